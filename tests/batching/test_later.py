"""`Later`: items that come back, returned for one item or raised for a batch."""

from __future__ import annotations

import asyncio
import gc
from typing import TYPE_CHECKING, Any

import pytest

from async_batcher import Later, current_batch, isolate, retry
from async_batcher._batching.queue.lane import Lane
from async_batcher.exceptions import (
    BatchError,
    BatcherStoppedError,
    ItemTimeoutError,
    QueueFullException,
)
from tests.support.batchers import make_batcher, package_logs
from tests.support.polling import turn
from tests.support.virtual_clock import FAKE, FakeBatcher, VirtualLoop, now, virtual_loop

if TYPE_CHECKING:
    from async_batcher.stats import BatchRecord

pytestmark = pytest.mark.usefixtures("no_noise")
virtual_clock = pytest.mark.virtual_clock


def counts(batcher: FakeBatcher) -> dict[str, int]:
    """Return what became of all items, without what is 0."""
    stats = batcher.stats()
    names = ("queued", "blocked", "running", "done", "failed", "cancelled", "timed_out")
    return {name: getattr(stats, name) for name in names if getattr(stats, name)}


def later_from(cause: BaseException, after: float | None = None) -> Later:
    """Return what ``raise Later(after) from cause`` raises."""
    later = Later(after)
    later.__cause__ = cause
    return later


async def end_with_later(
    batcher: FakeBatcher, times: int, after: float | None = None
) -> list[float]:
    """End so many batches with a `Later` for each item; return how long each was put off."""
    delays = []
    for _ in range(times):
        began = now()
        size = len(batcher.runner.running[0][0])
        count = len(batcher.batches)
        batcher.runner.end(0, [Later(after) for _ in range(size)])
        for _ in range(1000):
            if len(batcher.batches) > count:
                break
            await asyncio.sleep(0.01)
        delays.append(round(now() - began, 9))
    return delays


# ---- returned for an item


@virtual_clock
async def test_a_returned_item_runs_again_when_its_time_has_come() -> None:
    """The others have their results at once; the item holds no slot, and counts as queued."""
    batcher = FakeBatcher()
    calls = [batcher.call(item) for item in range(3)]
    await turn()
    began = now()
    batcher.runner.end(0, [0, Later(2.0), 2])
    await turn()
    assert [call.done() for call in calls] == [True, False, True]
    assert counts(batcher) == {"queued": 1, "done": 2}
    other = batcher.call("other")
    await turn()
    assert batcher.batches == [[0, 1, 2], ["other"]]
    batcher.runner.end()
    assert await other == "other"
    await asyncio.sleep(1.99)
    assert len(batcher.batches) == 2
    await asyncio.sleep(0.02)
    assert batcher.batches[2:] == [[1]]
    assert counts(batcher) == {"running": 1, "done": 3}
    batcher.runner.end()
    assert await calls[1] == 1
    assert now() == pytest.approx(began + 2.01)
    assert batcher.stats().retried == 1
    assert counts(batcher) == {"done": 4}
    await batcher.stop()


@virtual_clock
async def test_a_submitted_item_comes_back() -> None:
    """Its future stays the same."""
    batcher = FakeBatcher()
    future = batcher.submit("a")
    await turn()
    await end_with_later(batcher, 3, 0.5)
    assert not future.done()
    batcher.runner.end()
    assert await future == "a"
    await batcher.stop()


@virtual_clock
@pytest.mark.parametrize("return_exceptions", [False, True])
@pytest.mark.parametrize("raised", [False, True])
async def test_items_of_a_bulk_call_come_back(return_exceptions: bool, raised: bool) -> None:
    """The call has all results in order, however often its items came back."""
    batcher = FakeBatcher(max_batch_size=4)
    call = batcher.call_many(range(6), return_exceptions=return_exceptions)
    await turn()
    batcher.runner.end(0, Later(1.0) if raised else [0, Later(1.0), 2, Later(1.0)])
    assert counts(batcher) == ({"queued": 6} if raised else {"running": 2, "queued": 2, "done": 2})
    while not call.done():
        await asyncio.sleep(0.5)
        if batcher.runner.running:
            batcher.runner.end()
    assert await call == [0, 1, 2, 3, 4, 5]
    expected = [[0, 1, 2, 3], [0, 1, 2, 3], [4, 5]] if raised else [[0, 1, 2, 3], [4, 5], [1, 3]]
    assert batcher.batches == expected
    assert counts(batcher) == {"done": 6}
    await batcher.stop()


