"""The loop's side of a batcher, on a virtual clock and with a runner that does what the test says."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import math
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from async_batcher import AsyncBatcher
from async_batcher._batching.queue import BatchQueue
from async_batcher._batching.recorder import StatsRecorder
from async_batcher._batching.scheduler import Scheduler, SubmitFuture
from async_batcher.exceptions import BatchError, BatcherStoppedError, QueueFullException
from tests.support.virtual_clock import FakeRunner, VirtualLoop

pytestmark = pytest.mark.virtual_clock

NO_LIMIT = sys.maxsize


class Rig:
    """A session on the running loop, and its runner."""

    def __init__(self, *, size: int = NO_LIMIT, window: float = 1.0, slots: int = 1, room: int = NO_LIMIT) -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        self.loop = loop
        self.queue: BatchQueue[Any, asyncio.Future[Any]] = BatchQueue(
            max_batch_size=size, max_queue_time=window, concurrency=slots, max_queue_size=room
        )
        self.runner = FakeRunner()
        self.scheduler = Scheduler(self.loop, self.queue, self.runner, contextvars.copy_context(), StatsRecorder())

    def ask(self, item: Any) -> SubmitFuture:
        """What `AsyncBatcher.submit` does."""
        future = SubmitFuture(loop=self.loop)
        future.scheduler = self.scheduler
        future.handle = self.scheduler.enqueue(item, future)
        return future

    def ask_all(self, *items: Any) -> list[SubmitFuture]:
        """Ask for several."""
        return [self.ask(item) for item in items]

    @property
    def batches(self) -> list[list[Any]]:
        """The batches that have left."""
        return self.runner.batches

    def timers(self) -> int:
        """Timers, and calls that are ready, which are not cancelled; but for the test's own task there is nothing else."""
        ready = self.loop._ready  # type: ignore[attr-defined]
        return self.loop.timers() + sum(not handle.cancelled() for handle in ready)


async def turn() -> None:
    """Let the loop go round."""
    await asyncio.sleep(0)


# ---- time


async def test_the_window_runs_from_the_oldest_waiting_item() -> None:
    """A batch leaves when its oldest item is max_queue_time old: not a moment earlier, and not restarted by later items."""
    rig = Rig(window=10.0)
    for item in range(5):
        rig.ask(item)
        await asyncio.sleep(1.0)
    await asyncio.sleep(4.999)
    assert rig.batches == []
    await asyncio.sleep(0.001)
    assert rig.batches == [[0, 1, 2, 3, 4]]


async def test_the_window_moves_on_when_the_oldest_waiter_leaves() -> None:
    """The age that counts is that of an item that still waits."""
    rig = Rig(window=10.0)
    oldest = rig.ask(0)
    await asyncio.sleep(4.0)
    rig.ask(1)
    oldest.cancel()
    await asyncio.sleep(9.999)
    assert rig.batches == []
    await asyncio.sleep(0.001)
    assert rig.batches == [[1]]


async def test_a_full_batch_leaves_at_once() -> None:
    """The item that makes a batch full sends it off, in the same turn of the loop."""
    rig = Rig(size=3, window=math.inf)
    rig.ask_all(0, 1)
    assert rig.batches == []
    rig.ask(2)
    assert rig.batches == [[0, 1, 2]]


async def test_a_size_of_one() -> None:
    """With max_batch_size=1 each item is a batch, and none waits for a window."""
    rig = Rig(size=1, window=math.inf)
    futures = rig.ask_all("a", "b")
    assert rig.batches == [["a"]]
    rig.runner.end()
    assert rig.batches == [["a"], ["b"]]
    rig.runner.end()
    assert await asyncio.gather(*futures) == ["a", "b"]


async def test_items_collect_while_all_slots_are_busy() -> None:
    """A slot that frees takes what is due by then, as full as it has become."""
    rig = Rig(size=4, window=1.0, slots=1)
    rig.ask(0)
    await asyncio.sleep(1.0)
    assert rig.batches == [[0]]
    for item in range(1, 4):
        rig.ask(item)
        await asyncio.sleep(5.0)
    assert rig.batches == [[0]]
    assert rig.timers() == 0, "there is nothing to wait for but the slot"
    rig.runner.end()
    assert rig.batches == [[0], [1, 2, 3]]


