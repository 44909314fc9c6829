"""Calls for many items: on a virtual clock, with a runner that does what the test says."""

from __future__ import annotations

import asyncio
import gc
import sys
import weakref
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from async_batcher import batched
from async_batcher._batching.bulk import Slice
from async_batcher._eventloop.future import FastFuture
from async_batcher.exceptions import (
    BatchError,
    BatcherStoppedError,
    BatchTimeoutError,
    ItemTimeoutError,
    QueueFullException,
)
from tests.support.virtual_clock import FakeBatcher as Rig
from tests.support.virtual_clock import VirtualLoop

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.virtual_clock

NO_LIMIT = sys.maxsize


def now() -> float:
    """Virtual seconds."""
    return asyncio.get_running_loop().time()


async def turn(times: int = 3) -> None:
    """Let the loop go round."""
    for _ in range(times):
        await asyncio.sleep(0)


def many(rig: Rig, items: Any, **kwargs: Any) -> asyncio.Task[Any]:
    """A caller of his own."""
    return asyncio.create_task(rig.process_many(items, **kwargs))


async def busy(rig: Rig, slots: int = 1) -> list[asyncio.Task[Any]]:
    """Keep every slot busy."""
    calls = []
    for slot in range(slots):
        calls.append(rig.call(f"busy {slot}"))
        await turn()
    return calls


# ---- results


@pytest.mark.parametrize("size", [1, 3, 4, 100, -1])
@pytest.mark.parametrize("count", [0, 1, 4, 9])
async def test_results_come_in_order(size: int, count: int) -> None:
    """In as many batches as it takes, which end in any order."""
    rig = Rig(max_batch_size=size, concurrency=-1)
    call = many(rig, (f"item {i}" for i in range(count)))
    await turn(4)
    assert [item for batch in rig.batches for item in batch] == [f"item {i}" for i in range(count)]
    while rig.runner.running:
        rig.runner.end(len(rig.runner.running) - 1)
    assert await call == [f"item {i}" for i in range(count)]
    await rig.stop()


@pytest.mark.parametrize(("slots", "sizes"), [(1, [10]), (3, [4, 4, 2]), (4, [3, 3, 3, 1]), (16, [1] * 10)])
async def test_without_a_size_limit_items_are_spread_over_the_free_workers(slots: int, sizes: list[int]) -> None:
    """One batch for each, rather than one batch."""
    rig = Rig(concurrency=slots)
    call = many(rig, range(10))
    await turn()
    assert [len(batch) for batch in rig.batches] == sizes
    while rig.runner.running:
        rig.runner.end()
    assert await call == list(range(10))
    await rig.stop()


async def test_what_came_while_all_workers_were_busy_is_spread_too() -> None:
    """The first slot that frees leaves their part to the others, also if that came in several calls."""
    rig = Rig(concurrency=2)
    await busy(rig, 2)
    calls = [many(rig, range(start, start + 3)) for start in (0, 3, 6, 9)]
    await turn()
    for _ in range(3):
        rig.runner.end()
        await turn()
    assert rig.batches[2:] == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]]
    rig.runner.end()
    assert [item for items in await asyncio.gather(*calls) for item in items] == list(range(12))
    await rig.stop()


async def test_with_any_number_of_batches_at_a_time_the_workers_count() -> None:
    """``concurrency=-1`` does not say over how many they are to be spread; the pool does."""
    sizes = []

    def process_batch(batch: list[int]) -> list[int]:
        sizes.append(len(batch))
        return batch

    class Inline(Executor):
        _max_workers = 1

        def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
            future: Future[Any] = Future()
            future.set_result(fn(*args, **kwargs))
            return future

    async with batched(process_batch, executor=Inline(), concurrency=-1, max_queue_time=0) as batcher:
        assert await batcher.process_many(range(6)) == list(range(6))
    assert sizes == [6]


async def test_single_items_share_its_batches() -> None:
    """First in, first out, whoever called how."""
    rig = Rig(max_batch_size=4)
    calls = [rig.call(0), many(rig, [1, 2]), rig.call(3), many(rig, [4, 5, 6]), rig.call(7)]
    await turn()
    rig.runner.end()
    await turn()
    assert rig.batches == [[0, 1, 2, 3], [4, 5, 6, 7]]
    rig.runner.end()
    assert await asyncio.gather(*calls) == [0, [1, 2], 3, [4, 5, 6], 7]
    await rig.stop()


