"""The outcomes of `Scheduler` for its callers, and its queue limit."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from async_batcher.exceptions import QueueFullException
from tests.support.batchers import GatedBatcher
from tests.support.polling import turn
from tests.support.scheduler_rig import Rig
from tests.support.virtual_clock import FakeRunner

pytestmark = pytest.mark.virtual_clock


async def test_an_item_cancelled_while_queued_never_runs() -> None:
    """It is removed from the queue; the other items are unaffected."""
    rig = Rig(window=1.0)
    futures = rig.ask_all(*range(5))
    futures[0].cancel()
    futures[3].cancel()
    await asyncio.sleep(1.0)
    assert rig.batches == [[1, 2, 4]]
    rig.runner.end()
    assert [future.result() for future in futures if not future.cancelled()] == [1, 2, 4]


async def test_an_item_cancelled_while_running_leaves_the_others_their_results() -> None:
    """Its result is dropped; the others get theirs, or the batch's exception."""
    rig = Rig(size=3, slots=2)
    futures = rig.ask_all(*range(6))
    futures[1].cancel()
    futures[3].cancel()
    rig.runner.end()
    rig.runner.end(outcome=ValueError("no"))
    assert [future.result() for future in futures[0:3:2]] == [0, 2]
    assert [str(future.exception()) for future in futures[4:]] == ["no", "no"]


async def test_an_abandoned_batch_keeps_its_slot() -> None:
    """The slot is free when the batch has finished, even if no caller is left."""
    rig = Rig(size=2)
    first = rig.ask_all(0, 1)
    for future in first:
        future.cancel()
    rig.ask_all(2, 3)
    assert rig.batches == [[0, 1]]
    rig.runner.end()
    assert rig.batches == [[0, 1], [2, 3]]


async def test_half_of_20_000_callers_are_cancelled() -> None:
    """Any number may be cancelled in one iteration; the others get their results."""
    rig = Rig(window=1.0)
    futures = rig.ask_all(*range(20_000))
    for future in futures[1::2]:
        future.cancel()
    for future in futures[:10_000:2]:
        future.cancel()
    await asyncio.sleep(1.0)
    assert rig.batches == [list(range(10_000, 20_000, 2))]
    rig.runner.end()
    assert [future.result() for future in futures if not future.cancelled()] == rig.batches[0]


async def test_a_future_cancelled_twice_is_dequeued_once() -> None:
    """A future that is done is not removed from the queue a second time."""
    rig = Rig(window=1.0)
    futures = rig.ask_all(0, 1, 2)
    assert futures[0].cancel()
    assert not futures[0].cancel()
    assert len(rig.queue) == 2
    await asyncio.sleep(1.0)
    rig.runner.end()
    assert not futures[1].cancel()
    rig.ask(3)
    assert len(rig.queue) == 1


async def test_a_returned_exception_is_set_for_its_item_alone() -> None:
    """The other items get their results."""
    rig = Rig(size=3)
    futures = rig.ask_all(0, 1, 2)
    rig.runner.end(outcome=["a", KeyError("b"), "c"])
    assert futures[0].result() == "a"
    assert isinstance(futures[1].exception(), KeyError)
    assert futures[2].result() == "c"


async def test_a_runner_may_finish_batches_inside_submit() -> None:
    """Any number of batches in a row finish this way, without recursion."""

    class InlineRunner(FakeRunner):
        def submit(self, batch: list[Any], done: Any, *others: Any) -> None:
            super().submit(batch, done, *others)
            self.end()

    rig = Rig(size=1)
    rig.runner = rig.scheduler.inflight.runner = InlineRunner()
    futures = rig.ask_all(*range(2000))
    assert [future.result() for future in futures] == list(range(2000))

    rig = Rig(size=1)
    futures = rig.ask_all(*range(5000))  # the first one has the only slot
    inline = InlineRunner()
    rig.scheduler.inflight.runner = inline
    rig.runner.end()
    assert [future.result() for future in futures] == list(range(5000))
    assert len(inline.batches) == 4999


async def test_the_queue_limit_counts_queued_items_only() -> None:
    """Running and cancelled items do not count; a rejected item changes nothing."""
    rig = Rig(size=2, capacity=3)
    rig.ask_all(0, 1)
    futures = rig.ask_all(2, 3, 4)
    with pytest.raises(QueueFullException, match=r"full \(3 items queued, max_queue_size=3\)"):
        rig.ask(5)
    futures[1].cancel()
    rig.ask(6)
    with pytest.raises(QueueFullException):
        rig.ask(7)
    rig.runner.end()
    assert rig.batches == [[0, 1], [2, 4]]
    rig.ask_all(8, 9)


async def test_the_queue_limit_counts_process_and_submit_together() -> None:
    """Both raise QueueFullException when the queue is full."""
    batcher = GatedBatcher(max_batch_size=1, max_queue_size=2)
    calls = [asyncio.create_task(batcher.process(0))]
    await turn(1)
    calls.append(asyncio.create_task(batcher.process(1)))
    await turn(1)
    future = batcher.submit(2)
    with pytest.raises(QueueFullException):
        await batcher.process(3)
    with pytest.raises(QueueFullException):
        batcher.submit(4)
    batcher.gate.set()
    assert await asyncio.gather(*calls, future) == [0, 1, 2]
    await batcher.stop()


async def test_a_cancelled_process_call_frees_its_capacity() -> None:
    """An item that is cancelled or times out while queued never runs."""
    batcher = GatedBatcher(max_queue_time=10.0, max_queue_size=2)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(batcher.process("timed out"), 1.0)
    task = asyncio.create_task(batcher.process("cancelled"))
    await turn(1)
    task.cancel()
    calls = [asyncio.create_task(batcher.process(item)) for item in range(2)]
    batcher.gate.set()
    assert await asyncio.gather(*calls) == [0, 1]
    assert batcher.batches == [[0, 1]]
    assert task.cancelled()
    await batcher.stop()


async def test_wait_for_on_a_running_batch_does_not_free_its_slot() -> None:
    """The slot belongs to the batch, not to its caller."""
    batcher = GatedBatcher(max_batch_size=1, max_queue_time=0)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(batcher.process(0), 1.0)
    second = asyncio.create_task(batcher.process(1))
    await asyncio.sleep(1.0)
    assert batcher.batches == [[0]]
    batcher.gate.set()
    assert await second == 1
    await batcher.stop()
