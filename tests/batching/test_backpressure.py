"""A full queue, on a virtual clock."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from async_batcher.exceptions import (
    BatcherStoppedError,
    BatchTimeoutError,
    ItemTimeoutError,
    QueueFullException,
)
from tests.support.polling import turn
from tests.support.virtual_clock import FakeBatcher, now

pytestmark = pytest.mark.virtual_clock


async def fill(batcher: FakeBatcher) -> list[asyncio.Future[Any]]:
    """Run one item and queue two, as many as are allowed."""
    running = batcher.submit("running")
    await turn()
    return [running, batcher.submit("a"), batcher.submit("b")]


async def test_callers_get_capacity_in_order() -> None:
    """First in, first out; no caller is rejected, and the queue keeps its limit."""
    batcher = FakeBatcher(max_queue_size=2, max_batch_size=1, when_full="wait")
    first = await fill(batcher)
    calls = [batcher.call(item) for item in range(4)]
    await turn()
    while batcher.runner.running:
        assert len(batcher.scheduler.queue) <= 2
        batcher.runner.end()
    assert await asyncio.gather(*first, *calls) == ["running", "a", "b", 0, 1, 2, 3]
    assert batcher.batches == [["running"], ["a"], ["b"], [0], [1], [2], [3]]
    await batcher.stop()


async def test_a_failed_call_for_many_leaves_its_capacity_to_others() -> None:
    """Others get it when the call fails, even if the next batch is due no sooner."""
    options = {"max_batch_size": 3, "max_queue_size": 2, "max_queue_time": 1.0}
    batcher = FakeBatcher(**options, concurrency=2, when_full="wait")
    failing = batcher.call_many([0, 1, 2])
    others = [batcher.call("a"), batcher.call("b")]
    await asyncio.sleep(1.0)
    assert batcher.batches == [[0, 1]]
    assert (batcher.stats().queued, batcher.stats().blocked) == (2, 1)
    batcher.runner.end(outcome=[ValueError("no"), 1])
    assert (batcher.stats().queued, batcher.stats().blocked) == (2, 0)
    await asyncio.sleep(1.0)
    assert batcher.batches == [[0, 1], ["a", "b"]]
    batcher.runner.end()
    with pytest.raises(ValueError, match="no"):
        await failing
    assert await asyncio.gather(*others) == ["a", "b"]
    await batcher.stop()


async def test_the_window_starts_when_an_item_is_queued() -> None:
    """The time that an item spends on the waitlist does not count towards its window."""
    batcher = FakeBatcher(max_queue_size=1, max_queue_time=10.0, concurrency=-1, when_full="wait")
    calls = [batcher.call(0)]
    await asyncio.sleep(6.0)
    calls.append(batcher.call(1))
    await asyncio.sleep(4.0)
    await turn()
    assert batcher.batches == [[0]]
    await asyncio.sleep(9.9)
    assert batcher.batches == [[0]]
    await asyncio.sleep(0.1)
    await turn()
    assert batcher.batches == [[0], [1]]
    batcher.runner.end()
    batcher.runner.end()
    assert await asyncio.gather(*calls) == [0, 1]
    await batcher.stop()


async def test_submit_never_waits_for_capacity() -> None:
    """submit() raises QueueFullException even if `when_full` is "wait"."""
    for when_full in ("wait", "raise"):
        batcher = FakeBatcher(max_queue_size=2, max_batch_size=1, when_full=when_full)
        await fill(batcher)
        with pytest.raises(QueueFullException):
            batcher.submit("c")
    with pytest.raises(QueueFullException):
        await batcher.process("c")
    await batcher.stop(force=True)


async def test_a_caller_on_the_waitlist_is_cancelled_or_times_out() -> None:
    """Its timeout includes the time on the waitlist; later callers move up."""
    batcher = FakeBatcher(max_queue_size=2, max_batch_size=1, when_full="wait")
    first = await fill(batcher)
    cancelled, expired, last = (
        batcher.call("cancelled"),
        batcher.call("expired", timeout=3.0),
        batcher.call("last"),
    )
    await turn()
    cancelled.cancel()
    start = now()
    with pytest.raises(ItemTimeoutError, match="was removed"):
        await expired
    assert now() == start + 3.0
    for _ in range(4):
        batcher.runner.end()
    assert await asyncio.gather(*first, last) == ["running", "a", "b", "last"]
    assert batcher.batches == [["running"], ["a"], ["b"], ["last"]]
    await batcher.stop()


async def test_a_timeout_includes_the_time_on_the_waitlist() -> None:
    """An item's timeout still runs from the call after the item was queued."""
    batcher = FakeBatcher(max_queue_size=2, max_batch_size=1, when_full="wait")
    await fill(batcher)
    expired = batcher.call("late", timeout=3.0)
    await asyncio.sleep(2.0)
    batcher.runner.end()
    start = now()
    with pytest.raises(ItemTimeoutError, match="was removed"):
        await expired
    assert now() == start + 1.0
    assert len(batcher.scheduler.queue) == 1
    await batcher.stop(force=True)


async def test_a_cancelled_item_frees_capacity_for_the_waitlist() -> None:
    """Callers on the waitlist that time out are skipped."""
    batcher = FakeBatcher(max_queue_size=2, max_batch_size=1, when_full="wait")
    _, a, _ = await fill(batcher)
    calls = [batcher.call(0), batcher.call(1, timeout=5.0), batcher.call(2)]
    await turn()
    a.cancel()
    assert len(batcher.scheduler.queue) == 2
    await asyncio.sleep(6.0)
    assert isinstance(calls[1].exception(), ItemTimeoutError)
    for _ in range(4):
        batcher.runner.end()
    assert [await calls[0], await calls[2]] == [0, 2]
    assert batcher.batches == [["running"], ["b"], [0], [2]]
    await batcher.stop()


@pytest.mark.parametrize("force", [False, True])
async def test_stop_while_callers_wait_for_capacity(force: bool) -> None:
    """Blocked callers get BatcherStoppedError at once; queued items run, unless forced."""
    batcher = FakeBatcher(max_queue_size=2, max_batch_size=1, when_full="wait")
    first = await fill(batcher)
    calls = [batcher.call(item) for item in range(3)]
    await turn()
    stopping = asyncio.create_task(batcher.stop(force=force))
    await turn()
    assert all(isinstance(call.exception(), BatcherStoppedError) for call in calls)
    while batcher.runner.running:
        batcher.runner.end()
    await stopping
    if not force:
        assert await asyncio.gather(*first) == ["running", "a", "b"]
    with pytest.raises(BatcherStoppedError):
        await batcher.process("after")


async def test_the_waitlist_fails_when_every_slot_has_leaked() -> None:
    """Blocked callers and later ones get BatchTimeoutError."""
    batcher = FakeBatcher(max_queue_size=2, max_batch_size=1, when_full="wait")
    await fill(batcher)
    call = batcher.call("waiting")
    await turn()
    batcher.runner.on_timeouts[0](BatchTimeoutError("too long"))
    with pytest.raises(BatchTimeoutError, match="every batch that may run"):
        await call
    with pytest.raises(BatchTimeoutError, match="every batch that may run"):
        await batcher.process("later")
    await batcher.stop(force=True)
