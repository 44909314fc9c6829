"""A function is pickled and sent once, until one of its globals is rebound."""

from __future__ import annotations

import functools
import textwrap
from typing import TYPE_CHECKING, Any

import cloudpickle
import pytest
from cloudpickle import cloudpickle as internals

from async_batcher import WorkerPool, batched
from async_batcher.exceptions import SerializationError
from tests.support import scripts
from tests.support import worker_functions as work

if TYPE_CHECKING:
    from pathlib import Path


class _Counted:
    """Counts how often it is pickled."""

    def __init__(self) -> None:
        self.pickled = 0

    def __reduce__(self) -> Any:
        self.pickled += 1
        return (int, (5,))


async def test_a_function_is_pickled_once(module: Any) -> None:
    """Until a global that it, or a function that it calls, uses is bound to another object."""
    counted = module.model = _Counted()
    exec("def indirect(): return read()", vars(module))  # noqa: S102
    async with WorkerPool(2) as pool:
        for function in (module.read, module.indirect):
            before = counted.pickled
            assert [await pool.run(function) for _ in range(5)] == [5] * 5
            assert counted.pickled == before + 1
        module.model = 6
        assert await pool.run(module.indirect) == await pool.run(module.read) == 6


def test_a_function_of_an_executor_is_pickled_once(module: Any) -> None:
    """Not with each call, nor with each chunk of a map."""
    exec("def add(n): return n + int(0 if model is None else 1)", vars(module))  # noqa: S102
    counted = module.model = _Counted()
    with WorkerPool(1).as_executor() as executor:
        assert list(executor.map(module.add, range(20), chunksize=2)) == list(range(1, 21))
        assert [executor.submit(module.add, n).result() for n in range(3)] == [1, 2, 3]
    assert counted.pickled == 1


async def test_a_local_function_travels_with_its_call() -> None:
    """A worker sees when a closure variable is rebound."""
    factor = 2

    def scale(n: int) -> int:
        return n * factor

    async with WorkerPool(1) as pool:
        assert await pool.run(scale, 3) == 6
        factor = 5
        assert await pool.run(scale, 3) == 15


async def test_a_function_that_is_redefined(module: Any) -> None:
    """As in a notebook: the new one runs, also where another function calls it by its name."""
    exec("def inner(): return 1\ndef outer(): return inner()", vars(module))  # noqa: S102
    async with WorkerPool(1) as pool:
        assert await pool.run(module.outer) == 1
        exec("def inner(): return 2", vars(module))  # noqa: S102
        assert await pool.run(module.inner) == 2
        assert await pool.run(module.outer) == 2


async def test_a_batcher_sends_its_globals_at_start(module: Any) -> None:
    """A batch sees a name that was rebound from the next start on."""
    exec("def models(batch): return [model] * len(batch)", vars(module))  # noqa: S102
    module.model = 1
    async with WorkerPool(1) as pool:
        batcher = batched(module.models, executor=pool)
        async with batcher:
            assert await batcher(0) == 1
            module.model = 2
            assert await batcher(0) == 1
        async with batcher:
            assert await batcher(0) == 2


async def test_methods_and_partial_functions_are_pickled_once(module: Any) -> None:
    """Their function is; what they are bound to travels with each call."""
    code = """
        def add(n, m):
            return n + m + (model or 0)

        class Adder:
            def add(self, n):
                return add(1, n)
        """
    exec(textwrap.dedent(code), vars(module))  # noqa: S102
    counted = module.model = _Counted()
    calls = [
        functools.partial(module.add, 1),
        functools.partial(module.add, m=1),
        module.Adder().add,
    ]
    async with WorkerPool(1) as pool:
        for call in calls:
            before = counted.pickled
            assert [await pool.run(call, 1) for _ in range(3)] == [7] * 3
            assert counted.pickled <= before + 2, "with the function, and with its class"


async def test_a_class_follows_the_globals_of_its_methods(module: Any) -> None:
    """Also in workers that already have the class."""
    async with WorkerPool(2) as pool:
        for number in range(3):
            module.model = number
            assert {
                (await pool.run(module.Point.with_model, module.Point(0)))[1] for _ in range(4)
            } == {number}
            assert {
                (await pool.run(lambda point: point.with_model(), module.Point(0)))[1]
                for _ in range(4)
            } == {number}
            async with batched(work.same, executor=pool) as batcher:
                assert type(await batcher(module.Point(0))) is module.Point
    methods: Any = lambda batch: [point.with_model()[1] for point in batch]  # noqa: E731 - travels by value
    async with WorkerPool(1) as pool:
        for number in range(3):
            module.model = number
            async with batched(methods, executor=pool) as batcher:
                assert await batcher(module.Point(0)) == number


