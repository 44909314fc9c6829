"""What travels by value: functions and classes of the main module, and of modules that no worker can import."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import sys
import textwrap
import types
from typing import TYPE_CHECKING, Any

import cloudpickle
import pytest
from cloudpickle import cloudpickle as internals
from hypothesis import given
from hypothesis import strategies as st

from async_batcher import WorkerPool, batched
from async_batcher._serialization.by_value import Registry
from async_batcher._serialization.codec import Codec
from async_batcher._serialization.object_path import is_importable
from async_batcher.exceptions import SerializationError
from tests.support import scripts
from tests.support import worker_functions as work

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

METHODS = [
    "forkserver",
    "spawn",
    pytest.param("fork", marks=pytest.mark.skipif(sys.platform != "linux", reason="not safe there")),
]


class Process:
    """One process of several that this one plays: a codec over a registry of its own."""

    def __init__(self, *, worker: bool) -> None:
        self.codec = Codec(worker=worker, registry=Registry())

    def send(self, value: Any, receiver: Process) -> Any:
        """Pickle here, unpickle there, with the definitions that are asked for."""
        blob = self.codec.dumps_checked(value, define=True)[0]
        return receiver.codec.loads(blob)


@pytest.fixture
def here() -> Process:
    """The program."""
    return Process(worker=False)


@pytest.fixture
def there() -> Process:
    """A worker."""
    return Process(worker=True)


@pytest.fixture
def module(tmp_path: Path) -> Iterator[types.ModuleType]:
    """A module that no other process can import, with the text of a small program."""
    text = """
        model = None
        count = 0

        def bind(value):
            global model
            model = value

        def read():
            return model

        def bump():
            global count
            count += 1
            return count

        def countdown(n):
            return [n, *countdown(n - 1)] if n else []

        class Point:
            def __init__(self, x):
                self.x = x

            def with_model(self):
                return (self.x, model)
        """
    yield from _loaded(tmp_path, "tests_only_here", text)


def _loaded(folder: Path, name: str, text: str) -> Iterator[types.ModuleType]:
    file = folder / "source.py"
    file.write_text(textwrap.dedent(text))
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[name] = loaded
    spec.loader.exec_module(loaded)
    yield loaded
    del sys.modules[name]


# Namespaces.


def test_functions_of_a_module_share_its_globals(here: Process, there: Process, module: Any) -> None:
    """What one function binds in a worker, the others read, however they were sent; the program's own stay as they are."""
    bind, read, point = (here.send(value, there) for value in (module.bind, module.read, module.Point(1)))
    bind("bound in the worker")
    assert read() == "bound in the worker"
    assert point.with_model() == (1, "bound in the worker")
    assert here.send(module.read, there)() == "bound in the worker"
    assert module.model is None


def test_a_global_is_taken_when_the_name_is_bound_anew(here: Process, there: Process, module: Any) -> None:
    """A worker keeps what it has bound until the program binds the name to another object."""
    bump = here.send(module.bump, there)
    assert [bump(), bump()] == [1, 2]
    assert here.send(module.bump, there)() == 3
    module.count = 100
    assert here.send(module.bump, there)() == 101
    assert bump() == 102


def test_a_change_in_place_is_not_noticed(here: Process, there: Process, module: Any) -> None:
    """A list that is changed after it was sent stays as it was, until the name is bound to another one."""
    module.model = ["first"]
    read = here.send(module.read, there)
    module.model.append("second")
    assert here.send(module.read, there)() == ["first"]
    module.model = [*module.model]
    assert here.send(module.read, there)() == read() == ["first", "second"]


def test_a_global_that_is_bound_to_none(here: Process, there: Process, module: Any) -> None:
    """Also where the object that was sent is gone by then."""
    module.model = {1, 2}
    read = here.send(module.read, there)
    module.model = None
    assert here.send(module.read, there)() is None
    assert read() is None


def test_a_function_that_comes_home_has_the_globals_of_its_module(here: Process, there: Process, module: Any) -> None:
    """It reads what is there now, and changes nothing."""
    sent = here.send(module.read, there)
    module.model = "here"
    home = there.send(sent, here)
    assert home.__globals__ is vars(module)
    assert home() == module.model == "here"


