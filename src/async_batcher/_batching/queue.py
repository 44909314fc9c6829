"""The queue of a batcher: which items make the next batch, and when. Pure: `now` is an argument.

::

    add(now, item, future) --> queue --> get_batch(now) --> Batch     takes a slot
    discard(ticket)        --> leaves the queue, is never run         release_slot() frees it
    close(), flush()       --> what is queued is due now              leak_slot() keeps it
    next_wakeup: when `get_batch` has a batch

Rules:

- A batch is due when it is full, when its oldest item is ``max_queue_time`` old, or when the queue
  is closing. It leaves when it is due and a slot is free.
- First in, first out. No batch exceeds ``max_batch_size``; no more than ``concurrency`` batches
  run.
- Without ``max_batch_size``, items of bulk calls are spread: what is queued is divided by the
  workers.
- Only queued items count for the size, the age and ``max_queue_size``.
"""

from __future__ import annotations

import sys
from bisect import bisect_left
from itertools import islice, repeat
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

from async_batcher._batching.batch import Batch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from async_batcher.stats import Reason

T = TypeVar("T")
F = TypeVar("F")

NOW: Final = float("-inf")  # a wake-up time that has always come


class BatchQueue(Generic[T, F]):
    """The queue of one batcher.

    Args:
        max_batch_size: Items of a batch at most.
        max_queue_time: Seconds that an item is queued at most for its batch to fill.
        concurrency: Batches that run at a time at most.
        max_queue_size: Items that are queued at most.
        workers: Batches that items of bulk calls are spread over; None stands for ``concurrency``.

    Attributes:
        next_wakeup: When `get_batch` will return a batch: `NOW`, a time, or None without items or
            free slots.
        wakeup_changed: Whether `next_wakeup` changed since the user of the queue last reset this
            flag.
        running: Batches that hold a slot.
        leaked_slots: Those of them that timed out and cannot be stopped.
    """

    # Four lists of one length cost less than one of tuples: a batch is a slice of each. Dispatched
    # items stay in front of `_head` until the lists are cut. A discarded item leaves None.
    __slots__ = (
        "_bulk_until", "_capacity_until", "_closing", "_concurrency", "_decision_at", "_discarded",
        "_enqueued_at", "_flush_until", "_futures", "_head", "_items", "_max_batch_size",
        "_max_queue_time", "_next_ticket", "_spread_size", "_spread_until",
        "_tickets", "_was_blocked", "_workers", "leaked_slots", "max_queue_size", "next_wakeup",
        "running", "wakeup_changed",
    )  # fmt: skip

    def __init__(
        self,
        *,
        max_batch_size: int = sys.maxsize,
        max_queue_time: float = 0.0,
        concurrency: int = 1,
        max_queue_size: int = sys.maxsize,
        workers: int | None = None,
    ) -> None:
        self._max_batch_size = max_batch_size
        self._max_queue_time = max_queue_time
        self._concurrency = concurrency
        self.max_queue_size = max_queue_size
        self._workers = workers or (concurrency if concurrency < sys.maxsize else 1)
        self._tickets: list[int] = []
        self._items: list[T | None] = []
        self._futures: list[F | None] = []
        self._enqueued_at: list[float] = []
        self._head = 0  # index of the oldest item
        self._discarded = 0  # items after it that were discarded
        self._next_ticket = 0
        # Tickets: what holds for those before them.
        self._bulk_until = 0  # some are of bulk calls
        self._spread_until = 0  # they leave in batches of _spread_size
        self._spread_size = 0
        self._flush_until = 0  # they are due now
        self._closing = False
        self._was_blocked = False  # a due batch was blocked by a missing slot
        self.running = 0
        self.leaked_slots = 0
        self.next_wakeup: float | None = None
        self.wakeup_changed = False
        self._update_wakeup()

    def __len__(self) -> int:
        """Queued items."""
        return len(self._tickets) - self._head - self._discarded

    @property
    def free_capacity(self) -> int:
        """Items that `add_many` would accept."""
        return max(0, self._capacity_until - self._next_ticket)

    @property
    def has_slot(self) -> bool:
        return self.running < self._concurrency

    @property
    def all_slots_leaked(self) -> bool:
        """Whether nothing that is queued can ever leave, unless a leaked slot is released."""
        return self.leaked_slots >= self._concurrency

    def add(self, now: float, item: T, future: F) -> int | None:
        """Enqueue an item.

        Returns:
            Its ticket, for `discard`; None if the queue is full or closed.
        """
        ticket = self._next_ticket
        decides = ticket == self._decision_at
        if decides and ticket >= self._capacity_until:
            return None
        self._next_ticket = ticket + 1
        self._tickets.append(ticket)
        self._items.append(item)
        self._futures.append(future)
        self._enqueued_at.append(now)
        if decides:
            self._update_wakeup()
        return ticket

    def add_many(self, now: float, items: Sequence[T], future: F) -> int | None:
        """Enqueue all items of a bulk call, or none.

        Returns:
            The ticket of the first, which those of the others follow; None without capacity for
            all.
        """
        count, ticket = len(items), self._next_ticket
        if count > self._capacity_until - ticket:
            return None
        self._next_ticket = self._bulk_until = ticket + count
        self._tickets.extend(range(ticket, ticket + count))
        self._items.extend(items)
        self._futures.extend(repeat(future, count))
        self._enqueued_at.extend(repeat(now, count))
        self._update_wakeup()
        return ticket

    def discard(self, ticket: int) -> bool:
        """Remove an item, and return whether it was still queued."""
        index = self._index_of(ticket)
        if index is None or self._futures[index] is None:
            return False
        self._discard_range(index, 1)
        return True

    def discard_many(self, ticket: int, count: int) -> None:
        """Remove ``count`` items from that ticket on: either all of them are queued, or none."""
        index = self._index_of(ticket)
        if index is not None:
            self._discard_range(index, count)

    def get_batch(self, now: float) -> Batch[T, F] | None:
        """Dequeue the next batch and take a slot for it, if one is due and a slot is free."""
        if self.next_wakeup is None or self.next_wakeup > now:
            return None
        reason: Reason
        if self._closing:
            reason = "drain"
        elif self._was_blocked:
            reason = "slot_available"
        else:
            reason = "full" if self.next_wakeup == NOW else "timeout"
        may_have_slices = self._tickets[self._head] < self._bulk_until
        size = min(len(self._tickets) - self._head - self._discarded, self._max_batch_size)
        if may_have_slices and self._max_batch_size == sys.maxsize:
            size = self._spread(size)
        batch = Batch(*self._pop(size), reason)
        batch.has_slices = may_have_slices
        self._was_blocked = False
        self.running += 1
        self._update_wakeup()
        return batch

    def acquire_slot(self) -> None:
        """Take a slot for a batch that does not come from the queue."""
        self.running += 1
        self._update_wakeup()

    def release_slot(self, now: float = NOW, *, leaked: bool = False) -> None:
        """Give back the slot of a batch that has finished."""
        was_busy = self.running >= self._concurrency
        self.running -= 1
        self.leaked_slots -= leaked
        self._update_wakeup()
        self._was_blocked = was_busy and self.next_wakeup is not None and self.next_wakeup <= now

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
        self._flush_until = self._next_ticket
        self._update_wakeup()

    def clear(self) -> list[F]:
        """Remove all items, and return their futures."""
        _, futures, _ = self._pop(len(self))
        self._update_wakeup()
        return futures

    def resize(self, *, max_batch_size: int, max_queue_time: float) -> None:
        """Change the limits of the batches that have not left yet."""
        self._max_batch_size = max_batch_size
        self._max_queue_time = max_queue_time
        self._update_wakeup()

    def set_concurrency(self, concurrency: int, *, workers: int) -> None:
        """Change how many batches may run, and over how many workers bulk calls are spread."""
        self._concurrency = concurrency
        self._workers = workers
        self._update_wakeup()

    def _index_of(self, ticket: int) -> int | None:
        index = bisect_left(self._tickets, ticket, self._head)
        is_there = index < len(self._tickets) and self._tickets[index] == ticket
        return index if is_there else None

    def _discard_range(self, index: int, count: int) -> None:
        self._items[index : index + count] = [None] * count
        self._futures[index : index + count] = [None] * count
        self._discarded += count
        self._compact()
        self._update_wakeup()

    def _spread(self, size: int) -> int:
        """Return the size of a batch of ``size`` queued items, some of bulk calls."""
        if self._tickets[self._head] >= self._spread_until:
            self._spread_until = self._next_ticket
            self._spread_size = -(-size // self._workers)
        return min(size, self._spread_size)

    def _pop(self, count: int) -> tuple[list[T], list[F], list[float]]:
        """Remove the oldest ``count`` items: items, futures, times of arrival."""
        head, futures = self._head, self._futures
        if not self._discarded:
            end = head + count
            popped: Any = (self._items[head:end], futures[head:end], self._enqueued_at[head:end])
        else:
            queued = (index for index in range(head, len(futures)) if futures[index] is not None)
            indices = list(islice(queued, count))
            end = indices[-1] + 1 if indices else head
            self._discarded -= end - head - count
            columns: tuple[list[Any], ...] = (self._items, futures, self._enqueued_at)
            popped = tuple([column[index] for index in indices] for column in columns)
        self._head = end
        self._compact()
        return popped  # type: ignore[no-any-return]

    def _compact(self) -> None:
        """Skip discarded items, and cut the lists if that moves no more than it frees."""
        futures, head = self._futures, self._head
        # The window runs from the oldest item that is still queued.
        while self._discarded and futures[head] is None:
            head += 1
            self._discarded -= 1
        self._head = head
        if self._discarded * 2 > len(futures) - head:
            queued = [index for index in range(head, len(futures)) if futures[index] is not None]
            columns: tuple[list[Any], ...] = (
                self._tickets, self._enqueued_at, self._items, futures,
            )  # fmt: skip
            for column in columns:
                column[:] = [column[index] for index in queued]
            self._head = self._discarded = 0
        elif head * 2 >= len(futures):
            del self._tickets[:head], self._enqueued_at[:head], self._items[:head], futures[:head]
            self._head = 0

    def _update_wakeup(self) -> None:
        """Compute `next_wakeup`, and the next ticket that changes it or exceeds the capacity.

        An item before that ticket costs `add` next to nothing.
        """
        waiting = len(self._tickets) - self._head - self._discarded
        # The next tickets, less this, are the numbers of items that are queued before them.
        before = self._next_ticket - waiting
        is_closed = self._closing or self.leaked_slots >= self._concurrency
        self._capacity_until = 0 if is_closed else before + self.max_queue_size
        if not waiting or is_closed:
            self._decision_at = self._next_ticket
        elif waiting < self._max_batch_size:
            self._decision_at = min(before + self._max_batch_size - 1, self._capacity_until)
        else:
            self._decision_at = self._capacity_until
        wakeup: float | None
        if not waiting or self.running >= self._concurrency:
            wakeup = None
        elif (
            self._closing
            or waiting >= self._max_batch_size
            or self._tickets[self._head] < self._flush_until
        ):
            wakeup = NOW
        else:
            wakeup = self._enqueued_at[self._head] + self._max_queue_time
        if wakeup != self.next_wakeup:
            self.next_wakeup = wakeup
            self.wakeup_changed = True
