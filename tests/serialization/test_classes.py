"""Items and results, and the classes that travel with them."""

from __future__ import annotations

import abc
import enum
import gc
import sys
import textwrap
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

import pytest

from async_batcher import batched
from tests.support import worker_functions as work
from tests.support.round_trip import results_of, round_trip

if TYPE_CHECKING:
    from concurrent.futures import ProcessPoolExecutor

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there is no fork server")

T = TypeVar("T")


async def test_values_come_back_equal(pool: ProcessPoolExecutor) -> None:
    """Builtins and what importable modules hold, as with pickle."""
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
    results = await round_trip(pool, items)
    assert results == items
    assert [type(result) for result in results] == [type(item) for item in items]
    assert results[4] is work.Colour.RED
    assert results[7] is work.Point


async def test_functions_as_items_and_results(pool: ProcessPoolExecutor) -> None:
    """A lambda may be an item, and one that was created in the worker a result."""
    factor = 3
    assert await round_trip(
        pool, [lambda: factor, lambda: 4], lambda batch: [item() for item in batch]
    ) == [3, 4]
    results = await round_trip(
        pool, [1, 2], lambda batch: [lambda item=item: item * factor for item in batch]
    )
    assert [result() for result in results] == [3, 6]


async def test_classes_come_back_as_themselves(pool: ProcessPoolExecutor) -> None:
    """An instance of a local class comes back with the caller's class, which no batch changes."""

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
            results = await results_of(batcher, [Item(1), Item(2)])
            assert [type(result) for result in results] == [Item, Item]
            assert [result.describe() for result in results] == ["item 1", "item 2"]
            assert Item.__dict__["describe"] is describe
            assert (Item.made, Item.label) == (2 * round_number, "as defined")
    assert await round_trip(pool, [Item]) == [Item]


async def test_a_worker_keeps_the_attributes_of_a_class(pool: ProcessPoolExecutor) -> None:
    """The next batch with instances of a class does not reset a counter on it."""

    class Item:
        seen = 0

    def count(batch: list[Any]) -> list[int]:
        for item in batch:
            type(item).seen += 1
        return [type(item).seen for item in batch]

    async with batched(count, executor=pool, max_queue_time=0) as batcher:
        assert [await results_of(batcher, [Item()]) for _ in range(4)] == [[1], [2], [3], [4]]
    assert Item.seen == 0


async def test_another_batcher_does_not_reset_a_class(pool: ProcessPoolExecutor) -> None:
    """Two batchers of one pool send the same class; neither resets it for the other."""

    class Item:
        seen = 0

    def count(batch: list[Any]) -> list[int]:
        for item in batch:
            type(item).seen += 1
        return [type(item).seen for item in batch]

    async with batched(count, executor=pool) as first, batched(count, executor=pool) as second:
        of_first = [await results_of(first, [Item()]), await results_of(first, [Item()])]
        of_second = await results_of(second, [Item()])
        of_first.append(await results_of(first, [Item()]))
    assert of_first[:2] == [[1], [2]]
    assert (of_second, of_first[2]) in (([1], [3]), ([3], [4]))


async def test_a_function_keeps_its_globals_between_batches(pool: ProcessPoolExecutor) -> None:
    """A function that travels by value keeps the globals that it has bound in the worker."""
    namespace: dict[str, Any] = {"__name__": "__main__", "COUNT": 0}
    code = """
        def process_batch(batch):
            global COUNT
            COUNT += len(batch)
            return [COUNT] * len(batch)
        """
    exec(textwrap.dedent(code), namespace)  # noqa: S102
    async with batched(namespace["process_batch"], executor=pool) as batcher:
        assert [await results_of(batcher, [1, 2]) for _ in range(3)] == [[2, 2], [4, 4], [6, 6]]
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

    return [
        Plain(),
        Child(),
        Data(1, [2]),
        Pair(1),
        Square(),
        WithMeta(),
        Slotted(),
        Box[int](5),
        First(),
        IntLike(7),
    ]


@pytest.mark.parametrize("index", range(10))
async def test_classes_of_all_kinds_make_the_round_trip(
    pool: ProcessPoolExecutor, index: int
) -> None:
    """The same class and an equal object: dataclasses, ABCs, metaclasses, slots, generics."""
    item = _classes()[index]
    for _ in range(2):
        results = await round_trip(pool, [item, [item]])
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

    results = await round_trip(pool, [Colour.RED, Colour.GREEN, Flags.A | Flags.B, Colour])
    assert results[0] is Colour.RED
    assert results[1] is Colour.GREEN
    assert results[1].shade == "green"
    assert results[2] == Flags.A | Flags.B
    assert type(results[2]) is Flags
    assert results[3] is Colour


