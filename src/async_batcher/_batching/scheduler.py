"""The event-loop side of a running batcher: it dispatches batches as they are due.

::

    Callers --enqueue--> BatchQueue --get_batch--> InFlightBatches --> Delivery --> futures
                             |                         |                  ^
                             | next_wakeup             | slot released    | deadline
                             v                         v                  |
                         QueueTimer -------------> pump()             ItemTimeouts

States: open --close()--> closing (accepts nothing, runs what is queued) --> ended.

Rules:

- A slot is released when its batch has finished, whether or not it has callers.
- Never start an item whose caller is gone or whose deadline has passed, even if the timer fired
  late.
- Batches leave only in `pump`, which never runs inside itself: an eager task or an inline executor
  may finish a batch before `dispatch` returns.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from async_batcher._batching.callers import Callers, all_slots_leaked_error, stopped_error
from async_batcher._batching.delivery import Delivery
from async_batcher._batching.flushes import Flushes
from async_batcher._batching.inflight import InFlightBatches
from async_batcher._batching.item_timeouts import ItemTimeouts
from async_batcher._batching.queue.base import ALREADY_DUE
from async_batcher._batching.queue.lane_queue import LaneQueue
from async_batcher._batching.queue_timer import QueueTimer
from async_batcher._eventloop.future import future_factory, resolve
from async_batcher._eventloop.lifecycle import Session
from async_batcher.exceptions import BatcherStoppedError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextvars import Context

    from async_batcher._batching.batch import Batch
    from async_batcher._batching.queue.batch_queue import BatchQueue
    from async_batcher._batching.queue.limit_state import LimitStates
    from async_batcher._batching.records.recorder import StatsRecorder
    from async_batcher._runners.base import Runner
    from async_batcher.failures import FailurePolicy
    from async_batcher.stats import Stats


_STOPPED_MIDWAY_MSG = "the batcher was stopped before the item's batch had finished"


class Scheduler(Session):
    """The queue of a batcher on one event loop, and what moves items through it.

    Args:
        loop: The event loop.
        queue: The queue.
        runner: Where batches run.
        context: What callbacks run in.
        recorder: Counts.
        item_timeout: Seconds within which an item must have its result; None: no limit.
        waits_when_full: Whether calls wait for capacity; otherwise they fail.
        on_failure: The policies for items that fail.
        cancels_abandoned: Whether a running batch without callers is cancelled.
        name: What log lines and notes on exceptions call the batcher.

    Attributes:
        new_future: Makes what a caller awaits.
        ended: Resolved when everything that the batcher made has ended.
    """

    noun = "batcher"

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        queue: BatchQueue[Any, Any] | LaneQueue,
        runner: Runner,
        context: Context,
        recorder: StatsRecorder,
        *,
        item_timeout: float | None = None,
        waits_when_full: bool = False,
        on_failure: Sequence[FailurePolicy] = (),
        cancels_abandoned: bool = False,
        name: str = "process_batch",
    ) -> None:
        super().__init__(loop, context)
        self.queue: BatchQueue[Any, Any] | LaneQueue = queue
        self.recorder = recorder
        self.new_future = future_factory(loop)
        self.callers = Callers(self, item_timeout=item_timeout, waits_when_full=waits_when_full)
        self._limits = queue.limits if isinstance(queue, LaneQueue) else None
        if self._limits is not None:
            self._limits.join(self)
        self._delivery = Delivery(recorder, self.callers.drop, name)
        self.inflight = InFlightBatches(
            self,
            runner,
            self._delivery,
            context,
            on_failure=on_failure,
            cancels_abandoned=cancels_abandoned,
        )
        self._queue_timer = QueueTimer(loop, context, self.pump)
        self.item_timeouts = ItemTimeouts(self, self._delivery, context)
        self._pumping = False
        self._flushes = Flushes(loop)
        self._starting = 0  # calls of `start` that have not returned
        self._drained: asyncio.Future[None] = loop.create_future()
        self._tear_downs: asyncio.Task[None] | None = None
        self.ended: asyncio.Future[None] = loop.create_future()

    # --- the batcher

    def stats(self) -> Stats:
        """What it does and has done."""
        return self.recorder.stats(**self.pending(), workers=self.inflight.runner.workers())

    def pending(self) -> dict[str, int]:
        """The numbers of items with a caller, by their state in `stats.Stats`."""
        waiting = self.inflight.waiting_items
        return {
            "queued": len(self.queue) + waiting,
            "blocked": len(self.callers.waitlist),
            "running": self.inflight.pending_items - waiting,
        }

    def resize(self, *, max_batch_size: int, max_queue_time: float) -> None:
        """Change the limits of the batches that have not left yet."""
        self.queue.resize(max_batch_size=max_batch_size, max_queue_time=max_queue_time)
        if not self.loop.is_closed():
            self.pump(ALREADY_DUE, self.loop.time())

    def use(
        self, runner: Runner, *, concurrency: int, workers: int, divides_single_calls: bool
    ) -> None:
        """Dispatch to a runner what was held until it was known."""
        self.inflight.runner = runner
        ahead = runner.full_batches_ahead(concurrency)
        self.queue.set_concurrency(
            concurrency, workers=workers, divides_single_calls=divides_single_calls, ahead=ahead
        )
        now = self.loop.time()
        self.queue.release_slot(now)  # taken by `BatcherLifecycle._make`
        self.pump(now, now)

    async def flush(self) -> None:
        """Dispatch what waits, and return when all that was accepted has ended.

        Raises:
            RuntimeError: A batch of this batcher waits for that.
        """
        if self.inflight.runner.owns_task(asyncio.current_task()):
            msg = "process_batch cannot wait for its own end: call flush() elsewhere"
            raise RuntimeError(msg)
        self.callers.flush()
        pending = [*self.queue.futures(), *self.callers.waitlist.futures()]
        await self._flushes.wait(pending + self.inflight.futures())

    # --- start and end

    async def start(self) -> None:
        """Start the runner; see `Runner.start`."""
        self._starting += 1
        try:
            await self.inflight.runner.start()
        finally:
            self._starting -= 1
            self.check_drained()

    async def drain(self) -> None:
        """Wait until nothing runs, waits or starts, and what was set up is torn down."""
        self._delivery.fail(self.callers.waitlist.clear(), stopped_error())
        self.queue.close()
        self.pump(ALREADY_DUE, self.loop.time())
        if not self._drained.done():
            await asyncio.wait([self._drained])
        runner = self.inflight.runner
        if self.forced or self._ending is not None or not runner.tears_down:
            return
        if self._tear_downs is None:
            context = self._context.copy()
            self._tear_downs = self.loop.create_task(runner.run_tear_downs(), context=context)
        await asyncio.wait([self._tear_downs])

    def check_drained(self) -> None:
        """Go on with a flush, or the end, if nothing runs, waits or starts any longer."""
        self._flushes.check()
        if self.closing and not (
            self._starting or self.inflight or self.inflight.recovery.isolator or len(self.queue)
        ):
            resolve(self._drained, None)

    def fail_all(self) -> None:
        """Fail what waits and what runs."""
        if self._tear_downs is not None:
            self._tear_downs.cancel()
        self._delivery.stopping = True
        self.queue.close()
        error = BatcherStoppedError(_STOPPED_MIDWAY_MSG)
        self._clear_queue(error)
        self.inflight.fail_all(error)
        resolve(self._drained, None)
        self._flushes.check()

    def fail_waiting(self, future: Any, error: BaseException) -> None:
        """Fail a caller that waits for capacity."""
        self._delivery.fail([future], error)

    def reject_all(self, error: BaseException) -> None:
        """Fail what was held, and accept nothing more."""
        self.closing = True
        self.queue.close()
        self._clear_queue(error)
        self.item_timeouts.expire(self.loop.time())
        self._leave_limits()
        resolve(self._drained, None)
        resolve(self.ended, None)
        self._flushes.check()

    async def end(self) -> None:
        try:
            if self._tear_downs is not None:
                await asyncio.wait([self._tear_downs])
            await self.inflight.runner.close(kill=self.forced)
        finally:
            self.item_timeouts.cancel()
            self._leave_limits()
            resolve(self.ended, None)

    def close_without_loop(self) -> None:
        self.closing = self._delivery.stopping = True
        self.queue.close()
        self._leave_limits()
        self.inflight.runner.close_without_loop()

    def _leave_limits(self) -> None:
        if self._limits is not None:
            self._limits.has_due = False
            if not self.loop.is_closed():
                self._wake_sharers(self._limits, self.loop.time())
            self._limits.leave()

    # --- running batches

    def on_batch_finished(self, now: float, batch: Batch[Any, Any]) -> None:
        """Release the slot of a batch."""
        lane = batch.lane if isinstance(self.queue, LaneQueue) else None
        self.queue.release_slot(now, leaked=batch.slot_leaked, lane=lane)
        # Otherwise there is nothing new to dispatch, as for an item that was alone.
        if (
            self.queue.wakeup_changed
            or self.inflight.recovery.isolator
            or batch.rerun is not None
            or self.callers.waitlist.entries
        ):
            self.pump(now, now)
        if self.item_timeouts.handle is not None and not self.inflight and not len(self.queue):
            self.item_timeouts.expire(now)  # without callers no timer needs to wake an idle program
        if self.closing or self._flushes.waiting:
            self.check_drained()

    def on_slot_leaked(self) -> None:
        """Count a batch that timed out and cannot be stopped."""
        self.queue.leak_slot()
        if self.queue.all_slots_leaked:
            self._clear_queue(all_slots_leaked_error())
        self.pump(ALREADY_DUE, self.loop.time())

    def abort_if_loop_is_ending(self) -> BaseException | None:
        """Stop at once if a batch was cancelled with all other tasks, and return its error.

        Return None otherwise.
        """
        # asyncio.run() cancels all tasks at its end: then nothing more starts.
        if not all(task.cancelling() for task in asyncio.all_tasks(self.loop)):
            return None
        self.closing = True
        self.force()
        return BatcherStoppedError(_STOPPED_MIDWAY_MSG)

    def use_lanes(self) -> LaneQueue:
        """Return the queue, which can take items back from now on."""
        queue = self.queue
        if not isinstance(queue, LaneQueue):
            queue = self.queue = queue.to_lanes(self.recorder)
            self.callers.use_lanes(queue)
        return queue

    # --- the pump

    def pump(self, until: float, now: float) -> None:
        """Fail expired callers, dispatch batches due by ``until``, and arm the timer.

        `ALREADY_DUE`: those whose time does not count, since they are full, flushed or closing.
        """
        if self._pumping:
            return  # the call that is under way does it
        self._pumping = True
        try:
            if self.item_timeouts.next <= now:
                self.item_timeouts.expire(now)
            inflight, waitlist = self.inflight, self.callers.waitlist
            while True:
                queue = self.queue  # a batch may have ended at once, and its items come back
                if isinstance(queue, LaneQueue):
                    queue.refresh(now, until)
                if inflight.recovery.isolator:
                    inflight.dispatch_reruns(until)
                if waitlist.entries:
                    self.callers.admit(now)
                if queue.next_wakeup > until:
                    break
                batch = queue.get_batch()
                if batch is None:
                    break
                inflight.dispatch(batch)
        finally:
            self._pumping = False
            queue = self.queue
            queue.wakeup_changed = False
            if queue.next_wakeup != self._queue_timer.armed_for:
                self._queue_timer.arm(queue.next_wakeup, now)
            if self._limits is not None:
                self._wake_sharers(self._limits, now)
        if self.closing or self._flushes.waiting:  # the last items may have ended without a batch
            self.check_drained()

    def _wake_sharers(self, limits: LimitStates, now: float) -> None:
        for other in limits.take_sharers():
            if other.callers.waitlist.entries or other.queue.wakeup_changed:
                other.pump_soon()
        if limits.have_rates:
            for other in limits.take_waiting(now):
                other.pump_soon()

    def pump_soon(self) -> None:
        """Dispatch what may leave in the next iteration of the loop."""
        self.loop.call_soon(lambda: self.pump(ALREADY_DUE, self.loop.time()), context=self._context)

    def _clear_queue(self, error: BaseException) -> None:
        """Fail what is queued, waits to run again, or waits for capacity."""
        queued = dict.fromkeys(self.queue.clear())  # a slice is there once for each of its items
        waiting = [*queued, *self.inflight.recovery.clear(), *self.callers.waitlist.clear()]
        self._delivery.fail(waiting, error)
        self.pump(ALREADY_DUE, self.loop.time())
