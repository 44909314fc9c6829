"""The queued items of one key, in order, and which of them make its next batch. Pure.

::

    append, insert --> entries, by ticket --> the head: those of the next batch --> take(count)
    remove         -->

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
        lane: Where it was queued.
    """

    __slots__ = ("attempt", "costs", "enqueued_at", "future", "item", "key", "lane", "ticket")

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
        self.lane: Lane | None = None

    def next_attempt(self) -> Entry:
        """Return what goes back into the queue: the same, tried once more."""
        again = Entry(self.item, self.future, self.ticket, key=self.key, costs=self.costs)
        again.attempt, again.lane = self.attempt + 1, self.lane
        return again

    def is_done(self) -> bool:
        """Whether its caller has a result for it, or is gone."""
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
        entries: By ticket, in order.
        head_size: Items in the head.
        head_until: The ticket of the last one.
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
        "_max_costs", "due_at", "due_ticket", "entries", "flush_until", "head_costs", "head_size",
        "head_until", "is_full", "key", "reruns", "returning", "running", "version",
    )  # fmt: skip

    def __init__(self, key: Any, max_costs: Sequence[float]) -> None:
        self.key = key
        self._max_costs = max_costs
        self.entries: OrderedDict[int, Entry] = OrderedDict()
        self.head_size = 0
        self.head_until = -1
        self.head_costs: list[float] = [0.0] * len(max_costs)
        self.is_full = False
        self.flush_until = 0
        self.running = self.returning = self.reruns = 0
        self.due_at: float | None = None
        self.due_ticket = -1
        self.version = 0

    @property
    def oldest(self) -> Entry:
        return next(iter(self.entries.values()))

    @property
    def is_unused(self) -> bool:
        return not (self.entries or self.running or self.returning or self.reruns)

    def append(self, entry: Entry, max_size: int) -> None:
        self.entries[entry.ticket] = entry
        if not self.is_full:
            self._grow(entry, max_size)

    def insert(self, entry: Entry) -> None:
        """Put back an entry where its ticket says; call `find_head` when all are back."""
        entries = self.entries
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
        if self.entries.pop(entry.ticket, None) is None:
            return False
        if entry.ticket > self.head_until:  # it was not in the head
            return True
        if self.is_full:
            self.find_head(max_size)
        else:  # all entries are in the head
            self.head_size -= 1
            self.head_costs = list(map(float.__sub__, self.head_costs, entry.costs))
        return True

    def take(self, count: int) -> list[Entry]:
        """Remove and return the oldest: ``count`` at most, and no more than a batch may hold."""
        taken: list[Entry] = []
        costs = [0.0] * len(self._max_costs)
        for entry in self.entries.values():
            more = list(map(float.__add__, costs, entry.costs))
            if len(taken) == count or (taken and self._exceeds(more)):
                break
            taken.append(entry)
            costs = more
        for entry in taken:
            del self.entries[entry.ticket]
        self.head_costs = costs  # of what was taken, until `find_head`
        return taken

    def find_head(self, max_size: int) -> None:
        """Compute the head anew."""
        self.head_size, self.head_until = 0, -1
        self.head_costs = [0.0] * len(self._max_costs)
        self.is_full = False
        for entry in self.entries.values():
            self._grow(entry, max_size)
            if self.is_full:
                break

    def _grow(self, entry: Entry, max_size: int) -> None:
        costs = list(map(float.__add__, self.head_costs, entry.costs)) if entry.costs else []
        if self.head_size and self._exceeds(costs):
            self.is_full = True
            return
        self.head_size += 1
        self.head_until = entry.ticket
        self.head_costs = costs
        self.is_full = self.head_size >= max_size or any(
            cost >= limit for cost, limit in zip(costs, self._max_costs, strict=True)
        )

    def _exceeds(self, costs: Iterable[float]) -> bool:
        return any(cost > limit for cost, limit in zip(costs, self._max_costs, strict=True))


def sum_costs(entries: Iterable[Entry]) -> tuple[float, ...]:
    """Return what the items cost together, for each limit."""
    return tuple(sum(costs) for costs in zip(*(entry.costs for entry in entries), strict=True))
