"""When a batch starts: its window, its size, and the timers for them."""

from __future__ import annotations

import asyncio
import contextvars
import math
from typing import Any

import pytest

from async_batcher._batching.queue.batch_queue import BatchQueue
from async_batcher._batching.records.recorder import StatsRecorder
from async_batcher._batching.scheduler import Scheduler
from tests.support.polling import turn
from tests.support.scheduler_rig import NO_LIMIT, Rig
from tests.support.virtual_clock import FakeRunner

pytestmark = pytest.mark.virtual_clock


async def test_the_window_runs_from_the_oldest_queued_item() -> None:
    """A batch starts when its oldest item is max_queue_time old; later items do not delay it."""
    rig = Rig(window=10.0)
    for item in range(5):
        rig.ask(item)
        await asyncio.sleep(1.0)
    await asyncio.sleep(4.999)
    assert rig.batches == []
    await asyncio.sleep(0.001)
    assert rig.batches == [[0, 1, 2, 3, 4]]


async def test_the_window_moves_when_the_oldest_item_is_cancelled() -> None:
    """It then runs from the oldest item that is still queued."""
    rig = Rig(window=10.0)
    oldest = rig.ask(0)
    await asyncio.sleep(4.0)
    rig.ask(1)
    oldest.cancel()
    await asyncio.sleep(9.999)
    assert rig.batches == []
    await asyncio.sleep(0.001)
    assert rig.batches == [[1]]


async def test_a_full_batch_starts_at_once() -> None:
    """The item that fills a batch starts it, in the same iteration of the loop."""
    rig = Rig(size=3, window=math.inf)
    rig.ask_all(0, 1)
    assert rig.batches == []
    rig.ask(2)
    assert rig.batches == [[0, 1, 2]]


async def test_a_batch_size_of_one() -> None:
    """Each item is a batch, and none waits for a window."""
    rig = Rig(size=1, window=math.inf)
    futures = rig.ask_all("a", "b")
    assert rig.batches == [["a"]]
    rig.runner.end()
    assert rig.batches == [["a"], ["b"]]
    rig.runner.end()
    assert await asyncio.gather(*futures) == ["a", "b"]


async def test_items_accumulate_while_every_slot_is_busy() -> None:
    """A slot that becomes free takes all items that are due by then."""
    rig = Rig(size=4, window=1.0, slots=1)
    rig.ask(0)
    await asyncio.sleep(1.0)
    assert rig.batches == [[0]]
    for item in range(1, 4):
        rig.ask(item)
        await asyncio.sleep(5.0)
    assert rig.batches == [[0]]
    assert rig.timers() == 0, "only a slot can start the next batch"
    rig.runner.end()
    assert rig.batches == [[0], [1, 2, 3]]


async def test_a_freed_slot_does_not_shorten_the_window() -> None:
    """Items that are not due yet stay in the queue."""
    rig = Rig(window=10.0)
    rig.ask(0)
    await asyncio.sleep(10.0)
    rig.ask(1)
    await asyncio.sleep(3.0)
    rig.runner.end()
    assert rig.batches == [[0]]
    await asyncio.sleep(6.999)
    assert rig.batches == [[0]]
    await asyncio.sleep(0.001)
    assert rig.batches == [[0], [1]]


async def test_never_more_batches_than_concurrency() -> None:
    """At most `concurrency` batches run, the oldest items first."""
    rig = Rig(size=2, slots=3)
    rig.ask_all(*range(10))
    assert rig.batches == [[0, 1], [2, 3], [4, 5]]
    rig.runner.end(1)
    assert rig.batches[3:] == [[6, 7]]
    assert rig.queue.running == 3


async def test_a_window_of_zero_ends_with_the_iteration() -> None:
    """The batch starts in the next iteration, with all items that arrived until then."""
    rig = Rig(window=0.0)
    rig.ask_all(0, 1, 2)
    assert rig.batches == []
    await turn(1)
    assert rig.batches == [[0, 1, 2]]


async def test_a_timer_that_fires_early_counts_as_due() -> None:
    """The batch starts even if the loop's clock is slightly behind its timers."""
    rig = Rig(window=5.0)
    rig.ask(0)
    await turn(1)
    handle = rig.scheduler._queue_timer._handle
    assert isinstance(handle, asyncio.TimerHandle)
    handle._run()
    assert rig.batches == [[0]]
    handle.cancel()
    assert rig.timers() == 0