async def test_the_window_holds_for_many_too() -> None:
    """A part of a call that fills no batch waits for others, and no longer than the window."""
    rig = Rig(max_batch_size=4, max_queue_time=5.0, concurrency=2)
    began = now()
    call = many(rig, range(6))
    await turn()
    assert rig.batches == [[0, 1, 2, 3]]
    rig.runner.end()
    await asyncio.sleep(4.5)
    assert len(rig.batches) == 1
    single = rig.call("single")
    await asyncio.sleep(0.5)
    assert (now() - began, rig.batches[1]) == (5.0, [4, 5, "single"])
    rig.runner.end()
    assert (await call, await single) == (list(range(6)), "single")
    await rig.stop()


async def test_no_future_and_no_task_for_an_item() -> None:
    """A call for 100,000 items makes one future, and the objects of a batch."""
    rig = Rig(max_batch_size=50_000, concurrency=2)
    gc.collect()
    before = {id(thing) for thing in gc.get_objects()}
    call = many(rig, [None] * 100_000)
    await turn()
    things = [thing for thing in gc.get_objects() if isinstance(thing, asyncio.Future | FastFuture | Slice)]
    made = [type(thing) for thing in things if id(thing) not in before]
    assert Slice in made
    assert len(made) < 20
    assert len(asyncio.all_tasks()) == 2
    rig.runner.end()
    rig.runner.end()
    assert await call == [None] * 100_000
    await rig.stop()


async def test_items_are_read_at_once() -> None:
    """What the caller does to his list later changes nothing."""
    rig = Rig(max_batch_size=2, max_queue_size=2, when_full="wait")
    await busy(rig)
    items = list(range(6))
    call = many(rig, items)
    await turn()
    items.clear()
    for _ in range(4):
        rig.runner.end()
        await turn()
    assert await call == list(range(6))
    await rig.stop()


@pytest.mark.parametrize("items", [None, 7])
async def test_what_cannot_be_iterated_is_refused(items: Any) -> None:
    """At once, and nothing is queued."""
    rig = Rig()
    with pytest.raises(TypeError, match="iterable"):
        await rig.process_many(items)
    with pytest.raises(TypeError, match="iterable"):
        rig.map(items)
    with pytest.raises(ValueError, match="timeout"):
        await rig.process_many([1], timeout=-1)
    assert rig.stats().queued == 0
    await rig.stop()


async def test_an_iterable_that_raises_queues_nothing() -> None:
    """Its error is the caller's."""

    def items() -> Iterator[int]:
        yield 1
        raise ZeroDivisionError

    rig = Rig()
    with pytest.raises(ZeroDivisionError):
        await rig.process_many(items())
    assert rig.stats().queued == 0
    await rig.stop()


# ---- failures


async def test_the_first_failure_is_raised_and_drops_what_is_queued() -> None:
    """Batches that run go on, and others' items are untouched."""
    rig = Rig(max_batch_size=2, concurrency=2)
    call = many(rig, range(7))
    await turn()
    other = many(rig, ["a", "b", "c"])
    await turn()
    assert rig.batches == [[0, 1], [2, 3]]
    rig.runner.end(1, [2, ZeroDivisionError("three")])
    with pytest.raises(ZeroDivisionError, match="three"):
        await call
    assert rig.runner.cancelled in ([], [([0, 1], False)])
    assert rig.batches[2:] == [["a", "b"]]
    rig.runner.end()
    await asyncio.sleep(0.1)
    assert rig.batches[3:] == [["c"]]
    rig.runner.end()
    rig.runner.end()
    assert await other == ["a", "b", "c"]
    stats = rig.stats()
    assert (stats.done, stats.failed) == (3, 7)
    await rig.stop()


async def test_a_batch_that_fails_fails_the_call() -> None:
    """With an exception of its own, of the same type; the other callers of that batch get theirs."""
    rig = Rig(max_batch_size=3)
    call, single = many(rig, [0, 1]), rig.call(2)
    await turn()
    rig.runner.end(0, ZeroDivisionError("both"))
    errors = await asyncio.gather(call, single, return_exceptions=True)
    assert [type(error) for error in errors] == [ZeroDivisionError] * 2
    assert errors[0] is not errors[1]
    await rig.stop()


