"""A function is pickled and sent once, until one of its globals is rebound."""

from __future__ import annotations

import asyncio
import functools
import tempfile
import textwrap
import threading
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
from cloudpickle import cloudpickle as internals

from async_batcher import WorkerPool, batched
from async_batcher._worker import function_cache
from async_batcher.exceptions import SerializationError, WorkerDiedError
from tests.support import scripts
from tests.support import worker_functions as work
from tests.support.worker_pools import METHODS, may_warn_of_fork


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


async def test_a_batcher_sends_a_global_again_that_is_rebound(module: Any) -> None:
    """Every worker has it with its next batch, and one that replaces another at once."""
    exec("def models(batch): return [model] * len(batch)", vars(module))  # noqa: S102
    counted = module.model = _Counted()
    async with WorkerPool(2) as pool, batched(module.models, executor=pool) as batcher:
        for expected in (5, 6, [7]):
            if expected != 5:
                module.model = expected
            for _ in range(2):
                calls = [batcher.process_many(range(2), timeout=None) for _ in range(4)]
                assert await asyncio.gather(*calls) == [[expected] * 2] * 4
                await pool.restart_workers()
        module.model = lock = threading.Lock()
        for _ in range(2):
            with pytest.raises(SerializationError, match="models: global variable 'model'"):
                await batcher(0)
        module.model = 8
        assert await batcher(0) == 8
    assert counted.pickled == 1
    assert not lock.locked()


@pytest.mark.parametrize("kind", ["function", "method"])
async def test_a_global_that_is_rebound_runs_no_set_up_again(module: Any, kind: str) -> None:
    """What a set-up has bound stays, and its tear-down runs once, with what is bound then."""
    code = """
        class Loader:
            def setup_worker(self):
                noted.append("set-up")
                self.weights = noted
                yield
                (folder / "torn_down").write_text(f"{model} {noted}")

            def process(self, batch):
                return [(model, self.weights)] * len(batch)

        loader = Loader()

        def process(batch):
            return loader.process(batch)
        """
    module.noted, module.folder, module.model = [], module.Point, 1
    exec(textwrap.dedent(code), vars(module))  # noqa: S102
    function = module.loader.process if kind == "method" else module.process
    with tempfile.TemporaryDirectory() as folder:
        module.folder = Path(folder)
        async with (
            WorkerPool(1) as pool,
            batched(function, executor=pool, setup_worker=module.loader.setup_worker) as batcher,
        ):
            assert await batcher(0) == (1, ["set-up"])
            for number in (2, 3):
                module.model = number
                assert await batcher(0) == (number, ["set-up"])
        assert (module.folder / "torn_down").read_text() == "3 ['set-up']"


async def test_an_object_keeps_its_state_when_a_global_is_rebound(module: Any) -> None:
    """As a model that it has loaded for its first batch; a plain function is replaced."""
    code = """
        class Lazy:
            loaded = 0

            def process(self, batch):
                self.loaded += 1
                return [(model, self.loaded)] * len(batch)
        """
    exec(textwrap.dedent(code), vars(module))  # noqa: S102
    factor = module.model = 1
    local: Any = lambda batch: [factor * n for n in batch]  # noqa: E731 - travels by value
    async with WorkerPool(1) as pool:
        async with batched(module.Lazy().process, executor=pool) as batcher:
            assert await batcher(0) == (1, 1)
            module.model = 2
            assert await batcher(0) == (2, 2)
        async with batched(local, executor=pool) as batcher:
            assert await batcher(3) == 3
            factor = 5
            assert await batcher(3) == 15


_UNREADABLE = """
def fail():
    raise OSError("not here")

class Unreadable:
    def __reduce__(self):
        return fail, ()

def models(batch):
    return [model] * len(batch)
"""


async def test_a_global_that_no_worker_can_read(module: Any) -> None:
    """The batch fails, and so does the next, until there is one that can be read."""
    exec(_UNREADABLE, vars(module))  # noqa: S102
    module.model = 1
    async with WorkerPool(1) as pool, batched(module.models, executor=pool) as batcher:
        assert await batcher(0) == 1
        module.model = module.Unreadable()
        for _ in range(3):
            with pytest.raises(SerializationError, match="not here"):
                await batcher(0)
        module.model = 2
        assert await batcher(0) == 2


