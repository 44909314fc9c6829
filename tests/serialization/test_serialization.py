"""What crosses the process boundary, there and back: programs, classes, items, results, and what cannot."""

from __future__ import annotations

import abc
import asyncio
import enum
import functools
import gc
import importlib
import multiprocessing
import os
import sys
import threading
import time
import weakref
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

import pytest

from async_batcher import AsyncBatcher, batched
from async_batcher._serialization.codec import Codec
from async_batcher.exceptions import SerializationError
from tests.support import scripts
from tests.support import worker_functions as work

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path
    from types import ModuleType

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="forkserver")

PARENT = os.getpid()
T = TypeVar("T")


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPoolExecutor]:
    """One worker process for all tests, so that what one batch leaves in it, the next one meets."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("forkserver")) as executor:
        executor.submit(time.sleep, 0).result(work.DEADLINE)
        yield executor


@pytest.fixture(scope="module")
def numpy() -> Any:
    """numpy, imported before it is looked which files are open."""
    return pytest.importorskip("numpy")


async def answers(batcher: Any, items: list[Any]) -> list[Any]:
    """What each of the calls, all in one batch, returned or raised."""
    async with asyncio.timeout(work.DEADLINE / 2):
        return await asyncio.gather(*(batcher.process(item) for item in items), return_exceptions=True)


async def trip(pool: ProcessPoolExecutor, items: list[Any], function: Callable[[list[Any]], Any] = work.same) -> list[Any]:
    """What comes back for the items from one batch of a batcher made for it."""
    batcher: AsyncBatcher[Any, Any] = batched(function, executor=pool)
    try:
        return await answers(batcher, items)
    finally:
        await batcher.stop(force=True)


# Programs.


class Multiplier(AsyncBatcher[int, int]):
    """A method that crosses with its instance."""

    def __init__(self, factor: int, **options: Any) -> None:
        """Keep the factor."""
        super().__init__(**options)
        self.factor = factor

    def process_batch(self, batch: list[int]) -> list[int]:
        """That much of each."""
        return [item * self.factor for item in batch]


def _closure() -> Callable[[list[int]], list[int]]:
    factor = 3
    return lambda batch: [item * factor for item in batch]


def _nested_closure() -> Callable[[list[int]], list[int]]:
    factor = 3

    def one(item: int) -> int:
        return item * factor

    def process_batch(batch: list[int]) -> list[int]:
        return [one(item) for item in batch]

    return process_batch


def _recursive() -> Callable[[list[int]], list[int]]:
    def process_batch(batch: list[int]) -> list[int]:
        return [batch[0] * 3, *process_batch(batch[1:])] if batch else []

    return process_batch


def _local_object() -> Callable[[list[int]], list[int]]:
    class Local:
        factor = 3

        def __call__(self, batch: list[int]) -> list[int]:
            return [item * self.factor for item in batch]

    return Local()


def _local_method() -> Callable[[list[int]], list[int]]:
    class Local:
        factor = 3

        def run(self, batch: list[int]) -> list[int]:
            return [item * self.factor for item in batch]

    return Local().run


def _class_method() -> Callable[[list[int]], list[int]]:
    class Local:
        factor = 3

        @classmethod
        def run(cls, batch: list[int]) -> list[int]:
            return [item * cls.factor for item in batch]

    return Local.run


def _keyword_only() -> Callable[..., list[int]]:
    def process_batch(*, batch: list[int], factor: int = 3) -> list[int]:
        return [item * factor for item in batch]

    return process_batch


def _positional_only() -> Callable[[list[int]], list[int]]:
    def process_batch(items: list[int], /, factor: int = 3) -> list[int]:
        return [item * factor for item in items]

    return process_batch


@pytest.mark.parametrize(
    "make",
    [
        lambda: lambda batch: [item * 3 for item in batch],
        _closure,
        _nested_closure,
        _recursive,
        lambda: functools.partial(work.scaled, 3),
        lambda: functools.partial(lambda factor, batch: [item * factor for item in batch], 3),
        lambda: work.Scale(3),
        _local_object,
        _local_method,
        _class_method,
        _keyword_only,
        _positional_only,
    ],
)
async def test_functions_of_all_kinds_cross(pool: ProcessPoolExecutor, make: Callable[[], Callable[[list[int]], Any]]) -> None:
    """Lambdas, closures, partials, callable objects, methods of local classes run in a worker."""
    assert await trip(pool, [1, 2, 3], make()) == [3, 6, 9]


@pytest.mark.slow
async def test_a_method_crosses_with_what_user_code_put_on_its_instance(pool: ProcessPoolExecutor) -> None:
    """The attributes are there in the worker, and the running batcher is not touched."""
    async with Multiplier(3, executor=pool) as batcher:
        assert await answers(batcher, [1, 2, 3]) == [3, 6, 9]
        assert await answers(batcher, [1, 2, 3]) == [3, 6, 9]


async def test_attributes_may_have_any_name(pool: ProcessPoolExecutor) -> None:
    """No name of the user's is taken for the batcher's own running state, and none of them is lost."""
    names = ["_queue", "_state", "_loop", "_running", "_session", "_executor", "_options", "_lock", "state", "options", "session"]

    class Local(AsyncBatcher[int, Any]):
        def __init__(self, **options: Any) -> None:
            self._state = "set before"
            super().__init__(**options)
            for name in names:
                setattr(self, name, name.upper())
            self.__state = "mangled"

        def process_batch(self, batch: list[int]) -> list[Any]:
            return [([getattr(self, name) for name in names], self.__state)] * len(batch)

    async with Local(executor=pool) as batcher:
        assert await answers(batcher, [1]) == [([name.upper() for name in names], "mangled")]


async def test_slots_cross(pool: ProcessPoolExecutor) -> None:
    """A subclass with ``__slots__`` crosses as any other."""

    class Local(AsyncBatcher[int, int]):
        __slots__ = ("factor",)

        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self.factor = 3

        def process_batch(self, batch: list[int]) -> list[int]:
            return [item * self.factor for item in batch]

    async with Local(executor=pool) as batcher:
        assert await answers(batcher, [1, 2]) == [3, 6]


async def test_options_can_be_read_in_the_worker(pool: ProcessPoolExecutor) -> None:
    """``process_batch`` may ask for the options of its batcher; a given executor has stayed behind."""

    class Local(AsyncBatcher[int, Any]):
        def process_batch(self, batch: list[int]) -> list[Any]:
            return [(self.max_batch_size, self.max_queue_time, self.executor)] * len(batch)

    async with Local(max_batch_size=7, max_queue_time=0.004, executor=pool) as batcher:
        assert await answers(batcher, [1]) == [(7, 0.004, None)]


async def test_getstate_is_respected(pool: ProcessPoolExecutor) -> None:
    """What the user leaves out or replaces in ``__getstate__`` is left out or replaced; ``__setstate__`` is called."""

    class Local(AsyncBatcher[int, Any]):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self.lock: Any = threading.Lock()
            self.name = "kept"

        def __getstate__(self) -> dict[str, Any]:
            return {**self.__dict__, "lock": None}

        def __setstate__(self, state: dict[str, Any]) -> None:
            self.__dict__.update(state, restored=True)

        def process_batch(self, batch: list[int]) -> list[Any]:
            return [sorted(self.__dict__.items())] * len(batch)

    async with Local(executor=pool) as batcher:
        assert await answers(batcher, [1]) == [[("lock", None), ("name", "kept"), ("restored", True)]]
        assert batcher.lock is not None


async def test_another_batcher_as_an_attribute_crosses(pool: ProcessPoolExecutor) -> None:
    """A running batcher on a batcher crosses as one that has not started."""

    class Local(AsyncBatcher[int, Any]):
        def __init__(self, other: Multiplier, **options: Any) -> None:
            super().__init__(**options)
            self.other = other

        def process_batch(self, batch: list[int]) -> list[int]:
            return self.other.process_batch(batch)

    async with Multiplier(3, executor=pool) as other, Local(other, executor=pool) as batcher:
        assert await answers(batcher, [1, 2]) == [3, 6]
        assert await answers(other, [1, 2]) == [3, 6]


@pytest.fixture
def decorated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """An importable module with decorated functions."""
    (tmp_path / "decorated_here.py").write_text(
        """\