async def test_classes_that_refer_to_each_other(pool: ProcessPoolExecutor) -> None:
    """Objects of two such classes make the round trip, whichever comes first."""

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
        results = await round_trip(pool, items, swap)
        assert [type(result) for result in results] == [
            B if isinstance(item, A) else A for item in items
        ]
        assert A.partner is B
        assert B.partner is A


async def test_objects_that_refer_to_each_other(pool: ProcessPoolExecutor) -> None:
    """Cycles of objects, and of an object and its class, stay cycles."""

    class Node:
        first: Any = None

        def __init__(self) -> None:
            self.me = self

    Node.first = Node()
    (result,) = await round_trip(pool, [Node()])
    assert type(result) is Node
    assert result.me is result
    assert type(Node.first) is Node


async def test_two_classes_of_one_name(pool: ProcessPoolExecutor) -> None:
    """Classes with the same name and code stay apart."""

    def make(value: int) -> Any:
        class Item:
            def get(self) -> int:
                return value

        return Item()

    items = [make(1), make(2)]
    results = await round_trip(pool, items)
    assert [result.get() for result in results] == [1, 2]
    assert [type(result) for result in results] == [type(item) for item in items]


async def test_a_class_created_in_the_worker_comes_back_by_value(pool: ProcessPoolExecutor) -> None:
    """It is one class for as long as the caller refers to it."""

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
        first = await results_of(batcher, [1, 2])
        second = await results_of(batcher, [3])
    assert [result.double() for result in first + second] == [2, 4, 6]
    assert len({type(result) for result in first + second}) == 1


async def test_classes_that_only_the_function_knows(pool: ProcessPoolExecutor) -> None:
    """A class that arrived with the function comes back as the caller's, also as an exception."""

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
        results = await results_of(batcher, [1, 2, 3])
        assert [type(result) for result in results] == [Refusal, Answer, Answer]
        errors = await results_of(batcher, [0, 1])
        assert [type(error) for error in errors] == [Refusal] * 2
        assert str(errors[0]) == "no zeros"


async def test_classes_are_freed_on_the_callers_side(pool: ProcessPoolExecutor) -> None:
    """With a new local class per batch, the caller's side keeps no unused ones."""
    classes: list[weakref.ref[type]] = []

    def make() -> Any:
        class Item:
            pass

        classes.append(weakref.ref(Item))
        return Item()

    async with batched(work.same, executor=pool, max_queue_time=0) as batcher:
        for _ in range(20):
            (result,) = await results_of(batcher, [make()])
            assert type(result) is classes[-1]()
            del result
        gc.collect()
        assert sum(reference() is not None for reference in classes) <= 2


async def test_classes_created_in_the_worker_are_freed(
    pool: ProcessPoolExecutor,
) -> None:
    """With a new class per batch, created in the worker, no unused ones stay."""

    def process_batch(batch: list[int]) -> list[Any]:
        class Made:
            pass

        return [Made() for _ in batch]

    classes: list[weakref.ref[type]] = []
    async with batched(process_batch, executor=pool, max_queue_time=0) as batcher:
        for _ in range(20):
            (result,) = await results_of(batcher, [1])
            classes.append(weakref.ref(type(result)))
            del result
        gc.collect()
        assert sum(reference() is not None for reference in classes) <= 2


@pytest.mark.slow
async def test_arrays_make_the_round_trip(pool: ProcessPoolExecutor, numpy: Any) -> None:
    """Arrays are equal and writable, and share no memory with other arrays."""
    items = [numpy.arange(6).reshape(2, 3) + i for i in range(3)]

    def add_one(batch: list[Any]) -> list[Any]:
        for array in batch:
            numpy.add(array, 1, out=array)  # what arrived may be written to
        return batch

    results = await round_trip(pool, items, add_one)
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
    for item, result in zip(strange, await round_trip(pool, strange), strict=True):
        assert type(result) is type(item)
        assert result.dtype == item.dtype
        assert (result == item).all()


async def test_arrays_of_local_objects_make_the_round_trip(
    pool: ProcessPoolExecutor, numpy: Any
) -> None:
    """The objects in an object array come back with the caller's class."""

    class Item:
        pass

    array = numpy.array([Item(), Item()], dtype=object)
    (result,) = await round_trip(pool, [array])
    assert [type(item) for item in result] == [Item, Item]
