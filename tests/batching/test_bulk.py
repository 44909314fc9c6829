"""`process_many`, on a virtual clock."""

from __future__ import annotations

import asyncio
import gc
import weakref
from concurrent.futures import Executor, Future
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from async_batcher import batched
from async_batcher._batching.bulk.slices import Slice
from async_batcher._eventloop.future import FastFuture
from async_batcher.exceptions import (
    BatchError,
    BatcherStoppedError,
    BatchTimeoutError,
    ItemTimeoutError,
    QueueFullException,
)
from async_batcher.failures import isolate
from tests.support.polling import turn
from tests.support.virtual_clock import FakeBatcher, now

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.virtual_clock


async def occupy(batcher: FakeBatcher, slots: int = 1) -> list[asyncio.Task[Any]]:
    """Occupy every slot with a batch of one item."""
    calls = []
    for slot in range(slots):
        calls.append(batcher.call(f"busy {slot}"))
        await turn()
    return calls


@pytest.mark.parametrize("size", [1, 3, 4, 100, -1])
@pytest.mark.parametrize("count", [0, 1, 4, 9])
async def test_process_many_returns_results_in_order(size: int, count: int) -> None:
    """The batches may finish in any order."""
    batcher = FakeBatcher(max_batch_size=size, concurrency=-1)
    call = batcher.call_many(f"item {i}" for i in range(count))
    await turn(4)
    assert [item for batch in batcher.batches for item in batch] == [
        f"item {i}" for i in range(count)
    ]
    while batcher.runner.running:
        batcher.runner.end(len(batcher.runner.running) - 1)
    assert await call == [f"item {i}" for i in range(count)]
    await batcher.stop()


@pytest.mark.parametrize(
    ("slots", "sizes"), [(1, [10]), (3, [4, 4, 2]), (4, [3, 3, 3, 1]), (16, [1] * 10)]
)
async def test_without_a_size_limit_items_are_spread_over_the_free_workers(
    slots: int, sizes: list[int]
) -> None:
    """Each free worker gets a batch, rather than one of them all items."""
    batcher = FakeBatcher(concurrency=slots)
    call = batcher.call_many(range(10))
    await turn()
    assert [len(batch) for batch in batcher.batches] == sizes
    while batcher.runner.running:
        batcher.runner.end()
    assert await call == list(range(10))
    await batcher.stop()


class _IterableBothWays(list[int]):
    def __aiter__(self) -> Any:
        raise AssertionError


async def test_items_that_are_also_async_iterable() -> None:
    """Progress bars are both."""
    batcher = FakeBatcher()
    call = batcher.call_many(_IterableBothWays([1, 2]))
    await turn()
    assert batcher.batches == [[1, 2]]
    batcher.runner.end()
    await call
    await batcher.stop()


async def test_items_queued_while_all_workers_were_busy_are_spread() -> None:
    """The first free slot leaves a share to the others, even of several calls."""
    batcher = FakeBatcher(concurrency=2)
    await occupy(batcher, 2)
    calls = [batcher.call_many(range(start, start + 3)) for start in (0, 3, 6, 9)]
    await turn()
    for _ in range(3):
        batcher.runner.end()
        await turn()
    assert batcher.batches[2:] == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]]
    batcher.runner.end()
    assert [item for items in await asyncio.gather(*calls) for item in items] == list(range(12))
    await batcher.stop()


async def test_with_unlimited_concurrency_items_are_spread_over_workers() -> None:
    """With ``concurrency=-1`` the number of workers of the executor decides."""
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

    async with batched(
        process_batch, executor=Inline(), concurrency=-1, max_queue_time=0
    ) as batcher:
        assert await batcher.process_many(range(6)) == list(range(6))
    assert sizes == [6]


async def test_single_and_bulk_calls_share_batches() -> None:
    """First in, first out, for both kinds of calls."""
    batcher = FakeBatcher(max_batch_size=4)
    calls = [
        batcher.call(0),
        batcher.call_many([1, 2]),
        batcher.call(3),
        batcher.call_many([4, 5, 6]),
        batcher.call(7),
    ]
    await turn()
    batcher.runner.end()
    await turn()
    assert batcher.batches == [[0, 1, 2, 3], [4, 5, 6, 7]]
    batcher.runner.end()
    assert await asyncio.gather(*calls) == [0, [1, 2], 3, [4, 5, 6], 7]
    await batcher.stop()