import functools
from async_batcher import batched

def plain_decorator(function):
    @functools.wraps(function)
    def wrapper(batch):
        return ["wrong"] * len(batch)
    return wrapper

CALLS = []

@batched(executor="process", max_workers=1)
def triple(batch):
    CALLS.append("a text that is found in the code alone")
    return [(item * 3, __name__, len(CALLS)) for item in batch]

class Holder:
    @staticmethod
    @batched(executor="process", max_workers=1)
    def triple(batch):
        return [item * 3 for item in batch]
"""
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield importlib.import_module("decorated_here")
    del sys.modules["decorated_here"]


def test_a_decorated_function_crosses_by_reference(decorated: ModuleType) -> None:
    """Its pickle names it, and holds none of its code; so does that of a static method."""
    for batcher in (decorated.triple, decorated.Holder.triple):
        own, data, buffers = Codec().dumps_checked((batcher.process_batch, True, None), define=True)[0]
        assert isinstance(data, bytes)
        assert b"decorated_here" in data
        assert b"triple" in data
        assert b"found in the code" not in data
        assert b"__code__" not in data
        assert len(data) < 300
        function, _, _ = Codec(worker=True).loads((own, data, buffers))
        assert function is batcher.process_batch


@pytest.mark.slow
async def test_a_decorated_function_runs_in_its_own_module(decorated: ModuleType) -> None:
    """In the worker it is the function of the imported module, with that module's globals."""
    async with decorated.triple as triple:
        assert await answers(triple, [1, 2]) == [(3, "decorated_here", 1), (6, "decorated_here", 1)]
        assert await answers(triple, [3]) == [(9, "decorated_here", 2)]
    async with decorated.Holder.triple as triple:
        assert await answers(triple, [1]) == [3]