async def test_exceptions_among_the_results() -> None:
    """With ``return_exceptions`` each failed item has its own in its place, and nothing is dropped."""
    rig = Rig(max_batch_size=2)
    call = many(rig, range(6), return_exceptions=True)
    await turn()
    rig.runner.end(0, [0, ValueError("one")])
    await turn()
    rig.runner.end(0, ZeroDivisionError("two and three"))
    await turn()
    rig.runner.end()
    results = await call
    assert [type(result) for result in results] == [int, ValueError, ZeroDivisionError, ZeroDivisionError, int, int]
    assert results[2] is not results[3]
    stats = rig.stats()
    assert (stats.done, stats.failed) == (3, 3)
    await rig.stop()


@pytest.mark.parametrize("strict", [True, False])
async def test_the_guilty_of_many_stand_alone(strict: bool) -> None:  # noqa: FBT001 - a parameter
    """With ``isolate_failures`` the innocent of a bulk call get their results."""

    async def process_batch(batch: list[int]) -> list[float]:
        return [1 / item for item in batch]

    async with batched(process_batch, isolate_failures=True, max_batch_size=5, max_queue_time=0) as batcher:
        items = [1, 2, 0, 4, 5, 0, 8]
        if strict:
            with pytest.raises(ZeroDivisionError):
                await batcher.process_many(items)
        else:
            results = await batcher.process_many(items, return_exceptions=True)
            expected = [1 / item if item else ZeroDivisionError for item in items]
            assert [type(r) if isinstance(r, Exception) else r for r in results] == expected


# ---- who leaves, and deadlines


async def test_a_call_that_is_cancelled() -> None:
    """What is queued of it is never run, and what runs goes on for the others of its batch."""
    rig = Rig(max_batch_size=3)
    single, call, last = rig.call("single"), many(rig, range(6)), rig.call("last")
    await turn()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    stats = rig.stats()
    assert (stats.queued, stats.running, stats.cancelled) == (1, 1, 6)
    rig.runner.end()
    assert await single == "single"
    await turn()
    assert rig.batches == [["single", 0, 1], ["last"]]
    rig.runner.end()
    assert await last == "last"
    await rig.stop()


@pytest.mark.parametrize("ends", [True, False])
async def test_batches_of_a_call_that_is_cancelled_are_ended(ends: bool) -> None:  # noqa: FBT001 - a parameter
    """All of them, if abandoned batches are ended."""
    rig = Rig(max_batch_size=2, concurrency=2, cancel_abandoned=ends)
    call = many(rig, range(6))
    await turn()
    call.cancel()
    await turn()
    assert [force for _, force in rig.runner.cancelled] == [ends, ends]
    await rig.stop(force=True)


@pytest.mark.parametrize("way", ["item_timeout", "timeout"])
async def test_the_deadline_of_many(way: str) -> None:
    """It is that of all of them, counted from the call on: then the call fails, and what is queued is never run."""
    rig = Rig(max_batch_size=2, **({way: 5.0} if way == "item_timeout" else {}))
    began = now()
    call = many(rig, range(6), **({way: 5.0} if way == "timeout" else {}))
    await asyncio.sleep(1.0)
    rig.runner.end()
    with pytest.raises(ItemTimeoutError, match=r"4 of 6 items had no result within 5\.0 seconds"):
        await call
    assert now() == began + 5.0
    rig.runner.end()
    await turn()
    assert rig.batches == [[0, 1], [2, 3]]
    stats = rig.stats()
    assert (stats.done, stats.timed_out, stats.queued) == (2, 4, 0)
    await rig.stop()


async def test_what_came_before_the_deadline_counts() -> None:
    """With ``return_exceptions`` the others have ItemTimeoutError in their place."""
    rig = Rig(max_batch_size=2)
    call = many(rig, range(5), return_exceptions=True, timeout=5.0)
    await turn()
    rig.runner.end()
    results = await call
    assert results[:2] == [0, 1]
    assert [type(result) for result in results[2:]] == [ItemTimeoutError] * 3
    assert len({id(result) for result in results[2:]}) == 3
    await rig.stop(force=True)


# ---- a full queue


