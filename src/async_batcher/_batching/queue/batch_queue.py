"""The queue of a batcher: which items make the next batch, and when. Pure: `now` is an argument.

::

    add(now, item, future) --> QueuedItems --> get_batch() --> Batch   takes a slot
    discard(ticket)        --> leaves the queue, is never run          release_slot() frees it
    close(), flush()       --> what is queued is due now               leak_slot() keeps it
    next_wakeup: when to call `get_batch`

Rules:

- A batch is due when it is full, when its oldest item is ``max_queue_time`` old, or when the queue
  is closing. It leaves when it is due and a slot is free.
- First in, first out. No batch exceeds ``max_batch_size``; no more than ``concurrency`` batches
  run.
- A full batch, which cannot grow, may leave ahead of a free slot, to wait where the next slot is.
- Without ``max_batch_size``, what is queued when a batch is due is divided by the free slots: items
  of bulk calls, and where each slot is a worker also those of single calls. All of it is due then.
- Only queued items count for the size, the age and ``max_queue_size``.
"""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, Final, Generic, TypeVar

from async_batcher._batching.batch import Batch
from async_batcher._batching.queue.queued_items import QueuedItems
from async_batcher._batching.queue.shares import Shares

if TYPE_CHECKING:
    from collections.abc import Sequence

    from async_batcher.stats import Reason

T = TypeVar("T")
F = TypeVar("F")

# The wake-up time of a batch that is full, flushed or closing, and so due at any time.
ALREADY_DUE: Final = -math.inf
NEVER: Final = math.inf