async def test_a_freed_slot_leaves_what_is_not_due() -> None:
    """A slot that frees does not cut a window short."""
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
    """Slots are counted, and filled oldest first."""
    rig = Rig(size=2, slots=3)
    rig.ask_all(*range(10))
    assert rig.batches == [[0, 1], [2, 3], [4, 5]]
    rig.runner.end(1)
    assert rig.batches[3:] == [[6, 7]]
    assert rig.queue.running == 3


async def test_no_window_means_the_next_turn() -> None:
    """With max_queue_time=0 a batch leaves in the next turn of the loop, with all that arrived until then."""
    rig = Rig(window=0.0)
    rig.ask_all(0, 1, 2)
    assert rig.batches == []
    await turn()
    assert rig.batches == [[0, 1, 2]]


async def test_a_timer_that_fires_early_counts_as_due() -> None:
    """A loop whose clock is a little behind its timers loses no turn by it."""
    rig = Rig(window=5.0)
    rig.ask(0)
    await turn()
    handle = rig.scheduler._wakeup_timer._handle
    assert isinstance(handle, asyncio.TimerHandle)
    handle._run()
    assert rig.batches == [[0]]
    handle.cancel()
    assert rig.timers() == 0


def test_the_clock_is_the_loops_own() -> None:
    """The window is measured on loop.time(), also of a loop whose clock a test has put in place of its own."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        loop.time = lambda: 5.0  # type: ignore[method-assign]
        try:
            queue: BatchQueue[Any, asyncio.Future[Any]] = BatchQueue(max_queue_time=10.0)
            scheduler = Scheduler(loop, queue, FakeRunner(), contextvars.copy_context(), StatsRecorder())
            scheduler.enqueue(1, loop.create_future())
            assert queue.next_wakeup == 15.0
            await scheduler.shutdown.close(force=True, timeout=None)
        finally:
            del loop.time

    with asyncio.Runner() as runner:
        runner.run(main())


async def test_one_timer_at_most_and_none_when_idle() -> None:
    """There is one timer while something waits for its window, and nothing at all in the loop when not."""
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


async def test_timers_of_full_batches_do_not_pile_up() -> None:
    """Batches that leave because they are full take their timer with them."""
    rig = Rig(size=2, window=1000.0, slots=NO_LIMIT)
    for item in range(200):
        rig.ask(item)
        assert rig.timers() == (item + 1) % 2
    assert len(rig.loop._scheduled) < 200  # type: ignore[attr-defined]


async def test_a_batch_that_fills_in_one_turn_sets_no_timer() -> None:
    """A timer is set when the turn of the loop is over, for what still waits then."""
    rig = Rig(size=3, window=5.0, slots=2)
    rig.ask_all(0, 1, 2)
    await turn()
    assert rig.timers() == 0
    rig.ask_all(3, 4)
    assert rig.loop.timers() == 0
    await turn()
    assert rig.loop.timers() == rig.timers() == 1
    assert rig.batches == [[0, 1, 2]]


async def test_a_window_shorter_than_a_turn_is_over_with_it() -> None:
    """What has become due when the turn is over leaves then, as with a timer that was set at once."""
    rig = Rig(window=1.0)
    rig.ask(0)
    rig.loop._clock_selector.now += 1.0  # the turn takes that long
    await turn()
    assert rig.batches == [[0]]


@pytest.mark.parametrize("window", [1e12, math.inf, 10**15])
async def test_a_huge_window(window: float) -> None:
    """A window that no clock outlives is one: the batch leaves when it is full, or at the stop, not earlier."""
    rig = Rig(size=3, window=window, room=10**30)
    rig.ask_all(0, 1)
    await asyncio.sleep(1e7)
    assert rig.batches == []
    assert rig.timers() == 1
    rig.ask(2)
    assert rig.batches == [[0, 1, 2]]
    rig.runner.end()
    rig.ask(3)
    stopping = asyncio.create_task(rig.scheduler.shutdown.close(force=False, timeout=1e12))
    await turn()
    assert rig.batches[1:] == [[3]]
    rig.runner.end()
    await stopping


async def test_a_huge_size() -> None:
    """A max_batch_size beyond any count is no limit."""
    rig = Rig(size=10**30, window=1.0, slots=10**30, room=10**30)
    rig.ask_all(*range(1000))
    await asyncio.sleep(1.0)
    assert rig.batches == [list(range(1000))]


async def test_limits_can_change_on_the_way() -> None:
    """New limits hold for what waits: a smaller size sends off what is full by it, a new window moves the timer."""
    rig = Rig(window=100.0, slots=2)
    rig.ask_all(0, 1, 2)
    rig.scheduler.resize(max_batch_size=2, max_queue_time=100.0)
    assert rig.batches == [[0, 1]]
    rig.scheduler.resize(max_batch_size=2, max_queue_time=3.0)
    assert rig.timers() == 1
    await asyncio.sleep(3.0)
    assert rig.batches == [[0, 1], [2]]


# ---- waiters


async def test_a_waiter_cancelled_while_queued_is_never_run() -> None:
    """Its item is dropped from the queue; its neighbours are not touched."""
    rig = Rig(window=1.0)
    futures = rig.ask_all(*range(5))
    futures[0].cancel()
    futures[3].cancel()
    await asyncio.sleep(1.0)
    assert rig.batches == [[1, 2, 4]]
    rig.runner.end()
    assert [future.result() for future in futures if not future.cancelled()] == [1, 2, 4]


async def test_a_waiter_cancelled_while_running_leaves_the_others_their_results() -> None:
    """Its result is dropped; the others get theirs, whether the batch succeeds or fails."""
    rig = Rig(size=3, slots=2)
    futures = rig.ask_all(*range(6))
    futures[1].cancel()
    futures[3].cancel()
    rig.runner.end()
    rig.runner.end(outcome=ValueError("no"))
    assert [future.result() for future in futures[0:3:2]] == [0, 2]
    assert [str(future.exception()) for future in futures[4:]] == ["no", "no"]


async def test_a_batch_whose_waiters_have_all_left_keeps_its_slot() -> None:
    """A slot is free when the batch has ended, whoever still waits for it."""
    rig = Rig(size=2)
    first = rig.ask_all(0, 1)
    for future in first:
        future.cancel()
    rig.ask_all(2, 3)
    assert rig.batches == [[0, 1]]
    rig.runner.end()
    assert rig.batches == [[0, 1], [2, 3]]


async def test_mass_cancellation() -> None:
    """Of 20,000 waiters any number may leave in one turn; those who stay get their results."""
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


async def test_cancelling_twice_and_after_the_end() -> None:
    """A future that is done is not taken out of the queue a second time."""
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


async def test_a_result_that_is_an_exception_is_raised_for_its_item_alone() -> None:
    """The others get their results."""
    rig = Rig(size=3)
    futures = rig.ask_all(0, 1, 2)
    rig.runner.end(outcome=["a", KeyError("b"), "c"])
    assert futures[0].result() == "a"
    assert isinstance(futures[1].exception(), KeyError)
    assert futures[2].result() == "c"


async def test_a_batch_that_ends_before_its_runner_returns() -> None:
    """A runner may call back before `run` has returned, any number of times in a row, without recursion."""

    class Inline(FakeRunner):
        def submit(self, batch: list[Any], done: Any, *others: Any) -> None:
            super().submit(batch, done, *others)
            self.end()

    rig = Rig(size=1)
    rig.runner = rig.scheduler.inflight.runner = Inline()
    futures = rig.ask_all(*range(2000))
    assert [future.result() for future in futures] == list(range(2000))

    rig = Rig(size=1)
    futures = rig.ask_all(*range(5000))  # the first batch holds up all others
    inline = Inline()
    rig.scheduler.inflight.runner = inline
    rig.runner.end()
    assert [future.result() for future in futures] == list(range(5000))
    assert len(inline.batches) == 4999


# ---- the queue limit


async def test_the_queue_limit_counts_what_waits() -> None:
    """Items in running batches, and those that left, do not count; one too many is refused and leaves no trace."""
    rig = Rig(size=2, room=3)
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


class Gated(AsyncBatcher[Any, Any]):
    """Gives each item back when the gate is open."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.gate = asyncio.Event()
        self.batches: list[list[Any]] = []

    async def process_batch(self, batch: list[Any]) -> list[Any]:
        """Wait at the gate."""
        self.batches.append(batch)
        await self.gate.wait()
        return list(batch)


