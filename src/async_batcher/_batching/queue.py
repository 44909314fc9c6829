"""The queue: which items make the next batch, and when. Pure: events and the time go in, instructions come out.

::

    add(now, item, waiter) --> queue --> get_batch(now) --> items, waiters   acquires a slot, as acquire_slot() does
    discard(ticket)        --> leaves the queue, never run                   release_slot(): the slot is free again
                                                                             leak_slot(): it stays taken until then
    close(), flush()       --> what waits is due at once                     next_wakeup: when get_batch() has a batch

Rules:

- A batch is due when it is full, when its oldest waiting item is ``max_queue_time`` old, or when closing; it leaves when it
  is due and a slot is free.
- First in, first out. Never more than ``max_batch_size`` items, never more than ``concurrency`` batches at a time.
- Where there is no ``max_batch_size``, items that came many at a time are spread: what waits is divided by the workers.
- Only items that wait count: for the size, for the age, and for ``max_queue_size``.
"""

from __future__ import annotations

import sys
from bisect import bisect_left
from itertools import islice, repeat
from typing import TYPE_CHECKING, Any, Final, Generic, TypeAlias, TypeVar

if TYPE_CHECKING:
    from collections.abc import Sequence

    from async_batcher.stats import Reason

T = TypeVar("T")
W = TypeVar("W")

QueuedItems: TypeAlias = tuple[list[T], list[W]]  # items and their waiters, oldest first

NOW: Final = float("-inf")  # a time to wake at that has always come