async def test_a_program_is_loaded_once(pool: ProcessPoolExecutor, tmp_path: Path) -> None:
    """However many batches it runs, a worker unpickles the function once; what it keeps between batches stays."""

    class Loaded:
        def __init__(self, folder: Path) -> None:
            self.folder = folder
            self.calls = 0

        def __setstate__(self, state: dict[str, Any]) -> None:
            work.note(state["folder"], "loaded")
            self.__dict__.update(state)

        def __call__(self, batch: list[int]) -> list[int]:
            self.calls += 1
            return [self.calls] * len(batch)

    async with batched(Loaded(tmp_path), executor=pool, max_queue_time=0) as batcher:
        assert [await answers(batcher, [i]) for i in range(4)] == [[1], [2], [3], [4]]
    assert len(work.noted(tmp_path, "loaded")) == 1


# Programs that cannot cross.


class Locked(AsyncBatcher[int, int]):
    """Holds a lock."""

    def __init__(self, **options: Any) -> None:
        """Make it."""
        super().__init__(**options)
        self.name = "fine"
        self.lock = threading.Lock()

    def process_batch(self, batch: list[int]) -> list[int]:
        """Never runs."""
        return batch


class LockedDeep(AsyncBatcher[int, int]):
    """Holds an object that holds a lock."""

    def __init__(self, **options: Any) -> None:
        """Make it."""
        super().__init__(**options)
        self.config = {"fine": 1, "parts": [1, {"lock": threading.Lock()}]}

    def process_batch(self, batch: list[int]) -> list[int]:
        """Never runs."""
        return batch


class LockedSlot(AsyncBatcher[int, int]):
    """Holds a lock in a slot."""

    __slots__ = ("guard",)

    def __init__(self, **options: Any) -> None:
        """Make it."""
        super().__init__(**options)
        self.guard = threading.Lock()

    def process_batch(self, batch: list[int]) -> list[int]:
        """Never runs."""
        return batch


def _over_lock(**options: Any) -> AsyncBatcher[int, int]:
    lock = threading.Lock()

    def process_batch(batch: list[int]) -> list[int]:
        with lock:
            return batch

    return batched(process_batch, **options)


def _over_nested_lock(**options: Any) -> AsyncBatcher[int, int]:
    lock = threading.Lock()

    def guarded(item: int) -> int:
        with lock:
            return item

    return batched(lambda batch: [guarded(item) for item in batch], **options)


def _with_default(**options: Any) -> AsyncBatcher[int, int]:
    def process_batch(batch: list[int], *, lock: Any = threading.Lock()) -> list[int]:  # noqa: B008
        lock.acquire()
        return batch

    return batched(process_batch, **options)


def _with_global(**options: Any) -> AsyncBatcher[int, int]:
    namespace: dict[str, Any] = {"__name__": "__main__", "LOCK": threading.Lock()}
    exec("def process_batch(batch):\n    with LOCK:\n        return batch", namespace)  # noqa: S102
    batcher: AsyncBatcher[int, int] = batched(namespace["process_batch"], **options)
    return batcher


def _with_setup(**options: Any) -> AsyncBatcher[int, int]:
    lock = threading.Lock()

    def setup() -> None:
        with lock:
            pass

    return batched(work.same, setup_worker=setup, **options)


def _of_a_class_over_lock(**options: Any) -> AsyncBatcher[int, int]:
    lock = threading.Lock()

    class Local(AsyncBatcher[int, int]):
        def guarded(self) -> None:
            with lock:
                pass

        def process_batch(self, batch: list[int]) -> list[int]:
            return batch

    return Local(**options)


def _of_a_class_with_lock(**options: Any) -> AsyncBatcher[int, int]:
    class Local(AsyncBatcher[int, int]):
        lock = threading.Lock()

        def process_batch(self, batch: list[int]) -> list[int]:
            return batch

    return Local(**options)


def _with_a_lock(lock: Any, batch: list[int]) -> list[int]:
    with lock:
        return batch