async def test_process_and_submit_are_refused_alike() -> None:
    """The queue limit holds for single calls and for the fast path, counted together."""
    batcher = Gated(max_batch_size=1, max_queue_size=2)
    calls = [asyncio.create_task(batcher.process(0))]
    await turn()
    calls.append(asyncio.create_task(batcher.process(1)))
    await turn()
    future = batcher.submit(2)
    with pytest.raises(QueueFullException):
        await batcher.process(3)
    with pytest.raises(QueueFullException):
        batcher.submit(4)
    batcher.gate.set()
    assert await asyncio.gather(*calls, future) == [0, 1, 2]
    await batcher.stop()


async def test_a_cancelled_call_leaves_the_queue() -> None:
    """A `process` that is cancelled or timed out while queued frees its place, and its item is never run."""
    batcher = Gated(max_queue_time=10.0, max_queue_size=2)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(batcher.process("timed out"), 1.0)
    task = asyncio.create_task(batcher.process("cancelled"))
    await turn()
    task.cancel()
    calls = [asyncio.create_task(batcher.process(item)) for item in range(2)]
    batcher.gate.set()
    assert await asyncio.gather(*calls) == [0, 1]
    assert batcher.batches == [[0, 1]]
    assert task.cancelled()
    await batcher.stop()


