"""The event-loop side of a running batcher: it enqueues items and dispatches batches.

::

    enqueue(item, future) --> BatchQueue --get_batch--> InFlightBatches --> Delivery --> futures
              |                 ^     |                    |                   ^
              v      capacity   |     | next_wakeup        | slot released     | deadline
           Waitlist ------------'     v                    v                   |
                                  WakeupTimer ------->  _pump()             Expiry

States: open --Shutdown.close()--> closing (accepts nothing, runs what is queued) --> ended.

Rules:

- A slot is released when its batch has finished, whether or not it has callers.
- Never start an item whose caller is gone or whose deadline has passed, even if the timer fired
  late.
- While callers wait for capacity the queue is full; reruns need no capacity.
- Batches leave only in `_pump`, which never runs inside itself: an eager task or an inline executor
  may finish a batch before `dispatch` returns.
"""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Any

from async_batcher._batching.bulk import BulkFuture, Slice
from async_batcher._batching.capacity import (
    ALL_SLOTS_LEAKED_MSG,
    STOPPED_MSG,
    is_shut,
    rejection_error,
    remove,
)
from async_batcher._batching.delivery import Delivery
from async_batcher._batching.expiry import Expiry
from async_batcher._batching.inflight import InFlightBatches
from async_batcher._batching.queue import NOW, BatchQueue
from async_batcher._batching.shutdown import Shutdown
from async_batcher._batching.timers import WakeupTimer
from async_batcher._batching.waitlist import (
    BulkWaitlistEntry,
    Waitlist,
    WaitlistEntry,
    enqueue_slice,
)
from async_batcher._eventloop.future import future_factory
from async_batcher.exceptions import (
    BatcherStoppedError,
    BatchTimeoutError,
)

if TYPE_CHECKING:
    from collections.abc import Collection
    from contextvars import Context

    from async_batcher._batching.capacity import QueueHandle
    from async_batcher._batching.recorder import StatsRecorder
    from async_batcher._runners.base import Runner
    from async_batcher.integrations.opentelemetry import BatchTracer
    from async_batcher.stats import Stats


_STOPPED_MIDWAY_MSG = "the batcher was stopped before the item's batch had finished"