def test_the_window_is_measured_by_the_loops_clock() -> None:
    """It is loop.time(), also where a test has replaced it."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        loop.time = lambda: 5.0  # type: ignore[method-assign]
        try:
            queue: BatchQueue[Any, asyncio.Future[Any]] = BatchQueue(max_queue_time=10.0)
            scheduler = Scheduler(
                loop, queue, FakeRunner(), contextvars.copy_context(), StatsRecorder()
            )
            scheduler.callers.enqueue(1, loop.create_future())
            assert queue.next_wakeup == 15.0
            await scheduler.close(force=True, timeout=None)
        finally:
            del loop.time

    with asyncio.Runner() as runner:
        runner.run(main())


async def test_one_timer_at_most_and_none_when_idle() -> None:
    """One timer while items wait for their window; otherwise the loop has nothing to do."""
    rig = Rig(size=100, window=5.0, slots=2)
    assert rig.timers() == 0
    futures = rig.ask_all(*range(10))
    assert rig.timers() == 1
    futures[0].cancel()
    rig.ask(10)
    assert rig.timers() == 1
    await asyncio.sleep(5.0)
    assert rig.batches == [list(range(1, 11))]
    assert rig.timers() == 0
    waiting = rig.ask_all(11, 12)
    for future in waiting:
        future.cancel()
    assert rig.timers() == 0
    rig.runner.end()
    await asyncio.gather(*futures[1:])
    assert rig.timers() == 0


async def test_full_batches_cancel_their_timers() -> None:
    """Batches that start because they are full leave no timer."""
    rig = Rig(size=2, window=1000.0, slots=NO_LIMIT)
    for item in range(200):
        rig.ask(item)
        assert rig.timers() == (item + 1) % 2
    assert len(rig.loop._scheduled) < 200  # type: ignore[attr-defined]


async def test_a_batch_that_fills_in_one_iteration_sets_no_timer() -> None:
    """A timer is set at the end of an iteration, for items that are still queued."""
    rig = Rig(size=3, window=5.0, slots=2)
    rig.ask_all(0, 1, 2)
    await turn(1)
    assert rig.timers() == 0
    rig.ask_all(3, 4)
    assert rig.loop.timers() == 0
    await turn(1)
    assert rig.loop.timers() == rig.timers() == 1
    assert rig.batches == [[0, 1, 2]]


async def test_a_window_shorter_than_an_iteration_ends_with_it() -> None:
    """Items that become due during an iteration start at its end."""
    rig = Rig(window=1.0)
    rig.ask(0)
    rig.loop.advance(1.0)  # the iteration takes that long
    await turn(1)
    assert rig.batches == [[0]]


@pytest.mark.parametrize("window", [1e12, math.inf, 10**15])
async def test_a_huge_window_never_ends(window: float) -> None:
    """The batch starts when it is full, or at the stop, and not earlier."""
    rig = Rig(size=3, window=window, capacity=10**30)
    rig.ask_all(0, 1)
    await asyncio.sleep(1e7)
    assert rig.batches == []
    assert rig.timers() == (window < math.inf)
    rig.ask(2)
    assert rig.batches == [[0, 1, 2]]
    rig.runner.end()
    rig.ask(3)
    stopping = asyncio.create_task(rig.stop(timeout=1e12))
    await turn(1)
    assert rig.batches[1:] == [[3]]
    rig.runner.end()
    await stopping


async def test_a_huge_batch_size_is_no_limit() -> None:
    """A max_batch_size beyond any count is no limit."""
    rig = Rig(size=10**30, window=1.0, slots=10**30, capacity=10**30)
    rig.ask_all(*range(1000))
    await asyncio.sleep(1.0)
    assert rig.batches == [list(range(1000))]


async def test_new_limits_apply_to_queued_items() -> None:
    """A smaller size starts the batches that it fills; a new window moves the timer."""
    rig = Rig(window=100.0, slots=2)
    rig.ask_all(0, 1, 2)
    rig.scheduler.resize(max_batch_size=2, max_queue_time=100.0)
    assert rig.batches == [[0, 1]]
    rig.scheduler.resize(max_batch_size=2, max_queue_time=3.0)
    assert rig.timers() == 1
    await asyncio.sleep(3.0)
    assert rig.batches == [[0, 1], [2]]