async def test_wait_for_on_a_running_batch_does_not_free_its_slot() -> None:
    """The slot belongs to the work, not to the await."""
    batcher = Gated(max_batch_size=1, max_queue_time=0)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(batcher.process(0), 1.0)
    second = asyncio.create_task(batcher.process(1))
    await asyncio.sleep(1.0)
    assert batcher.batches == [[0]]
    batcher.gate.set()
    assert await second == 1
    await batcher.stop()


# ---- stop


async def test_stop_runs_what_waits_and_returns_when_the_last_batch_has_ended() -> None:
    """A drain cuts the window short, keeps the limits, and waits for every batch."""
    rig = Rig(size=2, window=1000.0)
    futures = rig.ask_all(*range(5))
    stopping = asyncio.create_task(rig.scheduler.shutdown.close(force=False, timeout=None))
    await turn()
    for _ in range(3):
        assert not stopping.done()
        assert rig.runner.closed == []
        rig.runner.end()
        await turn()
    await stopping
    assert rig.batches == [[0, 1], [2, 3], [4]]
    assert [future.result() for future in futures] == list(range(5))
    assert rig.runner.closed == [False]
    assert rig.timers() == 0


async def test_an_idle_stop_takes_no_time() -> None:
    """A batcher without work stops at once."""
    rig = Rig()
    before = rig.loop.time()
    await rig.scheduler.shutdown.close(force=False, timeout=None)
    assert rig.loop.time() == before


async def test_a_stopping_batcher_takes_no_more() -> None:
    """From the stop on, items are refused, also while it drains."""
    rig = Rig(size=1)
    rig.ask(0)
    stopping = asyncio.create_task(rig.scheduler.shutdown.close(force=False, timeout=None))
    await turn()
    with pytest.raises(BatcherStoppedError):
        rig.ask(1)
    rig.runner.end()
    await stopping


async def test_stop_is_over_when_the_last_waiting_item_is_cancelled() -> None:
    """A drain does not wait for items that nobody waits for."""
    rig = Rig(size=1, slots=1)
    first, second = rig.ask_all(0, 1)
    stopping = asyncio.create_task(rig.scheduler.shutdown.close(force=False, timeout=None))
    await turn()
    second.cancel()
    rig.runner.end()
    await stopping
    assert await first == 0
    assert rig.batches == [[0]]


async def test_a_stop_that_times_out_fails_what_is_unfinished() -> None:
    """Queued and running items fail with BatcherStoppedError, all is cleaned up, then TimeoutError is raised."""
    rig = Rig(size=2, window=1000.0)
    futures = rig.ask_all(*range(5))
    before = rig.loop.time()
    with pytest.raises(TimeoutError, match=r"7\.5 seconds"):
        await rig.scheduler.shutdown.close(force=False, timeout=7.5)
    assert rig.loop.time() == before + 7.5
    assert all(isinstance(future.exception(), BatcherStoppedError) for future in futures)
    assert rig.runner.closed == [True]
    assert rig.timers() == 0


async def test_a_stop_in_time_raises_nothing() -> None:
    """A timeout that is not reached changes nothing."""
    rig = Rig(size=2)
    futures = rig.ask_all(0, 1)
    rig.loop.call_later(5.0, rig.runner.end)
    await rig.scheduler.shutdown.close(force=False, timeout=5.001)
    assert [future.result() for future in futures] == [0, 1]
    await Rig().scheduler.shutdown.close(force=False, timeout=0)