@virtual_clock
async def test_a_failure_ends_a_strict_call_and_what_comes_back_of_it() -> None:
    """No item of the call runs again, and each is counted once."""
    batcher = FakeBatcher(max_batch_size=4)
    call = batcher.call_many(range(4))
    await turn()
    batcher.runner.end(0, [Later(1.0), 1, ZeroDivisionError(), Later(1.0)])
    with pytest.raises(ZeroDivisionError):
        await call
    assert counts(batcher) == {"failed": 4}
    await asyncio.sleep(2)
    assert len(batcher.batches) == 1
    await batcher.stop()


@virtual_clock
async def test_exceptions_and_later_in_one_batch_with_return_exceptions() -> None:
    """Each item has its own outcome."""
    batcher = FakeBatcher()
    call = batcher.call_many(range(3), return_exceptions=True)
    await turn()
    error = ZeroDivisionError()
    batcher.runner.end(0, [Later(1.0), error, 2])
    assert counts(batcher) == {"queued": 1, "done": 1, "failed": 1}
    await asyncio.sleep(1.1)
    batcher.runner.end()
    assert await call == [0, error, 2]
    await batcher.stop()


@virtual_clock
@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("pairs", [True, False])
async def test_items_of_a_map_come_back(ordered: bool, pairs: bool) -> None:
    """Results are those of all items: in order, or as they arrive."""
    batcher = FakeBatcher(max_batch_size=2, max_queue_time=1000)
    received: list[Any] = []

    async def consume() -> None:
        options: Any = {"ordered": ordered, "pairs": pairs}
        async for result in batcher.map(["a", "b", "c", "d", "e"], **options):
            received.append(result)  # noqa: PERF401 - the test looks at it meanwhile

    consumer = asyncio.create_task(consume())
    began = now()
    await turn(20)
    batcher.runner.end(0, [Later(5.0), "B"])
    await turn(10)
    batcher.runner.end(0, ["C", "D"])
    await turn(10)
    batcher.runner.end(0, ["E"])
    await turn(10)
    rest = [("b", "B"), ("c", "C"), ("d", "D"), ("e", "E")]
    if not pairs:
        rest = [result for _, result in rest]  # type: ignore[misc]
    assert received == ([] if ordered else rest)
    await asyncio.sleep(5)
    await turn()
    assert batcher.batches[-1] == ["a"]
    batcher.runner.end(0, ["A"])
    await consumer
    first = ("a", "A") if pairs else "A"
    assert received == ([first, *rest] if ordered else [*rest, first])
    assert now() == began + 5  # it did not wait for others
    await batcher.stop()


@virtual_clock
async def test_a_map_that_is_closed_drops_what_comes_back() -> None:
    """The item never runs again, and no timer is left."""
    batcher = FakeBatcher()
    stream = batcher.map(["a", "b"])
    first = asyncio.ensure_future(anext(stream))
    await turn(20)
    batcher.runner.end(0, ["A", Later(5.0)])
    assert await first == "A"
    await stream.aclose()
    assert counts(batcher) == {"done": 1, "cancelled": 1}
    await batcher.stop()
    assert virtual_loop().timers() == 0
    assert len(batcher.batches) == 1


@virtual_clock
async def test_an_item_that_a_generator_yields_later_for() -> None:
    """It comes back while its batch runs on, and may be in another batch beside it."""
    batcher = FakeBatcher(concurrency=2)
    calls = [batcher.call(item) for item in range(3)]
    await turn()
    batcher.runner.yield_results(2, results=[Later(1.0), 1])
    assert counts(batcher) == {"queued": 1, "running": 1, "done": 1}
    await asyncio.sleep(1.1)
    assert [left for left, _ in batcher.runner.running] == [[2], [0]]
    batcher.runner.end(1)
    await turn()
    assert [call.done() for call in calls] == [True, True, False]
    batcher.runner.end()
    assert [await call for call in calls] == [0, 1, 2]
    assert counts(batcher) == {"done": 3}
    await batcher.stop()


@virtual_clock
async def test_a_generator_that_yields_later_for_the_items_of_a_bulk_call() -> None:
    """Those without a result come back when it raises one, too."""
    batcher = FakeBatcher(concurrency=2, max_batch_size=4)
    call = batcher.call_many(range(4))
    await turn()
    batcher.runner.yield_results(2, results=[Later(1.0), 1])
    batcher.runner.end(0, Later(2.0))
    assert counts(batcher) == {"queued": 3, "done": 1}
    await asyncio.sleep(1.5)
    assert len(batcher.batches) == 1  # the batcher pauses
    await asyncio.sleep(0.6)
    assert batcher.batches[1:] == [[0, 2, 3]]
    batcher.runner.end()
    assert await call == [0, 1, 2, 3]
    await batcher.stop()