class Scheduler:
    """The queue of a batcher on one event loop, and what moves items through it.

    Args:
        loop: The event loop.
        queue: The queue.
        runner: Where batches run.
        context: What callbacks run in.
        recorder: Counts.
        item_timeout: Seconds within which an item must have its result; None: no limit.
        waits_when_full: Whether calls wait for capacity; otherwise they fail.
        isolates_failures: Whether failed batches are split.
        cancels_abandoned: Whether a running batch without callers is cancelled.
        tracer: Makes a span for each batch.
        function: The name of the batch function.

    Attributes:
        closing: Whether nothing is accepted.
        tracks_callers: Whether callers have deadlines or spans without asking for them.
        new_future: Makes what a caller awaits.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        queue: BatchQueue[Any, Any],
        runner: Runner,
        context: Context,
        recorder: StatsRecorder,
        *,
        item_timeout: float | None = None,
        waits_when_full: bool = False,
        isolates_failures: bool = False,
        cancels_abandoned: bool = False,
        tracer: BatchTracer | None = None,
        function: str = "process_batch",
    ) -> None:
        self.loop = loop
        self.pid = os.getpid()
        self.queue = queue
        self.recorder = recorder
        self.closing = False
        self.new_future = future_factory(loop)
        self.tracks_callers = item_timeout is not None or tracer is not None
        self.shutdown = Shutdown(self, context)
        self._delivery = Delivery(recorder, self._drop_bulk, function)
        self.inflight = InFlightBatches(
            self,
            runner,
            self._delivery,
            context,
            isolates_failures=isolates_failures,
            cancels_abandoned=cancels_abandoned,
            tracer=tracer,
        )
        self._wakeup_timer = WakeupTimer(loop, context, self._pump)
        self.expiry = Expiry(self, self._delivery, context)
        self._item_timeout = item_timeout
        self._waits_when_full = waits_when_full
        self._waitlist = Waitlist(queue)
        self._pumping = False

    # --- callers

    def enqueue(
        self,
        item: Any,
        future: asyncio.Future[Any],
        timeout: float | None = None,
        *,
        may_wait: bool = True,
    ) -> int | WaitlistEntry:
        """Enqueue an item.

        Args:
            item: The item.
            future: What its caller awaits.
            timeout: Seconds within which it must have a result; None: ``item_timeout``.
            may_wait: Whether it may wait for capacity, if calls do.

        Returns:
            Its handle, for `discard`.

        Raises:
            QueueFullException: The queue is full.
            BatchTimeoutError: Every slot has leaked.
            BatcherStoppedError: The batcher is stopped.
        """
        queue = self.queue
        handle: int | WaitlistEntry | None = queue.add(self.loop.time(), item, future)
        if handle is None:
            if not (may_wait and self._waits_when_full) or is_shut(self):
                raise rejection_error(self)
            handle = WaitlistEntry(item, future)
            self._waitlist.append(handle)
        if timeout is not None or self.tracks_callers:
            self._track(future, handle, timeout)
        if queue.wakeup_changed:
            self._pump(NOW, self.loop.time())
        return handle

    def enqueue_many(
        self,
        items: list[Any],
        bulk: BulkFuture,
        timeout: float | None = None,
        *,
        waits_when_full: bool | None = None,
    ) -> None:
        """Enqueue all items of a bulk call, or let them wait for capacity; see `enqueue`.

        Args:
            items: One or more.
            bulk: Their caller's.
            timeout: Seconds for all of them.
            waits_when_full: Whether they wait for capacity; None: as other calls.

        Raises:
            QueueFullException: The queue has no capacity for all of them.
        """
        now = self.loop.time()
        part = Slice(bulk, 0, len(items))
        if not enqueue_slice(self.queue, now, items, part):
            waits = self._waits_when_full if waits_when_full is None else waits_when_full
            if not waits or is_shut(self):
                raise rejection_error(self, len(items))
            bulk.waitlist_entry = BulkWaitlistEntry(items, part)
            self._waitlist.append(bulk.waitlist_entry)
            self._waitlist.admit(now)
        if timeout is not None or self.tracks_callers:
            self._track(bulk, bulk, timeout)
        if self.queue.wakeup_changed:
            self._pump(NOW, now)

    def submit(self, item: Any, timeout: float | None) -> SubmitFuture:
        """Enqueue an item whose future removes it when it is cancelled."""
        future = SubmitFuture(loop=self.loop)
        future.scheduler = self
        future.handle = self.enqueue(item, future, timeout, may_wait=False)
        return future

    def discard(self, handle: QueueHandle, future: asyncio.Future[Any]) -> None:
        """Remove the item of a cancelled caller, if it is still queued."""
        if self.loop.is_closed():
            return
        if not future.done():
            future.cancel()
        if not future.cancelled():  # its result or its deadline came just before
            return
        self.recorder.cancelled += 1
        if self.remove(handle):
            self._on_capacity()
        else:
            self.inflight.on_caller_cancelled(future)
        self.shutdown.check_drained()

    def discard_many(self, bulks: Collection[BulkFuture]) -> None:
        """Remove the items of a cancelled caller that are still queued."""
        if self.loop.is_closed():
            return
        self.recorder.cancelled += sum(bulk.cancel() for bulk in bulks)
        # All of them, before the end of a batch makes capacity for the next.
        were_queued = [self.remove(bulk) for bulk in bulks]
        if any(were_queued):
            self._on_capacity()
        for bulk in bulks:
            self.inflight.on_caller_cancelled(bulk)
        self.shutdown.check_drained()

    def flush(self) -> None:
        """Make what waits now, in the queue or for capacity, due."""
        self.queue.flush()
        self._waitlist.flush()
        if self.queue.wakeup_changed:
            self._pump(NOW, self.loop.time())

    # --- the batcher

    def stats(self) -> Stats:
        """What it does and has done."""
        return self.recorder.stats(
            queued=len(self.queue),
            blocked=len(self._waitlist),
            running=self.inflight.pending_items,
            workers=self.inflight.runner.workers(),
        )

    def resize(self, *, max_batch_size: int, max_queue_time: float) -> None:
        """Change the limits of the batches that have not left yet."""
        self.queue.resize(max_batch_size=max_batch_size, max_queue_time=max_queue_time)
        if not self.loop.is_closed():
            self._pump(NOW, self.loop.time())

    def use(self, runner: Runner, *, concurrency: int, workers: int) -> None:
        """Dispatch to a runner what was held until it was known."""
        self.inflight.runner = runner
        self.queue.set_concurrency(concurrency, workers=workers)
        now = self.loop.time()
        self.queue.release_slot(now)
        self._pump(now, now)
        self.shutdown.check_drained()

    def reject_all(self, error: BaseException) -> None:
        """Fail what was held, and accept nothing more."""
        self.closing = True
        self.queue.close()
        self._clear_queue(error)
        self.expiry.expire(self.loop.time())
        self.shutdown.mark_drained()
        self.shutdown.mark_ended()

    def drain(self) -> None:
        """Accept nothing more, and make what is queued due."""
        self.closing = True
        error = BatcherStoppedError(STOPPED_MSG)
        self._delivery.deliver_and_count(self._waitlist.clear(), error)
        self.queue.close()
        self._pump(NOW, self.loop.time())
        self.shutdown.check_drained()

    def fail_everything(self) -> None:
        """Fail what waits and what runs."""
        self._delivery.stopping = True
        self.queue.close()
        error = BatcherStoppedError(_STOPPED_MIDWAY_MSG)
        self._clear_queue(error)
        self.inflight.fail_all(error)

    def close_without_loop(self) -> None:
        """Close after the loop has been closed."""
        self.closing = self._delivery.stopping = True
        self.queue.close()
        if self.pid == os.getpid():
            self.inflight.runner.close_without_loop()

    # --- running batches

    def on_batch_finished(self, now: float, *, leaked: bool) -> None:
        """Release the slot of a batch."""
        self.queue.release_slot(now, leaked=leaked)
        self._pump(now, now)
        if self.expiry.handle is not None and not self.inflight and not len(self.queue):
            self.expiry.expire(now)  # without callers no timer needs to wake an idle program
        if self.closing:
            self.shutdown.check_drained()

    def on_slot_leaked(self) -> None:
        """Count a batch that timed out and cannot be stopped."""
        self.queue.leak_slot()
        if self.queue.all_slots_leaked:
            self._clear_queue(BatchTimeoutError(ALL_SLOTS_LEAKED_MSG))
        self._pump(NOW, self.loop.time())

    def on_batch_cancelled(self) -> BaseException | None:
        """Return the error of a batch whose task was cancelled with all others; None otherwise."""
        # asyncio.run() cancels all tasks at its end: then nothing more starts.
        if not all(task.cancelling() for task in asyncio.all_tasks(self.loop)):
            return None
        self.closing = True
        self.shutdown.abort()
        return BatcherStoppedError(_STOPPED_MIDWAY_MSG)

    # --- the pump

    def _pump(self, until: float, now: float) -> None:
        """Dispatch the batches that are due by ``until``, then arm the timer."""
        if self._pumping:
            return  # the call that is under way does it
        self._pumping = True
        queue = self.queue
        try:
            if self.expiry.next <= now:
                self.expiry.expire(now)
            inflight = self.inflight
            if inflight.isolator:
                inflight.dispatch_reruns(until)
            while True:
                if self._waitlist.entries:
                    self._waitlist.admit(now)
                batch = queue.get_batch(until)
                if batch is None:
                    break
                inflight.dispatch(batch)
                if inflight.isolator:
                    inflight.dispatch_reruns(until)
        finally:
            self._pumping = False
            queue.wakeup_changed = False
            if queue.next_wakeup != self._wakeup_timer.armed_for:
                self._wakeup_timer.arm(queue.next_wakeup, now)

    def on_deadline(self, now: float) -> None:
        """Fail callers whose deadline has come, and dispatch what is due."""
        self._pump(NOW, now)
        self.shutdown.check_drained()

    def remove(self, handle: QueueHandle) -> bool:
        """Remove what waits, and return whether anything did."""
        return remove(handle, self.queue, self._waitlist)

    def _track(
        self, future: asyncio.Future[Any] | BulkFuture, handle: QueueHandle, timeout: float | None
    ) -> None:
        """Give a caller its deadline, and note its span."""
        if self.inflight.tracer is not None:
            self.inflight.tracer.link_caller(future)
        seconds = self._item_timeout if timeout is None else timeout
        if seconds is not None:
            self.expiry.add(future, handle, seconds)

    def _clear_queue(self, error: BaseException) -> None:
        """Fail what is queued, waits to run again, or waits for capacity."""
        queued = dict.fromkeys(self.queue.clear())  # a slice is there once for each of its items
        waiting = [*queued, *self.inflight.cancel_reruns(), *self._waitlist.clear()]
        self._delivery.deliver_and_count(waiting, error)
        self._on_capacity()

    def _on_capacity(self) -> None:
        """Go on after something left the queue without running."""
        self._pump(NOW, self.loop.time())

    def _drop_bulk(self, bulk: BulkFuture) -> None:
        """Drop what is left of a bulk call that its first failure ended."""
        self.remove(bulk)
        self.inflight.on_caller_cancelled(bulk, cancels_started=False)


class SubmitFuture(asyncio.Future[Any]):
    """What `AsyncBatcher.submit` returns: cancelling it removes an item that is still queued."""

    __slots__ = ("handle", "scheduler")
    scheduler: Scheduler
    handle: QueueHandle

    def cancel(self, msg: Any | None = None) -> bool:
        """Cancel it."""
        cancelled = super().cancel(msg)
        if cancelled:
            self.scheduler.discard(self.handle, self)
        return cancelled