class BatchQueue(Generic[T, F]):
    """The queue of one batcher.

    Args:
        max_batch_size: Items of a batch at most.
        max_queue_time: Seconds that an item is queued at most for its batch to fill.
        concurrency: Batches that run at a time at most.
        max_queue_size: Items that are queued at most.
        workers: Batches that items are divided over at most; None stands for ``concurrency``.
        divides_single_calls: Whether items of single calls are divided as those of bulk calls are.
        ahead: Full batches that may leave ahead of a free slot.

    Attributes:
        next_wakeup: When there is a batch: `ALREADY_DUE`, a time, or `NEVER` without items or free
            slots.
        wakeup_changed: Whether `next_wakeup` changed since the user of the queue last reset this
            flag.
        running: Batches that hold a slot.
        leaked_slots: Those of them that timed out and cannot be stopped.
    """

    __slots__ = (
        "_ahead", "_capacity_until", "_closing", "_concurrency", "_decision_at", "_flush_until",
        "_items", "_max_batch_size", "_max_queue_time", "_shares", "_was_blocked", "leaked_slots",
        "max_queue_size", "next_wakeup", "running", "wakeup_changed",
    )  # fmt: skip

    def __init__(
        self,
        *,
        max_batch_size: int = sys.maxsize,
        max_queue_time: float = 0.0,
        concurrency: int = 1,
        max_queue_size: int = sys.maxsize,
        workers: int | None = None,
        divides_single_calls: bool = False,
        ahead: int = 0,
    ) -> None:
        self._max_batch_size = max_batch_size
        self._max_queue_time = max_queue_time
        self._concurrency = concurrency
        self._ahead = ahead
        self.max_queue_size = max_queue_size
        self._items: QueuedItems[T, F] = QueuedItems()
        self._shares = Shares(
            workers or (concurrency if concurrency < sys.maxsize else 1),
            divides_single_calls=divides_single_calls,
        )
        self._flush_until = 0  # items with a ticket before this are due now
        self._closing = False
        self._was_blocked = False  # a due batch was blocked by a missing slot
        self.running = 0
        self.leaked_slots = 0
        self.next_wakeup: float = NEVER
        self.wakeup_changed = False
        self._update_wakeup()

    def __len__(self) -> int:
        """Queued items."""
        return len(self._items)

    @property
    def free_capacity(self) -> int:
        """Items that `add_many` would accept."""
        return max(0, self._capacity_until - self._items.next_ticket)

    @property
    def may_dispatch_full(self) -> bool:
        """Whether a batch that cannot grow may leave."""
        return self.running < self._concurrency + self._ahead

    @property
    def all_slots_leaked(self) -> bool:
        """Whether nothing that is queued can ever leave, unless a leaked slot is released."""
        return self.leaked_slots >= self._concurrency

    def add(self, now: float, item: T, future: F) -> int | None:
        """Enqueue an item.

        Returns:
            Its ticket, for `discard`; None if the queue is full or closed.
        """
        items = self._items
        if items.next_ticket != self._decision_at:
            return items.append(now, item, future)
        if self._decision_at >= self._capacity_until:
            return None
        ticket = items.append(now, item, future)
        self._update_wakeup()
        return ticket

    def add_many(
        self, now: float, items: Sequence[T], future: F, *, of_stream: bool = False
    ) -> int | None:
        """Enqueue all items of a bulk call, or none.

        Args:
            now: The time.
            items: The items.
            future: What they share.
            of_stream: Whether more items follow when results of these have been consumed.

        Returns:
            The ticket of the first, which those of the others follow; None without capacity for
            all.
        """
        if len(items) > self._capacity_until - self._items.next_ticket:
            return None
        ticket = self._items.extend(now, items, future)
        self._shares.bulk_until = self._items.next_ticket
        if of_stream:
            self._shares.stream_until = self._items.next_ticket
        self._update_wakeup()
        return ticket

    def discard(self, ticket: int, count: int = 1) -> bool:
        """Remove ``count`` items from that ticket on, and return whether they were still queued.

        Either all of them are, or none.
        """
        found = self._items.discard(ticket, count)
        if found:
            self._update_wakeup()
        return found

    def get_batch(self) -> Batch[T, F]:
        """Dequeue the next batch and take a slot for it; only when `next_wakeup` has come."""
        reason: Reason
        if self._closing:
            reason = "drain"
        elif self._was_blocked:
            reason = "slot_available"
        else:
            reason = "full" if self.next_wakeup == ALREADY_DUE else "timeout"
        items, shares = self._items, self._shares
        size = min(items.next_ticket - items.removed, self._max_batch_size)
        may_have_slices = shares.bulk_until > 0 and items.oldest[0] < shares.bulk_until
        if self._max_batch_size >= sys.maxsize and (may_have_slices or shares.divides_single_calls):
            # Other slots become free soon after the one that a bulk call has waited for.
            running = 0 if may_have_slices and self._was_blocked else self.running
            size, reason = shares.next_share(
                items.oldest[0], items.next_ticket, size, running, reason
            )
            self._flush_until = max(self._flush_until, shares.divided_until)
        batch = Batch(*items.pop(size), reason)
        batch.has_slices = may_have_slices
        self._was_blocked = False
        self.running += 1
        self._update_wakeup()
        return batch

    def acquire_slot(self) -> None:
        """Take a slot for a batch that does not come from the queue."""
        self.running += 1
        self._update_wakeup()

    def release_slot(self, now: float = ALREADY_DUE, *, leaked: bool = False) -> None:
        """Give back the slot of a batch that has finished."""
        was_busy = self.running >= self._concurrency
        self.running -= 1
        self.leaked_slots -= leaked
        if leaked or self._items.removed < self._items.next_ticket:  # else nothing waits for a slot
            self._update_wakeup()
        self._was_blocked = was_busy and self.next_wakeup <= now

    def leak_slot(self) -> None:
        """Count a running batch that timed out and cannot be stopped."""
        self.leaked_slots += 1
        self._update_wakeup()

    def close(self) -> None:
        """Accept no more items; from now on every queued item is due."""
        self._closing = True
        self._update_wakeup()

    def flush(self) -> None:
        """Make every item that is queued now due."""
        self._flush_until = self._items.next_ticket
        self._update_wakeup()

    def clear(self) -> list[F]:
        """Remove all items, and return their futures."""
        _, futures, _ = self._items.pop(len(self._items))
        self._update_wakeup()
        return futures

    def resize(self, *, max_batch_size: int, max_queue_time: float) -> None:
        """Change the limits of the batches that have not left yet."""
        self._max_batch_size = max_batch_size
        self._max_queue_time = max_queue_time
        self._update_wakeup()

    def set_concurrency(
        self, concurrency: int, *, workers: int, divides_single_calls: bool = False, ahead: int = 0
    ) -> None:
        """Change the limits of what runs, and over how many workers items are divided."""
        self._concurrency = concurrency
        self._ahead = ahead
        self._shares.workers = workers
        self._shares.divides_single_calls = divides_single_calls
        self._update_wakeup()

    def _update_wakeup(self) -> None:
        """Compute `next_wakeup`, and the next ticket that changes it or exceeds the capacity.

        An item before that ticket costs `add` next to nothing.
        """
        items = self._items
        # A ticket, less the number of items removed, is the number of items queued before it.
        removed = items.removed
        waiting = items.next_ticket - removed
        is_closed = self._closing or self.leaked_slots >= self._concurrency
        self._capacity_until = 0 if is_closed else removed + self.max_queue_size
        if not waiting or is_closed:
            self._decision_at = items.next_ticket
        elif waiting < self._max_batch_size:
            self._decision_at = min(removed + self._max_batch_size - 1, self._capacity_until)
        else:
            self._decision_at = self._capacity_until
        slots = self._concurrency
        if waiting >= self._max_batch_size:
            slots += self._ahead
        if not waiting or self.running >= slots:
            wakeup = NEVER
        elif self._closing or waiting >= self._max_batch_size:
            wakeup = ALREADY_DUE
        else:
            oldest, enqueued_at = items.oldest
            due_at = enqueued_at + self._max_queue_time
            wakeup = ALREADY_DUE if oldest < self._flush_until else due_at
        if wakeup != self.next_wakeup:
            self.next_wakeup = wakeup
            self.wakeup_changed = True
