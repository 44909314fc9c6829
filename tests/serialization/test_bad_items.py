"""An item, a result or an exception that cannot be pickled fails alone."""

from __future__ import annotations

import os
import sys
import threading
import traceback
from typing import TYPE_CHECKING, Any

import pytest

from async_batcher import batched
from async_batcher.exceptions import SerializationError
from tests.support import worker_functions as work
from tests.support.exception_kinds import uncarriable
from tests.support.round_trip import results_of, round_trip

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import ProcessPoolExecutor

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there is no fork server")


class _Deep:
    """A lock in nested lists."""

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
    parent = os.getpid()

    class Meta(type):
        def __new__(mcs, name: str, bases: tuple[type, ...], namespace: dict[str, Any]) -> Any:
            if os.getpid() != parent:
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
    """An item that cannot be pickled or unpickled fails with SerializationError; others run."""
    batcher = batched(work.double, executor=pool)
    try:
        results = await results_of(batcher, [1, _BAD_ITEMS[kind](), 3, 4])
        assert [results[0], *results[2:]] == [2, 6, 8]
        assert type(results[1]) is SerializationError
        assert "item" in str(results[1])
        assert len(str(results[1])) < 2000
        assert await results_of(batcher, [5]) == [10]
    finally:
        sys.modules.pop("only_here", None)
        await batcher.stop(force=True)


@pytest.mark.parametrize("kind", ["class_with_a_lock", "class_that_will_not_be_made_there"])
async def test_a_bad_class_does_no_harm_later(pool: ProcessPoolExecutor, kind: str) -> None:
    """While an item of a class that cannot be sent exists, items of new classes still run."""

    class Other:
        pass

    batcher = batched(work.same, executor=pool)
    try:
        bad = _BAD_ITEMS[kind]()
        assert type((await results_of(batcher, [bad]))[0]) is SerializationError
        assert type((await results_of(batcher, [Other()]))[0]) is Other
        del bad
    finally:
        await batcher.stop(force=True)


async def test_every_item_may_be_bad(pool: ProcessPoolExecutor) -> None:
    """A batch without any item that can be sent fails item by item, without a trip."""
    errors = await round_trip(pool, [threading.Lock(), threading.Lock()])
    assert [type(error) for error in errors] == [SerializationError] * 2
    errors = await round_trip(pool, [work.CrashAtUnpickle("raise"), work.CrashAtUnpickle("exit")])
    assert [type(error) for error in errors] == [SerializationError] * 2
    assert "this hurts" in str(errors[0])


class _FailsPickled:
    def __reduce__(self) -> Any:
        return _fail_in_user_code()


def _fail_in_user_code() -> Any:
    msg = "not today"
    raise ValueError(msg)


async def test_the_traceback_of_a_bad_item_is_short(pool: ProcessPoolExecutor) -> None:
    """It shows one cause, with the frames of user code only."""
    lock, failing = await round_trip(pool, [threading.Lock(), _FailsPickled()])
    shown = traceback.format_exception(lock.__cause__)
    assert [type(lock.__cause__), len(shown)] == [TypeError, 1], shown
    cause = failing.__cause__
    assert type(cause) is ValueError
    assert cause.__context__ is None
    functions = [frame.name for frame in traceback.extract_tb(cause.__traceback__)]
    assert functions == ["__reduce__", "_fail_in_user_code"]


async def test_the_batch_has_only_the_good_items(pool: ProcessPoolExecutor) -> None:
    """An exception that ``process_batch`` raises reaches only the callers of good items."""

    def process_batch(batch: list[int]) -> list[int]:
        msg = f"batch of {len(batch)}"
        raise LookupError(msg)

    for bad in (threading.Lock(), work.CrashAtUnpickle("raise")):
        results = await round_trip(pool, [1, bad, 3], process_batch)
        assert [type(result) for result in results] == [
            LookupError,
            SerializationError,
            LookupError,
        ]
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
    """A result that cannot be pickled or unpickled fails with SerializationError; others arrive."""

    def process_batch(batch: list[int]) -> list[Any]:
        return [_bad_results(kind, item) if item == 1 else item for item in batch]

    async with batched(process_batch, executor=pool) as batcher:
        for _ in range(2):
            results = await results_of(batcher, [0, 1, 2])
            assert [results[0], results[2]] == [0, 2]
            assert type(results[1]) is SerializationError
            assert "result" in str(results[1])
            assert len(str(results[1])) < 2000


async def test_an_exception_that_cannot_be_pickled_fails_alone(pool: ProcessPoolExecutor) -> None:
    """The caller of its item gets a BatchError with its text."""

    def process_batch(batch: list[int]) -> list[Any]:
        error = uncarriable("with a lock")
        return [error if item == 1 else item for item in batch]

    results = await round_trip(pool, [0, 1, 2], process_batch)
    assert [results[0], results[2]] == [0, 2]
    assert type(results[1]).__name__ == "BatchError"
    assert results[1].original_type.endswith("UncarriableError")
    assert "with a lock" in str(results[1])