async def test_a_full_queue_admits_all_or_none() -> None:
    """With "raise" nothing is taken of what does not fit; what is refused is counted."""
    rig = Rig(max_queue_size=4, max_batch_size=1)
    await busy(rig)
    first = many(rig, range(3))
    await turn()
    with pytest.raises(QueueFullException, match=r"no capacity for 2 more items \(3 items queued, max_queue_size=4\)"):
        await rig.process_many([3, 4])
    assert (rig.stats().queued, rig.stats().rejected) == (3, 2)
    last = many(rig, [3])
    await turn()
    for _ in range(5):
        rig.runner.end()
        await turn()
    assert (await first, await last) == ([0, 1, 2], [3])
    await rig.stop()


async def test_a_full_queue_admits_piece_by_piece() -> None:
    """With "wait" a call for more than fit into the queue gets in as there is room, and nobody overtakes it."""
    rig = Rig(max_queue_size=3, max_batch_size=2, when_full="wait")
    await busy(rig)
    call, single = many(rig, range(8)), None
    await turn()
    single = rig.call("single")
    await turn()
    stats = rig.stats()
    assert (stats.queued, stats.blocked) == (3, 6)
    for _ in range(6):
        rig.runner.end()
        await turn()
        assert rig.stats().queued <= 3
    assert rig.batches[1:] == [[0, 1], [2, 3], [4, 5], [6, 7], ["single"]]
    assert await call == list(range(8))
    assert await single == "single"
    await rig.stop()


async def test_one_that_waits_for_room_may_leave() -> None:
    """With what has got in and what has not."""
    rig = Rig(max_queue_size=3, max_batch_size=2, when_full="wait")
    await busy(rig)
    call, last = many(rig, range(8)), rig.call("last")
    await turn()
    call.cancel()
    await turn()
    stats = rig.stats()
    assert (stats.queued, stats.blocked, stats.cancelled) == (1, 0, 8)
    rig.runner.end()
    await turn()
    rig.runner.end()
    assert await last == "last"
    await rig.stop()


async def test_when_every_slot_is_lost() -> None:
    """A call that waits in the queue and for room is told, and so is one that comes later."""
    rig = Rig(max_queue_size=3, max_batch_size=1, when_full="wait")
    await busy(rig)
    call = many(rig, range(8), return_exceptions=True)
    await turn()
    rig.runner.late[0](BatchTimeoutError("too long"))
    assert {type(error) for error in await call} == {BatchTimeoutError}
    with pytest.raises(BatchTimeoutError, match="every batch"):
        await rig.process_many([1, 2])
    await rig.stop(force=True)


# ---- the end


@pytest.mark.parametrize("force", [False, True])
async def test_stop(force: bool) -> None:  # noqa: FBT001 - a parameter
    """What is in the queue is run, unless forced; then the call fails, and no error is lost in a future that nobody awaits."""
    rig = Rig(max_batch_size=2)
    call, mixed = many(rig, range(6)), many(rig, range(6, 9), return_exceptions=True)
    await turn()
    stopping = asyncio.create_task(rig.stop(force=force))
    await turn()
    while rig.runner.running:
        rig.runner.end()
        await turn()
    await stopping
    if force:
        with pytest.raises(BatcherStoppedError):
            await call
        assert {type(error) for error in await mixed} == {BatcherStoppedError}
    else:
        assert (await call, await mixed) == (list(range(6)), [6, 7, 8])
    with pytest.raises(BatcherStoppedError):
        await rig.process_many([1, 2])
    with pytest.raises(BatcherStoppedError):
        await rig.process_many([])


async def test_a_forced_stop_ends_batches_that_have_not_begun() -> None:
    """Though they end while those who wait are told, one after the other: everyone is told, and the batcher stops."""
    rig = Rig(max_batch_size=1, concurrency=8)
    begun: list[Any] = []

    def end_early(batch: list[Any], on_done: Callable[[Any], None], on_timeout: object, has_callers: object) -> Any:  # noqa: ARG001 - as a runner's
        begun.append(batch)

        def end(force: bool) -> None:  # noqa: ARG001, FBT001 - as a runner's
            if batch in begun:
                begun.remove(batch)
                on_done(BatcherStoppedError("not begun"))

        return end

    rig.runner.submit = end_early  # type: ignore[method-assign]
    calls = [many(rig, range(4)), rig.call(4), many(rig, range(5, 9), return_exceptions=True), rig.call(9)]
    await turn()
    await rig.stop(force=True)
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [BatcherStoppedError, BatcherStoppedError, list, BatcherStoppedError]