def _partial_lock(**options: Any) -> AsyncBatcher[int, int]:
    return batched(functools.partial(_with_a_lock, threading.Lock()), **options)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (Locked, "self.lock (a _thread.lock)"),
        (LockedDeep, "self.config['parts'][1]['lock'] (a _thread.lock)"),
        (LockedSlot, "self.guard (a _thread.lock)"),
        (_over_lock, "closure variable 'lock' (a _thread.lock)"),
        (_over_nested_lock, "closure variable 'guarded': closure variable 'lock' (a _thread.lock)"),
        (_with_default, "default of argument 'lock' (a _thread.lock)"),
        (_with_global, "global variable 'LOCK' (a _thread.lock)"),
        (_with_setup, "setup_worker: closure variable 'lock' (a _thread.lock)"),
        (_of_a_class_over_lock, "closure variable 'lock' (a _thread.lock)"),
        (_of_a_class_with_lock, "lock (a _thread.lock)"),
        (_partial_lock, "(a _thread.lock)"),
    ],
)
async def test_what_cannot_cross_is_named(pool: ProcessPoolExecutor, make: Callable[..., Any], named: str) -> None:
    """Every call fails, with an error of its own that names the attribute or variable at fault and says what to do."""
    batcher = make(executor=pool)
    errors = [*await answers(batcher, [1, 2]), *await answers(batcher, [3])]
    with pytest.raises(SerializationError):
        await batcher.start()
    await batcher.stop()
    assert [type(error) for error in errors] == [SerializationError] * 3
    assert len({id(error) for error in errors}) == 3
    assert all(named in str(error) and "setup_worker" in str(error) for error in errors), str(errors[0])


async def test_a_program_that_will_not_load_fails_each_batch(pool: ProcessPoolExecutor) -> None:
    """Its callers learn what the worker raised; the worker lives on."""

    class Unloadable:
        def __reduce__(self) -> Any:
            return (work.end, ("exit",))

        def __call__(self, batch: list[int]) -> list[int]:
            return batch

    batcher = batched(Unloadable(), executor=pool)
    for _ in range(2):
        errors = await answers(batcher, [1, 2])
        assert [type(error) for error in errors] == [SerializationError] * 2
        assert all("function" in str(error) and "SystemExit" in str(error) for error in errors)
    await batcher.stop()
    assert await trip(pool, [1]) == [1]


# Items and results, and their classes.


async def test_values_come_back_equal(pool: ProcessPoolExecutor) -> None:
    """What importable modules hold, and builtins: as pickle does it."""
    items: list[Any] = [
        None,
        {"a": [1, (2, 3)]},
        {4, 5},
        b"bytes",
        work.Colour.RED,
        work.Point(1, 2),
        work.Pair(3, 4),
        work.Point,
        len,
        ...,
        NotImplemented,
        type(None),
        "__main__",
        float("inf"),
        range(3),
        slice(1, 2),
        list[int],
    ]
    results = await trip(pool, items)
    assert results == items
    assert [type(result) for result in results] == [type(item) for item in items]
    assert results[4] is work.Colour.RED
    assert results[7] is work.Point


async def test_functions_as_items_and_results(pool: ProcessPoolExecutor) -> None:
    """A lambda may be an item, and one made in the worker a result."""
    factor = 3
    assert await trip(pool, [lambda: factor, lambda: 4], lambda batch: [item() for item in batch]) == [3, 4]
    results = await trip(pool, [1, 2], lambda batch: [lambda item=item: item * factor for item in batch])
    assert [result() for result in results] == [3, 6]


async def test_classes_come_back_as_themselves(pool: ProcessPoolExecutor) -> None:
    """An instance of a local class comes back as one of the caller's class, which no batch and no result alters."""

    class Item:
        made = 0
        label = "as defined"

        def __init__(self, number: int) -> None:
            type(self).made += 1
            self.number = number

        def describe(self) -> str:
            return f"item {self.number}"

    def touch(batch: list[Any]) -> list[Any]:
        for item in batch:
            type(item).label = "changed in the worker"
            type(item).describe = lambda _: "changed in the worker"
        return batch

    describe = Item.__dict__["describe"]
    async with batched(touch, executor=pool) as batcher:
        for round_number in range(1, 4):
            results = await answers(batcher, [Item(1), Item(2)])
            assert [type(result) for result in results] == [Item, Item]
            assert [result.describe() for result in results] == ["item 1", "item 2"]
            assert Item.__dict__["describe"] is describe
            assert (Item.made, Item.label) == (2 * round_number, "as defined")
    assert await trip(pool, [Item]) == [Item]


async def test_a_worker_keeps_what_a_class_holds_there(pool: ProcessPoolExecutor) -> None:
    """A counter on a class, in the worker, is not set back by the next batch that brings instances of it."""

    class Item:
        seen = 0

    def count(batch: list[Any]) -> list[int]:
        for item in batch:
            type(item).seen += 1
        return [type(item).seen for item in batch]

    async with batched(count, executor=pool, max_queue_time=0) as batcher:
        assert [await answers(batcher, [Item()]) for _ in range(4)] == [[1], [2], [3], [4]]
    assert Item.seen == 0


async def test_another_batcher_does_not_set_a_class_back(pool: ProcessPoolExecutor) -> None:
    """Two batchers in one pool send the same class: whether they share it there or not, neither resets it."""

    class Item:
        seen = 0

    def count(batch: list[Any]) -> list[int]:
        for item in batch:
            type(item).seen += 1
        return [type(item).seen for item in batch]

    async with batched(count, executor=pool) as first, batched(count, executor=pool) as second:
        of_first = [await answers(first, [Item()]), await answers(first, [Item()])]
        of_second = await answers(second, [Item()])
        of_first.append(await answers(first, [Item()]))
    assert of_first[:2] == [[1], [2]]
    assert (of_second, of_first[2]) in (([1], [3]), ([3], [4]))


