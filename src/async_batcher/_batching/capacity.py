"""Which items the queue accepts, the errors of those that it does not, and their removal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from async_batcher._batching.bulk import BulkFuture
from async_batcher._batching.waitlist import WaitlistEntry
from async_batcher.exceptions import BatcherStoppedError, BatchTimeoutError, QueueFullException

if TYPE_CHECKING:
    from typing import Any, TypeAlias

    from async_batcher._batching.queue import BatchQueue
    from async_batcher._batching.scheduler import Scheduler
    from async_batcher._batching.waitlist import Waitlist

    # What removes an item: a ticket of the queue, or what has one later.
    QueueHandle: TypeAlias = int | WaitlistEntry | BulkFuture

STOPPED_MSG = "the batcher has been stopped; start() reopens it"
ALL_SLOTS_LEAKED_MSG = (
    "every batch that may run at a time exceeded batch_timeout and cannot be stopped, so nothing "
    "can run until one of them returns; executor='process' kills a worker that hangs, and goes on"
)


def is_shut(scheduler: Scheduler) -> bool:
    """Whether nothing that waits for capacity could ever run."""
    return scheduler.closing or scheduler.queue.all_slots_leaked


def rejection_error(scheduler: Scheduler, size: int = 1) -> Exception:
    """Return the error of a call whose items the queue has no capacity for."""
    queue = scheduler.queue
    if scheduler.closing:
        return BatcherStoppedError(STOPPED_MSG)
    if queue.all_slots_leaked:
        return BatchTimeoutError(ALL_SLOTS_LEAKED_MSG)
    scheduler.recorder.rejected += size
    facts = f"{len(queue)} items queued, max_queue_size={queue.max_queue_size}"
    if size == 1:
        msg = f"the queue is full ({facts}); retry later, or raise max_queue_size"
    else:
        msg = (
            f"the queue has no capacity for {size} more items ({facts}); retry later, raise "
            "max_queue_size, call with fewer items, or set when_full='wait'"
        )
    return QueueFullException(msg)


def remove(handle: QueueHandle, queue: BatchQueue[Any, Any], waitlist: Waitlist) -> bool:
    """Remove what waits, in the queue or for capacity, and return whether anything did."""
    if isinstance(handle, BulkFuture):
        slices, handle.queued = handle.queued, set()
        entry, handle.waitlist_entry = handle.waitlist_entry, None
        for part in slices:
            queue.discard_many(part.ticket, part.size)
        was_on_waitlist = entry is not None and waitlist.remove(entry)
        return was_on_waitlist or bool(slices)
    if not isinstance(handle, WaitlistEntry):
        return queue.discard(handle)
    if handle.ticket is not None:
        return queue.discard(handle.ticket)
    return waitlist.remove(handle)