class Unhashable(type):
    """A metaclass whose classes have no hash."""

    def __eq__(cls, other: object) -> bool:
        """Takes the hash away."""
        return cls is other

    __hash__ = None  # type: ignore[assignment]


class Strange(metaclass=Unhashable):
    """A result of a type without a hash."""


class HostileError(Exception):
    """An exception that does not let itself be looked at."""

    @property
    def args(self) -> Any:  # type: ignore[override]
        """Raises."""
        raise ZeroDivisionError

    @property
    def __traceback__(self) -> Any:  # type: ignore[override]
        """Raises."""
        raise ZeroDivisionError


@pytest.mark.parametrize("answer", [Strange(), HostileError()], ids=["no hash", "hostile"])
async def test_answers_that_are_hard_to_handle(answer: Any) -> None:
    """Are handed out, or are an error; nobody waits in vain, and the slot is free again."""
    rig = Rig(max_batch_size=3)
    calls = [many(rig, [0, 1], return_exceptions=True), rig.call(2)]
    await turn()
    rig.runner.end(0, [answer] * 3)
    several: Any
    several, single = await asyncio.gather(*calls, return_exceptions=True)
    if isinstance(answer, Strange):
        assert (several, single) == ([answer, answer], answer)
    else:
        assert {type(error) for error in (*several, single)} <= {HostileError, BatchError}
    after = rig.call("after")
    await asyncio.sleep(0.1)
    rig.runner.end()
    assert await after == "after"
    await rig.stop()


@pytest.mark.parametrize("strict", [True, False])
async def test_a_deadline_keeps_nothing_that_is_over(strict: bool) -> None:  # noqa: FBT001 - a parameter
    """Results are not kept until the time that their call had."""

    class Result:
        """Something that can be watched."""

    rig = Rig(item_timeout=1000.0)
    call, busy_one = many(rig, [0], return_exceptions=not strict), None
    await turn()
    busy_one = rig.call("busy")
    rig.runner.end(0, [Result()])
    (result,) = await call
    watched = weakref.ref(result)
    del result, call
    await turn()  # the loop lets the task go
    assert watched() is None
    rig.runner.end()
    assert await busy_one == "busy"
    await rig.stop()


async def test_a_failed_call_holds_nothing() -> None:
    """Neither its items nor its frame are kept by the exception's traceback, nor by the batcher."""

    class Item:
        """Something that can be watched."""

    rig = Rig(max_batch_size=1)
    items = [Item(), Item()]
    watched = [weakref.ref(item) for item in items]
    call = many(rig, items)
    await turn()
    rig.runner.end(0, ZeroDivisionError())
    rig.runner.batches.clear()
    with pytest.raises(ZeroDivisionError):
        await call
    del items, call
    assert [ref() for ref in watched] == [None, None]
    await rig.stop()


# ---- everything at once


@dataclass
class Call:
    """A call for some items.

    Attributes:
        items: Their numbers.
        task: The caller.
        kind: "one", "strict" (many), "mixed" (many, with exceptions among the results) or "stream".
        deadline: When it has no time left.
        window: Of a stream.
        read: Items that a stream has read.
        results: What a stream has given.
    """

    kind: str
    items: list[int]
    deadline: float
    window: int = 0
    results: list[Any] = field(default_factory=list)
    task: asyncio.Task[Any] | None = None
    is_late: bool = False


TIMES = st.sampled_from([None, 0.5, 1.0, 3.0])
EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("one"), st.just(1), TIMES),
        st.tuples(st.sampled_from(["strict", "mixed"]), st.integers(1, 9), TIMES),
        st.tuples(st.just("stream"), st.integers(0, 12), st.integers(1, 6)),
        st.tuples(st.just("cancel"), st.integers(0, 12), st.none()),
        st.tuples(st.just("sleep"), st.sampled_from([0, 1, 2, 4, 8]), st.none()),
        st.tuples(st.just("end"), st.integers(0, 5), st.none()),
        st.tuples(st.just("raise"), st.integers(0, 5), st.none()),
        st.tuples(st.just("spoil"), st.integers(0, 5), st.none()),
        st.tuples(st.just("stop"), st.just(0), st.booleans()),
    ),
    max_size=50,
)