async def test_the_window_applies_to_bulk_calls() -> None:
    """Items that do not fill a batch wait for others, but not longer than the window."""
    batcher = FakeBatcher(max_batch_size=4, max_queue_time=5.0, concurrency=2)
    start = now()
    call = batcher.call_many(range(6))
    await turn()
    assert batcher.batches == [[0, 1, 2, 3]]
    batcher.runner.end()
    await asyncio.sleep(4.5)
    assert len(batcher.batches) == 1
    single = batcher.call("single")
    await asyncio.sleep(0.5)
    assert (now() - start, batcher.batches[1]) == (5.0, [4, 5, "single"])
    batcher.runner.end()
    assert (await call, await single) == (list(range(6)), "single")
    await batcher.stop()


async def test_no_future_and_no_task_for_an_item() -> None:
    """A call for 100,000 items makes one future, and objects for each batch."""
    batcher = FakeBatcher(max_batch_size=50_000, concurrency=2)
    gc.collect()
    before = {id(thing) for thing in gc.get_objects()}
    call = batcher.call_many([None] * 100_000)
    await turn()
    things = [
        thing
        for thing in gc.get_objects()
        if isinstance(thing, asyncio.Future | FastFuture | Slice)
    ]
    made = [type(thing) for thing in things if id(thing) not in before]
    assert Slice in made
    assert len(made) < 20
    assert len(asyncio.all_tasks()) == 2
    batcher.runner.end()
    batcher.runner.end()
    assert await call == [None] * 100_000
    await batcher.stop()


async def test_process_many_copies_its_items() -> None:
    """Later changes of the caller's list have no effect."""
    batcher = FakeBatcher(max_batch_size=2, max_queue_size=2, when_full="wait")
    await occupy(batcher)
    items = list(range(6))
    call = batcher.call_many(items)
    await turn()
    items.clear()
    for _ in range(4):
        batcher.runner.end()
        await turn()
    assert await call == list(range(6))
    await batcher.stop()


@pytest.mark.parametrize("items", [None, 7])
async def test_process_many_rejects_bad_arguments(items: Any) -> None:
    """The error is raised at once, and nothing is queued."""
    batcher = FakeBatcher()
    with pytest.raises(TypeError, match="iterable"):
        await batcher.process_many(items)
    with pytest.raises(TypeError, match="iterable"):
        batcher.map(items)
    with pytest.raises(ValueError, match="timeout"):
        await batcher.process_many([1], timeout=-1)
    assert batcher.stats().queued == 0
    await batcher.stop()


async def test_an_iterable_that_raises_queues_nothing() -> None:
    """The caller gets the exception of the iterable."""

    def items() -> Iterator[int]:
        yield 1
        raise ZeroDivisionError

    batcher = FakeBatcher()
    with pytest.raises(ZeroDivisionError):
        await batcher.process_many(items())
    assert batcher.stats().queued == 0
    await batcher.stop()


async def test_the_first_failure_is_raised_and_drops_queued_items() -> None:
    """Running batches continue, and other callers' items are unaffected."""
    batcher = FakeBatcher(max_batch_size=2, concurrency=2)
    call = batcher.call_many(range(7))
    await turn()
    other = batcher.call_many(["a", "b", "c"])
    await turn()
    assert batcher.batches == [[0, 1], [2, 3]]
    batcher.runner.end(1, [2, ZeroDivisionError("three")])
    with pytest.raises(ZeroDivisionError, match="three"):
        await call
    assert batcher.runner.cancelled in ([], [([0, 1], False)])
    assert batcher.batches[2:] == [["a", "b"]]
    batcher.runner.end()
    await asyncio.sleep(0.1)
    assert batcher.batches[3:] == [["c"]]
    batcher.runner.end()
    batcher.runner.end()
    assert await other == ["a", "b", "c"]
    stats = batcher.stats()
    assert (stats.done, stats.failed) == (3, 7)
    await batcher.stop()