async def test_a_forced_stop_fails_everything_now() -> None:
    """No waiter is left pending, in the queue or in a batch."""
    rig = Rig(size=2, window=1000.0)
    futures = rig.ask_all(*range(5))
    before = rig.loop.time()
    await rig.scheduler.shutdown.close(force=True, timeout=None)
    assert rig.loop.time() == before
    assert all(isinstance(future.exception(), BatcherStoppedError) for future in futures)
    assert len({id(future.exception()) for future in futures}) == 5, "each has an exception of its own"
    assert rig.batches == [[0, 1]]
    assert rig.runner.closed == [True]
    assert rig.timers() == 0


@pytest.mark.parametrize("window", [0.0, 1000.0])
async def test_a_forced_stop_starts_nothing(window: float) -> None:
    """What waits at a forced stop is failed, not run, though there be a free slot."""
    rig = Rig(window=window, slots=2)
    futures = rig.ask_all(0, 1)
    await rig.scheduler.shutdown.close(force=True, timeout=None)
    assert all(isinstance(future.exception(), BatcherStoppedError) for future in futures)
    assert rig.batches == []


async def test_cancelling_a_stop_forces_it() -> None:
    """The stop sees its end through, then is cancelled."""
    rig = Rig(size=2, window=1000.0)
    futures = rig.ask_all(*range(5))
    stopping = asyncio.create_task(rig.scheduler.shutdown.close(force=False, timeout=None))
    await turn()
    stopping.cancel()
    with pytest.raises(asyncio.CancelledError):
        await stopping
    assert all(isinstance(future.exception(), BatcherStoppedError) for future in futures)
    assert rig.runner.closed == [True]


async def test_a_second_stop_is_harmless() -> None:
    """After a stop, and beside one, another stop returns when all has ended, and ends nothing twice."""
    rig = Rig(size=2, window=1000.0)
    futures = rig.ask_all(*range(3))
    stops = [asyncio.create_task(rig.scheduler.shutdown.close(force=False, timeout=None)) for _ in range(3)]
    await turn()
    assert not any(stop.done() for stop in stops)
    rig.runner.end()
    rig.runner.end()
    await asyncio.gather(*stops)
    await rig.scheduler.shutdown.close(force=False, timeout=1.0)
    await rig.scheduler.shutdown.close(force=True, timeout=None)
    assert rig.runner.closed == [False]
    assert await asyncio.gather(*futures) == [0, 1, 2]


async def test_a_forced_stop_ends_a_drain_that_is_under_way() -> None:
    """Who waits for the drain is let go too, without an error of its own."""
    rig = Rig(size=2)
    futures = rig.ask_all(*range(3))
    draining = asyncio.create_task(rig.scheduler.shutdown.close(force=False, timeout=None))
    await turn()
    await rig.scheduler.shutdown.close(force=True, timeout=None)
    await draining
    assert all(isinstance(future.exception(), BatcherStoppedError) for future in futures)


async def test_one_of_two_stops_is_cancelled() -> None:
    """It forces the end, which the other sees too."""
    rig = Rig(size=2)
    futures = rig.ask_all(*range(3))
    stops = [asyncio.create_task(rig.scheduler.shutdown.close(force=False, timeout=None)) for _ in range(2)]
    await turn()
    stops[0].cancel()
    await asyncio.wait(stops)
    assert stops[0].cancelled()
    assert stops[1].exception() is None
    assert all(isinstance(future.exception(), BatcherStoppedError) for future in futures)


async def test_a_batch_that_ends_after_a_forced_stop_changes_nothing() -> None:
    """Its outcome, late as it is, reaches nobody and breaks nothing."""

    class Deaf(FakeRunner):
        async def close(self, *, kill: bool) -> None:
            self.closed.append(kill)

    rig = Rig(size=2)
    rig.runner = rig.scheduler.inflight.runner = Deaf()
    futures = rig.ask_all(0, 1, 2)
    await rig.scheduler.shutdown.close(force=True, timeout=None)
    rig.runner.end()
    assert rig.runner.running == []
    assert all(isinstance(future.exception(), BatcherStoppedError) for future in futures)