class Scenario:
    """Calls of all kinds, in any order, and what must be so all the time."""

    def __init__(self, rig: Rig, *, size: int, slots: int, room: int, isolates: bool, item_timeout: float | None) -> None:
        self.rig = rig
        self.size, self.slots, self.room = (limit if limit > 0 else NO_LIMIT for limit in (size, slots, room))
        self.isolates = isolates
        self.item_timeout = item_timeout
        self.calls: list[Call] = []
        self.call_of: dict[int, Call] = {}
        self.begun: list[int] = []
        self.failed: set[int] = set()
        self.stops: list[asyncio.Task[None]] = []
        self._run, rig.runner.submit = rig.runner.submit, self.run  # type: ignore[method-assign]

    def run(self, batch: list[Any], on_done: Callable[[Any], None], on_timeout: Any, has_callers: Any) -> Any:
        """A batch begins: it may."""
        assert 0 < len(batch) <= self.size
        for item in batch:
            call = self.call_of[item]
            assert call.task is not None
            assert not call.task.done(), "begun for one who has gone, or has been told"
            assert call.window or now() < call.deadline, "begun after its deadline"
            if not any(other.window for other in self.calls):  # a feeder may go on in the turn before a cancelled task's
                assert not call.task.cancelling(), "begun for one who has gone"
        fresh = [item for item in batch if item not in self.begun]
        assert self.isolates or fresh == batch, "run twice"
        self.begun += fresh
        return self._run(batch, on_done, on_timeout, has_callers)

    def call(self, kind: str, count: int, extra: Any) -> None:
        """Somebody calls."""
        is_stream = kind == "stream"
        seconds = self.item_timeout if extra is None or is_stream else extra
        call = Call(kind, [], now() + (NO_LIMIT if seconds is None else seconds), window=extra if is_stream else 0)
        call.is_late = bool(self.stops)
        self.calls.append(call)
        numbers = self._numbers(call, count)
        if is_stream:
            call.task = asyncio.create_task(self._consume(call, numbers, ordered=bool(count % 2)))
            return
        items = list(numbers)
        if kind == "one":
            call.task = self.rig.call(items[0], timeout=extra)
        else:
            call.task = many(self.rig, items, return_exceptions=kind == "mixed", timeout=extra)

    def _numbers(self, call: Call, count: int) -> Iterator[int]:
        for _ in range(count):
            number = len(self.call_of)
            self.call_of[number] = call
            call.items.append(number)
            assert not call.window or len(call.items) - len(call.results) <= call.window, "read further than the window"
            yield number

    async def _consume(self, call: Call, numbers: Iterator[int], *, ordered: bool) -> None:
        async for result in self.rig.map(numbers, ordered=ordered, window=call.window, return_exceptions=True):
            call.results.append(result)
            await asyncio.sleep(0.25 * (len(call.results) % 3))

    def spoil(self, index: int) -> None:
        """A running batch ends with an exception as the answer of every other item."""
        batch = self.rig.runner.running[index][0]
        self.failed.update(batch[::2])
        self.rig.runner.end(index, [item if place % 2 else ZeroDivisionError(item) for place, item in enumerate(batch)])

    def look(self) -> None:
        """The limits are kept, and the counts are true."""
        assert len(self.rig.runner.running) <= self.slots
        stats = self.rig.stats()
        assert stats.queued <= self.room
        assert stats.rejected == sum(len(c.items) for c in self.calls if self._is_refused(c))

    @staticmethod
    def _is_refused(call: Call) -> bool:
        task = call.task
        assert task is not None
        return task.done() and not task.cancelled() and isinstance(task.exception(), QueueFullException)

    async def finish(self, *, force: bool) -> None:
        """Stop, and see that nobody waits, and that everybody has got what is true."""
        self.stops.append(asyncio.create_task(self.rig.stop(force=force)))
        await turn()
        while self.rig.runner.running:
            self.rig.runner.end()
            await turn(1)
            self.look()
        await asyncio.gather(*self.stops)
        await asyncio.sleep(10.0)  # consumers have their pauses
        if not any(call.window for call in self.calls):
            assert self.begun == sorted(self.begun), "first in, first out"
        for call in self.calls:
            assert call.task is not None
            assert call.task.done(), "somebody waits in vain"
            if not call.task.cancelled():
                self._check(call, call.task)
        stats = self.rig.stats()
        assert stats.queued == stats.blocked == stats.running == 0
        if not any(call.window for call in self.calls):  # what a stream has read when the batcher stops is nowhere
            taken = sum(len(call.items) for call in self.calls if not call.is_late and not self._is_refused(call))
            assert stats.done + stats.failed + stats.cancelled + stats.timed_out == taken
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        assert loop.timers() == 0

    def _check(self, call: Call, task: asyncio.Task[Any]) -> None:
        error = task.exception()
        if call.window:
            assert error is None or isinstance(error, BatcherStoppedError)
            results = call.results
            self._check_results(call, sorted(results, key=lambda result: result if type(result) is int else -1), is_sorted=True)
        elif error is not None:
            self._check_error(call, error, call.items)
        else:
            self._check_results(call, [task.result()] if call.kind == "one" else task.result())

    def _check_results(self, call: Call, results: list[Any], *, is_sorted: bool = False) -> None:
        if is_sorted:
            whole = [result for result in results if type(result) is int]
            assert len(set(whole)) == len(whole)
            assert set(whole) <= set(call.items) & set(self.begun)
            assert len(results) <= len(call.items)
            for result in results[: len(results) - len(whole)]:
                self._check_error(call, result, call.items)
            return
        for item, result in zip(call.items, results, strict=True):
            if isinstance(result, Exception):
                assert call.kind == "mixed"
                self._check_error(call, result, [item])
            else:
                assert result == item
                assert item in self.begun

    def _check_error(self, call: Call, error: BaseException, items: list[int]) -> None:
        if isinstance(error, ItemTimeoutError):
            assert call.window or now() >= call.deadline
        elif isinstance(error, ZeroDivisionError):
            assert set(items) & self.failed
        elif isinstance(error, BatcherStoppedError):
            assert self.stops
        else:
            assert isinstance(error, QueueFullException)