async def test_a_failed_batch_fails_the_bulk_call() -> None:
    """Each caller of the batch gets an exception of its own, of the same type."""
    batcher = FakeBatcher(max_batch_size=3)
    call, single = batcher.call_many([0, 1]), batcher.call(2)
    await turn()
    batcher.runner.end(0, ZeroDivisionError("both"))
    errors = await asyncio.gather(call, single, return_exceptions=True)
    assert [type(error) for error in errors] == [ZeroDivisionError] * 2
    assert errors[0] is not errors[1]
    await batcher.stop()


async def test_process_many_returns_exceptions() -> None:
    """With ``return_exceptions`` each failed item has its own, and nothing is dropped."""
    batcher = FakeBatcher(max_batch_size=2)
    call = batcher.call_many(range(6), return_exceptions=True)
    await turn()
    batcher.runner.end(0, [0, ValueError("one")])
    await turn()
    batcher.runner.end(0, ZeroDivisionError("two and three"))
    await turn()
    batcher.runner.end()
    results = await call
    assert [type(result) for result in results] == [
        int,
        ValueError,
        ZeroDivisionError,
        ZeroDivisionError,
        int,
        int,
    ]
    assert results[2] is not results[3]
    stats = batcher.stats()
    assert (stats.done, stats.failed) == (3, 3)
    await batcher.stop()


@pytest.mark.parametrize("strict", [True, False])
async def test_failing_items_of_a_bulk_call_are_isolated(strict: bool) -> None:
    """With `isolate` the other items of the call get their results."""

    async def process_batch(batch: list[int]) -> list[float]:
        return [1 / item for item in batch]

    async with batched(
        process_batch, on_failure=isolate(), max_batch_size=5, max_queue_time=0
    ) as batcher:
        items = [1, 2, 0, 4, 5, 0, 8]
        if strict:
            with pytest.raises(ZeroDivisionError):
                await batcher.process_many(items)
        else:
            results = await batcher.process_many(items, return_exceptions=True)
            expected = [1 / item if item else ZeroDivisionError for item in items]
            assert [type(r) if isinstance(r, Exception) else r for r in results] == expected


async def test_a_cancelled_bulk_call_drops_its_queued_items() -> None:
    """Its running items continue for the other callers of their batch."""
    batcher = FakeBatcher(max_batch_size=3)
    single, call, last = batcher.call("single"), batcher.call_many(range(6)), batcher.call("last")
    await turn()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    stats = batcher.stats()
    assert (stats.queued, stats.running, stats.cancelled) == (1, 1, 6)
    batcher.runner.end()
    assert await single == "single"
    await turn()
    assert batcher.batches == [["single", 0, 1], ["last"]]
    batcher.runner.end()
    assert await last == "last"
    await batcher.stop()


@pytest.mark.parametrize("ends", [True, False])
async def test_the_batches_of_a_cancelled_bulk_call_are_cancelled(ends: bool) -> None:
    """All of them, if `cancel_abandoned` is set."""
    batcher = FakeBatcher(max_batch_size=2, concurrency=2, cancel_abandoned=ends)
    call = batcher.call_many(range(6))
    await turn()
    call.cancel()
    await turn()
    assert [force for _, force in batcher.runner.cancelled] == [ends, ends]
    await batcher.stop(force=True)


@pytest.mark.parametrize("way", ["item_timeout", "timeout"])
async def test_the_timeout_of_a_bulk_call(way: str) -> None:
    """It runs from the call; then the call fails, and its queued items never run."""
    batcher = FakeBatcher(max_batch_size=2, **({way: 5.0} if way == "item_timeout" else {}))
    start = now()
    call = batcher.call_many(range(6), **({way: 5.0} if way == "timeout" else {}))
    await asyncio.sleep(1.0)
    batcher.runner.end()
    with pytest.raises(ItemTimeoutError, match=r"4 of 6 items had no result within 5 seconds"):
        await call
    assert now() == start + 5.0
    batcher.runner.end()
    await turn()
    assert batcher.batches == [[0, 1], [2, 3]]
    stats = batcher.stats()
    assert (stats.done, stats.timed_out, stats.queued) == (2, 4, 0)
    await batcher.stop()


