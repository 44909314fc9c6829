"""One life of a batcher on one event loop, from its first call to its stop: the loop's side of everything.

::

    the waitlist
          |  as the queue empties
          v
    add(item, future) --> BatchQueue --get_batch--> InFlightBatches --> Delivery --> the futures
                             |  ^                      |               ^
                 next_wakeup |  | a timer              | a slot        | a timer
                             v  |                      | is free       |
                           the loop <------------------'          DeadlineHeap

States: open --close()--> closing (takes no more, runs what waits) --> closed. An abort settles everything at once.

Rules:

- A future is settled in one place, `Delivery`. For many items at once a share of a bulk stands in its place (`bulk.py`).
- A slot is free when its batch has ended, whoever still waits for it.
- Nothing is begun for a waiter that has gone, nor after its deadline, whether a timer was late or not.
- While callers wait for room the queue is full; what is run again never needs room.
- Batches leave only in `_pump`, which never runs inside itself: an eager task or an inline executor may end a batch
  before it has returned.
"""

from __future__ import annotations

import asyncio
import math
import os
from typing import TYPE_CHECKING, Any

from async_batcher._batching.bulk import BulkFuture, Slice
from async_batcher._batching.deadlines import DeadlineHeap
from async_batcher._batching.delivery import Delivery
from async_batcher._batching.inflight import InFlightBatches
from async_batcher._batching.queue import NOW, BatchQueue
from async_batcher._batching.waitlist import BulkWaitlistEntry, Waitlist, WaitlistEntry, enqueue_many
from async_batcher._eventloop.future import future_factory
from async_batcher.exceptions import (
    BatcherStoppedError,
    BatchTimeoutError,
    ItemTimeoutError,
    QueueFullException,
)

if TYPE_CHECKING:
    from collections.abc import Collection
    from contextvars import Context
    from typing import TypeAlias

    from async_batcher._batching.recorder import StatsRecorder
    from async_batcher._runners.base import Runner
    from async_batcher.integrations.opentelemetry import BatchTracer
    from async_batcher.stats import Stats

    QueueHandle: TypeAlias = int | WaitlistEntry | BulkFuture

_MAX_TIMER_DELAY = 86_400.0  # seconds; a longer wait is taken in parts, since loops do not take any number
_TIMER_TOLERANCE = 0.01  # seconds that a timer may fire early: loops count in milliseconds at the coarsest
_STOPPED_MSG = "the batcher has been stopped; start() reopens it"
_STOPPED_MIDWAY_MSG = "the batcher was stopped before the item's batch had ended"

_ALL_SLOTS_LEAKED_MSG = (
    "every batch that may run at a time has run out of batch_timeout and cannot be ended, so nothing can be run until one "
    "returns; executor='process' ends a worker that hangs, and goes on"
)


