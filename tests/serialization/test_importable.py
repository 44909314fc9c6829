"""Which modules workers can import; what is in the others travels by value."""

from __future__ import annotations

import functools
import sys
import textwrap
import types
from typing import TYPE_CHECKING, Any

import pytest

from async_batcher import WorkerPool, batched
from async_batcher._serialization.object_path import is_importable, modules_used_by
from tests.support import scripts
from tests.support import worker_functions as work
from tests.support.modules import unimportable_module

if TYPE_CHECKING:
    from pathlib import Path

METHODS = [
    "forkserver",
    "spawn",
    pytest.param(
        "fork", marks=pytest.mark.skipif(sys.platform != "linux", reason="not safe there")
    ),
]


def test_every_module_that_can_be_imported_is_known_as_such() -> None:
    """All modules that the tests have imported, apart from those without a file."""
    doubtful = {
        name
        for name, loaded in list(sys.modules.items())
        if getattr(loaded, "__spec__", None) is None
    }
    doubtful |= {"__main__", "__mp_main__"}
    assert [
        name for name in list(sys.modules) if name not in doubtful and not is_importable(name)
    ] == []


def test_what_cannot_be_imported(module: Any, tmp_path: Path) -> None:
    """The main module, one from a file outside of the path, and one created in code."""
    by_hand = types.ModuleType("tests_by_hand")
    sys.modules["tests_by_hand"] = by_hand
    try:
        assert not is_importable("tests_by_hand")
    finally:
        del sys.modules["tests_by_hand"]
    assert not is_importable("__main__")
    assert not is_importable(module.__name__)
    with unimportable_module(tmp_path, "colorsys_x.colorsys", ""):
        assert not is_importable("colorsys_x.colorsys")
    known = sys.modules.pop("colorsys", None)
    with unimportable_module(tmp_path, "colorsys", ""):
        assert not is_importable("colorsys"), (
            "another process would import the one of the standard library"
        )
    if known is not None:
        sys.modules["colorsys"] = known


def test_modules_that_a_function_uses() -> None:
    """Those of what it names, directly and not; modules may refer to each other."""
    names: dict[str, Any] = {"__name__": "tests_user"}
    text = """
        import json, tests.support.round_trip, tests.support.scripts as scripts
        from async_batcher import stats
        from async_batcher.limits import Limit as Most
        class Loader:
            def load(self): return [Most for _ in ()]
        def outer(): return tests.support.round_trip, tests.tests, scripts.os, inner(), json.loads
        def inner(): return stats.Quantiles, lambda: Loader()
        """
    exec(textwrap.dedent(text), names)  # noqa: S102
    names["tests"].tests = names["tests"]
    try:
        used = set(modules_used_by(functools.partial(names["outer"], 1)))
    finally:
        del names["tests"].tests
    support = {"tests", "tests.support.round_trip", "tests.support.scripts"}
    assert used >= {"tests_user", "async_batcher.stats", "async_batcher.limits", *support}
    assert not used & {"os", "json"}


def test_a_lazy_object_is_not_loaded_to_see_what_a_function_uses() -> None:
    """Such as the settings of Django, which a set-up has to configure first."""

    class Lazy:
        @property  # type: ignore[misc]
        def __class__(self) -> Any:
            raise AssertionError

    names: dict[str, Any] = {"__name__": "tests_user", "lazy": Lazy()}
    exec("def use(): return lazy", names)  # noqa: S102
    assert list(modules_used_by(names["use"])) == ["tests_user"]


@pytest.mark.parametrize("method", METHODS)
async def test_functions_and_items_of_a_module_that_no_worker_can_import(
    module: Any, method: str
) -> None:
    """In a batcher, in `WorkerPool.run`, and as items."""
    async with WorkerPool(
        1, mp_context=method, initializer=module.bind, initargs=("bound",)
    ) as pool:
        assert await pool.run(module.read) == "bound"
        same = await pool.run(work.same, [module.Point(3)])
        assert type(same[0]) is module.Point
        async with batched(work.same, executor=pool, max_batch_size=2) as batcher:
            points = await batcher.process_many([module.Point(1), 2, module.Point(4), 5])
        assert [type(point) for point in points] == [module.Point, int, module.Point, int]
        with_model: Any = lambda batch: [point.with_model() for point in batch]  # noqa: E731 - travels by value
        async with batched(with_model, executor=pool) as batcher:
            assert await batcher(module.Point(1)) == (1, "bound")
        assert await pool.run(lambda: [module.read()]) == ["bound"]


@pytest.mark.slow
def test_a_function_whose_module_a_worker_cannot_import_is_named(tmp_path: Path) -> None:
    """Only the program's own import hook finds its module; the error names the function."""
    text = """
        import asyncio, importlib.util, sys
        from async_batcher import batched

        class Finder:
            @staticmethod
            def find_spec(name, path=None, target=None):
                if name == "hooked":
                    return importlib.util.spec_from_loader(name, Finder)
            @staticmethod
            def create_module(spec):
                return None
            @staticmethod
            def exec_module(module):
                exec("def double(batch): return [2 * n for n in batch]", module.__dict__)

        sys.meta_path.append(Finder)
        import hooked

        async def main():
            async with batched(hooked.double, executor="process", max_workers=1) as double:
                await double(1)

        asyncio.run(main())
        """
    done = scripts.run_any(tmp_path, text)
    assert done.returncode == 1
    assert "SerializationError: the function 'double'" in done.stderr
    assert "No module named 'hooked'" in done.stderr


@pytest.mark.slow
def test_runpy_and_multiprocessing(tmp_path: Path) -> None:
    """A program that `runpy` runs, and one in a process of multiprocessing."""
    (tmp_path / "inner.py").write_text(
        textwrap.dedent("""
            import asyncio
            from async_batcher import WorkerPool, batched

            class Item:
                def __init__(self, n): self.n = n

            model = None
            def load(): globals()["model"] = 10
            def scale(batch): return [Item(item.n * model) for item in batch]

            async def main():
                async with WorkerPool(1, initializer=load) as pool, batched(scale, executor=pool) as scaled:
                    item = await scaled(Item(2))
                    print(type(item) is Item, item.n, (await pool.run(scale, [Item(3)]))[0].n)

            def run(): asyncio.run(main())
            """)
        + 'if __name__ == "by runpy": run()\n'
    )
    text = """
        import multiprocessing, runpy
        exec(open("inner.py").read())

        if __name__ == "__main__":
            run()
            runpy.run_path("inner.py", run_name="by runpy")
            for method in ("spawn", "forkserver", "fork"):
                process = multiprocessing.get_context(method).Process(target=run)
                process.start()
                process.join()
        """
    assert scripts.run_script(tmp_path, text) == "True 20 30\n" * 5