async def test_globals_of_a_function_are_its_own(pool: ProcessPoolExecutor) -> None:
    """A function by value keeps the globals that it has in the worker from one batch to the next."""
    namespace: dict[str, Any] = {"__name__": "__main__", "COUNT": 0}
    exec(  # noqa: S102
        "def process_batch(batch):\n    global COUNT\n    COUNT += len(batch)\n    return [COUNT] * len(batch)", namespace
    )
    async with batched(namespace["process_batch"], executor=pool) as batcher:
        assert [await answers(batcher, [1, 2]) for _ in range(3)] == [[2, 2], [4, 4], [6, 6]]
    assert namespace["COUNT"] == 0


def _classes() -> list[Any]:
    class Plain:
        def __eq__(self, other: object) -> bool:
            return type(other) is type(self) and other.__dict__ == self.__dict__

        __hash__ = None  # type: ignore[assignment]

    class Child(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.own = 1

    @dataclass(frozen=True, slots=True)
    class Data:
        x: int
        y: list[int]

    class Pair(NamedTuple):
        left: int
        right: str = "r"

    class Shape(abc.ABC):
        @abc.abstractmethod
        def area(self) -> int: ...

    class Square(Shape):
        def area(self) -> int:
            return 4

        def __eq__(self, other: object) -> bool:
            return isinstance(other, Shape) and other.area() == 4

        __hash__ = None  # type: ignore[assignment]

    class Meta(type):
        def __call__(cls, *args: Any, **kwargs: Any) -> Any:
            instance = super().__call__(*args, **kwargs)
            instance.through_meta = True
            return instance

    class WithMeta(Plain, metaclass=Meta):
        pass

    class Slotted:
        __slots__ = ("value",)

        def __init__(self) -> None:
            self.value = 3

        def __eq__(self, other: object) -> bool:
            return isinstance(other, Slotted) and other.value == self.value

        __hash__ = None  # type: ignore[assignment]

    class Box(Generic[T]):
        def __init__(self, content: T) -> None:
            self.content = content

        def __eq__(self, other: object) -> bool:
            return isinstance(other, Box) and other.content == self.content

        __hash__ = None  # type: ignore[assignment]

    class Registered:
        registry: dict[str, type] = {}  # noqa: RUF012

        def __init_subclass__(cls) -> None:
            cls.registry[cls.__name__] = cls

        def __eq__(self, other: object) -> bool:
            return type(other) is type(self)

        __hash__ = None  # type: ignore[assignment]

    class First(Registered):
        pass

    class IntLike(int):
        pass

    return [Plain(), Child(), Data(1, [2]), Pair(1), Square(), WithMeta(), Slotted(), Box[int](5), First(), IntLike(7)]


@pytest.mark.parametrize("index", range(10))
async def test_classes_of_all_kinds_cross(pool: ProcessPoolExecutor, index: int) -> None:
    """Local dataclasses, named tuples, ABCs, subclasses, metaclasses, slots, generics: the same class, an equal object."""
    item = _classes()[index]
    for _ in range(2):
        results = await trip(pool, [item, [item]])
        assert type(results[0]) is type(item), results
        assert results == [item, [item]]


async def test_local_enums_keep_their_identity(pool: ProcessPoolExecutor) -> None:
    """A member of a local enum comes back as that very member."""

    class Colour(enum.Enum):
        RED = 1
        GREEN = 2

        @property
        def shade(self) -> str:
            return self.name.lower()

    class Flags(enum.Flag):
        A = enum.auto()
        B = enum.auto()

    results = await trip(pool, [Colour.RED, Colour.GREEN, Flags.A | Flags.B, Colour])
    assert results[0] is Colour.RED
    assert results[1] is Colour.GREEN
    assert results[1].shade == "green"
    assert results[2] == Flags.A | Flags.B
    assert type(results[2]) is Flags
    assert results[3] is Colour


async def test_classes_that_refer_to_each_other(pool: ProcessPoolExecutor) -> None:
    """A refers to B, B to A, and both to themselves; their objects cross either way round."""

    class A:
        partner: Any = None

        def make(self) -> Any:
            return self.partner()

    class B:
        partner: Any = A

        def make(self) -> Any:
            return self.partner()

    A.partner = B

    def swap(batch: list[Any]) -> list[Any]:
        return [item.make() for item in batch]

    for items in ([A(), B()], [B(), A()]):
        results = await trip(pool, items, swap)
        assert [type(result) for result in results] == [B if isinstance(item, A) else A for item in items]
        assert A.partner is B
        assert B.partner is A


async def test_objects_that_refer_to_each_other(pool: ProcessPoolExecutor) -> None:
    """Cycles of objects, and of an object and its class, survive the trip."""

    class Node:
        first: Any = None

        def __init__(self) -> None:
            self.me = self

    Node.first = Node()
    (result,) = await trip(pool, [Node()])
    assert type(result) is Node
    assert result.me is result
    assert type(Node.first) is Node


async def test_two_classes_of_one_name(pool: ProcessPoolExecutor) -> None:
    """Classes that only look alike stay apart."""

    def make(value: int) -> Any:
        class Item:
            def get(self) -> int:
                return value

        return Item()

    items = [make(1), make(2)]
    results = await trip(pool, items)
    assert [result.get() for result in results] == [1, 2]
    assert [type(result) for result in results] == [type(item) for item in items]


async def test_classes_made_in_the_worker(pool: ProcessPoolExecutor) -> None:
    """A class that exists only there comes back by value; while the caller holds it, it is one class."""

    class Maker:
        made: Any = None

        def __call__(self, batch: list[int]) -> list[Any]:
            if self.made is None:

                class Made:
                    def __init__(self, number: int) -> None:
                        self.number = number

                    def double(self) -> int:
                        return 2 * self.number

                self.made = Made
            return [self.made(item) for item in batch]

    async with batched(Maker(), executor=pool) as batcher:
        first = await answers(batcher, [1, 2])
        second = await answers(batcher, [3])
    assert [result.double() for result in first + second] == [2, 4, 6]
    assert len({type(result) for result in first + second}) == 1


async def test_classes_that_only_the_function_knows(pool: ProcessPoolExecutor) -> None:
    """A class that crossed with the function comes back as the caller's own, in results and as an exception."""

    class Answer:
        def __init__(self, value: int) -> None:
            self.value = value

    class Refusal(Exception):  # noqa: N818
        pass

    def process_batch(batch: list[int]) -> list[Any]:
        if 0 in batch:
            msg = "no zeros"
            raise Refusal(msg)
        return [Refusal("one") if item == 1 else Answer(item) for item in batch]

    async with batched(process_batch, executor=pool) as batcher:
        results = await answers(batcher, [1, 2, 3])
        assert [type(result) for result in results] == [Refusal, Answer, Answer]
        errors = await answers(batcher, [0, 1])
        assert [type(error) for error in errors] == [Refusal] * 2
        assert str(errors[0]) == "no zeros"


async def test_classes_do_not_pile_up_on_the_callers_side(pool: ProcessPoolExecutor) -> None:
    """With a new local class for each batch, the caller's side forgets those that nobody uses any more."""
    classes: list[weakref.ref[type]] = []

    def make() -> Any:
        class Item:
            pass

        classes.append(weakref.ref(Item))
        return Item()

    async with batched(work.same, executor=pool, max_queue_time=0) as batcher:
        for _ in range(20):
            (result,) = await answers(batcher, [make()])
            assert type(result) is classes[-1]()
            del result
        gc.collect()
        assert sum(reference() is not None for reference in classes) <= 2


async def test_results_of_classes_made_in_the_worker_do_not_pile_up(pool: ProcessPoolExecutor) -> None:
    """The same the other way round: a class per batch, made in the worker."""

    def process_batch(batch: list[int]) -> list[Any]:
        class Made:
            pass

        return [Made() for _ in batch]

    classes: list[weakref.ref[type]] = []
    async with batched(process_batch, executor=pool, max_queue_time=0) as batcher:
        for _ in range(20):
            (result,) = await answers(batcher, [1])
            classes.append(weakref.ref(type(result)))
            del result
        gc.collect()
        assert sum(reference() is not None for reference in classes) <= 2


@pytest.mark.slow
async def test_arrays_cross(pool: ProcessPoolExecutor, numpy: Any) -> None:
    """Arrays as items and results: equal, writable, and no view of anything that is used again."""
    items = [numpy.arange(6).reshape(2, 3) + i for i in range(3)]

    def add_one(batch: list[Any]) -> list[Any]:
        for array in batch:
            numpy.add(array, 1, out=array)  # what arrived may be written to
        return batch

    results = await trip(pool, items, add_one)
    for item, result in zip(items, results, strict=True):
        assert (result == item + 1).all()
        numpy.add(result, 1, out=result)
    assert [item[0, 0] for item in items] == [0, 1, 2]
    strange = [
        numpy.array([1, "a", None], dtype=object),
        numpy.zeros(0),
        numpy.array(5),
        numpy.array([(1, 2.0)], dtype=[("a", "i4"), ("b", "f8")]),
        numpy.float32(1.5),
        numpy.asfortranarray(numpy.ones((2, 2))),
        numpy.ones((4, 4))[::2, ::2],
    ]
    for item, result in zip(strange, await trip(pool, strange), strict=True):
        assert type(result) is type(item)
        assert result.dtype == item.dtype
        assert (result == item).all()


async def test_arrays_of_local_objects_cross(pool: ProcessPoolExecutor, numpy: Any) -> None:
    """An object array of instances of a local class comes back with the caller's class."""

    class Item:
        pass

    array = numpy.array([Item(), Item()], dtype=object)
    (result,) = await trip(pool, [array])
    assert [type(item) for item in result] == [Item, Item]


# One bad item, one bad result.


class _Deep:
    """A lock in lists in lists."""

    def __new__(cls, depth: int) -> Any:
        nested: list[Any] = [threading.Lock()]
        for _ in range(depth):
            nested = [nested]
        return nested


class _RecursesPickled:
    def __reduce__(self) -> Any:
        return self.__reduce__()


class _RecursesUnpickled:
    def __init__(self, depth: int = 0) -> None:
        self.depth = depth

    def __reduce__(self) -> Any:
        return (_recurse, ())


def _recurse() -> Any:
    return _recurse()


def _local_with_lock() -> Any:
    class Item:
        lock = threading.Lock()

    return Item()


def _local_that_needs_home() -> Any:
    class Meta(type):
        def __new__(mcs, name: str, bases: tuple[type, ...], namespace: dict[str, Any]) -> Any:
            if os.getpid() != PARENT:
                msg = "not here"
                raise ValueError(msg)
            return super().__new__(mcs, name, bases, namespace)

    class Item(metaclass=Meta):
        pass

    return Item()


_BAD_ITEMS: dict[str, Callable[[], Any]] = {
    "lock": threading.Lock,
    "lock_inside": lambda: {"a": [threading.Lock()]},
    "raises_here": lambda: work.CrashAtPickle("raise"),
    "raises_here_inside": lambda: [1, {"a": work.CrashAtPickle("raise")}],
    "exits_here": lambda: work.CrashAtPickle("exit"),
    "exits_here_inside": lambda: [1, {"a": work.CrashAtPickle("exit")}],
    "recurses_here": _RecursesPickled,
    "raises_there": lambda: work.CrashAtUnpickle("raise"),
    "exits_there": lambda: work.CrashAtUnpickle("exit"),
    "exits_there_inside": lambda: [1, work.CrashAtUnpickle("exit")],
    "recurses_there": _RecursesUnpickled,
    "too_deep": lambda: _Deep(2000),
    "class_with_a_lock": _local_with_lock,
    "class_that_will_not_be_made_there": _local_that_needs_home,
    "generator": lambda: (i for i in range(3)),
}


@pytest.mark.parametrize("kind", _BAD_ITEMS)
async def test_a_bad_item_fails_alone(pool: ProcessPoolExecutor, kind: str) -> None:
    """An item that will not be pickled here or unpickled there fails with SerializationError; its neighbours do not."""
    batcher = batched(work.double, executor=pool)
    try:
        results = await answers(batcher, [1, _BAD_ITEMS[kind](), 3, 4])
        assert [results[0], *results[2:]] == [2, 6, 8]
        assert type(results[1]) is SerializationError
        assert "item" in str(results[1])
        assert len(str(results[1])) < 2000
        assert await answers(batcher, [5]) == [10]
    finally:
        sys.modules.pop("only_here", None)
        await batcher.stop(force=True)


@pytest.mark.parametrize("kind", ["class_with_a_lock", "class_that_will_not_be_made_there"])
async def test_a_bad_class_does_no_harm_later(pool: ProcessPoolExecutor, kind: str) -> None:
    """While an item of a class that cannot cross is held somewhere, items of other new classes still cross."""

    class Other:
        pass

    batcher = batched(work.same, executor=pool)
    try:
        bad = _BAD_ITEMS[kind]()
        assert type((await answers(batcher, [bad]))[0]) is SerializationError
        assert type((await answers(batcher, [Other()]))[0]) is Other
        del bad
    finally:
        await batcher.stop(force=True)


async def test_every_item_may_be_bad(pool: ProcessPoolExecutor) -> None:
    """A batch of which nothing can be sent fails item by item, and the worker never hears of it."""
    errors = await trip(pool, [threading.Lock(), threading.Lock()])
    assert [type(error) for error in errors] == [SerializationError] * 2
    errors = await trip(pool, [work.CrashAtUnpickle("raise"), work.CrashAtUnpickle("exit")])
    assert [type(error) for error in errors] == [SerializationError] * 2
    assert "this hurts" in str(errors[0])


async def test_the_batch_is_told_nothing_of_bad_items(pool: ProcessPoolExecutor) -> None:
    """``process_batch`` gets the good items, and an exception of its own reaches their callers only."""

    def process_batch(batch: list[int]) -> list[int]:
        msg = f"batch of {len(batch)}"
        raise LookupError(msg)

    for bad in (threading.Lock(), work.CrashAtUnpickle("raise")):
        results = await trip(pool, [1, bad, 3], process_batch)
        assert [type(result) for result in results] == [LookupError, SerializationError, LookupError]
        assert str(results[0]) == "'batch of 2'" or str(results[0]) == "batch of 2"


def _bad_results(kind: str, index: int) -> Any:
    match kind:
        case "lock":
            return threading.Lock()
        case "lock_inside":
            return {"a": [threading.Lock()]}
        case "raises_there":
            return work.CrashAtPickle("raise")
        case "exits_there":
            return work.CrashAtPickle("exit")
        case "exits_there_inside":
            return [{"a": work.CrashAtPickle("exit")}]
        case "raises_here":
            return work.CrashAtUnpickle("raise")
        case "exits_here":
            return work.CrashAtUnpickle("exit")
        case "recurses_there":
            return _RecursesPickled()
        case "recurses_here":
            return _RecursesUnpickled()
        case "too_deep":
            return _Deep(2000)
        case "class_with_a_lock":
            return _local_with_lock()
        case "generator":
            return (i for i in range(index))
    raise AssertionError


@pytest.mark.parametrize(
    "kind",
    [
        "lock",
        "lock_inside",
        "raises_there",
        "exits_there",
        "exits_there_inside",
        "raises_here",
        "exits_here",
        "recurses_there",
        "recurses_here",
        "too_deep",
        "class_with_a_lock",
        "generator",
    ],
)
async def test_a_bad_result_fails_alone(pool: ProcessPoolExecutor, kind: str) -> None:
    """A result that will not be pickled there or unpickled here fails with SerializationError; its neighbours do not."""

    def process_batch(batch: list[int]) -> list[Any]:
        return [_bad_results(kind, item) if item == 1 else item for item in batch]

    async with batched(process_batch, executor=pool) as batcher:
        for _ in range(2):
            results = await answers(batcher, [0, 1, 2])
            assert [results[0], results[2]] == [0, 2]
            assert type(results[1]) is SerializationError
            assert "result" in str(results[1])
            assert len(str(results[1])) < 2000


async def test_an_exception_that_will_not_cross_fails_alone(pool: ProcessPoolExecutor) -> None:
    """One among the results, which cannot be pickled: BatchError for its item, with its text."""

    class Unsteady(ValueError):  # noqa: N818
        def __str__(self) -> str:
            return f"with a lock, at {id(self)}"

    def process_batch(batch: list[int]) -> list[Any]:
        error = Unsteady()
        return [error if item == 1 else item for item in batch]

    results = await trip(pool, [0, 1, 2], process_batch)
    assert [results[0], results[2]] == [0, 2]
    assert type(results[1]).__name__ == "BatchError"
    assert results[1].original_type.endswith("Unsteady")
    assert "with a lock" in str(results[1])


@pytest.mark.slow
async def test_many_programs_in_one_worker(pool: ProcessPoolExecutor) -> None:
    """A shared worker keeps only so many programs; one that it has dropped is loaded again when it is called."""
    from async_batcher._worker.run_batch import MAX_CACHED_FUNCTIONS

    first = batched(functools.partial(work.scaled, 2), executor=pool, max_queue_time=0)
    assert await answers(first, [1]) == [2]
    for factor in range(MAX_CACHED_FUNCTIONS + 1):
        assert await trip(pool, [1], functools.partial(work.scaled, factor)) == [factor]
    assert await answers(first, [1]) == [2]
    await first.stop()


# Programs of their own.


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
def test_functions_and_classes_of_main_cross(tmp_path: Path, how: str, method: str) -> None:
    """A program's own functions and classes cross, whichever way it is run, wherever a standard pool runs at all."""
    if method == "fork" and sys.platform != "linux":
        pytest.skip("fork is not safe there")
    text = _MAIN.replace("METHOD", repr(method))
    done = scripts.run_any(tmp_path, text, how=how)
    assert (done.returncode, done.stdout) == (0, "good\n"), done.stderr


@pytest.mark.slow
def test_a_worker_does_not_import_asyncio(tmp_path: Path) -> None:
    """For a plain function in a module of its own, a worker loads neither asyncio nor the front end."""
    text = """
        from tests import worker_functions

        async def main():
            import asyncio
            from async_batcher import batched

            async with batched(worker_functions.modules, executor="process", max_workers=1) as batcher:
                loaded = set(await batcher(1))
            assert "async_batcher._worker.run_batch" in loaded
            print(sorted(loaded & {"asyncio", "uvloop", "async_batcher.batcher", "async_batcher._runners.base", "numpy"}))

        if __name__ == "__main__":
            import asyncio
            asyncio.run(main())
    """
    assert scripts.run_script(tmp_path, text) == "[]\n"


@pytest.mark.slow
@pytest.mark.parametrize("how", ["file", "stdin", "command"])
def test_a_program_needs_no_guard(tmp_path: Path, how: str) -> None:
    """A program that starts processes at import works, wherever it is read from, and is run once: no worker runs it again."""
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
def test_a_program_without_a_guard_is_told(tmp_path: Path) -> None:
    """On a standard pool its worker fails: its caller is told what to add, and does not hang."""
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
