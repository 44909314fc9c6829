"""The callers of a batcher: how their items get into its queue, and out of it again.

::

    enqueue(item, future) --> BatchQueue ----------------> Scheduler.pump, if that changes when
               |                 ^                         the next batch is due
               `--> Waitlist ----' capacity

    cancelled: discard    failed: drop    timed out: ItemTimeouts    --> remove: the item never runs

Rules:

- While callers wait for capacity the queue is full; reruns need no capacity.
- An item whose caller is gone is removed at once, if it has not started.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from async_batcher._batching.bulk.slices import BulkFuture, Slice
from async_batcher._batching.queue.base import ALREADY_DUE
from async_batcher._batching.queue.lane_queue import LaneQueue
from async_batcher._batching.queue.waitlist import (
    BulkWaitlistEntry,
    PreparedWaitlistEntry,
    Waitlist,
    WaitlistEntry,
    enqueue_slice,
)
from async_batcher._serialization.exception_text import counted
from async_batcher.exceptions import BatcherStoppedError, BatchTimeoutError, QueueFullException

if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from typing import TypeAlias

    from async_batcher._batching.batch import CallerFuture
    from async_batcher._batching.queue.lane import Entry
    from async_batcher._batching.scheduler import Scheduler

    # What removes an item: a ticket of the queue, or what has one later.
    QueueHandle: TypeAlias = int | WaitlistEntry | BulkFuture


class Callers:
    """The callers of one scheduler.

    Args:
        scheduler: The scheduler.
        item_timeout: Seconds within which an item must have its result; None: no limit.
        waits_when_full: Whether calls wait for capacity; otherwise they fail.

    Attributes:
        waitlist: Those that wait for capacity.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        *,
        item_timeout: float | None,
        waits_when_full: bool,
    ) -> None:
        self._scheduler = scheduler
        self._loop = scheduler.loop
        self._time = scheduler.loop.time
        self._queue: Any = scheduler.queue
        # Of a `LaneQueue`: adds the key and the costs to an item.
        self._prepare: Callable[[Any], Entry] | None = getattr(self._queue, "prepare", None)
        self._item_timeout = item_timeout
        self._waits_when_full = waits_when_full
        observers = scheduler.recorder.observers
        self._observers = observers if observers is not None and observers.captures else None
        # Whether all callers have deadlines, or are observed.
        self._tracks_all = item_timeout is not None or self._observers is not None
        self._limits = scheduler.queue.limits if isinstance(scheduler.queue, LaneQueue) else None
        self.waitlist = Waitlist(scheduler.queue, scheduler.fail_waiting)

    def enqueue(
        self, item: Any, future: asyncio.Future[Any], timeout: float | None = None
    ) -> int | WaitlistEntry:
        """Enqueue an item, or let it wait for capacity.

        Args:
            item: The item.
            future: What its caller awaits.
            timeout: Seconds within which it must have a result; None: ``item_timeout``.

        Returns:
            Its handle, for `discard`.

        Raises:
            QueueFullException: The queue is full.
            BatchTimeoutError: Every slot has leaked.
            BatcherStoppedError: The batcher is stopped.
            Exception: What the user's functions for the key and the costs of the item raise.
        """
        queue = self._queue
        handle: int | WaitlistEntry | None = None
        if self._prepare is None:
            now = self._time()
            handle = queue.add(now, item, future)
        else:
            item = self._prepare(item)
            now = self._time()
            if not self.waitlist.entries:
                handle = queue.add(now, item, future)
        if handle is None:
            handle = WaitlistEntry(item, future)
            may_wait = not isinstance(future, SubmitFuture)
            self._append_to_waitlist(handle, waits=may_wait and self._waits_when_full)
        if timeout is not None or self._tracks_all:
            self._track(future, handle, timeout)
        if queue.wakeup_changed:
            self._scheduler.pump(ALREADY_DUE, now)
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
        now = self._time()
        entry: WaitlistEntry
        errors: dict[int, Exception] = {}
        if self._prepare is None:
            part = Slice(bulk, 0, len(items))
            entry = BulkWaitlistEntry(items, part)
            is_queued = enqueue_slice(self._queue, now, items, part)
        else:
            prepared, errors = self._prepare_many(items, bulk)
            entry = PreparedWaitlistEntry(prepared, bulk)
            has_capacity = not self.waitlist.entries and entry.fits(self._queue)
            is_queued = not prepared or (has_capacity and entry.enqueue(self._queue, now))
        if not is_queued:
            waits = self._waits_when_full if waits_when_full is None else waits_when_full
            self._append_to_waitlist(entry, waits=waits)
            bulk.waitlist_entry = entry
            self.admit(now)
        for index, error in errors.items():
            bulk.deliver(index, [error], None, index)
        self._scheduler.recorder.failed += len(errors)
        if timeout is not None or self._tracks_all:
            self._track(bulk, bulk, timeout)
        if self._queue.wakeup_changed:
            self._scheduler.pump(ALREADY_DUE, now)

    def admit(self, now: float) -> None:
        """Let callers that wait into the queue, and those of batchers that share a limit."""
        sharers = () if self._limits is None else self._limits.sharers()
        self.waitlist.admit(now, [other.callers.waitlist for other in sharers])

    def use_lanes(self, queue: LaneQueue) -> None:
        """Enqueue there from now on."""
        self._queue = queue
        self.waitlist.use_lanes(queue)
        self._prepare = queue.prepare

    def _prepare_many(
        self, items: list[Any], bulk: BulkFuture
    ) -> tuple[list[tuple[Entry, Slice]], dict[int, Exception]]:
        """Return the items of a bulk call with keys and costs, and the errors of the others.

        A strict call fails with the first error, before any of its items is queued.
        """
        prepared = []
        errors = {}
        keys = set()  # comparing the keys may fail, too
        for index, item in enumerate(items):
            try:
                entry = self._queue.prepare(item)
                keys.add(entry.key)
            except Exception as exc:
                if bulk.is_strict:
                    raise
                errors[index] = exc
            else:
                prepared.append((entry, Slice(bulk, index, 1)))
        return prepared, errors

    def submit(self, item: Any, timeout: float | None) -> SubmitFuture:
        """Enqueue an item whose future removes it when it is cancelled."""
        future = SubmitFuture(loop=self._loop)
        future.callers = self
        future.handle = self.enqueue(item, future, timeout)
        return future

    def discard(self, handle: QueueHandle, future: asyncio.Future[Any]) -> None:
        """Remove the item of a cancelled caller, if it is still queued."""
        if self._loop.is_closed():
            return
        if not future.done():
            future.cancel()
        if not future.cancelled():  # its result or its deadline came just before
            return
        scheduler = self._scheduler
        scheduler.recorder.cancelled += 1
        if self.remove(handle):
            scheduler.pump(ALREADY_DUE, self._time())
        else:
            scheduler.inflight.on_caller_gone(future)
        scheduler.check_drained()

    def discard_many(self, bulks: Collection[BulkFuture]) -> None:
        """Remove the items of a cancelled caller that are still queued."""
        if self._loop.is_closed():
            return
        scheduler = self._scheduler
        scheduler.recorder.cancelled += sum(bulk.cancel() for bulk in bulks)
        # All of them, before the end of a batch makes capacity for the next.
        were_queued = [self.remove(bulk) for bulk in bulks]
        if any(were_queued):
            scheduler.pump(ALREADY_DUE, self._time())
        for bulk in bulks:
            scheduler.inflight.on_caller_gone(bulk)
        scheduler.check_drained()

    def drop(self, bulk: BulkFuture) -> None:
        """Drop what is left of a bulk call that its first failure ended."""
        if self.remove(bulk) and self._prepare is not None:
            self._scheduler.pump_soon()  # others may share the capacity
        self._scheduler.inflight.on_caller_gone(bulk, cancels_started=False)

    def flush(self) -> None:
        """Make what waits now, in the queue or for capacity, due."""
        self._queue.flush()
        self.waitlist.flush()
        if self._queue.wakeup_changed:
            self._scheduler.pump(ALREADY_DUE, self._time())

    def remove(self, handle: QueueHandle) -> bool:
        """Remove what waits, in the queue or for capacity, and return whether anything did."""
        if isinstance(handle, BulkFuture):
            slices, handle.queued = handle.queued, set()
            entry, handle.waitlist_entry = handle.waitlist_entry, None
            for part in sorted(slices, key=lambda part: -part.ticket):  # heads last: it costs less
                self._queue.discard(part.ticket, part.size)
            was_on_waitlist = entry is not None and self.waitlist.remove(entry)
            return was_on_waitlist or bool(slices)
        if isinstance(handle, WaitlistEntry):
            if handle.ticket is None:
                return self.waitlist.remove(handle)
            handle = handle.ticket
        found: bool = self._queue.discard(handle)
        return found

    def _append_to_waitlist(self, entry: WaitlistEntry, *, waits: bool) -> None:
        """Let a caller wait for capacity, or raise what says why it cannot."""
        queue = self._queue
        if self._scheduler.closing:
            raise stopped_error()
        if queue.all_slots_leaked:
            raise all_slots_leaked_error()
        if not waits:
            self._scheduler.recorder.rejected += entry.size
            facts = queue.fullness(entry.size)
            if self._prepare is not None and self.waitlist.entries:
                facts += f"; {counted(len(self.waitlist), 'item')} before it"
            raise _queue_full_error(entry.size, facts)
        self.waitlist.append(entry)

    def _track(self, future: CallerFuture, handle: QueueHandle, timeout: float | None) -> None:
        """Give a caller its deadline, and let observers capture its context."""
        if self._observers is not None:
            self._observers.enqueued(future)
        seconds = self._item_timeout if timeout is None else timeout
        if seconds is not None:
            self._scheduler.item_timeouts.add(future, handle, seconds)