async def test_results_before_the_timeout_are_returned() -> None:
    """With ``return_exceptions`` the other items have ItemTimeoutError."""
    batcher = FakeBatcher(max_batch_size=2)
    call = batcher.call_many(range(5), return_exceptions=True, timeout=5.0)
    await turn()
    batcher.runner.end()
    results = await call
    assert results[:2] == [0, 1]
    assert [type(result) for result in results[2:]] == [ItemTimeoutError] * 3
    assert len({id(result) for result in results[2:]}) == 3
    await batcher.stop(force=True)


async def test_a_full_queue_accepts_a_bulk_call_as_a_whole_or_not() -> None:
    """With "raise" a call that does not fit queues nothing; rejected items are counted."""
    batcher = FakeBatcher(max_queue_size=4, max_batch_size=1)
    await occupy(batcher)
    first = batcher.call_many(range(3))
    await turn()
    with pytest.raises(
        QueueFullException,
        match=r"no capacity for 2 more items \(3 items queued, max_queue_size=4\)",
    ):
        await batcher.process_many([3, 4])
    assert (batcher.stats().queued, batcher.stats().rejected) == (3, 2)
    last = batcher.call_many([3])
    await turn()
    for _ in range(5):
        batcher.runner.end()
        await turn()
    assert (await first, await last) == ([0, 1, 2], [3])
    await batcher.stop()


async def test_a_bulk_call_waits_for_capacity_in_parts() -> None:
    """With "wait" its items are queued as capacity frees, and no later call overtakes it."""
    batcher = FakeBatcher(max_queue_size=3, max_batch_size=2, when_full="wait")
    await occupy(batcher)
    call, single = batcher.call_many(range(8)), None
    await turn()
    single = batcher.call("single")
    await turn()
    stats = batcher.stats()
    assert (stats.queued, stats.blocked) == (3, 6)
    for _ in range(6):
        batcher.runner.end()
        await turn()
        assert batcher.stats().queued <= 3
    assert batcher.batches[1:] == [[0, 1], [2, 3], [4, 5], [6, 7], ["single"]]
    assert await call == list(range(8))
    assert await single == "single"
    await batcher.stop()


async def test_a_bulk_call_that_waits_for_capacity_can_be_cancelled() -> None:
    """Its queued items and those on the waitlist are dropped."""
    batcher = FakeBatcher(max_queue_size=3, max_batch_size=2, when_full="wait")
    await occupy(batcher)
    call, last = batcher.call_many(range(8)), batcher.call("last")
    await turn()
    call.cancel()
    await turn()
    stats = batcher.stats()
    assert (stats.queued, stats.blocked, stats.cancelled) == (1, 0, 8)
    batcher.runner.end()
    await turn()
    batcher.runner.end()
    assert await last == "last"
    await batcher.stop()


async def test_bulk_calls_fail_when_every_slot_has_leaked() -> None:
    """Both a call that waits for capacity and a later one get BatchTimeoutError."""
    batcher = FakeBatcher(max_queue_size=3, max_batch_size=1, when_full="wait")
    await occupy(batcher)
    call = batcher.call_many(range(8), return_exceptions=True)
    await turn()
    batcher.runner.on_timeouts[0](BatchTimeoutError("too long"))
    assert {type(error) for error in await call} == {BatchTimeoutError}
    with pytest.raises(BatchTimeoutError, match="every batch"):
        await batcher.process_many([1, 2])
    await batcher.stop(force=True)


@pytest.mark.parametrize("force", [False, True])
async def test_stop_runs_queued_bulk_calls_unless_forced(force: bool) -> None:
    """A forced stop fails the calls, and leaves no exception that was never retrieved."""
    batcher = FakeBatcher(max_batch_size=2)
    call, mixed = (
        batcher.call_many(range(6)),
        batcher.call_many(range(6, 9), return_exceptions=True),
    )
    await turn()
    stopping = asyncio.create_task(batcher.stop(force=force))
    await turn()
    while batcher.runner.running:
        batcher.runner.end()
        await turn()
    await stopping
    if force:
        with pytest.raises(BatcherStoppedError):
            await call
        assert {type(error) for error in await mixed} == {BatcherStoppedError}
    else:
        assert (await call, await mixed) == (list(range(6)), [6, 7, 8])
    with pytest.raises(BatcherStoppedError):
        await batcher.process_many([1, 2])
    with pytest.raises(BatcherStoppedError):
        await batcher.process_many([])