@settings(max_examples=150, deadline=None)
@given(
    EVENTS,
    st.sampled_from([1, 2, 4, -1]),
    st.sampled_from([1, 2, -1]),
    st.sampled_from([1, 3, 10, -1]),
    st.booleans(),
    st.booleans(),
    st.sampled_from([None, 0.75, 2.0]),
    st.booleans(),
)
def test_whatever_happens(
    events: list[tuple[str, Any, Any]],
    size: int,
    slots: int,
    room: int,
    waits: bool,  # noqa: FBT001 - drawn
    isolates: bool,  # noqa: FBT001
    item_timeout: float | None,
    force: bool,  # noqa: FBT001
) -> None:
    """Calls for one and for many, streams, departures, deadlines, failures and stops in any order.

    Every caller gets each item's own result or a true error; nothing is begun for nobody, or too late; first in, first out;
    limits and windows are kept; what is counted adds up.
    """

    async def scenario() -> None:
        rig = Rig(
            max_batch_size=size,
            concurrency=slots,
            max_queue_size=room,
            when_full="wait" if waits else "raise",
            isolate_failures=isolates,
            item_timeout=item_timeout,
            max_queue_time=0.25,
        )
        it = Scenario(rig, size=size, slots=slots, room=room, isolates=isolates, item_timeout=item_timeout)
        for kind, value, extra in events:
            if kind in ("one", "strict", "mixed", "stream"):
                it.call(kind, value, extra)
                await asyncio.sleep(0)
            elif kind == "cancel" and value < len(it.calls):
                task = it.calls[value].task
                assert task is not None
                task.cancel()
                await asyncio.sleep(0)
            elif kind == "sleep":
                for _ in range(value):
                    await asyncio.sleep(0.25)
                    it.look()
                await asyncio.sleep(0)
            elif kind == "stop":
                it.stops.append(asyncio.create_task(rig.stop(force=extra)))
                await asyncio.sleep(0)
            elif kind in ("end", "raise", "spoil") and value < len(rig.runner.running):
                if kind == "spoil":
                    it.spoil(value)
                elif kind == "raise":
                    it.failed.update(rig.runner.running[value][0])
                    rig.runner.end(value, ZeroDivisionError("poison"))
                else:
                    rig.runner.end(value)
            it.look()
        await it.finish(force=force)

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(scenario())