# ---- raised for a batch


@virtual_clock
async def test_a_batch_that_raises_pauses_its_batcher() -> None:
    """Nothing of it starts before; batches that run go on; another batcher does not pause."""
    batcher, other = FakeBatcher(concurrency=3), FakeBatcher()
    running = batcher.call("running")
    await turn()
    call = batcher.call("a")
    await turn()
    batcher.runner.end(1, Later(2.0))
    new, others = batcher.call("new"), other.call("others")
    await turn()
    assert batcher.batches == [["running"], ["a"]]
    assert other.batches == [["others"]]
    assert counts(batcher) == {"queued": 2, "running": 1}
    other.runner.end()
    batcher.runner.end()
    assert [await others, await running] == ["others", "running"]
    await asyncio.sleep(1.9)
    assert len(batcher.batches) == 2
    await asyncio.sleep(0.2)
    assert batcher.batches[2:] == [["a", "new"]]
    batcher.runner.end()
    assert [await call, await new] == ["a", "new"]
    await batcher.stop()
    await other.stop()


@virtual_clock
async def test_a_pause_ends_at_the_last_time() -> None:
    """Of several batches that raise one, the one that takes longest counts."""
    batcher = FakeBatcher(concurrency=2, max_batch_size=1)
    calls = [batcher.call(item) for item in range(2)]
    await turn()
    batcher.runner.end(0, Later(3.0))
    batcher.runner.end(0, Later(1.0))
    await asyncio.sleep(2.9)
    assert len(batcher.batches) == 2
    await asyncio.sleep(0.2)
    assert batcher.batches[2:] == [[0], [1]]
    batcher.runner.end()
    batcher.runner.end()
    assert [await call for call in calls] == [0, 1]
    await batcher.stop()


@virtual_clock
async def test_a_pause_holds_parts_of_failed_batches() -> None:
    """`isolate` runs them when it has ended."""
    batcher = FakeBatcher(on_failure=isolate(), concurrency=2)
    first = [batcher.call(item) for item in range(2)]
    await turn()
    second = batcher.call("later")
    await turn()
    batcher.runner.end(1, Later(1.0))
    batcher.runner.end(0, ZeroDivisionError())
    await asyncio.sleep(0.9)
    assert len(batcher.batches) == 2
    await asyncio.sleep(0.2)
    assert batcher.batches[2:] == [[0], [1]]
    batcher.runner.end()
    batcher.runner.end()
    await turn()
    batcher.runner.end()
    assert [await call for call in (*first, second)] == [0, 1, "later"]
    await batcher.stop()


@virtual_clock
@pytest.mark.parametrize("after", [0.0, 1.0])
async def test_a_batch_that_raises_in_a_part_that_runs_alone(after: float) -> None:
    """Its items come back, and the failed batch ends with its other part."""
    batcher = FakeBatcher(on_failure=isolate(ZeroDivisionError))
    calls = [batcher.call(item) for item in range(4)]
    await turn()
    batcher.runner.end(0, ZeroDivisionError())
    batcher.runner.end(0, Later(after))
    await asyncio.sleep(after + 0.01)
    while batcher.runner.running:
        batcher.runner.end()
        await turn()
    assert [await call for call in calls] == [0, 1, 2, 3]
    assert batcher.batches == [[0, 1, 2, 3], [0, 1], [2, 3], [0, 1]]
    await batcher.stop()


# ---- order


@virtual_clock
async def test_what_comes_back_is_in_front_of_what_came_after_it() -> None:
    """Items keep their place among each other, too."""
    batcher = FakeBatcher(max_batch_size=2)
    calls = [batcher.call(item) for item in range(6)]
    await turn()
    batcher.runner.end(0, [Later(0.0), Later(1.0)])
    await turn()
    assert batcher.batches[1:] == [[0, 2]]
    await asyncio.sleep(1.5)
    batcher.runner.end()
    assert batcher.batches[2:] == [[1, 3]]
    batcher.runner.end(0, [Later(0.5), Later(0.2)])
    await turn()
    await asyncio.sleep(1)
    batcher.runner.end()
    await turn()
    batcher.runner.end()
    assert batcher.batches[3:] == [[4, 5], [1, 3]]
    assert [await call for call in calls] == [0, 1, 2, 3, 4, 5]
    await batcher.stop()


