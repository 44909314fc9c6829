"""Functions and classes of the main module, however the program is run."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest

from tests.support import scripts

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there is no fork server")


_MAIN = """
    import sys
    from dataclasses import dataclass

    FACTOR = 3

    @dataclass
    class Item:
        number: int
        seen = 0

    class Refusal(Exception):
        pass

    def process_batch(batch):
        for item in batch:
            type(item).seen += 1
            if item.number < 0:
                raise Refusal(item.number)
        return [Item(item.number * FACTOR) for item in batch]

    async def main(executor):
        import asyncio
        from async_batcher import AsyncBatcher, batched

        class Batcher(AsyncBatcher):
            def process_batch(self, batch):
                return process_batch(batch)

        for batcher in (batched(process_batch, executor=executor), Batcher(executor=executor)):
            async with batcher:
                results = await asyncio.gather(*(batcher.process(Item(n)) for n in range(3)))
                assert results == [Item(0), Item(3), Item(6)], results
                assert {type(result) for result in results} == {Item}
                assert Item.seen == 0
                try:
                    await batcher.process(Item(-1))
                except Refusal as error:
                    assert error.args == (-1,)
        print("good")

    if __name__ == "__main__":
        import asyncio, multiprocessing
        from concurrent.futures import ProcessPoolExecutor
        method = METHOD
        if method == "process":
            asyncio.run(main("process"))
        else:
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context(method)) as executor:
                asyncio.run(main(executor))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "method"),
    [
        ("file", "process"),
        ("file", "spawn"),
        ("file", "forkserver"),
        ("file", "fork"),
        ("command", "process"),
        ("command", "spawn"),
        ("command", "forkserver"),
        ("stdin", "fork"),
    ],
)
def test_functions_and_classes_of_the_main_module(tmp_path: Path, how: str, method: str) -> None:
    """They work in workers however the program is run, with each start method."""
    if method == "fork" and sys.platform != "linux":
        pytest.skip("fork is not safe there")
    text = _MAIN.replace("METHOD", repr(method))
    done = scripts.run_any(tmp_path, text, how=how)
    assert (done.returncode, done.stdout) == (0, "good\n"), done.stderr


@pytest.mark.slow
def test_a_worker_does_not_import_asyncio(tmp_path: Path) -> None:
    """With a plain function in an importable module, a worker loads no asyncio and no front end."""
    text = """
        from tests.support import worker_functions

        async def main():
            import asyncio
            from async_batcher import batched

            async with batched(worker_functions.modules, executor="process", max_workers=1) as batcher:
                loaded = set(await batcher(1))
            assert "async_batcher._worker.run_batch" in loaded
            front_end = {"async_batcher.batcher", "async_batcher._runners.base"}
            print(sorted(loaded & {"asyncio", "uvloop", "numpy", *front_end}))

        if __name__ == "__main__":
            import asyncio
            asyncio.run(main())
    """
    assert scripts.run_script(tmp_path, text) == "[]\n"


@pytest.mark.slow
@pytest.mark.parametrize("how", ["file", "stdin", "command"])
def test_a_program_needs_no_guard(tmp_path: Path, how: str) -> None:
    """A program that starts workers while it is imported runs once: no worker runs it again."""
    text = """
        import asyncio
        from async_batcher import batched

        class Word:
            def __init__(self, text):
                self.text = text

        def process_batch(batch):
            return [Word(word.text.upper()) for word in batch]

        print("once")
        word = asyncio.run(batched(process_batch, executor="process", max_workers=2)(Word("a")))
        print(type(word) is Word, word.text)
    """
    assert scripts.run_script(tmp_path, text, how=how) == "once\nTrue A\n"


@pytest.mark.slow
def test_a_missing_guard_is_named(tmp_path: Path) -> None:
    """Where a standard pool needs the guard, an error names it, and nothing hangs."""
    text = """
        import asyncio
        from async_batcher._batching import lifecycle
        from async_batcher import batched

        lifecycle.SUPPORTS_WORKER_POOL = False

        def process_batch(batch):
            return batch

        asyncio.run(batched(process_batch, executor="process", max_workers=1)(1))
    """
    done = scripts.run_any(tmp_path, text)
    assert done.returncode == 1
    assert "WorkerDiedError" in done.stderr
    assert "if __name__ == '__main__':" in done.stderr.rpartition("WorkerDiedError")[2]
