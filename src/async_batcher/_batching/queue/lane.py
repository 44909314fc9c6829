"""The queued items of one key, in order, and which of them make its next batch. Pure.

::

    append, insert --> rest --as far as they fit--> head, the next batch --take(count)-->
    remove <-------------'--------------------------'

Rules:

- The head grows from the oldest item on, until the next item would exceed a limit, or may not be in
  a batch with it. An item that exceeds a limit by itself is a head alone.
- The head is full if it has ``max_batch_size`` items, uses up a limit, or if an item follows it.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any

from async_batcher._batching.bulk.slices import Slice

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


class Entry:
    """An item with all that a queue knows of it.

    Attributes:
        item: The item.
        key: Its key; None in a batcher without ``key``.
        costs: One for each limit.
        ticket: Its number: it keeps its place when it comes back.
        future: What its caller awaits, or a slice of a bulk call.
        enqueued_at: When it came, or came back.
        attempt: How often it has been tried, with the time that is to come.
        has_run: Whether it has run in that attempt, in a batch that was split.
        lane: Where it was queued.
    """

    __slots__ = (
        "attempt", "costs", "enqueued_at", "future", "has_run", "item", "key", "lane", "ticket",
    )  # fmt: skip

    def __init__(
        self,
        item: Any,
        future: Any = None,
        ticket: int = -1,
        enqueued_at: float = 0.0,
        *,
        key: Any = None,
        costs: tuple[float, ...] = (),
    ) -> None:
        self.item = item
        self.future = future
        self.ticket = ticket
        self.enqueued_at = enqueued_at
        self.key = key
        self.costs = costs
        self.attempt = 1
        self.has_run = False
        self.lane: Lane | None = None

    def next_attempt(self) -> Entry:
        """Return what goes back into the queue: the same, tried once more."""
        again = Entry(self.item, self.future, self.ticket, key=self.key, costs=self.costs)
        again.attempt, again.lane = self.attempt + 1, self.lane
        return again

    def is_done(self) -> bool:
        """Tell whether its caller has a result for it, or is gone."""
        future = self.future
        if future.done():
            return True
        return type(future) is Slice and future.bulk.has_result(future.start)


class Lane:
    """The queued items of one key.

    Args:
        key: The key.
        max_costs: What a batch may cost at most, for each limit.

    Attributes:
        head: The items of the next batch, by ticket, in order; none only if the lane has none.
        head_costs: Their costs, for each limit.
        is_full: Whether the head cannot grow.
        flush_until: Items with a ticket before this are due now.
        running: Batches of this key that run.
        returning: Items of this key that come back later.
        reruns: Parts of failed batches of this key that wait to run again.
        due_at: When its head is due; None if the lane is not scheduled.
        due_ticket: Of the oldest item, when that was computed.
        version: Counts the changes of `due_at` and of the oldest item.
    """

    __slots__ = (
        "_max_costs", "_rest", "due_at", "due_ticket", "flush_until", "head", "head_costs",
        "is_full", "key", "reruns", "returning", "running", "version",
    )  # fmt: skip

    def __init__(self, key: Any, max_costs: Sequence[float]) -> None:
        self.key = key
        self._max_costs = max_costs
        self.head: OrderedDict[int, Entry] = OrderedDict()
        self.head_costs: list[float] = [0.0] * len(max_costs)
        self._rest: OrderedDict[int, Entry] = OrderedDict()
        self.is_full = False
        self.flush_until = 0
        self.running = self.returning = self.reruns = 0
        self.due_at: float | None = None
        self.due_ticket = -1
        self.version = 0

    @property
    def size(self) -> int:
        return len(self.head) + len(self._rest)

    @property
    def oldest(self) -> Entry:
        return next(iter((self.head or self._rest).values()))

    @property
    def is_unused(self) -> bool:
        return not (self.size or self.running or self.returning or self.reruns)

    def append(self, entry: Entry, max_size: int) -> None:
        self._rest[entry.ticket] = entry
        if len(self._rest) == 1:  # else it is behind one that does not fit
            self._grow(max_size)

    def insert(self, entry: Entry) -> None:
        """Put back an entry where its ticket says; call `find_head` when all are back."""
        is_in_head = bool(self.head) and entry.ticket < next(reversed(self.head))
        entries = self.head if is_in_head else self._rest
        before = []
        for ticket in entries:
            if ticket > entry.ticket:
                break
            before.append(ticket)
        entries[entry.ticket] = entry
        if len(before) < len(entries) - 1:
            for ticket in (entry.ticket, *reversed(before)):
                entries.move_to_end(ticket, last=False)

    def remove(self, entry: Entry, max_size: int) -> bool:
        """Remove an entry, and return whether it was here."""
        if self.head.pop(entry.ticket, None) is not None:
            self.head_costs = list(map(float.__sub__, self.head_costs, entry.costs))
            if not self.head:  # without rounding errors
                self.head_costs = [0.0] * len(self._max_costs)
        elif self._rest.pop(entry.ticket, None) is None:
            return False
        self._grow(max_size)
        return True

    def take(self, count: int) -> list[Entry]:
        """Remove and return the oldest: ``count`` at most, and no more than a batch may hold."""
        taken: list[Entry] = []
        costs = [0.0] * len(self._max_costs)
        for entry in self.head.values():
            more = list(map(float.__add__, costs, entry.costs))
            if len(taken) == count or (taken and self._exceeds(more)):
                break
            taken.append(entry)
            costs = more
        for entry in taken:
            del self.head[entry.ticket]
        self.head_costs = costs  # of what was taken, until `find_head`
        return taken

    def find_head(self, max_size: int) -> None:
        """Compute the head anew."""
        for ticket in reversed(self.head):
            self._rest[ticket] = self.head[ticket]
            self._rest.move_to_end(ticket, last=False)
        self.head.clear()
        self.head_costs = [0.0] * len(self._max_costs)
        self._grow(max_size)

    def _grow(self, max_size: int) -> None:
        """Move items to the head as long as they fit; one that costs nothing still may."""
        while self._rest and len(self.head) < max_size:
            ticket, entry = next(iter(self._rest.items()))
            costs = list(map(float.__add__, self.head_costs, entry.costs))
            if self.head and self._exceeds(costs):
                break
            del self._rest[ticket]
            self.head[ticket] = entry
            self.head_costs = costs
        self.is_full = (
            bool(self._rest)
            or len(self.head) >= max_size
            or any(map(float.__ge__, self.head_costs, self._max_costs))
        )

    def _exceeds(self, costs: Iterable[float]) -> bool:
        return any(cost > limit for cost, limit in zip(costs, self._max_costs, strict=True))


def sum_costs(entries: Iterable[Entry]) -> tuple[float, ...]:
    """Return what the items cost together, for each limit."""
    return tuple(sum(costs) for costs in zip(*(entry.costs for entry in entries), strict=True))
