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

import sys
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from async_batcher._batching.batch import Batch
from async_batcher._batching.bulk.slices import Slice
from async_batcher._batching.queue.base import ALREADY_DUE, NEVER, QueueBase
from async_batcher._batching.queue.lane import Entry
from async_batcher._batching.queue.queued_items import QueuedItems
from async_batcher._batching.queue.shares import Shares

if TYPE_CHECKING:
    from collections.abc import Sequence

    from async_batcher._batching.queue.lane import Lane
    from async_batcher._batching.queue.lane_queue import LaneQueue
    from async_batcher._batching.records.recorder import StatsRecorder
    from async_batcher.stats import Reason

T = TypeVar("T")
F = TypeVar("F")


class BatchQueue(QueueBase, Generic[T, F]):
    """The queue of one batcher.

    Args:
        max_batch_size: Items of a batch at most.
        max_queue_time: Seconds that an item is queued at most for its batch to fill.
        concurrency: Batches that run at a time at most.
        max_queue_size: Items that are queued at most.
        workers: Batches that items are divided over at most; None stands for ``concurrency``.
        divides_single_calls: Whether items of single calls are divided as those of bulk calls are.
        ahead: Full batches that may leave ahead of a free slot.
    """

    __slots__ = ("_capacity_until", "_decision_at", "_flush_until", "_items", "_shares")

    keeps_order = False

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
        super().__init__(
            max_batch_size=max_batch_size,
            max_queue_time=max_queue_time,
            concurrency=concurrency,
            max_queue_size=max_queue_size,
            ahead=ahead,
        )
        self._items: QueuedItems[T, F] = QueuedItems()
        self._shares = Shares(
            workers or (concurrency if concurrency < sys.maxsize else 1),
            divides_single_calls=divides_single_calls,
        )
        self._flush_until = 0  # items with a ticket before this are due now
        self._update()

    def __len__(self) -> int:
        """Queued items."""
        return len(self._items)

    @property
    def free_capacity(self) -> int:
        """Items that `add_many` would accept."""
        return max(0, self._capacity_until - self._items.next_ticket)

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
        self._update()
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
        self._update()
        return ticket

    def discard(self, ticket: int, count: int = 1) -> bool:
        """Remove ``count`` items from that ticket on, and return whether they were still queued.

        Either all of them are, or none.
        """
        found = self._items.discard(ticket, count)
        if found:
            self._update()
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
        self._update()
        return batch

    def may_rerun(self, entries: Sequence[Entry]) -> bool:  # noqa: ARG002 - there are no limits
        """Tell whether a part of a failed batch may run again, if there is a slot for it."""
        return True

    def count_rerun(self, entries: Sequence[Entry], change: int) -> None:
        """Count a part of a failed batch that waits to run again: there are no keys to count by."""

    def acquire_slot(self, entries: Sequence[Entry] = ()) -> None:  # noqa: ARG002
        """Take a slot for a batch that does not come from the queue."""
        self.running += 1
        self._update()

    def release_slot(
        self,
        now: float = ALREADY_DUE,
        *,
        leaked: bool = False,
        lane: Lane | None = None,  # noqa: ARG002
    ) -> None:
        """Give back the slot of a batch that has finished."""
        was_busy = self.running >= self._concurrency
        self.running -= 1
        self.leaked_slots -= leaked
        if leaked or self._items.removed < self._items.next_ticket:  # else nothing waits for a slot
            self._update()
        self._was_blocked = was_busy and self.next_wakeup <= now

    def to_lanes(self, counts: StatsRecorder) -> LaneQueue:
        """Return a queue that takes items back, with all that is in this one."""
        from async_batcher._batching.queue.lane_queue import LaneQueue

        lanes = LaneQueue(
            max_batch_size=self._max_batch_size,
            max_queue_time=self._max_queue_time,
            concurrency=self._concurrency,
            max_queue_size=self.max_queue_size,
            workers=self._shares.workers,
            divides_single_calls=self._shares.divides_single_calls,
            ahead=self._ahead,
            counts=counts,
        )
        lanes.running, lanes.leaked_slots = self.running, self.leaked_slots
        items = lanes.items
        items.next_ticket, items.flush_until = self._items.next_ticket, self._flush_until
        for ticket, item, future, enqueued_at in self._items.rows():
            own: Any = future.take_item(ticket) if isinstance(future, Slice) else future
            items.adopt(Entry(item, own, ticket, enqueued_at))
        lanes.resize(max_batch_size=self._max_batch_size, max_queue_time=self._max_queue_time)
        if self._closing:
            lanes.close()
        lanes.wakeup_changed = True
        return lanes

    def futures(self) -> list[F]:
        """Return the futures of all items, in order."""
        return [future for _, _, future, _ in self._items.rows()]

    def flush(self) -> None:
        """Make every item that is queued now due."""
        self._flush_until = self._items.next_ticket
        self._update()

    def clear(self) -> list[F]:
        """Remove all items, and return their futures."""
        _, futures, _, _ = self._items.pop(len(self._items))
        self._update()
        return futures

    def set_concurrency(
        self, concurrency: int, *, workers: int, divides_single_calls: bool = False, ahead: int = 0
    ) -> None:
        """Change the limits of what runs, and over how many workers items are divided."""
        self._concurrency = concurrency
        self._ahead = ahead
        self._shares.workers = workers
        self._shares.divides_single_calls = divides_single_calls
        self._update()

    def _update(self) -> None:
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
        if wakeup != self.next_wakeup:  # as `_set_wakeup`, without a call
            self.next_wakeup = wakeup
            self.wakeup_changed = True
