"""Pools inside of workers: refused to a module that a worker imports, allowed everywhere else."""

from __future__ import annotations

import asyncio
import importlib
import os
import sys
import textwrap
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from async_batcher import WorkerPool, batched
from async_batcher.exceptions import PoolBrokenError
from tests.support import scripts
from tests.support import worker_functions as work
from tests.support.worker_pools import METHODS, may_warn_of_fork

if TYPE_CHECKING:
    import types
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="no event loop there watches sockets"),
    may_warn_of_fork,
]

# Where it is imported in another process than the test's, it starts workers that import it.
_UNGUARDED = """
    import asyncio, multiprocessing, os, threading
    from concurrent.futures import ProcessPoolExecutor
    from functools import partial
    from pathlib import Path
    from async_batcher import WorkerPool, batched
    from tests.support import worker_functions as work

    FOLDER = Path(__file__).parent
    work.note(FOLDER, "imported", str(os.getpid()))
    if len(work.noted(FOLDER, "imported")) > 8:
        os._exit(9)

    class Item:
        pass

    class Setup:
        def __call__(self):
            pass

    def double(batch):
        return [2 * number for number in batch]

    def do_nothing():
        pass

    standard_pool = partial(ProcessPoolExecutor, 1, multiprocessing.get_context("spawn"))

    def executor():
        with WorkerPool(1).as_executor() as executor:
            executor.submit(double, [1])

    async def pool():
        async with WorkerPool(1) as pool:
            await pool.run(double, [1])

    async def batcher():
        async with batched(double, executor="process", max_workers=1) as batcher:
            await batcher(1)

    async def given():
        with standard_pool() as executor:
            async with batched(double, executor=executor) as batcher:
                await batcher(1)

    async def factory():
        async with batched(double, executor=standard_pool) as batcher:
            await batcher(1)

    def thread():
        errors = []
        def run():
            try:
                asyncio.run(pool())
            except BaseException as error:
                errors.append(error)
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        raise errors[0]

    if os.getpid() != PID:
        START
"""

_STARTS = {
    "pool": "asyncio.run(pool())",
    "batcher": "asyncio.run(batcher())",
    "given standard pool": "asyncio.run(given())",
    "factory": "asyncio.run(factory())",
    "executor": "executor()",
    "thread": "thread()",
}