async def test_a_module_as_a_global_travels_as_far_as_it_is_used(module: Any) -> None:
    """The rest of its globals need not be picklable."""
    exec("import threading\nlock = threading.Lock()", vars(module))  # noqa: S102
    names: dict[str, Any] = {"__name__": "tests_user", "plugin": module}
    exec("def use(): return plugin.countdown(2), plugin.read(), plugin.__name__", names)  # noqa: S102
    module.model = 5
    async with WorkerPool(1) as pool:
        assert await pool.run(names["use"]) == ([2, 1], 5, module.__name__)


async def test_namespaces_of_modules_are_kept(module: Any) -> None:
    """A worker drops old namespaces without a module, and none of a module."""
    async with WorkerPool(1) as pool:
        await pool.run(module.bind, "bound")
        for number in range(260):
            rule: dict[str, Any] = {"__name__": f"rule_{number}"}
            exec("def rule(): return 1", rule)  # noqa: S102
            assert await pool.run(rule["rule"]) == 1
        assert await pool.run(module.read) == "bound"


# Tracebacks, and what cannot be pickled.


@pytest.mark.slow
def test_a_traceback_has_file_and_line(tmp_path: Path) -> None:
    """Also for a function of a script; `inspect.getsource` finds its source in the worker."""
    text = """
        import asyncio, inspect
        from async_batcher import WorkerPool

        def fail():
            raise KeyError("here")

        async def main():
            async with WorkerPool(1) as pool:
                try:
                    await pool.run(fail)
                except KeyError as error:
                    trace = str(error.__cause__)
                    print('program.py", line 6, in fail' in trace, 'raise KeyError("here")' in trace)
                print(await pool.run(lambda: inspect.getsource(fail)))

        asyncio.run(main())
        """
    assert (
        scripts.run_script(tmp_path, text)
        == 'True True\ndef fail():\n    raise KeyError("here")\n\n'
    )


async def test_source_that_is_in_no_file_travels_along() -> None:
    """Such as that of a notebook's cell."""
    import linecache

    source = "def fail():\n    raise KeyError('in the cell')\n"
    names: dict[str, Any] = {"__name__": "tests_cell"}
    exec(compile(source, "<cell 1>", "exec"), names)  # noqa: S102
    linecache.cache["<cell 1>"] = (len(source), None, source.splitlines(keepends=True), "<cell 1>")
    try:
        async with WorkerPool(1) as pool:
            with pytest.raises(KeyError) as caught:
                await pool.run(names["fail"])
    finally:
        del linecache.cache["<cell 1>"]
    assert "raise KeyError('in the cell')" in str(caught.value.__cause__)


@pytest.mark.parametrize(
    "body", ["return lock", "return [lock for _ in range(3)]", "return (lambda: lock)()"]
)
async def test_a_global_that_cannot_be_pickled_is_named(module: Any, body: str) -> None:
    """Also one that only a nested function uses."""
    exec(f"import threading\nlock = threading.Lock()\ndef use(batch=None): {body}", vars(module))  # noqa: S102
    async with WorkerPool(1) as pool:
        with pytest.raises(SerializationError, match=r"^use: global variable 'lock'"):
            await pool.run(module.use)
        with pytest.raises(SerializationError, match=r"^use: global variable 'lock'"):
            await batched(module.use, executor=pool).start()


async def test_a_global_whose_attribute_is_named_as_the_function(module: Any) -> None:
    """It is named, and not the set-up, which can be pickled."""
    code = (
        "import threading, types\nholder = types.SimpleNamespace(use=threading.Lock())\n"
        "def set_up(): pass\ndef use(batch): return [holder.use for _ in batch]"
    )
    exec(code, vars(module))  # noqa: S102
    batcher = batched(module.use, executor="process", setup_worker=module.set_up)
    with pytest.raises(SerializationError, match="global variable 'holder'"):
        await batcher.start()
    await batcher.stop()


def test_cloudpickle_has_the_private_parts_in_use() -> None:
    """On the oldest and the newest supported version (tox: minimal)."""

    class Local:
        pass

    def local() -> Any:
        return [functools.reduce(lambda a, b: a + b, [1])]

    assert len(internals._dynamic_class_reduce(Local)) == 6
    assert internals._get_or_create_tracker_id(Local) == internals._get_or_create_tracker_id(Local)
    assert list(internals._extract_code_globals(local.__code__)) == ["functools"]
    assert internals._find_imported_submodules(local.__code__, [functools]) == []
    assert issubclass(cloudpickle.Pickler, internals.Pickler)