@virtual_clock
async def test_the_window_of_what_comes_back_starts_anew() -> None:
    """It waits for others as a new item does, but not longer than one that is there."""
    batcher = FakeBatcher(max_queue_time=1.0)
    first = batcher.call("first")
    await asyncio.sleep(1.1)
    batcher.runner.end(0, [Later(2.0)])
    await asyncio.sleep(2.5)
    assert len(batcher.batches) == 1
    await asyncio.sleep(0.6)
    assert batcher.batches[1:] == [["first"]]
    batcher.runner.end(0, [Later(2.0)])
    await asyncio.sleep(1.5)
    second = batcher.call("second")
    await asyncio.sleep(1.1)
    assert batcher.batches[2:] == [["first", "second"]]
    batcher.runner.end()
    assert [await first, await second] == ["first", "second"]
    await batcher.stop()


@virtual_clock
@pytest.mark.parametrize("yielded", [False, True])
async def test_the_items_of_a_batch_come_back_together(yielded: bool) -> None:
    """However long it takes to put them back."""

    def slow(_error: BaseException, _attempt: int) -> Later:
        virtual_loop().advance(0.001)
        return Later(1.0)

    batcher = FakeBatcher(on_failure=slow)
    calls = [batcher.call(item) for item in range(4)]
    await turn()
    if yielded:
        batcher.runner.yield_results(3, results=[ValueError(), 1, ValueError()])
        batcher.runner.end(0, [3])
    else:
        batcher.runner.end(0, [ValueError(), 1, ValueError(), 3])
    await asyncio.sleep(1.1)
    assert batcher.batches[1:] == [[0, 2]]
    batcher.runner.end()
    assert [await call for call in calls] == [0, 1, 2, 3]
    await batcher.stop()