class BatchQueue(Generic[T, W]):
    """The queue of one batcher and its rules.

    Args:
        max_batch_size: Items in a batch at most.
        max_queue_time: Seconds that an item waits at most for its batch to fill.
        concurrency: Batches at a time.
        max_queue_size: Items that wait at most.
        workers: Batches that items which came many at a time are spread over; None: as many as may run at a time.

    Attributes:
        next_wakeup: The time at which `get_batch` will have a batch: `NOW`, a time, or None while there is nothing to wait for
            (no item, or no free slot).
        running: Batches that were taken and not yet released.
        leaked_slots: Those of them that ran out of their time and run on.
        reason: Why the batch that was taken last has left; see `stats.BatchCounts`.
        arrivals: When each of its items came.
        has_many: Whether some of them may have come many at a time.
    """

    # The queue is four lists of one length, which cost less than one of tuples: a batch is cut out of them in one piece. What has
    # been taken stays before _head until the lists are cut; where a waiter has left there is None.
    __slots__ = (
        "_arrivals", "_bulk_until", "_capacity", "_closing", "_concurrency", "_flushed", "_futures",
        "_head", "_items", "_left", "_max_batch_size", "_max_queue_size", "_max_queue_time",
        "_next_decision_ticket", "_next_ticket", "_spread_size", "_spread_until", "_tickets",
        "_was_blocked", "_workers", "arrivals", "has_many", "leaked_slots", "next_wakeup", "reason",
        "running",
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
        self._max_queue_size = max_queue_size
        self._workers = workers or (concurrency if concurrency < sys.maxsize else 1)
        self._tickets: list[int] = []
        self._items: list[T | None] = []
        self._futures: list[W | None] = []
        self._arrivals: list[float] = []
        self._head = 0  # the place of the oldest item that waits
        self._left = 0  # places after it whose waiters have left
        self._next_ticket = 0
        # Tickets before which something is so:
        self._bulk_until = 0  # some came many at a time
        self._spread_until = 0  # what waits is spread, in batches of _spread_size
        self._spread_size = 0
        self._flushed = 0  # what waits is due at once
        self._closing = False
        self._was_blocked = False  # what is due has been so for longer than there has been a slot for it
        self.has_many = False
        self.reason: Reason = "timeout"
        self.arrivals: list[float] = []
        self.running = 0
        self.leaked_slots = 0
        self.next_wakeup: float | None = None
        self._update_wakeup()

    @property
    def waiting(self) -> int:
        """Items in the queue."""
        return len(self._tickets) - self._head - self._left

    @property
    def has_capacity(self) -> bool:
        """Whether `add` would take an item."""
        return self._next_ticket < self._capacity

    @property
    def free_capacity(self) -> int:
        """Items that `add_many` would take."""
        return max(0, self._capacity - self._next_ticket)

    def add(self, now: float, item: T, waiter: W) -> int | None:
        """Take an item into the queue.

        Returns:
            The item's ticket, for `discard`; None when ``max_queue_size`` items wait, and after `close`.
        """
        ticket = self._next_ticket
        is_notable = ticket == self._next_decision_ticket
        if is_notable and ticket >= self._capacity:
            return None
        self._next_ticket = ticket + 1
        self._tickets.append(ticket)
        self._items.append(item)
        self._futures.append(waiter)
        self._arrivals.append(now)
        if is_notable:
            self._update_wakeup()
        return ticket

    def add_many(self, now: float, items: Sequence[T], waiter: W) -> int | None:
        """Take many items of one waiter into the queue, or none.

        Returns:
            The ticket of the first, which those of the others follow; None when there is no room for all.
        """
        count, ticket = len(items), self._next_ticket
        if count > self._capacity - ticket:
            return None
        self._next_ticket = self._bulk_until = ticket + count
        self._tickets.extend(range(ticket, ticket + count))
        self._items.extend(items)
        self._futures.extend(repeat(waiter, count))
        self._arrivals.extend(repeat(now, count))
        self._update_wakeup()
        return ticket

    def discard_many(self, ticket: int, count: int) -> None:
        """Drop so many items from that ticket on, if they are waiting: all of them are, or none."""
        tickets = self._tickets
        place = bisect_left(tickets, ticket, self._head)
        if place == len(tickets) or tickets[place] != ticket:
            return
        self._items[place : place + count] = [None] * count
        self._futures[place : place + count] = [None] * count
        self._left += count
        self._compact()
        self._update_wakeup()

    def discard(self, ticket: int) -> bool:
        """Drop an item whose waiter has left.

        Returns:
            Whether it was still waiting; an item that has been taken, or dropped before, is left alone.
        """
        tickets = self._tickets
        place = bisect_left(tickets, ticket, self._head)
        if place == len(tickets) or tickets[place] != ticket or self._futures[place] is None:
            return False
        self._items[place] = self._futures[place] = None
        self._left += 1
        self._compact()
        self._update_wakeup()
        return True

    def get_batch(self, now: float) -> QueuedItems[T, W] | None:
        """Take the next batch, and a slot for it, if one is due and may leave.

        Returns:
            Its items and their waiters, oldest first; None when there is none at this time.
        """
        if self.next_wakeup is None or self.next_wakeup > now:
            return None
        waiting = self.waiting
        if self._closing:
            self.reason = "drain"
        elif self._was_blocked:
            self.reason = "slot_available"
        else:
            self.reason = "full" if self.next_wakeup == NOW else "timeout"
        batch = self._pop(self._next_size(waiting))
        self._was_blocked = False
        self.running += 1
        self._update_wakeup()
        return batch

    @property
    def has_slot(self) -> bool:
        """Whether a slot is free."""
        return self.running < self._concurrency

    def acquire_slot(self) -> None:
        """Take a slot for something that was in the queue before; `release_slot` it."""
        self.running += 1
        self._update_wakeup()

    def release_slot(self, now: float = NOW, *, was_lost: bool = False) -> None:
        """A batch has ended; its slot is free."""
        was_busy = self.running >= self._concurrency
        self.running -= 1
        self.leaked_slots -= was_lost
        self._update_wakeup()
        self._was_blocked = was_busy and self.next_wakeup is not None and self.next_wakeup <= now

    def leak_slot(self) -> None:
        """A batch has run out of its time and runs on; its slot stays taken until `release_slot`."""
        self.leaked_slots += 1
        self._update_wakeup()

    @property
    def all_slots_leaked(self) -> bool:
        """Whether every slot is lost: nothing that waits has a time to leave, so nothing is taken in."""
        return self.leaked_slots >= self._concurrency

    def close(self) -> None:
        """Take no more items; from now on every item that waits is due."""
        self._closing = True
        self._update_wakeup()

    def flush(self) -> None:
        """What waits now need not wait for more: it is due at once."""
        self._flushed = self._next_ticket
        self._update_wakeup()

    def clear(self) -> QueuedItems[T, W]:
        """Take every item that waits out of the queue, without running it."""
        batch = self._pop(self.waiting)
        self._update_wakeup()
        return batch

    def resize(self, *, max_batch_size: int, max_queue_time: float) -> None:
        """Change the limits of the batches that have not left yet."""
        self._max_batch_size = max_batch_size
        self._max_queue_time = max_queue_time
        self._update_wakeup()

    def widen(self, *, concurrency: int, workers: int) -> None:
        """Change how many batches may run at a time, and over how many workers items are spread."""
        self._concurrency = concurrency
        self._workers = workers
        self._update_wakeup()

    def _next_size(self, waiting: int) -> int:
        """Items of the next batch."""
        oldest = self._tickets[self._head]
        self.has_many = oldest < self._bulk_until
        if not self.has_many or self._max_batch_size < sys.maxsize:
            return min(waiting, self._max_batch_size)
        if oldest >= self._spread_until:
            self._spread_until = self._next_ticket
            self._spread_size = -(-waiting // self._workers)
        return min(waiting, self._spread_size)

    def _pop(self, count: int) -> QueuedItems[T, W]:
        """The oldest ``count`` items that wait, taken out."""
        head = self._head
        if not self._left:
            end = head + count
            batch = self._items[head:end], self._futures[head:end]
            self.arrivals = self._arrivals[head:end]
        else:
            waiters = self._futures
            places = list(islice((place for place in range(head, len(waiters)) if waiters[place] is not None), count))
            end = places[-1] + 1 if places else head
            self._left -= end - head - count
            batch = [self._items[place] for place in places], [waiters[place] for place in places]
            self.arrivals = [self._arrivals[place] for place in places]
        self._head = end
        self._compact()
        return batch  # type: ignore[return-value]  # what waits has an item, and its waiter is not None

    def _compact(self) -> None:
        """Pass over what has left, and cut the lists when that moves no more than it frees: amortised, O(1) an item."""
        waiters, head = self._futures, self._head
        while self._left and waiters[head] is None:  # the window runs from the oldest item that still waits
            head += 1
            self._left -= 1
        self._head = head
        if self._left > self.waiting:
            living = [place for place in range(head, len(waiters)) if waiters[place] is not None]
            columns: tuple[list[Any], ...] = (self._tickets, self._arrivals, self._items, waiters)
            for column in columns:
                column[:] = [column[place] for place in living]
            self._head = self._left = 0
        elif head * 2 >= len(waiters):
            del self._tickets[:head], self._arrivals[:head], self._items[:head], waiters[:head]
            self._head = 0

    def _update_wakeup(self) -> None:
        """Compute `next_wakeup`, and for `add` the next ticket that changes it or does not fit."""
        waiting = self.waiting
        before = self._next_ticket - waiting  # the next tickets, less this, are the numbers of items that wait before them
        self._capacity = 0 if self._closing or self.all_slots_leaked else before + self._max_queue_size
        if not waiting or not self._capacity:
            self._next_decision_ticket = self._next_ticket
        elif waiting < self._max_batch_size:
            self._next_decision_ticket = min(before + self._max_batch_size - 1, self._capacity)
        else:
            self._next_decision_ticket = self._capacity
        if not waiting or self.running >= self._concurrency:
            self.next_wakeup = None
        elif self._closing or waiting >= self._max_batch_size or self._tickets[self._head] < self._flushed:
            self.next_wakeup = NOW
        else:
            self.next_wakeup = self._arrivals[self._head] + self._max_queue_time
