"""Functions and classes that travel by value, and their globals."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import textwrap
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from async_batcher import batched
from async_batcher._serialization.by_value import Registry
from async_batcher._serialization.codec import Codec
from async_batcher._serialization.object_path import is_importable
from async_batcher.exceptions import SerializationError
from tests.support import scripts
from tests.support import worker_functions as work
from tests.support.modules import unimportable_module

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

METHODS = [
    "forkserver",
    "spawn",
    pytest.param(
        "fork", marks=pytest.mark.skipif(sys.platform != "linux", reason="not safe there")
    ),
]


class Process:
    """One of several processes, all simulated here: a codec with its own registry."""

    def __init__(self, *, worker: bool) -> None:
        self.codec = Codec(worker=worker, registry=Registry())

    def send(self, value: Any, receiver: Process) -> Any:
        """Pickle here, unpickle there, with the definitions if needed."""
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


# Namespaces.


def test_functions_of_a_module_share_its_globals(
    here: Process, there: Process, module: Any
) -> None:
    """In a worker each function sees what another one binds; the program's globals stay."""
    bind, read, point = (
        here.send(value, there) for value in (module.bind, module.read, module.Point(1))
    )
    bind("bound in the worker")
    assert read() == "bound in the worker"
    assert point.with_model() == (1, "bound in the worker")
    assert here.send(module.read, there)() == "bound in the worker"
    assert module.model is None


def test_a_global_is_sent_again_when_its_name_is_rebound(
    here: Process, there: Process, module: Any
) -> None:
    """A worker keeps what it has bound until the program binds the name to another object."""
    bump = here.send(module.bump, there)
    assert [bump(), bump()] == [1, 2]
    assert here.send(module.bump, there)() == 3
    module.count = 100
    assert here.send(module.bump, there)() == 101
    assert bump() == 102


def test_a_change_in_place_is_not_noticed(here: Process, there: Process, module: Any) -> None:
    """A list that is changed after it was sent is not sent again until its name is rebound."""
    module.model = ["first"]
    read = here.send(module.read, there)
    module.model.append("second")
    assert here.send(module.read, there)() == ["first"]
    module.model = [*module.model]
    assert here.send(module.read, there)() == read() == ["first", "second"]


def test_a_global_that_is_bound_to_none(here: Process, there: Process, module: Any) -> None:
    """None is sent, also if the object that was sent before has been freed."""
    module.model = {1, 2}
    read = here.send(module.read, there)
    module.model = None
    assert here.send(module.read, there)() is None
    assert read() is None


def test_a_function_that_comes_back_has_the_globals_of_its_module(
    here: Process, there: Process, module: Any
) -> None:
    """It reads the globals of its own process, and changes none."""
    sent = here.send(module.read, there)
    module.model = "here"
    home = there.send(sent, here)
    assert home.__globals__ is vars(module)
    assert home() == module.model == "here"


def test_two_keys_that_share_a_dict(there: Process, monkeypatch: pytest.MonkeyPatch) -> None:
    """If one of two namespaces over a dict is dropped, the other still works."""
    monkeypatch.setattr("async_batcher._serialization.by_value._MAX_NAMESPACES", 2)
    registry = there.codec.registry
    attributes = {"__name__": "colorsys"}
    importlib.import_module("colorsys")
    first, second = (
        registry.namespace(("one", False, attributes)),
        registry.namespace(("two", False, attributes)),
    )
    assert first.globals is second.globals
    for number in range(3):
        registry.namespace((f"other {number}", False, {"__name__": f"other_{number}"}))
    assert registry.namespace(("one", False, attributes)).globals is first.globals