async def test_a_global_that_is_rebound_beside_a_large_one(
    module: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """The log says once what that costs, and of which variable."""
    exec("def models(batch): return [(count, len(model))] * len(batch)", vars(module))  # noqa: S102
    module.model = b"x" * 1_000_000
    async with WorkerPool(1) as pool, batched(module.models, executor=pool) as batcher:
        for number in range(3):
            module.count = number
            assert await batcher(0) == (number, 1_000_000)
    (record,) = caplog.records
    assert record.getMessage() == (
        "models: the program has bound 'count' anew, so the function with all its globals (1 MB) "
        "is sent to each worker again. Pass what changes with the items"
    )


async def test_a_replacement_that_cannot_read_a_global(module: Any) -> None:
    """It does not try for ever: it takes batches, which say why they fail."""
    exec(_UNREADABLE, vars(module))  # noqa: S102
    module.model = 1
    async with WorkerPool(1) as pool, batched(module.models, executor=pool) as batcher:
        assert await batcher(0) == 1
        module.model = module.Unreadable()
        with pytest.raises(WorkerDiedError):
            await pool.run(work.exit_now, 1)
        for _ in range(2):
            with pytest.raises(SerializationError, match="not here"):
                await batcher(0)
        assert await pool.run(abs, -1) == 1


async def test_nothing_runs_with_an_old_global_behind_one_that_cannot_be_read(module: Any) -> None:
    """A batch waits at a busy worker only if that has loaded its function."""
    exec(_UNREADABLE, vars(module))  # noqa: S102
    module.model = 1
    async with (
        WorkerPool(1) as pool,
        batched(module.models, executor=pool, max_batch_size=1) as batcher,
    ):
        assert await batcher(0) == 1
        module.model = module.Unreadable()
        outcomes = await asyncio.gather(*map(batcher, range(6)), return_exceptions=True)
        assert {type(outcome) for outcome in outcomes} == {SerializationError}


async def test_a_tear_down_after_a_global_that_cannot_be_read(module: Any, tmp_path: Path) -> None:
    """It runs before the stop of the batcher returns."""
    code = """
        def set_up():
            yield
            (folder / "torn_down").touch()
        """
    exec(_UNREADABLE + textwrap.dedent(code), vars(module))  # noqa: S102
    module.model, module.folder = 1, tmp_path
    async with WorkerPool(1) as pool:
        async with batched(module.models, executor=pool, setup_worker=module.set_up) as batcher:
            assert await batcher(0) == 1
            module.model = module.Unreadable()
            with pytest.raises(SerializationError, match="not here"):
                await batcher(0)
        assert (tmp_path / "torn_down").exists()


async def test_set_ups_of_a_restart_use_the_global_of_now(module: Any) -> None:
    """As what a worker loads that replaces another one."""
    code = """
        loaded = []

        def set_up():
            loaded.append(model)

        def models(batch):
            return [loaded] * len(batch)
        """
    exec(textwrap.dedent(code), vars(module))  # noqa: S102
    module.model = 1
    async with (
        WorkerPool(1) as pool,
        batched(module.models, executor=pool, setup_worker=module.set_up) as batcher,
    ):
        assert await batcher(0) == [1]
        module.model = 2
        await pool.restart_workers()
        assert await batcher(0) == [2]


@may_warn_of_fork
@pytest.mark.parametrize("method", METHODS)
async def test_a_global_that_an_initializer_and_the_program_bind(module: Any, method: str) -> None:
    """The initializer's stays until the program rebinds it after the first batch; then as well in
    workers that have not seen the first one.
    """
    code = """
        def load(value):
            globals()["model"] = value

        def models(batch):
            return [model] * len(batch)
        """
    exec(textwrap.dedent(code), vars(module))  # noqa: S102
    for number in range(2):
        module.model = f"of round {number}"
        async with (
            WorkerPool(1, mp_context=method, initializer=module.load, initargs=("loaded",)) as pool,
            batched(module.models, executor=pool) as batcher,
        ):
            assert await batcher(0) == "loaded"
            module.model = "bound anew"
            assert await batcher(0) == "bound anew"
            with pytest.raises(WorkerDiedError):
                await pool.run(work.exit_now, 1)
            assert await batcher(0) == "bound anew"


async def test_definitions_of_a_class_leave_the_function_alone(module: Any) -> None:
    """A function keeps its state when a worker asks for the class of an item."""
    count = 0

    def counted(batch: list[Any]) -> list[int]:
        nonlocal count
        count += 1
        return [count] * len(batch)

    async with WorkerPool(1) as pool, batched(counted, executor=pool) as batcher:
        numbers = [await batcher(item) for item in (1, module.Point(1), 2, module.Point(2))]
    assert numbers == [1, 2, 3, 4]


def _loaded(batch: list[Any]) -> list[int]:
    return [len(function_cache._functions)] * len(batch)


async def test_a_standard_pool_keeps_one_version_of_a_function() -> None:
    """A worker drops the former one when a closure variable is bound anew."""
    factor = 0
    local: Any = lambda batch: [(factor, *_loaded([0]))] * len(batch)  # noqa: E731 - travels by value
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as executor:
        async with batched(local, executor=executor) as batcher:
            for number in range(4):
                factor = number
                assert await batcher(0) == (number, 1)


async def test_a_global_that_is_rebound_in_a_standard_pool(module: Any) -> None:
    """As in a `WorkerPool`, where the batch function travels by value: workers lack its module."""
    exec("def models(batch): return [model] * len(batch)", vars(module))  # noqa: S102
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as executor:
        async with batched(module.models, executor=executor) as batcher:
            for expected in (1, 2, 3):
                module.model = expected
                assert await batcher(0) == expected


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