class SubmitFuture(asyncio.Future[Any]):
    """What `AsyncBatcher.submit` returns: cancelling it removes an item that is still queued.

    It is there at once, so its item never waits for capacity.
    """

    __slots__ = ("callers", "handle")
    callers: Callers
    handle: QueueHandle

    def cancel(self, msg: Any | None = None) -> bool:
        """Cancel it."""
        cancelled = super().cancel(msg)
        if cancelled:
            self.callers.discard(self.handle, self)
        return cancelled


def stopped_error() -> BatcherStoppedError:
    """Return the error of calls after a stop."""
    return BatcherStoppedError("the batcher has been stopped; start() reopens it")


def all_slots_leaked_error() -> BatchTimeoutError:
    """Return the error of calls while no batch can run."""
    msg = (
        "every batch that may run at a time exceeded batch_timeout and cannot be stopped, so "
        "nothing can run until one of them returns; executor='process' kills a worker that hangs, "
        "and goes on"
    )
    return BatchTimeoutError(msg)


def _queue_full_error(size: int, facts: str) -> QueueFullException:
    if size == 1:
        msg = f"the queue is full ({facts}); retry later, or raise that limit"
    else:
        msg = (
            f"the queue has no capacity for {size} more items ({facts}); retry later, raise "
            "that limit, call with fewer items, or set when_full='wait'"
        )
    return QueueFullException(msg)