class Scheduler:
    """The event-loop side of a running batcher.

    Args:
        loop: The loop that it lives on.
        queue: Its queue.
        runner: Where batches run.
        context: What its callbacks run in.
        recorder: What it counts in.
        item_timeout: Seconds within which an item must have its result; None: no limit.
        may_wait_for_room: Whether a call that finds the queue full waits.
        isolates: Whether a batch that fails is run again in parts.
        cancels_abandoned: Whether a batch whose waiters have all gone is ended.
        tracer: Makes a span of each batch.
        function: The name of the batch function.

    Attributes:
        batches: Those that run.
        tracks_callers: Whether `track_deadline` is to be told of every waiter.
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
        may_wait_for_room: bool = False,
        isolates: bool = False,
        cancels_abandoned: bool = False,
        tracer: BatchTracer | None = None,
        function: str = "process_batch",
    ) -> None:
        self.loop = loop
        self.new_future = future_factory(loop)
        self.pid = os.getpid()
        self.queue = queue
        self.closing = False
        self.recorder = recorder
        self._delivery = Delivery(recorder, self._drop_group, function)
        self.batches = InFlightBatches(
            loop,
            queue,
            runner,
            self._delivery,
            recorder,
            context,
            self,
            isolates=isolates,
            cancels_abandoned=cancels_abandoned,
            tracer=tracer,
        )
        self._context = context
        self._time = loop.time
        self._timer: asyncio.Handle | None = None
        self.armed_wakeup: float | None = None  # what the timer waits for: `wake` itself, so that `is` shows a change
        self._pumping = False
        self._tracer = tracer
        self.tracks_callers = item_timeout is not None or tracer is not None
        self._item_timeout = item_timeout
        self._deadlines: DeadlineHeap[tuple[asyncio.Future[Any] | BulkFuture, QueueHandle, float]] = DeadlineHeap(
            lambda limit: limit[0].done()
        )
        self._deadline_timer: asyncio.TimerHandle | None = None
        self._deadline_timer_for = math.inf  # what that timer waits for
        self._may_block = may_wait_for_room
        self._waitlist = Waitlist(queue)
        self._starts = 0  # calls of `start` that have not returned
        self._drained: asyncio.Future[None] = loop.create_future()
        self._tear_downs: asyncio.Task[None] | None = None  # the tear-downs
        self._torn_down: asyncio.Future[None] = loop.create_future()
        self._ending: asyncio.Task[None] | None = None
        self.ended: asyncio.Future[None] = loop.create_future()

    def add(self, item: Any, future: asyncio.Future[Any], timeout: float | None = None) -> int:
        """Take an item.

        Returns:
            Its ticket, for `discard`.

        Raises:
            QueueFullException: The queue is full.
            BatcherStoppedError: It takes no more.
        """
        ticket = self.queue.add(self._time(), item, future)
        if ticket is None:
            raise self.rejection_error()
        if timeout is not None or self.tracks_callers:
            self.track_deadline(future, ticket, timeout)
        if self.queue.next_wakeup is not self.armed_wakeup:
            self.run_ready()
        return ticket

    def join_waitlist(self, item: Any, future: asyncio.Future[Any]) -> WaitlistEntry:
        """Have an item that the queue has refused wait until there is room.

        Raises:
            QueueFullException: It is not to wait.
            BatchTimeoutError: Every slot is lost.
            BatcherStoppedError: The batcher takes no more.
        """
        if not self._may_block or self.closing or self.queue.all_slots_leaked:
            raise self.rejection_error()
        place = WaitlistEntry(item, future)
        self._waitlist.append(place)
        return place

    def add_many(self, items: list[Any], bulk: BulkFuture, timeout: float | None = None, *, may_wait: bool | None = None) -> None:
        """Take all items of a bulk, or none, or have them wait until there is room.

        Args:
            items: They, one at least.
            bulk: Who waits for them.
            timeout: As for `track_deadline`.
            may_wait: Whether they may wait; None: as single items do.

        Raises:
            QueueFullException: There is no room for all of them, and they are not to wait.
            BatchTimeoutError: Every slot is lost.
            BatcherStoppedError: The batcher takes no more.
        """
        now = self._time()
        share = Slice(bulk, 0, len(items))
        if not enqueue_many(self.queue, now, items, share):
            waits = self._may_block if may_wait is None else may_wait
            if not waits or self.closing or self.queue.all_slots_leaked:
                raise self.rejection_error(len(items))
            bulk.waitlist_entry = BulkWaitlistEntry(items, share)
            self._waitlist.append(bulk.waitlist_entry)
            self._waitlist.admit(now)
        if timeout is not None or self.tracks_callers:
            self.track_deadline(bulk, bulk, timeout)
        if self.queue.next_wakeup is not self.armed_wakeup:
            self.run_ready()

    def flush(self) -> None:
        """What waits now, in the queue or for room, need not wait for more."""
        self.queue.flush()
        self._waitlist.flush()
        if self.queue.next_wakeup is not self.armed_wakeup:
            self.run_ready()

    def track_deadline(self, future: asyncio.Future[Any] | BulkFuture, ticket: QueueHandle, timeout: float | None) -> None:
        """Give the waiter of that ticket so many seconds (None: as many as all have), and note the span that he is in."""
        if self._tracer is not None:
            self._tracer.link_caller(future)
        seconds = self._item_timeout if timeout is None else timeout
        if seconds is not None:
            self._deadlines.add(self._time() + seconds, (future, ticket, seconds))
            self._arm_deadline_timer()

    def rejection_error(self, size: int = 1) -> Exception:
        """What to raise when the queue has refused an item, or so many at once."""
        if self.closing:
            return BatcherStoppedError(_STOPPED_MSG)
        if self.queue.all_slots_leaked:
            return BatchTimeoutError(_ALL_SLOTS_LEAKED_MSG)
        self.recorder.rejected += size
        waiting = self.queue.waiting
        if size == 1:
            msg = f"{waiting} items wait already, as many as max_queue_size allows; try again later, or raise it"
        else:
            msg = (
                f"{waiting} items wait already, and {size} more are more than max_queue_size allows; try again later, raise it, "
                "call with fewer items, or let calls wait for room: when_full='wait'"
            )
        return QueueFullException(msg)

    def run_ready(self) -> None:
        """The queue's `wake` has changed: let a batch leave that is full, and set the timer."""
        self._pump(NOW, self._time())

    def submit(self, item: Any, timeout: float | None = None) -> SubmitFuture:
        """Take an item; its future leaves the queue by itself when it is cancelled."""
        future = SubmitFuture(loop=self.loop)
        future.session = self
        future.ticket = self.add(item, future, timeout)
        return future

    def discard(self, ticket: QueueHandle, future: asyncio.Future[Any]) -> None:
        """The waiter of that ticket has gone: its item is not run if it still waits, and its future wants no answer."""
        if self.loop.is_closed():
            return
        if not future.done():
            future.cancel()
        if not future.cancelled():  # its answer has come just before, or its time was over
            return
        self.recorder.cancelled += 1
        if self._remove(ticket):
            self._on_capacity()
        else:
            self.batches.on_caller_cancelled(future)
        self._check_drained()

    def discard_many(self, bulks: Collection[BulkFuture]) -> None:
        """Who waited for these has gone; see `discard`."""
        if self.loop.is_closed():
            return
        self.recorder.cancelled += sum(bulk.cancel() for bulk in bulks)
        were_waiting = [self._remove(bulk) for bulk in bulks]  # all, before a batch of one ends and makes room for another
        if any(were_waiting):
            self._on_capacity()
        for bulk in bulks:
            self.batches.on_caller_cancelled(bulk)
        self._check_drained()

    def owns_task(self, task: asyncio.Task[Any] | None) -> bool:
        """Whether ``task`` is one of its own batches."""
        return self.batches.runner.owns_task(task)

    def stats(self) -> Stats:
        """What it does, and has done."""
        return self.recorder.stats(
            queued=self.queue.waiting,
            blocked=len(self._waitlist),
            running=self.batches.items,
            workers=self.batches.runner.workers(),
        )

    def hold(self) -> None:
        """Dispatch nothing before `use`: where batches run is not known yet."""
        self.queue.widen(concurrency=1, workers=1)
        self.queue.acquire_slot()

    def use(self, runner: Runner, *, concurrency: int, workers: int) -> None:
        """Dispatch what was held to a runner."""
        self.batches.runner = runner
        self.queue.widen(concurrency=concurrency, workers=workers)
        now = self._time()
        self.queue.release_slot(now)
        self._pump(now, now)
        self._check_drained()

    def refuse(self, error: BaseException) -> None:
        """Fail everything, since nothing that was held can run; take no more."""
        self.closing = True
        self.queue.close()
        self._clear_queues(error)
        now = self._time()
        self._arm_timer(now)
        self._expire_items(now)
        if not self._drained.done():
            self._drained.set_result(None)
        if not self.ended.done():
            self.ended.set_result(None)

    def is_open(self) -> bool:
        """Whether it takes items, in this process."""
        return not self.closing and not self.loop.is_closed() and self.pid == os.getpid()

    def resize(self, *, max_batch_size: int, max_queue_time: float) -> None:
        """Change the limits of the batches that have not left yet."""
        self.queue.resize(max_batch_size=max_batch_size, max_queue_time=max_queue_time)
        if not self.loop.is_closed():
            self._pump(NOW, self._time())

    # What its batches tell.

    def on_batch_finished(self, now: float, *, was_lost: bool) -> None:
        """A batch has ended, and its slot is free."""
        self.queue.release_slot(now, was_lost=was_lost)
        self._pump(now, now)
        if self._deadline_timer is not None and not self.batches and not self.queue.waiting:
            self._expire_items(now)  # nobody waits: no timer is to wake an idle program
        self._check_drained()

    def on_slot_leaked(self) -> None:
        """A batch has run out of its time and runs on: its slot is lost until it ends."""
        self.queue.leak_slot()
        if self.queue.all_slots_leaked:
            self._clear_queues(BatchTimeoutError(_ALL_SLOTS_LEAKED_MSG))
        self._pump(NOW, self._time())

    def on_batch_cancelled(self) -> BaseException | None:
        """A batch was cancelled by somebody else: if every task of the loop was, the program ends, and nothing more is begun."""
        if not all(task.cancelling() for task in asyncio.all_tasks(self.loop)):  # as `asyncio.run` does at its end
            return None
        self.closing = True
        self._abort()
        return BatcherStoppedError(_STOPPED_MIDWAY_MSG)

    # Its life.

    async def start(self) -> None:
        """Get the runner ready; see `Runner.start`."""
        self._starts += 1
        try:
            await self.batches.runner.start()
        finally:
            self._starts -= 1
            self._check_drained()

    async def close(self, *, force: bool, timeout: float | None) -> None:  # noqa: ASYNC109 - it bounds one stage of several
        """Take no more, run what waits, and end.

        Raises:
            TimeoutError: It took longer than ``timeout``; what had not ended by then has failed.
        """
        self.closing = True
        expired = False
        until = self._time() + (timeout or 0.0)
        task = asyncio.current_task()
        if self.owns_task(task):
            self.batches.runner.exclude_task(task)  # by force: it cannot wait for itself
        try:
            if force:
                self._abort()
            else:
                self._clear_waitlist(BatcherStoppedError(_STOPPED_MSG))
                self.queue.close()
                self._pump(NOW, self._time())
                self._check_drained()
            if not self._drained.done():
                done, _ = await asyncio.wait([self._drained], timeout=timeout)
                if not done:
                    expired = True
                    self._abort()
            if self._ending is None:
                self._ending = self.loop.create_task(self._end(), context=self._context.copy())
            if not expired and timeout is not None and self.batches.runner.tears_down:
                await asyncio.wait([self._torn_down], timeout=max(0.0, until - self._time()))
                if not self._torn_down.done():
                    expired = True
                    self._abort()
            await asyncio.shield(self._ending)
        except asyncio.CancelledError:
            await self._end_forced()
            raise
        if expired:
            msg = f"the batcher did not come to its end within {timeout} seconds; it has been stopped by force"
            raise TimeoutError(msg)

    def close_without_loop(self) -> None:
        """The loop has closed without `close`."""
        self.closing = self._delivery.stopping = True
        self.queue.close()
        if self.pid == os.getpid():
            self.batches.runner.close_without_loop()

    async def _end(self) -> None:
        try:
            if not self._delivery.stopping and self.batches.runner.tears_down:
                self._tear_downs = self.loop.create_task(self.batches.runner.run_tear_downs(), context=self._context.copy())
                await asyncio.wait([self._tear_downs])
            if not self._torn_down.done():
                self._torn_down.set_result(None)
            await self.batches.runner.close(kill=self._delivery.stopping)
        finally:
            if self._deadline_timer is not None:
                self._deadline_timer.cancel()
            if not self.ended.done():
                self.ended.set_result(None)

    async def _end_forced(self) -> None:
        """See the end through although the task that waits for it is cancelled."""
        self._abort()
        if self._ending is None or self._ending.cancelled():
            self._ending = self.loop.create_task(self._end(), context=self._context.copy())
        while not self._ending.done():
            try:
                await asyncio.wait([self._ending])
            except asyncio.CancelledError:
                continue

    def _abort(self) -> None:
        self._delivery.stopping = True
        if self._tear_downs is not None:
            self._tear_downs.cancel()  # a tear-down that takes too long is not waited for
        self.queue.close()
        error = BatcherStoppedError(_STOPPED_MIDWAY_MSG)
        self._clear_queues(error)
        self.batches.fail_all(error)
        self._arm_timer(self._time())
        if not self._drained.done():
            self._drained.set_result(None)

    def _pump(self, until: float, now: float) -> None:
        """Let the batches leave that are due by ``until``, then set the timer."""
        if self._pumping:
            return  # the call that is under way will see to it
        self._pumping = True
        try:
            if self._deadlines.next <= now:
                self._expire_items(now)
            batches = self.batches
            if batches.has_reruns:
                batches.dispatch_reruns(until)
            while True:
                if self._waitlist:
                    self._waitlist.admit(now)
                batch = self.queue.get_batch(until)
                if batch is None:
                    break
                batches.dispatch(*batch)
                if batches.has_reruns:
                    batches.dispatch_reruns(until)
        finally:
            self._pumping = False
            self._arm_timer(now)

    def _clear_queues(self, error: BaseException) -> None:
        """Nothing that waits is run any more."""
        _, waiters = self.queue.clear()
        waiting = list(dict.fromkeys(waiters))  # a share is there once for each of its items
        self._delivery.deliver_and_count([*waiting, *self.batches.cancel_reruns()], error)
        self._clear_waitlist(error)

    def _clear_waitlist(self, error: BaseException) -> None:
        """Nobody gets room any more."""
        self._delivery.deliver_and_count(self._waitlist.clear(), error)

    def _remove(self, ticket: QueueHandle) -> bool:
        """Take an item, or what is left of a bulk, out of the line, or of the queue; says whether it was in either."""
        if isinstance(ticket, BulkFuture):
            shares, ticket.queued = ticket.queued, set()
            place, ticket.waitlist_entry = ticket.waitlist_entry, None
            for share in shares:
                self.queue.discard_many(share.ticket, share.size)
            was_in_line = place is not None and self._waitlist.remove(place)
            return was_in_line or bool(shares)
        if not isinstance(ticket, WaitlistEntry):
            return self.queue.discard(ticket)
        if ticket.ticket is not None:
            return self.queue.discard(ticket.ticket)
        return self._waitlist.remove(ticket)

    def _on_capacity(self) -> None:
        """Something has left the queue without being run."""
        now = self._time()
        if self._waitlist:
            self._pump(NOW, now)
        else:
            self._arm_timer(now)

    def _expire_items(self, now: float) -> None:
        """The time of some is over."""
        gone: list[asyncio.Future[Any] | BulkFuture] = []
        for future, ticket, seconds in self._deadlines.expire(now):
            was_waiting = self._remove(ticket)
            if isinstance(future, BulkFuture):
                what, where = f"{future.left} of {len(future.results)} items", "those that were still queued are never run"
            else:
                what = "the item"
                where = "it was still queued, and is never run" if was_waiting else "its batch was still running"
            self.recorder.timed_out += self._delivery.deliver(
                [future], ItemTimeoutError(f"{what} had no result within {seconds} seconds: {where}")
            )
            if isinstance(future, BulkFuture) or not was_waiting:
                gone.append(future)
        for future in gone:
            self.batches.on_caller_cancelled(future)
        self._arm_deadline_timer()

    def _arm_deadline_timer(self) -> None:
        when = self._deadlines.next
        if self._deadline_timer is not None:
            if self._deadline_timer_for <= when != math.inf:
                return
            self._deadline_timer.cancel()
            self._deadline_timer = None
        if when != math.inf:
            self._deadline_timer_for = when
            self._deadline_timer = self.loop.call_at(
                min(when, self._time() + _MAX_TIMER_DELAY), self._on_deadline, when, context=self._context
            )

    def _on_deadline(self, when: float) -> None:
        self._deadline_timer = None
        now = self._time()
        if now < when <= now + _TIMER_TOLERANCE:
            now = when  # a timer that fires a little early counts as due
        self._pump(NOW, now)
        self._arm_deadline_timer()
        self._check_drained()

    def _drop_group(self, bulk: BulkFuture) -> None:
        """A bulk is over, for its first failure was that of all: what has not begun of it need not."""
        self._remove(bulk)
        self.batches.on_caller_cancelled(bulk, ends=False)

    def _check_drained(self) -> None:
        if not self.closing or self._drained.done():
            return
        if not (self.batches or self.batches.has_reruns or self._starts or self.queue.waiting):
            self._drained.set_result(None)

    def _arm_timer(self, now: float) -> None:
        wake = self.queue.next_wakeup
        if wake == self.armed_wakeup:
            self.armed_wakeup = wake
            return
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self.armed_wakeup = wake
        if wake is None:
            return
        step = self._on_timer if wake <= now else self._arm_timer_late
        self._timer = self.loop.call_soon(step, wake, context=self._context)

    def _arm_timer_late(self, wake: float) -> None:
        # In the next turn: a batch that fills in the turn in which it began needs no timer, and one costs more than this call.
        now = self._time()
        if wake <= now:
            self._on_timer(wake)
        else:
            when = min(wake, now + _MAX_TIMER_DELAY)
            self._timer = self.loop.call_at(when, self._on_timer, when, context=self._context)

    def _on_timer(self, when: float) -> None:
        self._timer = self.armed_wakeup = None
        now = max(self._time(), when)  # a timer that fires a little early counts as due
        self._pump(now, now)


class SubmitFuture(asyncio.Future[Any]):
    """What `Scheduler.submit` returns: a future that leaves the queue when it is cancelled."""

    __slots__ = ("session", "ticket")
    session: Scheduler
    ticket: int

    def cancel(self, msg: Any | None = None) -> bool:
        """Cancel it; an item that still waits is never run."""
        cancelled = super().cancel(msg)
        if cancelled:
            self.session.discard(self.ticket, self)
        return cancelled