def test_two_keys_that_share_a_dict(there: Process, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of them may be forgotten; the other still finds its namespace."""
    monkeypatch.setattr("async_batcher._serialization.by_value._MAX_NAMESPACES", 2)
    registry = there.codec.registry
    attributes = {"__name__": "colorsys"}
    importlib.import_module("colorsys")
    first, second = registry.namespace(("one", False, attributes)), registry.namespace(("two", False, attributes))
    assert first.globals is second.globals
    for number in range(3):
        registry.namespace((f"other {number}", False, {"__name__": f"other_{number}"}))
    assert registry.namespace(("one", False, attributes)).globals is first.globals


def test_a_finder_that_pickles(here: Process, module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An import finder of the program's own may pickle while a module is looked for."""
    asked = []
    assert is_importable(__name__), "it is known from here on, so that the finder is not asked for it while it pickles"

    class Finder:
        @staticmethod
        def find_spec(name: str, path: Any = None, target: Any = None) -> None:  # noqa: ARG004 - the protocol's
            asked.append(name)
            here.codec.dumps_checked(lambda: asked, define=True)

    monkeypatch.setattr(sys, "meta_path", [Finder, *sys.meta_path])
    here.codec.registry.namespace_of(vars(module))  # the first that looks for the module, under the registry's lock
    assert module.__name__ in asked


def test_recursion_and_closures(here: Process, there: Process, module: Any) -> None:
    """A function that calls itself, and one that keeps state in a closure."""
    assert here.send(module.countdown, there)(3) == [3, 2, 1]

    def counter() -> Any:
        count = 0

        def step() -> int:
            nonlocal count
            count += 1
            return count

        return step

    step = here.send(counter(), there)
    assert [step(), step()] == [1, 2]


@given(st.lists(st.tuples(st.sampled_from(["bind", "send", "deliver", "bind there"]), st.integers(0, 2)), max_size=30))
def test_every_worker_has_the_newest_value_that_reached_it(steps: list[tuple[str, int]]) -> None:
    """In any order in which pickles arrive: the newest one wins, and a worker's own binding until a newer one comes."""
    names: dict[str, Any] = {"__name__": "tests_versions", "value": object()}
    exec("def read(): return value\ndef write(new):\n    global value\n    value = new", names)  # noqa: S102
    here = Process(worker=False)
    workers = [Process(worker=True) for _ in range(3)]
    pickles: list[tuple[int, int, Any]] = []
    bound = last = 0
    names["value"] = 0
    read: dict[int, Any] = {}
    expected: dict[int, Any] = {}
    seen: dict[int, int] = {}
    versions = 0
    for step, number in steps:
        if step == "bind":
            bound += 1000
            names["value"] = bound
        elif step == "send":
            if bound != last:
                versions, last = versions + 1, bound
            pickles.append((versions, bound, here.codec.dumps_checked([names["read"], names["write"]], define=True)[0]))
        elif step == "deliver" and pickles:
            version, value, blob = pickles[number % len(pickles)]
            read[number] = workers[number].codec.loads(blob)
            if version > seen.get(number, -1):
                seen[number], expected[number] = version, value
        elif step == "bind there" and number in read:
            expected[number] = -number
            read[number][1](-number)
        for worker, (reads, _) in read.items():
            assert reads() == expected[worker]


@pytest.mark.slow
def test_what_an_imported_module_has_bound_is_seen_by_its_lambdas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An initializer of an importable module binds a global there; a lambda of the module, which travels by value, reads it."""
    text = """
        model = limit = None

        def load(value):
            global model
            model = value

        look = lambda: (model, limit)
        """
    (tmp_path / "tests_importable.py").write_text(textwrap.dedent(text))
    monkeypatch.syspath_prepend(tmp_path)
    program = """
        import asyncio, tests_importable
        from async_batcher import WorkerPool

        async def main():
            tests_importable.limit = 5
            for method in ("forkserver", "spawn", "fork"):
                async with WorkerPool(1, mp_context=method, initializer=tests_importable.load, initargs=("loaded",)) as pool:
                    print(await pool.run(tests_importable.look))

        asyncio.run(main())
        """
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    assert scripts.run_script(tmp_path, program) == "('loaded', 5)\n" * 3


@pytest.mark.slow
def test_globals_that_an_initializer_binds_in_any_way(tmp_path: Path) -> None:
    """Also past the names in its code, and after the program has bound the name anew; for each worker of each pool.

    Functions of the main module that a decorator of a library has wrapped do not lead to the library's globals.
    """
    library = """
        import functools
        model = "library"
        def wraps(function):
            @functools.wraps(function)
            def inner(*args): return function(*args)
            return inner
        """
    (tmp_path / "tests_library.py").write_text(textwrap.dedent(library))
    text = """
        import asyncio, multiprocessing
        from concurrent.futures import ProcessPoolExecutor
        from async_batcher import WorkerPool, batched
        from tests_library import wraps

        @wraps
        def first(): ...

        model = None

        def load(value):
            globals()["model"] = value

        def read(batch):
            return [model] * len(batch)

        async def main():
            global model
            for method in ("forkserver", "spawn", "fork"):
                model = f"bound anew, {method}"
                async with WorkerPool(1, mp_context=method, initializer=load, initargs=("loaded",)) as pool:
                    print(await pool.run(read, [1]), await pool.run(lambda: model))
                context = multiprocessing.get_context(method)
                with ProcessPoolExecutor(1, mp_context=context, initializer=load, initargs=("loaded",)) as executor:
                    async with batched(lambda batch: read(batch), executor=executor) as batcher:
                        print(await batcher(1))

        if __name__ == "__main__":
            asyncio.run(main())
        """
    assert scripts.run_script(tmp_path, text) == "['loaded'] loaded\nloaded\n" * 3


# What can be imported.


def test_every_module_that_can_be_imported_is_known_as_such() -> None:
    """All that the tests have imported, but for what says of itself that it is no file's."""
    doubtful = {name for name, loaded in list(sys.modules.items()) if getattr(loaded, "__spec__", None) is None}
    doubtful |= {"__main__", "__mp_main__"}
    assert [name for name in list(sys.modules) if name not in doubtful and not is_importable(name)] == []


def test_what_cannot_be_imported(module: Any, tmp_path: Path) -> None:
    """The main module, a module that was loaded from a file that is not on the path, and one that was made by hand."""
    by_hand = types.ModuleType("tests_by_hand")
    sys.modules["tests_by_hand"] = by_hand
    try:
        assert not is_importable("tests_by_hand")
    finally:
        del sys.modules["tests_by_hand"]
    assert not is_importable("__main__")
    assert not is_importable(module.__name__)
    for _ in _loaded(tmp_path, "colorsys_x.colorsys", ""):
        assert not is_importable("colorsys_x.colorsys")
    known = sys.modules.pop("colorsys", None)
    for _ in _loaded(tmp_path, "colorsys", ""):
        assert not is_importable("colorsys"), "another process would import the one of the standard library"
    if known is not None:
        sys.modules["colorsys"] = known


@pytest.mark.parametrize("method", METHODS)
async def test_functions_and_items_of_a_module_that_no_worker_can_import(module: Any, method: str) -> None:
    """In a batcher, in `WorkerPool.run`, and as items, the first of which the worker cannot read as they are."""
    async with WorkerPool(1, mp_context=method, initializer=module.bind, initargs=("bound",)) as pool:
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
    """An import hook of the program's own finds its module; a worker lacks the hook, and the error names the function."""
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
    """A program that `runpy` runs, and one in a process of multiprocessing, whose main module has another name there."""
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


# Objects that pickle as their names, and names in general.


@pytest.mark.slow
def test_objects_that_pickle_as_their_names(tmp_path: Path) -> None:
    """Cached functions and methods, sentinels, NewType and ParamSpec of the main module; a sentinel comes home as itself."""
    text = """
        import asyncio, builtins, functools, sys, typing
        from async_batcher import WorkerPool

        if sys.version_info >= (3, 12):
            exec("type Alias = int | str")
        if hasattr(builtins, "sentinel"):
            NOTHING = sentinel("NOTHING")
        else:
            NOTHING = None
        def newer():
            return NOTHING, sys.version_info < (3, 12) or Alias.__value__ == int | str

        @functools.lru_cache(maxsize=7)
        def fib(n):
            return n if n < 2 else fib(n - 1) + fib(n - 2)

        class Sentinel:
            def __reduce__(self):
                return "MISSING"

        MISSING = Sentinel()
        UserId = typing.NewType("UserId", int)
        P = typing.ParamSpec("P")

        class Cached:
            MISSING = MISSING
            @functools.cache
            def square(self):
                return 4

        def look(item):
            return item is MISSING, Cached.MISSING is MISSING, UserId(3), UserId.__supertype__ is int, P.__name__

        def fib_of(n):
            return fib(n), fib.cache_parameters()["maxsize"], fib.cache_info().currsize

        async def main():
            for method in ("forkserver", "spawn", "fork"):
                async with WorkerPool(1, mp_context=method) as pool:
                    print(await pool.run(fib_of, 20), await pool.run(fib, 20), await pool.run(fib_of, 20))
                    print(await pool.run(look, MISSING), (await pool.run(lambda: MISSING)) is MISSING)
                    nothing, is_alias = await pool.run(newer)
                    print(await pool.run(Cached().square), nothing is NOTHING, is_alias)

        asyncio.run(main())
        """
    expected = "(6765, 7, 7) 6765 (6765, 7, 7)\n(True, True, 3, True, 'P') True\n4 True True\n"
    assert scripts.run_script(tmp_path, text) == expected * 3


@pytest.mark.slow
def test_nested_classes_keep_their_names(tmp_path: Path) -> None:
    """Their qualified names, documentation and source are those of the program."""
    text = """
        import asyncio, dataclasses, enum, inspect, typing
        from async_batcher import WorkerPool

        class Outer:
            @dataclasses.dataclass
            class Inner:
                "Its doc."
                x: int
            class Kind(enum.Enum):
                A = 1
            class Pair(typing.NamedTuple):
                a: int

        def look(value):
            cls = type(value)
            return repr(value), cls.__qualname__, cls.__module__, cls.__doc__, inspect.getsource(cls)

        async def main():
            async with WorkerPool(1) as pool:
                for value in (Outer.Inner(1), Outer.Kind.A, Outer.Pair(2)):
                    print(look(value) == await pool.run(look, value))

        asyncio.run(main())
        """
    assert scripts.run_script(tmp_path, text) == "True\n" * 3


async def test_a_class_whose_definition_fails() -> None:
    """The error of an item says why its class cannot be made in a worker."""
    program = os.getpid()

    class Meta(type):
        def __new__(cls, name: str, bases: tuple[type, ...], namespace: dict[str, Any]) -> Any:
            if os.getpid() != program:
                msg = "this class is made in the program only"
                raise ValueError(msg)
            return super().__new__(cls, name, bases, namespace)

    class Item(metaclass=Meta):
        pass

    async with batched(work.same, executor="process", max_workers=1, max_batch_size=2) as batcher:
        bad, good = await batcher.process_many([Item(), 1], return_exceptions=True)
    assert good == 1
    assert isinstance(bad, SerializationError)
    assert "this class is made in the program only" in str(bad)


# Sent once.


class _Counted:
    """Counts how often it is pickled."""

    def __init__(self) -> None:
        self.pickled = 0

    def __reduce__(self) -> Any:
        self.pickled += 1
        return (int, (5,))


async def test_a_function_is_pickled_once(module: Any) -> None:
    """However often it is called, until one of its names, or of those of the functions that it calls, is bound anew."""
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
    """A worker does not keep what it has enclosed; a closure variable that is bound anew is seen."""
    factor = 2

    def scale(n: int) -> int:
        return n * factor

    async with WorkerPool(1) as pool:
        assert await pool.run(scale, 3) == 6
        factor = 5
        assert await pool.run(scale, 3) == 15


async def test_a_function_that_is_defined_anew(module: Any) -> None:
    """As in a notebook: the new one runs, also where another function calls it by its name."""
    exec("def inner(): return 1\ndef outer(): return inner()", vars(module))  # noqa: S102
    async with WorkerPool(1) as pool:
        assert await pool.run(module.outer) == 1
        exec("def inner(): return 2", vars(module))  # noqa: S102
        assert await pool.run(module.inner) == 2
        assert await pool.run(module.outer) == 2


async def test_a_batcher_sends_its_globals_at_start(module: Any) -> None:
    """A name that is bound anew is seen from the next start on."""
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
    """Their function; what they are bound to travels with each call."""
    exec("def add(n, m): return n + m + (model or 0)\nclass Adder:\n def add(self, n): return add(1, n)", vars(module))  # noqa: S102
    counted = module.model = _Counted()
    calls = [functools.partial(module.add, 1), functools.partial(module.add, m=1), module.Adder().add]
    async with WorkerPool(1) as pool:
        for call in calls:
            before = counted.pickled
            assert [await pool.run(call, 1) for _ in range(3)] == [7] * 3
            assert counted.pickled <= before + 2, "with the function, and with its class"


async def test_a_class_follows_the_globals_of_its_methods(module: Any) -> None:
    """Instances that arrive as arguments and as items, in workers that know the class already."""
    async with WorkerPool(2) as pool:
        for number in range(3):
            module.model = number
            assert {(await pool.run(module.Point.with_model, module.Point(0)))[1] for _ in range(4)} == {number}
            assert {(await pool.run(lambda point: point.with_model(), module.Point(0)))[1] for _ in range(4)} == {number}
            async with batched(work.same, executor=pool) as batcher:
                assert type(await batcher(module.Point(0))) is module.Point
    methods: Any = lambda batch: [point.with_model()[1] for point in batch]  # noqa: E731 - travels by value
    async with WorkerPool(1) as pool:
        for number in range(3):
            module.model = number
            async with batched(methods, executor=pool) as batcher:
                assert await batcher(module.Point(0)) == number


async def test_a_module_as_a_global_travels_as_far_as_it_is_used(module: Any) -> None:
    """What it holds besides need not be picklable."""
    exec("import threading\nlock = threading.Lock()", vars(module))  # noqa: S102
    names: dict[str, Any] = {"__name__": "tests_user", "plugin": module}
    exec("def use(): return plugin.countdown(2), plugin.read(), plugin.__name__", names)  # noqa: S102
    module.model = 5
    async with WorkerPool(1) as pool:
        assert await pool.run(names["use"]) == ([2, 1], 5, module.__name__)


async def test_namespaces_without_a_module_do_not_drive_out_those_of_modules(module: Any) -> None:
    """As in a program that makes functions of rules: a worker forgets the rules' globals, not the module's."""
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
    """That of a worker, for a function of a script; `inspect.getsource` finds its source there."""
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
    assert scripts.run_script(tmp_path, text) == 'True True\ndef fail():\n    raise KeyError("here")\n\n'


async def test_source_that_is_in_no_file_travels_along() -> None:
    """As that of a notebook's cell, which only the program's line cache has."""
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


@pytest.mark.parametrize("body", ["return lock", "return [lock for _ in range(3)]", "return (lambda: lock)()"])
async def test_a_global_that_cannot_be_pickled_is_named(module: Any, body: str) -> None:
    """Also one that only a nested function uses."""
    exec(f"import threading\nlock = threading.Lock()\ndef use(batch=None): {body}", vars(module))  # noqa: S102
    async with WorkerPool(1) as pool:
        with pytest.raises(SerializationError, match="the function: global variable 'lock'"):
            await pool.run(module.use)
        with pytest.raises(SerializationError, match="process_batch: global variable 'lock'"):
            await batched(module.use, executor=pool).start()


def test_the_parts_of_cloudpickle_that_are_used_are_there() -> None:
    """They are private; this runs on the oldest and the newest supported version (tox: minimal)."""

    class Local:
        pass

    def local() -> Any:
        return [functools.reduce(lambda a, b: a + b, [1])]

    assert len(internals._dynamic_class_reduce(Local)) == 6
    assert internals._get_or_create_tracker_id(Local) == internals._get_or_create_tracker_id(Local)
    assert list(internals._extract_code_globals(local.__code__)) == ["functools"]
    assert internals._find_imported_submodules(local.__code__, [functools]) == []
    assert issubclass(cloudpickle.Pickler, internals.Pickler)


# Given pools.

_TEN_KINDS = """
    import asyncio, collections, contextvars, multiprocessing, threading
    from concurrent.futures import ProcessPoolExecutor
    from async_batcher import batched

    constant = 3
    by_initializer = None
    lazy = None
    table = {}
    counter = 0
    lock = threading.Lock()
    variable = contextvars.ContextVar("variable", default=1)
    listed = []
    class Point(collections.namedtuple("Point", "x y")): pass
    origin = Point(0, 0)
    class Config: level = 1
    def helper(n): return (n, by_initializer, Config.level)
    double = lambda n: 2 * n

    def load(value):
        global by_initializer
        by_initializer = value
        table["loaded"] = value
        listed.append(value)
        variable.set(value)
        Config.level = value

    def of_constant(batch): return [constant for _ in batch]
    def of_initializer(batch): return [by_initializer for _ in batch]
    def of_lazy(batch):
        global lazy
        lazy = (lazy or 0) + 1
        return [lazy > 0 for _ in batch]
    def of_table(batch): return [dict(table) for _ in batch]
    def of_lock(batch):
        with lock: return [n for n in batch]
    def of_list(batch): return [list(listed) for _ in batch]
    def of_variable(batch): return [variable.get(1) is not None for _ in batch]
    def of_class(batch): return [(type(p) is Point, p == origin, Point(p.x + 1, 2)) for p in batch]
    def of_helper(batch): return [helper(n) for n in batch]
    def of_lambda(batch): return [double(n) for n in batch]

    KINDS = [of_constant, of_initializer, of_lazy, of_table, of_lock, of_list, of_variable, of_class, of_helper, of_lambda]

    async def main():
        loop = asyncio.get_running_loop()
        context = multiprocessing.get_context(METHOD)
        with ProcessPoolExecutor(1, mp_context=context, initializer=load, initargs=(7,)) as pool:
            for function in KINDS:
                batch = [Point(0, 0), Point(1, 0)] if function is of_class else [1, 2]
                plain = await loop.run_in_executor(pool, function, batch)
                async with batched(function, executor=pool, max_batch_size=2) as batcher:
                    ours = await batcher.process_many(batch)
                same = ours == plain and [*map(type, ours)] == [*map(type, plain)]
                print("same" if same else (function.__name__, plain, ours))
            async with batched(lambda batch: [by_initializer] * len(batch), executor=pool) as batcher:
                print(await batcher(1))
        async with of_decorated:
            print(await of_decorated(1))

    def make():
        return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context(METHOD), initializer=load, initargs=(7,))

    @batched(executor=make)
    def of_decorated(batch):
        with lock: return [by_initializer] * len(batch)

    if __name__ == "__main__":
        asyncio.run(main())
"""


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.slow
def test_a_given_pool_gives_what_run_in_executor_gives(tmp_path: Path, method: str) -> None:
    """For ten kinds of globals of the main module; and a lambda, which run_in_executor refuses, sees what they see.

    So does a decorated function, whose name in its module is bound to the batcher.
    """
    assert scripts.run_script(tmp_path, _TEN_KINDS.replace("METHOD", repr(method))) == "same\n" * 10 + "7\n7\n"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("how", ["command", "stdin"])
@pytest.mark.slow
def test_a_given_pool_whose_workers_have_not_run_the_main_module(tmp_path: Path, method: str, how: str) -> None:
    """There is no file to run it from: functions, items and results travel by value."""
    if how == "stdin" and method != "fork":
        pytest.skip("the standard pool cannot start a worker for a program that is read from standard input")
    text = """
        import asyncio, multiprocessing
        from concurrent.futures import ProcessPoolExecutor
        from async_batcher import batched

        class Word:
            def __init__(self, text): self.text = text

        def upper(batch): return [Word(word.text.upper()) for word in batch]

        async def main():
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context(METHOD)) as pool:
                async with batched(upper, executor=pool) as batcher:
                    for text in "ab":
                        word = await batcher(Word(text))
                        print(type(word) is Word, word.text)

        if __name__ == "__main__":
            asyncio.run(main())
        """
    assert scripts.run_script(tmp_path, text.replace("METHOD", repr(method)), how=how) == "True A\nTrue B\n"