@pytest.fixture(name="unguarded")
def _unguarded(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[types.ModuleType]:
    """Return a module that starts workers when a worker imports it."""
    start = _STARTS[getattr(request, "param", "pool")]
    text = textwrap.dedent(_UNGUARDED).replace("PID", str(os.getpid())).replace("START", start)
    (tmp_path / "unguarded.py").write_text(text)
    (tmp_path / "importer.py").write_text("from unguarded import double as twice\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("unguarded")
    for name in ("unguarded", "importer"):
        sys.modules.pop(name, None)


def _refusal(error: BaseException | None) -> str:
    """Return the text of the RuntimeError in a chain of causes; empty if there is none."""
    while error is not None and type(error) is not RuntimeError:
        error = error.__cause__
    return str(error or "")


async def _run(executor: Any, function: Any, item: Any, **options: Any) -> None:
    async with batched(function, executor=executor, **options) as batcher:
        await batcher(item)


def _imports(folder: Path) -> int:
    return len(work.noted(folder, "imported"))


@pytest.mark.slow
@pytest.mark.parametrize("unguarded", _STARTS, indirect=True)
async def test_a_module_that_starts_workers(unguarded: Any, tmp_path: Path) -> None:
    """The first worker that imports it is refused to start others; the caller learns why."""
    async with WorkerPool(1) as pool:
        with pytest.raises(Exception, match="unguarded") as caught:
            await pool.run(unguarded.double, [1], timeout=work.DEADLINE)
        assert await pool.run(abs, -1) == 1
    assert "module 'unguarded' starts workers while it is imported" in _refusal(caught.value)
    assert _imports(tmp_path) == 2  # by this process and one worker


@pytest.mark.slow
async def test_workers_of_a_standard_pool(unguarded: Any, tmp_path: Path) -> None:
    """They are refused to start others, too."""
    with pytest.raises(Exception, match="unguarded") as caught:
        await _run(unguarded.standard_pool, unguarded.double, 1)
    assert "while it is imported" in _refusal(caught.value)
    assert _imports(tmp_path) == 2


@pytest.mark.slow
@pytest.mark.parametrize("what", ["function", "item", "set-up", "initializer", "preload", "global"])
async def test_all_ways_in_which_a_worker_imports_it(
    unguarded: Any, what: str, tmp_path: Path
) -> None:
    """A function, an item, a set-up, a module that a function by value refers to, the pool."""
    pool, item = WorkerPool(1), None
    function: Any = list
    options: dict[str, Any] = {}
    if what == "function":
        function = unguarded.double
    elif what == "item":
        item = unguarded.Item()
    elif what == "set-up":
        options = {"setup_worker": unguarded.Setup()}
    elif what == "initializer":
        pool = WorkerPool(1, initializer=unguarded.do_nothing)
    elif what == "preload":
        pool = WorkerPool(1, preload=["unguarded"])
    elif what == "global":
        function = lambda batch: unguarded.double(batch)  # noqa: E731, PLW0108 - by value
    with pytest.raises(Exception, match="unguarded") as caught:
        async with pool:
            await _run(pool, function, item, **options)
    assert "module 'unguarded' starts workers" in _refusal(caught.value)
    assert isinstance(caught.value, PoolBrokenError) == (what in ("initializer", "preload"))
    assert _imports(tmp_path) == (3 if what == "item" else 2)  # an item is tried again by itself


@pytest.mark.slow
async def test_a_module_that_imports_it(unguarded: Any) -> None:
    """The error names both: the one that starts workers, and the one that a worker needs."""
    twice = importlib.import_module("importer").twice
    assert twice is unguarded.double
    async with WorkerPool(1) as pool:
        with pytest.raises(Exception, match="unguarded") as caught:
            await pool.run(partial(getattr, importlib.import_module("importer"), "twice"))
    text = "module 'unguarded' (imported by 'importer') starts workers while it is imported"
    assert text in _refusal(caught.value)


def _same(batch: list[int]) -> list[int]:
    return batch


def _use_pool() -> int:
    async def use() -> int:
        same = batched(_same, executor="process", max_workers=1)
        async with WorkerPool(1) as pool, same:
            total: int = await pool.run(abs, -1) + await same(1)
            return total

    return asyncio.run(use())


def _use_executor() -> int:
    with WorkerPool(1).as_executor() as executor:
        result: int = executor.submit(abs, -1).result()
        return result


def _import_one() -> int:
    return int(importlib.import_module("starts_workers").result)


_used: list[int] = []


def _initialize(use: Any) -> None:
    _used.append(use())


def _total(batch: list[Any]) -> list[int]:
    return [sum(_used)] * len(batch)


class _Item:
    def __init__(self, use: Any) -> None:
        self.use = use

    def __setstate__(self, state: dict[str, Any]) -> None:
        _used.append(state["use"]())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "use"),
    [
        ("function", _use_pool),
        ("function", _use_executor),
        ("function", _import_one),
        ("set-up", _use_pool),
        ("initializer", _import_one),
    ],
)
async def test_user_code_in_a_worker_may_use_a_pool(
    where: str, use: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So may a module that it imports, since workers of that pool do not do the same."""
    (tmp_path / "starts_workers.py").write_text(
        "from tests.pool import test_nested_pools as tests\nresult = tests._use_pool()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    expected = 1 if use is _use_executor else 2
    if where == "function":
        async with WorkerPool(1) as pool:
            assert await pool.run(use) == expected
        return
    initializer = _initialize if where == "initializer" else None
    setup = partial(_initialize, use) if where == "set-up" else None
    pool = WorkerPool(1, initializer=initializer, initargs=(use,))
    async with pool, batched(_total, executor=pool, setup_worker=setup) as batcher:
        assert await batcher(None) == expected


@pytest.mark.slow
async def test_an_item_may_use_a_pool_when_it_is_unpickled() -> None:
    """Nothing is imported then."""
    async with WorkerPool(1) as pool:
        assert await pool.run(_total, [_Item(_use_pool)]) == [2]


@pytest.mark.slow
@pytest.mark.parametrize("method", [METHODS[0], METHODS[-1]])
def test_a_script_that_is_imported(tmp_path: Path, method: str) -> None:
    """The traceback of the program ends with what to do."""
    (tmp_path / "app.py").write_text(
        textwrap.dedent("""
        import asyncio
        from async_batcher import WorkerPool, batched

        def double(batch):
            return [2 * number for number in batch]

        async def main():
            async with WorkerPool(1, mp_context=METHOD) as pool:
                async with batched(double, executor=pool) as batcher:
                    print(await batcher(21))

        asyncio.run(main())
        """).replace("METHOD", repr(method))
    )
    done = scripts.run_any(tmp_path, "import warnings; warnings.simplefilter('ignore'); import app")
    if method == "fork":  # a fork of the program has the module
        assert (done.returncode, done.stdout, done.stderr) == (0, "42\n", "")
    else:
        assert done.returncode == 1
        assert "RuntimeError: module 'app' starts workers while it is imported" in done.stderr
        assert """under 'if __name__ == "__main__":'""" in done.stderr
