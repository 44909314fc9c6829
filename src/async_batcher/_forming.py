"""Forming: which items make the next batch, and when. Pure: events and the time go in, instructions come out.

::

    add(now, item, waiter) --> queue --> take(now) --> [entry, ...]    one slot taken
    discard(ticket)        --> leaves the queue, never run             release(): the slot is free again
    close()                --> what waits is due at once               wake: when `take` will next have something

Rules:

- A batch is due when it is full, when its oldest waiting item is ``max_queue_time`` old, or when closing; it leaves when it
  is due and a slot is free.
- First in, first out. Never more than ``max_batch_size`` items, never more than ``concurrency`` batches at a time.
- Only items that wait count: for the size, for the age, and for ``max_queue_size``.
"""

from __future__ import annotations

import sys
from collections import deque
from typing import Final, Generic, TypeAlias, TypeVar

T = TypeVar("T")
W = TypeVar("W")

Entry: TypeAlias = tuple[int, float, T, W]  # ticket, arrival, item, waiter

AT_ONCE: Final = float("-inf")  # a time to wake at that has always come
REFUSED: Final = -1  # a ticket that was never given out


class Forming(Generic[T, W]):
    """The queue of one batcher and its rules.

    Args:
        max_batch_size: Items in a batch at most.
        max_queue_time: Seconds that an item waits at most for its batch to fill.
        concurrency: Batches at a time.
        max_queue_size: Items that wait at most.

    Attributes:
        wake: The time at which `take` will have a batch: `AT_ONCE`, a time, or None while there is nothing to wait for
            (no item, or no free slot).
        running: Batches that were taken and not yet released.
    """

    __slots__ = (
        "_capacity", "_closing", "_concurrency", "_gone", "_left", "_max_batch_size", "_max_queue_size", "_max_queue_time",
        "_next_out", "_next_ticket", "_notable", "_queue", "running", "wake",
    )  # fmt: skip

    def __init__(
        self,
        *,
        max_batch_size: int = sys.maxsize,
        max_queue_time: float = 0.0,
        concurrency: int = 1,
        max_queue_size: int = sys.maxsize,
    ) -> None:
        self._max_batch_size = max_batch_size
        self._max_queue_time = max_queue_time
        self._concurrency = concurrency
        self._max_queue_size = max_queue_size
        self._queue: deque[Entry[T, W]] = deque()
        self._gone: set[int] = set()  # tickets in the queue whose waiters have left
        self._left = 0  # tickets from _next_out on whose waiters have left, whether or not they are still in the queue
        self._next_ticket = 0
        self._next_out = 0  # every ticket below has been taken
        self._closing = False
        self.running = 0
        self.wake: float | None = None
        self._decide()

    @property
    def waiting(self) -> int:
        """Items in the queue."""
        return self._next_ticket - self._next_out - self._left

    def add(self, now: float, item: T, waiter: W) -> int:
        """Take an item into the queue.

        Returns:
            The item's ticket, for `discard`; `REFUSED` when ``max_queue_size`` items wait, and after `close`.
        """
        ticket = self._next_ticket
        if ticket >= self._capacity:
            return REFUSED
        self._next_ticket = ticket + 1
        self._queue.append((ticket, now, item, waiter))
        if ticket == self._notable:
            self._decide()
        return ticket

    def discard(self, ticket: int) -> bool:
        """Drop an item whose waiter has left; at most once for each ticket.

        Returns:
            Whether it was still waiting; an item that has been taken is left alone.
        """
        if ticket < self._next_out:
            return False
        queue, gone = self._queue, self._gone
        gone.add(ticket)
        self._left += 1
        while queue and queue[0][0] in gone:  # the window runs from the oldest item that still waits
            gone.remove(queue.popleft()[0])
        if len(gone) > self.waiting:  # the dead outnumber the living: let their items go; amortised, O(1) a call
            self._queue = deque(entry for entry in queue if entry[0] not in gone)
            gone.clear()
        self._decide()
        return True

    def take(self, now: float) -> list[Entry[T, W]] | None:
        """Take the next batch, and a slot for it, if one is due and may leave.

        Returns:
            Its entries, oldest first; None when there is none at this time.
        """
        if self.wake is None or self.wake > now:
            return None
        waiting = self.waiting
        count = min(waiting, self._max_batch_size)
        queue, gone = self._queue, self._gone
        if not gone:
            popleft = queue.popleft
            batch = [popleft() for _ in range(count)]
        else:
            batch = []
            while len(batch) < count:
                entry = queue.popleft()
                if entry[0] in gone:
                    gone.remove(entry[0])
                else:
                    batch.append(entry)
            while queue and queue[0][0] in gone:
                gone.remove(queue.popleft()[0])
        self._next_out = batch[-1][0] + 1
        self._left = self._next_ticket - self._next_out - (waiting - count)
        self.running += 1
        self._decide()
        return batch

    def release(self) -> None:
        """A batch has ended; its slot is free."""
        self.running -= 1
        self._decide()

    def close(self) -> None:
        """Take no more items; from now on every item that waits is due."""
        self._closing = True
        self._decide()

    def clear(self) -> list[Entry[T, W]]:
        """Take every item that waits out of the queue, without running it."""
        entries = [entry for entry in self._queue if entry[0] not in self._gone]
        self._queue.clear()
        self._gone.clear()
        self._left = 0
        self._next_out = self._next_ticket
        self._decide()
        return entries

    def resize(self, *, max_batch_size: int, max_queue_time: float) -> None:
        """Change the limits of the batches that have not left yet."""
        self._max_batch_size = max_batch_size
        self._max_queue_time = max_queue_time
        self._decide()

    def _decide(self) -> None:
        """Work out `wake`, and for `add` the tickets at which it changes, so that an item that changes nothing costs nothing."""
        waiting = self.waiting
        head = self._next_out + self._left  # a ticket less this is the number of items that waited before it
        self._capacity = 0 if self._closing else head + self._max_queue_size
        self._notable = head + self._max_batch_size - 1 if waiting else self._next_ticket
        if not waiting or self.running >= self._concurrency:
            self.wake = None
        elif self._closing or waiting >= self._max_batch_size:
            self.wake = AT_ONCE
        else:
            self.wake = self._queue[0][1] + self._max_queue_time