async def test_start_reopens_while_an_older_stop_still_drains() -> None:
    """After a stop `process` is refused; `start` reopens at once, and neither life disturbs the other."""
    batcher = Gated(max_batch_size=1)
    first = batcher.submit("first")
    stopping = asyncio.create_task(batcher.stop())
    await turn()
    with pytest.raises(BatcherStoppedError):
        await batcher.process("refused")
    assert not await batcher.is_running()
    await batcher.start()
    assert await batcher.is_running()
    second = batcher.submit("second")
    await turn()
    assert not stopping.done()
    batcher.gate.set()
    await stopping
    assert (await first, await second) == ("first", "second")
    assert await batcher.is_running()
    assert await batcher.process("third") == "third"
    await batcher.stop()
    assert not await batcher.is_running()


async def test_a_stop_before_the_first_call() -> None:
    """A batcher that never ran can be stopped, again and again, and is then closed."""
    batcher = Gated()
    await batcher.stop()
    await batcher.stop(force=True)
    with pytest.raises(BatcherStoppedError):
        await batcher.process(1)
    with pytest.raises(BatcherStoppedError):
        batcher.submit(1)
    await batcher.start()
    batcher.gate.set()
    assert await batcher.process(1) == 1
    await batcher.stop()


async def test_a_stop_that_times_out_can_be_followed_by_a_start() -> None:
    """After any stop the batcher can be reopened."""
    batcher = Gated(max_batch_size=1)
    future = batcher.submit(1)
    with pytest.raises(TimeoutError):
        await batcher.stop(timeout=3.0)
    assert isinstance(future.exception(), BatcherStoppedError)
    with pytest.raises(BatcherStoppedError):
        batcher.submit(2)
    await batcher.start()
    batcher.gate.set()
    assert await batcher.process(3) == 3
    await batcher.stop()


async def test_a_batch_that_stops_its_batcher_by_force_takes_no_time() -> None:
    """The stop and the batch that called it do not wait for each other."""

    class Stopper(AsyncBatcher[int, None]):
        async def process_batch(self, batch: list[int]) -> None:
            assert batch == [1]
            await self.stop(force=True)

    loop = asyncio.get_running_loop()
    batcher = Stopper(max_queue_time=0)
    before = loop.time()
    with pytest.raises(BatcherStoppedError):
        await batcher.process(1)
    await batcher.stop()
    while len(asyncio.all_tasks()) > 1:
        await asyncio.wait(asyncio.all_tasks() - {asyncio.current_task()})
    assert loop.time() == before


# ---- everything in any order

ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("ask"), st.integers(1, 5)),
        st.tuples(st.just("cancel"), st.integers(0, 60)),
        st.tuples(st.just("end"), st.integers(0, 5)),
        st.tuples(st.just("fail"), st.integers(0, 5)),
        st.tuples(st.just("fail some"), st.integers(0, 5)),
        st.tuples(st.just("exit"), st.integers(0, 5)),
        st.tuples(st.just("sleep"), st.sampled_from([0.0, 0.5, 1.0, 5.0])),
        st.tuples(st.just("resize"), st.integers(1, 5)),
    ),
    max_size=40,
)
STOPS = st.lists(st.sampled_from(["drain", "timeout", "force", "cancel"]), max_size=3)


class Counted(SubmitFuture):
    """A future that counts how often it is settled."""

    __slots__ = ("settled",)

    def set_result(self, result: Any) -> None:
        """Count."""
        self.settled = getattr(self, "settled", 0) + 1
        super().set_result(result)

    def set_exception(self, exception: Any) -> None:
        """Count."""
        self.settled = getattr(self, "settled", 0) + 1
        super().set_exception(exception)


