"""The items of a queue, first in, first out, each under a ticket. Pure.

::

    append(now, item, future) --> ticket     pop(count) --> the oldest items
                                             discard(ticket, count) --> are never popped

Rules:

- Tickets are consecutive numbers. The items of a bulk call have one after the other.
- Any number of items may be discarded, in any order, in linear time and memory.
"""

from __future__ import annotations

from bisect import bisect_left
from itertools import islice, repeat
from typing import TYPE_CHECKING, Any, Generic, TypeAlias, TypeVar

if TYPE_CHECKING:
    from collections.abc import Sequence

T = TypeVar("T")
F = TypeVar("F")

if TYPE_CHECKING:
    Popped: TypeAlias = tuple[list[T], list[F], list[float], list[int]]


class QueuedItems(Generic[T, F]):
    """The items of one queue, with the future and the time of arrival of each.

    Attributes:
        next_ticket: Of the next item; as many items have been added.
        removed: Items that have been popped or discarded.
    """

    # Four lists of one length cost less than one of tuples: a batch is a slice of each. Popped
    # items stay in front of `_head` until the lists are cut. A discarded item leaves None.
    __slots__ = (
        "_discarded", "_enqueued_at", "_futures", "_head", "_items", "_tickets", "next_ticket",
        "removed",
    )  # fmt: skip

    def __init__(self) -> None:
        self._tickets: list[int] = []
        self._items: list[T | None] = []
        self._futures: list[F | None] = []
        self._enqueued_at: list[float] = []
        self._head = 0  # index of the oldest item
        self._discarded = 0  # items after it that were discarded
        self.next_ticket = 0
        self.removed = 0

    def __len__(self) -> int:
        return self.next_ticket - self.removed

    @property
    def oldest(self) -> tuple[int, float]:
        """The ticket of the oldest item, and when it came."""
        head = self._head
        return self._tickets[head], self._enqueued_at[head]

    def append(self, now: float, item: T, future: F) -> int:
        """Add an item, and return its ticket."""
        ticket = self.next_ticket
        self.next_ticket = ticket + 1
        self._tickets.append(ticket)
        self._items.append(item)
        self._futures.append(future)
        self._enqueued_at.append(now)
        return ticket

    def extend(self, now: float, items: Sequence[T], future: F) -> int:
        """Add items that share a future, and return the ticket of the first."""
        count, ticket = len(items), self.next_ticket
        self.next_ticket = ticket + count
        self._tickets.extend(range(ticket, ticket + count))
        self._items.extend(items)
        self._futures.extend(repeat(future, count))
        self._enqueued_at.extend(repeat(now, count))
        return ticket

    def discard(self, ticket: int, count: int = 1) -> bool:
        """Remove ``count`` items from that ticket on, and return whether they were still there.

        Either all of them are, or none.
        """
        futures = self._futures
        index = bisect_left(self._tickets, ticket, self._head)
        is_there = index < len(futures) and self._tickets[index] == ticket
        if not is_there or futures[index] is None:
            return False
        self._items[index : index + count] = [None] * count
        futures[index : index + count] = [None] * count
        self._discarded += count
        self.removed += count
        self._compact()
        return True

    def pop(self, count: int) -> Popped[T, F]:
        """Remove the oldest ``count`` items: items, futures, times of arrival, tickets."""
        head, futures = self._head, self._futures
        self.removed += count
        popped: Any
        columns: tuple[list[Any], ...]
        if count == len(futures):  # most often: all that there are
            popped = (self._items, futures, self._enqueued_at, self._tickets)
            self._tickets, self._items, self._futures, self._enqueued_at = [], [], [], []
            return popped  # type: ignore[no-any-return]
        if not self._discarded:
            end = head + count
            popped = (
                self._items[head:end],
                futures[head:end],
                self._enqueued_at[head:end],
                self._tickets[head:end],
            )
        else:
            queued = (index for index in range(head, len(futures)) if futures[index] is not None)
            indices = list(islice(queued, count))
            end = indices[-1] + 1 if indices else head
            self._discarded -= end - head - count
            columns = (self._items, futures, self._enqueued_at, self._tickets)
            popped = tuple([column[index] for index in indices] for column in columns)
        self._head = end
        self._compact()
        return popped  # type: ignore[no-any-return]

    def rows(self) -> list[tuple[int, T, F, float]]:
        """The items in order: ticket, item, future, time of arrival."""
        columns: Any = (self._tickets, self._items, self._futures, self._enqueued_at)
        rows = islice(zip(*columns, strict=True), self._head, None)
        return [row for row in rows if row[2] is not None]

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