def test_a_finder_that_pickles(here: Process, module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The program's own import finder may pickle while a module is looked up."""
    asked = []
    assert is_importable(__name__), (
        "it is known from here on, so that the finder is not asked for it while it pickles"
    )

    class Finder:
        @staticmethod
        def find_spec(name: str, path: Any = None, target: Any = None) -> None:  # noqa: ARG004 - the protocol's
            asked.append(name)
            here.codec.dumps_checked(lambda: asked, define=True)

    monkeypatch.setattr(sys, "meta_path", [Finder, *sys.meta_path])
    here.codec.registry.namespace_of(
        vars(module)
    )  # the first that looks for the module, under the registry's lock
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


@given(
    st.lists(
        st.tuples(st.sampled_from(["bind", "send", "deliver", "bind there"]), st.integers(0, 2)),
        max_size=30,
    )
)
def test_every_worker_has_the_newest_value_that_reached_it(steps: list[tuple[str, int]]) -> None:
    """In any order of pickles, the newest value replaces older ones and a worker's own."""
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
            pickles.append(
                (
                    versions,
                    bound,
                    here.codec.dumps_checked([names["read"], names["write"]], define=True)[0],
                )
            )
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
def test_what_an_imported_module_has_bound_is_seen_by_its_lambdas(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lambda of an importable module sees what an initializer has bound in that module.

    However indirectly; the lambda's globals do not replace those of the module.
    """
    text = """
        model = limit = None

        def load(value):
            global model
            model = value

        def read():
            return model, limit

        look = lambda: (model, limit)
        """
    (tmp_path / "tests_importable.py").write_text(textwrap.dedent(text))
    monkeypatch.syspath_prepend(tmp_path)
    program = """
        import asyncio, tests_importable
        from tests_importable import load
        from async_batcher import WorkerPool

        class Loader:
            def __init__(self, value): load(value)

        def load_here(value): Loader(value)
        def load_there(value): tests_importable.load(value)

        async def main():
            tests_importable.limit = 5
            for method in ("forkserver", "spawn", "fork"):
                for initializer in (load, load_here, load_there, Loader):
                    async with WorkerPool(1, mp_context=method, initializer=initializer, initargs=("loaded",)) as pool:
                        print(await pool.run(tests_importable.look))
                        model, _ = await pool.run(tests_importable.read)
                        assert model == "loaded"

        asyncio.run(main())
        """
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    assert scripts.run_script(tmp_path, program) == "('loaded', 5)\n" * 12


@pytest.mark.slow
def test_globals_that_an_initializer_binds_in_any_way(tmp_path: Path) -> None:
    """However it binds them, also after the program has rebound the name; in each worker.

    Functions of the main module that a library's decorator has wrapped do not get its globals.
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


# Objects that pickle as their names, and names in general.


@pytest.mark.slow
def test_objects_that_pickle_as_their_names(tmp_path: Path) -> None:
    """Cached functions, sentinels, NewType and ParamSpec of the main module."""
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


@pytest.fixture
def named(tmp_path: Path) -> Iterator[Any]:
    """A module that no worker can import, with objects that their names do not find there."""
    text = """
        import functools, typing

        def plus_one(n): return n + 1

        def local():
            @functools.cache
            def double(n): return 2 * n
            return double

        of_lambda = functools.lru_cache(lambda n: n + 2)
        renamed = functools.lru_cache(plus_one)
        of_partial = functools.cache(functools.partial(pow, 2))
        wrapped = functools.wraps(plus_one)(functools.lru_cache(lambda n: 3 * n))
        made = local()
        Renamed = typing.NewType("Other", int)

        class Cached:
            @classmethod
            @functools.cache
            def of_class(cls, n): return 4 * n

        def use(n):
            made(n), wrapped(n)
            every = of_lambda, renamed, of_partial, wrapped, made, Cached.of_class, Renamed
            return [function(n) for function in every]

        def same(value): return value
        """
    with unimportable_module(tmp_path, "tests_named", text) as module:
        yield module


def test_objects_that_their_names_do_not_find(here: Process, there: Process, named: Any) -> None:
    """Those of the functions that a cache calls, as themselves, and as items and results."""
    expected = [5, 4, 8, 9, 6, 12, 3]
    assert named.use(3) == expected
    use = here.send(named.use, there)
    assert use.__globals__ is not vars(named)
    assert use(3) == expected
    wrapped = use.__globals__["wrapped"]
    assert (wrapped.__name__, wrapped.__wrapped__(3)) == ("plus_one", 4)
    values = [use.__globals__[name] for name in ("of_lambda", "made", "wrapped", "Renamed")]
    assert [value(3) for value in there.send(values, here)] == [5, 6, 9, 3]


def test_a_cached_function_without_a_module(here: Process, there: Process) -> None:
    """As after runpy.run_path(), and in a namespace of exec()."""
    names: dict[str, Any] = {"__name__": "tests_nowhere"}
    text = """
        import functools
        @functools.cache
        def double(n): return 2 * n
        def use(n): return double(n)
        """
    exec(textwrap.dedent(text), names)  # noqa: S102
    assert here.send(names["use"], there)(3) == 6


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
    """The error of an item says why its class cannot be created in a worker."""
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
    """For ten kinds of globals of the main module, also to a lambda.

    So does a decorated function, whose name in its module is bound to the batcher.
    """
    assert (
        scripts.run_script(tmp_path, _TEN_KINDS.replace("METHOD", repr(method)))
        == "same\n" * 10 + "7\n7\n"
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.slow
def test_classes_of_the_main_module_are_the_same_in_a_given_pool(
    tmp_path: Path, method: str
) -> None:
    """Also those of exceptions with constructors of their own, and beside what has no name."""
    text = """
        import asyncio, logging, multiprocessing
        from concurrent.futures import ProcessPoolExecutor
        from async_batcher import batched

        class Item: pass
        class Refusal(Exception):
            def __init__(self, *, code):
                super().__init__(f"code {code}")
                self.code = code

        def refuse(batch): raise Refusal(code=1)
        def refuse_each(batch): return [Refusal(code=2) for _ in batch]
        def refuse_set_up(): raise Refusal(code=3)
        def same(batch): return [(type(item) is Item, Item(), function) for item, function in batch]

        async def main():
            logging.disable()
            context = multiprocessing.get_context(METHOD)
            with ProcessPoolExecutor(1, mp_context=context) as pool:
                for function, set_up in (
                    (refuse, None), (refuse_each, None), (same, refuse_set_up),
                    (lambda batch: refuse(batch), None),
                ):
                    try:
                        await batched(function, executor=pool, setup_worker=set_up)(0)
                    except Refusal as error:
                        print(error.code, end=" ")
                for function in (same, lambda batch: same(batch)):
                    async with batched(function, executor=pool) as batcher:
                        is_item, item, double = await batcher((Item(), lambda n: 2 * n))
                        print(is_item, type(item) is Item, double(2))

        if __name__ == "__main__":
            asyncio.run(main())
        """
    done = scripts.run_script(tmp_path, text.replace("METHOD", repr(method)))
    assert done == "1 2 3 1 True True 4\nTrue True 4\n"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("how", ["command", "stdin"])
@pytest.mark.slow
def test_a_given_pool_whose_workers_have_not_run_the_main_module(
    tmp_path: Path, method: str, how: str
) -> None:
    """There is no file to run: functions, items and results travel by value."""
    if how == "stdin" and method != "fork":
        pytest.skip(
            "the standard pool cannot start a worker for a program that is read from standard input"
        )
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
    assert (
        scripts.run_script(tmp_path, text.replace("METHOD", repr(method)), how=how)
        == "True A\nTrue B\n"
    )