@virtual_clock
async def test_many_items_that_come_back_together_take_their_places(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The next batch is found once for all of them, not once for each."""
    searches: list[int] = []
    find_head = Lane.find_head

    def counted(lane: Lane, max_size: int) -> None:
        searches.append(max_size)
        find_head(lane, max_size)

    monkeypatch.setattr(Lane, "find_head", counted)
    batcher = FakeBatcher(max_batch_size=None)
    call = batcher.call_many(range(500))
    await turn()
    batcher.runner.end(0, Later(1.0))
    await asyncio.sleep(1.1)
    assert batcher.batches[1:] == [list(range(500))]
    batcher.runner.end()
    assert await call == list(range(500))
    assert len(searches) < 10
    await batcher.stop()


# ---- deadlines, cancellation, capacity


@virtual_clock
@pytest.mark.parametrize("raised", [False, True])
async def test_an_item_keeps_its_deadline(raised: bool) -> None:
    """It times out while it waits to come back, is counted once, and does not run again."""
    batcher = FakeBatcher(item_timeout=3.0)
    began = now()
    call, bulk = batcher.call("a"), batcher.call_many(["b", "c"], timeout=2.0)
    await turn()
    batcher.runner.end(0, Later(10.0) if raised else [Later(10.0)] * 3)
    with pytest.raises(ItemTimeoutError, match="2 of 2 items had no result within 2"):
        await bulk
    assert now() == began + 2
    with pytest.raises(ItemTimeoutError, match="it was still queued, and was removed"):
        await call
    assert now() == began + 3
    assert counts(batcher) == {"timed_out": 3}
    await asyncio.sleep(20)
    assert len(batcher.batches) == 1
    await batcher.stop()


@virtual_clock
async def test_a_cancelled_item_does_not_come_back() -> None:
    """It is counted once, and leaves no timer behind."""
    batcher = FakeBatcher(max_batch_size=4, max_queue_time=1.0)
    call, future = batcher.call(0), batcher.submit(1)
    bulk = batcher.call_many([2, 3])
    await turn()
    batcher.runner.end(0, [Later(100.0) for _ in range(4)])
    await turn()
    assert counts(batcher) == {"queued": 4}
    call.cancel()
    future.cancel()
    bulk.cancel()
    await turn()
    assert counts(batcher) == {"cancelled": 4}
    assert virtual_loop().timers() == 0
    await batcher.stop()
    assert len(batcher.batches) == 1


@virtual_clock
async def test_a_caller_that_is_gone_before_its_item_comes_back() -> None:
    """Nothing is put back for it; in a raised batch neither."""
    batcher = FakeBatcher()
    for outcome in ([0, Later(1.0)], Later(1.0)):
        calls = [batcher.call(item) for item in range(2)]
        await turn()
        calls[1].cancel()
        await turn()
        batcher.runner.end(0, outcome)
        await asyncio.sleep(1.1)
        if batcher.runner.running:
            batcher.runner.end()
        assert await calls[0] == 0
    assert batcher.batches == [[0, 1], [0, 1], [0]]
    assert counts(batcher) == {"done": 2, "cancelled": 2}
    assert batcher.stats().retried == 1
    await batcher.stop()


@virtual_clock
async def test_what_comes_back_counts_for_max_queue_size() -> None:
    """A full queue rejects new items until it runs again, or is cancelled."""
    batcher = FakeBatcher(max_queue_size=2, max_batch_size=2)
    calls = [batcher.call(item) for item in range(2)]
    await turn()
    batcher.runner.end(0, Later(5.0))
    with pytest.raises(QueueFullException, match="2 items queued, max_queue_size=2"):
        await batcher.process("rejected")
    calls[1].cancel()
    await turn()
    new = batcher.call("new")
    await turn()
    with pytest.raises(QueueFullException):
        await batcher.process_many(["rejected"])
    await asyncio.sleep(5.1)
    assert batcher.batches[1:] == [[0, "new"]]
    batcher.runner.end()
    assert [await calls[0], await new] == [0, "new"]
    assert batcher.stats().rejected == 2
    await batcher.stop()


@virtual_clock
@pytest.mark.parametrize("bulk", [False, True])
async def test_callers_wait_for_capacity_behind_what_comes_back(bulk: bool) -> None:
    """They are let in when it runs, or when it is cancelled."""
    batcher = FakeBatcher(max_queue_size=2, max_batch_size=2, when_full="wait")
    calls = [batcher.call(item) for item in range(2)]
    await turn()
    waiting: list[asyncio.Task[Any]] = [batcher.call_many([2, 3])] if bulk else []
    waiting += [batcher.call(item) for item in range(4, 8)]
    await turn()
    assert counts(batcher) == {"queued": 2, "running": 2, "blocked": 4 if bulk else 2}
    batcher.runner.end(0, [Later(5.0), Later(5.0)])
    await turn()
    assert counts(batcher)["blocked"] == (4 if bulk else 2)
    calls[0].cancel()
    for _ in range(9):
        await turn()
        if batcher.runner.running:
            batcher.runner.end()
    assert counts(batcher)["done"] + counts(batcher).get("queued", 0) == (7 if bulk else 5)
    await asyncio.sleep(5.1)
    while batcher.runner.running:
        batcher.runner.end()
        await turn()
    assert await calls[1] == 1
    expected: list[Any] = [[2, 3]] if bulk else []
    assert [await call for call in waiting] == [*expected, 4, 5, 6, 7]
    await batcher.stop()


@virtual_clock
async def test_calls_that_wait_for_capacity_when_the_first_item_comes_back() -> None:
    """The queue changes its kind then; calls that wait keep their order and can be cancelled."""
    batcher = FakeBatcher(max_queue_size=2, max_batch_size=2, when_full="wait")
    calls = [batcher.call(item) for item in range(5)]
    bulk = batcher.call_many([5, 6, 7])
    await turn()
    calls[4].cancel()
    batcher.runner.end(0, [0, Later(0.0)])
    for _ in range(12):
        await turn()
        if batcher.runner.running:
            batcher.runner.end()
    assert [await call for call in calls[:4]] == [0, 1, 2, 3]
    assert await bulk == [5, 6, 7]
    assert counts(batcher) == {"done": 7, "cancelled": 1}
    await batcher.stop()


# ---- the end


@virtual_clock
@pytest.mark.parametrize("raised", [False, True])
async def test_stop_waits_for_what_comes_back(raised: bool) -> None:
    """It accepts no calls meanwhile."""
    batcher = FakeBatcher(max_queue_time=100.0)
    call = batcher.call("a")
    await asyncio.sleep(101)
    began = now()
    batcher.runner.end(0, Later(5.0) if raised else [Later(5.0)])
    stop = asyncio.create_task(batcher.stop())
    await asyncio.sleep(4)
    assert not stop.done()
    with pytest.raises(BatcherStoppedError):
        await batcher.process("late")
    await asyncio.sleep(1.1)
    assert batcher.batches == [["a"], ["a"]]
    batcher.runner.end(0, [Later(1.0)])
    await asyncio.sleep(1.1)
    batcher.runner.end()
    assert await call == "a"
    await stop
    assert now() < began + 7
    assert batcher.stats().batches.drain == 2
    assert virtual_loop().timers() == 0


@virtual_clock
async def test_a_stop_ends_if_the_last_item_times_out_when_it_comes_back() -> None:
    """On a busy loop the timer of the queue may be the first that fires."""
    batcher = FakeBatcher(on_failure=retry(backoff=0.4))
    call = batcher.call("a", timeout=0.5)
    await turn()
    batcher.runner.end(0, ValueError())
    stop = asyncio.create_task(batcher.stop())
    await turn()
    virtual_loop().advance(1.0)
    with pytest.raises(ItemTimeoutError):
        await call
    await stop
    assert len(batcher.batches) == 1


@virtual_clock
async def test_a_stop_ends_if_a_pause_has_held_parts_that_lost_their_callers() -> None:
    """No batch runs for them after it."""
    batcher = FakeBatcher(on_failure=isolate(), concurrency=2, max_batch_size=2)
    calls = [batcher.call(item) for item in range(4)]
    await turn()
    calls[0].cancel()
    calls[1].cancel()
    await turn()
    batcher.runner.end(0, Later(1.0))
    batcher.runner.end(0, ZeroDivisionError())
    stop = asyncio.create_task(batcher.stop())
    await turn()
    calls[2].cancel()
    calls[3].cancel()
    await stop
    assert len(batcher.batches) == 2
    assert counts(batcher) == {"cancelled": 4}


@virtual_clock
@pytest.mark.parametrize("how", ["force", "timeout"])
@pytest.mark.parametrize("raised", [False, True])
async def test_a_forced_stop_fails_what_comes_back(how: str, raised: bool) -> None:
    """Callers get a `BatcherStoppedError`, and no timer is left."""
    batcher = FakeBatcher()
    call, bulk = batcher.call(0), batcher.call_many([1, 2], return_exceptions=True)
    await turn()
    batcher.runner.end(0, Later(50.0) if raised else [Later(50.0) for _ in range(3)])
    if how == "force":
        await batcher.stop(force=True)
    else:
        with pytest.raises(TimeoutError):
            await batcher.stop(timeout=1.0)
    with pytest.raises(BatcherStoppedError):
        await call
    assert [type(result) for result in await bulk] == [BatcherStoppedError] * 2
    assert counts(batcher) == {"failed": 3}
    assert len(batcher.batches) == 1
    assert virtual_loop().timers() == 0


@virtual_clock
async def test_later_after_a_forced_stop() -> None:
    """A batch that ends with one while it is stopped puts nothing back."""
    batcher = FakeBatcher()
    call = batcher.call(0)
    await turn()
    stop = asyncio.create_task(batcher.stop(force=True))
    running = batcher.runner.running[0][1]
    await stop
    with pytest.raises(BatcherStoppedError):
        await call
    running([Later(1.0)])
    assert counts(batcher) == {"failed": 1}
    assert virtual_loop().timers() == 0


@pytest.mark.parametrize("raised", [False, True])
def test_a_loop_that_ends_while_items_wait_to_come_back(raised: bool) -> None:
    """`asyncio.run` returns, callers are cancelled, and a new loop starts with an empty queue."""
    batcher = FakeBatcher()

    async def first() -> None:
        batcher.call("a")
        batcher.submit("b")
        await turn()
        batcher.runner.end(0, Later(50.0) if raised else [Later(50.0), Later(50.0)])
        await turn()
        assert batcher.stats().queued == 2

    async def second() -> None:
        call = batcher.call("c")
        await turn()
        assert batcher.batches[1:] == [["c"]]
        batcher.runner.end()
        assert await call == "c"
        await batcher.stop()

    for main in (first, second):
        with asyncio.Runner(loop_factory=VirtualLoop) as runner:
            runner.run(main())
    gc.collect()


# ---- delays and limits


@virtual_clock
async def test_a_later_without_a_time_waits_longer_each_time() -> None:
    """20 ms, then twice as long each time, and 5 s at most."""
    batcher = FakeBatcher()
    call = batcher.call("a")
    await turn()
    delays = await end_with_later(batcher, 11)
    expected = [0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.0, 5.0, 5.0]
    assert delays == pytest.approx(expected, abs=0.011)
    batcher.runner.end()
    assert await call == "a"
    await batcher.stop()


@virtual_clock
async def test_a_raised_later_without_a_time() -> None:
    """The batcher pauses until the first of its items may run again."""
    batcher = FakeBatcher(max_batch_size=2)
    first = batcher.call("first")
    await turn()
    await end_with_later(batcher, 4)  # its next delay is 0.32 s
    second = batcher.call("second")
    await turn()
    batcher.runner.end(0, [Later(0.0)])
    await turn()
    assert batcher.batches[-1] == ["first", "second"]
    batcher.runner.end(0, Later())
    await asyncio.sleep(0.015)
    assert batcher.batches[-1] == ["first", "second"]
    await asyncio.sleep(0.01)
    assert batcher.batches[-1] == ["second"]
    batcher.runner.end()
    assert await second == "second"
    await asyncio.sleep(1)
    batcher.runner.end()
    assert await first == "first"
    await batcher.stop()


@virtual_clock
@pytest.mark.parametrize("raised", [False, True])
async def test_attempts_limit_how_often_an_item_comes_back(
    raised: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Then its caller gets a `BatchError`, the first run counting as one."""
    batcher = FakeBatcher(on_failure=retry(Later, attempts=3))
    calls = [batcher.call(item) for item in range(2)]
    await turn()
    for _ in range(2):
        batcher.runner.end(0, Later(1.0) if raised else [Later(1.0), Later(1.0)])
        await asyncio.sleep(1.1)
    assert not package_logs(caplog)
    batcher.runner.end(0, Later(1.0) if raised else [Later(1.0), Later(1.0)])
    for call in calls:
        with pytest.raises(
            BatchError, match="Later for the item in attempt 3, and on_failure"
        ) as caught:
            await call
        assert caught.value.original_type == "async_batcher.failures.Later"
    assert len(batcher.batches) == 3
    assert counts(batcher) == {"failed": 2}
    messages = [record.message for record in package_logs(caplog)]
    expected = [f"{FAKE}: a batch of 2 items failed: async_batcher.failures.Later: after 1.0 s"]
    assert messages == (expected if raised else [])
    await batcher.stop()


@virtual_clock
@pytest.mark.parametrize("raised", [False, True])
@pytest.mark.parametrize("named", [Later, ConnectionError, OSError])
async def test_the_cause_is_what_the_callers_get(raised: bool, named: type[Exception]) -> None:
    """A policy may name it, or `Later`; each caller has an exception of its own."""
    batcher = FakeBatcher(on_failure=retry(named, attempts=2))
    calls = [batcher.call(item) for item in range(3)]
    await turn()
    cause = ConnectionError("down")
    for _ in range(2):
        later = later_from(cause, 1.0)
        batcher.runner.end(0, later if raised else [later] * 3)
        await asyncio.sleep(1.1)
    errors = [await asyncio.gather(call, return_exceptions=True) for call in calls]
    assert [(type(error), error.args) for [error] in errors] == [(ConnectionError, ("down",))] * 3
    assert len({id(error) for [error] in errors}) == 3
    await batcher.stop()


@virtual_clock
async def test_a_policy_that_does_not_match_the_cause_leaves_the_item_alone() -> None:
    """It comes back any number of times."""
    batcher = FakeBatcher(on_failure=[retry(ValueError, attempts=1), isolate()])
    call = batcher.call("a")
    await turn()
    for _ in range(20):
        batcher.runner.end(0, later_from(ConnectionError(), 0.1))
        await asyncio.sleep(0.2)
    batcher.runner.end()
    assert await call == "a"
    await batcher.stop()


@virtual_clock
async def test_the_time_of_the_later_goes_before_that_of_the_policy() -> None:
    """The policy's counts for one without a time."""
    batcher = FakeBatcher(on_failure=retry(Later, backoff=3.0, attempts=9))
    call = batcher.call("a")
    await turn()
    assert await end_with_later(batcher, 1, 1.0) == pytest.approx([1.0], abs=0.011)
    assert await end_with_later(batcher, 1) == pytest.approx([5.0], abs=0.011)  # max_backoff
    batcher.runner.end()
    assert await call == "a"
    await batcher.stop()


# ---- what is recorded


@virtual_clock
async def test_records_and_facts_of_batches_with_what_came_back() -> None:
    """``attempt`` is the largest of the items; ``failed`` counts only what failed its caller."""
    records: list[BatchRecord] = []
    batcher = FakeBatcher(on_batch=records.append)
    calls = [batcher.call("a")]
    await turn()
    batcher.runner.end(0, [Later(1.0)])
    await asyncio.sleep(1.1)
    batcher.runner.end(0, Later(1.0))
    await asyncio.sleep(0.9)
    calls.append(batcher.call("b"))
    await asyncio.sleep(0.2)
    assert batcher.batches[2:] == [["a", "b"]]
    batcher.runner.end(0, ["a", ZeroDivisionError()])
    await asyncio.gather(*calls, return_exceptions=True)
    assert [(r.size, r.attempt, r.failed, r.error) for r in records] == [
        (1, 1, 0, None),
        (1, 2, 0, "async_batcher.failures.Later"),
        (2, 3, 1, None),
    ]
    assert [facts and facts[1] for facts in batcher.runner.facts] == [None, 2, 3]
    assert batcher.stats().retried == 2
    await batcher.stop()


async def test_current_batch_tells_the_attempt() -> None:
    """The batch function sees how often the items of its batch were tried."""
    seen: list[tuple[list[str], int]] = []

    async def process_batch(batch: list[str]) -> list[Any]:
        info = current_batch()
        assert info is not None
        seen.append((batch.copy(), info.attempt))
        return [Later(0.0) if info.attempt < 3 else item for item in batch]

    async with make_batcher(process_batch, max_queue_time=0) as batcher:
        assert await batcher.process_many(["a", "b"]) == ["a", "b"]
        assert await batcher.process("c") == "c"
    assert seen == [(["a", "b"], attempt) for attempt in (1, 2, 3)] + [
        (["c"], attempt) for attempt in (1, 2, 3)
    ]


@pytest.mark.every_loop
@pytest.mark.parametrize("kind", ["coroutine", "async generator", "function", "generator"])
async def test_every_kind_of_batch_function(kind: str) -> None:
    """Returned, yielded and raised; in threads and on the loop."""
    runs: list[list[int]] = []

    def outcomes(batch: list[int]) -> list[Any]:
        runs.append(batch.copy())
        if len(runs) == 1:
            return [Later(0.0) if item % 2 else item for item in batch]
        if len(runs) == 2:
            raise Later(0.0) from ConnectionError()
        return batch.copy()

    async def coroutine(batch: list[int]) -> list[Any]:
        return outcomes(batch)

    async def async_generator(batch: list[int]) -> Any:
        for result in outcomes(batch):
            yield result

    def generator(batch: list[int]) -> Any:
        yield from outcomes(batch)

    functions = {
        "coroutine": coroutine,
        "async generator": async_generator,
        "function": outcomes,
        "generator": generator,
    }
    async with make_batcher(functions[kind], max_queue_time=0) as batcher:
        assert await batcher.process_many(range(6)) == [0, 1, 2, 3, 4, 5]
        assert (batcher.stats().retried, batcher.stats().done) == (6, 6)
    # A generator's items may come back one after the other.
    assert sorted({item for batch in runs[1:] for item in batch}) == [1, 3, 5]


# ---- the object


@pytest.mark.parametrize(
    ("after", "error", "text"),
    [
        ("1", TypeError, "after='1': must be a number, not str"),
        (True, TypeError, "after=True: must be a number, not bool"),
        (-1, ValueError, "after=-1: must be a finite number, and not negative"),
        (float("nan"), ValueError, "after=nan: must be a finite number, and not negative"),
        (float("inf"), ValueError, "after=inf: must be a finite number, and not negative"),
        pytest.param(10**400, ValueError, "must be a finite number", id="large"),
    ],
)
def test_bad_times(after: Any, error: type[Exception], text: str) -> None:
    """The error names the argument and its value."""
    with pytest.raises(error) as caught:
        Later(after)
    assert text in str(caught.value)


@virtual_clock
async def test_any_number_is_a_time() -> None:
    """It is a float from then on."""
    from decimal import Decimal
    from fractions import Fraction

    batcher = FakeBatcher()
    call = batcher.call("a")
    await turn()
    for after in (Decimal("0.5"), Fraction(1, 2), 1):
        later = Later(after)  # type: ignore[arg-type]
        assert type(later.after) is float
        batcher.runner.end(0, [later])
        await asyncio.sleep(1.1)
    batcher.runner.end()
    assert await call == "a"
    await batcher.stop()


def test_the_text_of_a_later() -> None:
    """It says when."""
    assert str(Later(2)) == "after 2.0 s"
    assert str(Later()) == "without a time"