async def test_a_forced_stop_cancels_batches_that_have_not_started() -> None:
    """They finish while the callers are being resolved: every caller gets an outcome."""
    batcher = FakeBatcher(max_batch_size=1, concurrency=8)
    submitted: list[Any] = []

    def submit(batch: Any, on_done: Callable[[Any], None], *_: Any) -> Any:
        submitted.append(batch)

        def cancel(**_: Any) -> None:
            if batch in submitted:
                submitted.remove(batch)
                on_done(BatcherStoppedError("not started"))

        return SimpleNamespace(cancel=cancel, began_at=0.0)

    batcher.runner.submit = submit  # type: ignore[assignment, method-assign]
    calls = [
        batcher.call_many(range(4)),
        batcher.call(4),
        batcher.call_many(range(5, 9), return_exceptions=True),
        batcher.call(9),
    ]
    await turn()
    await batcher.stop(force=True)
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [
        BatcherStoppedError,
        BatcherStoppedError,
        list,
        BatcherStoppedError,
    ]


class Unhashable(type):
    """A metaclass whose classes have no hash."""

    def __eq__(cls, other: object) -> bool:
        """Remove the inherited hash."""
        return cls is other

    __hash__ = None  # type: ignore[assignment]


class UnhashableType(metaclass=Unhashable):
    """A result of a type without a hash."""


class HostileError(Exception):
    """An exception whose attributes cannot be read."""

    @property
    def args(self) -> Any:  # type: ignore[override]
        """Fail."""
        raise ZeroDivisionError

    @property
    def __traceback__(self) -> Any:  # type: ignore[override]
        """Fail."""
        raise ZeroDivisionError


@pytest.mark.parametrize("result", [UnhashableType(), HostileError()], ids=["no hash", "hostile"])
async def test_hostile_results_reach_their_callers(result: Any) -> None:
    """Each caller gets the result or an error, and the slot is free again."""
    batcher = FakeBatcher(max_batch_size=3)
    calls = [batcher.call_many([0, 1], return_exceptions=True), batcher.call(2)]
    await turn()
    batcher.runner.end(0, [result] * 3)
    several: Any
    several, single = await asyncio.gather(*calls, return_exceptions=True)
    if isinstance(result, UnhashableType):
        assert (several, single) == ([result, result], result)
    else:
        assert {type(error) for error in (*several, single)} <= {HostileError, BatchError}
    after = batcher.call("after")
    await asyncio.sleep(0.1)
    batcher.runner.end()
    assert await after == "after"
    await batcher.stop()


@pytest.mark.parametrize("strict", [True, False])
async def test_a_timeout_keeps_no_result_alive(strict: bool) -> None:
    """Results are freed before the timeout of their call would have passed."""

    class Result:
        """Can be referred to weakly."""

    batcher = FakeBatcher(item_timeout=1000.0)
    call, other = batcher.call_many([0], return_exceptions=not strict), None
    await turn()
    other = batcher.call("other")
    batcher.runner.end(0, [Result()])
    (result,) = await call
    watched = weakref.ref(result)
    del result, call
    await turn()  # the loop drops the task
    assert watched() is None
    batcher.runner.end()
    assert await other == "other"
    await batcher.stop()


async def test_a_failed_bulk_call_keeps_no_item_alive() -> None:
    """Neither its exception's traceback nor the batcher refers to the items."""

    class Item:
        """Can be referred to weakly."""

    batcher = FakeBatcher(max_batch_size=1)
    items = [Item(), Item()]
    watched = [weakref.ref(item) for item in items]
    call = batcher.call_many(items)
    await turn()
    batcher.runner.end(0, ZeroDivisionError())
    batcher.runner.batches.clear()
    with pytest.raises(ZeroDivisionError):
        await call
    del items, call
    assert [ref() for ref in watched] == [None, None]
    await batcher.stop()