class Scenario:
    """A session under a sequence of events, and what each waiter may have got."""

    def __init__(self, size: int, slots: int, window: float) -> None:
        self.rig = Rig(size=size, slots=slots, window=window, room=20)
        self.size, self.slots, self.window = size, slots, window
        self.futures: list[Counted] = []
        self.refused = 0
        self.cancelled_in_queue: set[int] = set()
        self.failed: dict[int, str] = {}  # what a batch, or an item, has failed with

    def ask(self, count: int) -> None:
        """New items."""
        for _ in range(count):
            item = len(self.futures)
            future = Counted(loop=self.rig.loop)
            future.scheduler = self.rig.scheduler
            try:
                future.handle = self.rig.scheduler.enqueue(item, future)
            except QueueFullException:
                self.refused += 1
            except BatcherStoppedError:
                assert self.rig.scheduler.closing
            else:
                self.futures.append(future)

    def cancel(self, item: int) -> None:
        """One waiter leaves."""
        if item < len(self.futures):
            started = {one for batch in self.rig.batches for one in batch}
            if self.futures[item].cancel() and item not in started:
                self.cancelled_in_queue.add(item)

    def end(self, index: int, how: str) -> None:
        """One batch ends."""
        running = self.rig.runner.running
        if not running:
            return
        index %= len(running)
        batch = running[index][0]
        outcome: Any = [("result of", item) for item in batch]
        if how == "fail":
            outcome = ValueError(f"batch {batch}")
            self.failed.update((item, f"batch {batch}") for item in batch)
        elif how == "exit":
            outcome = SystemExit(f"batch {batch}")
            self.failed.update((item, f"batch {batch}") for item in batch)
        elif how == "fail some":
            outcome[::2] = [ValueError(f"item {item}") for item in batch[::2]]
            self.failed.update((item, f"item {item}") for item in batch[::2])
        self.rig.runner.end(index, outcome)

    async def play(self, actions: list[tuple[str, Any]], *, stops: int = 0) -> None:
        """One event after the other, beside as many stops, each with a timer of its own."""
        for name, value in actions:
            if name == "ask":
                self.ask(value)
            elif name == "cancel":
                self.cancel(value)
            elif name == "sleep":
                await asyncio.sleep(value)
            elif name == "resize":
                self.rig.scheduler.resize(max_batch_size=value, max_queue_time=self.window)
            else:
                self.end(value, name)
            assert len(self.rig.runner.running) <= self.slots
            assert self.rig.loop.timers() <= 1 + stops

    async def stop(self, how: str) -> None:
        """Stop, one way or another."""
        if how == "cancel":
            task = asyncio.create_task(self.rig.scheduler.shutdown.close(force=False, timeout=None))
            await turn()
            task.cancel()
            await asyncio.wait([task])
        elif how == "timeout":
            with contextlib.suppress(TimeoutError):
                await self.rig.scheduler.shutdown.close(force=False, timeout=3.0)
        else:
            await self.rig.scheduler.shutdown.close(force=how == "force", timeout=None)

    def check(self) -> None:
        """Everyone has what is its own."""
        ran = [item for batch in self.rig.batches for item in batch]
        assert ran == sorted(set(ran)), "first in, first out, and none twice"
        assert not self.cancelled_in_queue & set(ran)
        for item, future in enumerate(self.futures):
            assert future.done()
            if future.cancelled():
                assert not hasattr(future, "settled")
                continue
            assert future.settled == 1
            error = future.exception()
            if error is None:
                assert future.result() == ("result of", item)
                assert item not in self.failed
            elif isinstance(error, ValueError):
                assert str(error) == self.failed[item]
            elif isinstance(error, BatchError):
                assert self.failed[item] in str(error)
                assert error.original_type == "builtins.SystemExit"
            else:
                assert isinstance(error, BatcherStoppedError)
        assert len(self.rig.queue) == 0
        assert self.rig.runner.running == []
        assert len(self.rig.runner.closed) == 1


async def play(
    before: list[tuple[str, Any]], during: list[tuple[str, Any]], stops: list[str], size: int, slots: int, window: float
) -> None:
    """Events, then stops with more events beside them, then the end."""
    scenario = Scenario(size, slots, window)
    await scenario.play(before)
    tasks = [asyncio.create_task(scenario.stop(how)) for how in stops]
    await scenario.play(during, stops=len(stops))
    if "drain" in stops or not stops:
        tasks.append(asyncio.create_task(scenario.stop("drain")))
        await turn()
        while scenario.rig.runner.running:
            scenario.end(0, "end")
            await turn()
    await asyncio.gather(*tasks)
    scenario.check()
    assert asyncio.all_tasks() == {asyncio.current_task()}


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(
    before=ACTIONS,
    during=ACTIONS,
    stops=STOPS,
    size=st.integers(1, 5),
    slots=st.integers(1, 3),
    window=st.sampled_from([0.0, 1.0, 3.0, math.inf]),
)
def test_every_waiter_is_settled_once_with_its_own(
    before: list[tuple[str, Any]], during: list[tuple[str, Any]], stops: list[str], size: int, slots: int, window: float
) -> None:
    """Whatever the order of arrivals, departures, ends, failures and stops, each waiter gets what is its own, once."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(play(before, during, stops, size, slots, window))
