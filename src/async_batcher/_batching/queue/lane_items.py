"""The items of a `LaneQueue`: those in the lanes, and those that come back later. Pure.

::

    add --> lane of the key --LaneQueue.get_batch--> leave
              ^   |                                    |
              |   `--discard-->                        |
    restore --'   .--discard-->                        |
       `------ delayed <--requeue----------------------'
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from async_batcher._batching.deadlines import DeadlineHeap
from async_batcher._batching.queue.base import ALREADY_DUE
from async_batcher._batching.queue.lane import Entry, Lane
from async_batcher._batching.queue.limit_state import LimitStates

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from async_batcher._batching.queue.lane_schedule import LaneSchedule
    from async_batcher.limits import Limit


class LaneItems:
    """All items of one queue.

    Args:
        schedule: Of the lanes; it learns of each change.
        limits: What a batch and the queue may cost.
        key: Returns the key of an item.
        max_batch_size: Items of a batch at most.

    Attributes:
        limits: See above.
        max_batch_size: See above.
        entries: All of them, by ticket.
        next_ticket: Of the next item.
        flush_until: Items with a ticket before this are due, also when they come back.
    """

    __slots__ = (
        "_delayed", "_key", "_schedule", "entries", "flush_until", "limits", "max_batch_size",
        "next_ticket",
    )  # fmt: skip

    def __init__(
        self,
        schedule: LaneSchedule,
        limits: Iterable[Limit],
        key: Callable[[Any], Any] | None,
        max_batch_size: int,
    ) -> None:
        self._schedule = schedule
        self._key = key
        self.limits = LimitStates(limits)
        self.max_batch_size = max_batch_size
        self.entries: dict[int, Entry] = {}
        self._delayed: DeadlineHeap[Entry] = DeadlineHeap(
            lambda entry: self.entries.get(entry.ticket) is not entry
        )
        self.next_ticket = self.flush_until = 0

    @property
    def next_return(self) -> float:
        """When the next item comes back."""
        return self._delayed.next

    def prepare(self, item: Any) -> Entry:
        """Return an item with its key and costs, for `add`.

        Raises:
            TypeError: The key is not hashable, or a cost is not a number.
            ValueError: A cost is NaN, negative, or more than is ever allowed.
            Exception: What the user's functions raise.
        """
        key = None if self._key is None else self._key(item)
        try:
            self._schedule.lanes.get(key)
        except TypeError as exc:
            msg = f"key= returned {key!r:.100} for the item: {exc}; a key must be hashable"
            raise TypeError(msg) from exc
        return Entry(item, key=key, costs=self.limits.costs_of(item))

    def add(self, now: float, entry: Entry, future: Any) -> int:
        """Enqueue what `prepare` returned, and return its ticket."""
        entry.future, entry.enqueued_at, entry.ticket = future, now, self.next_ticket
        self.adopt(entry)
        self.next_ticket += 1
        return entry.ticket

    def adopt(self, entry: Entry) -> None:
        """Enqueue an item that has a ticket."""
        lane = entry.lane = self._schedule.get_or_add(entry.key, self.limits.max_costs)
        self._enter(entry)
        lane.append(entry, self.max_batch_size)
        if entry.ticket < self.flush_until:
            lane.flush_until = self.flush_until
        self._schedule.update(lane)

    def discard(self, ticket: int) -> bool:
        """Remove an item, and return whether it was here."""
        entry = self.entries.get(ticket)
        if entry is None:
            return False
        self.leave(entry)
        lane = lane_of(entry)
        if not lane.remove(entry, self.max_batch_size):
            lane.returning -= 1
            self._delayed.expire(ALREADY_DUE)  # no timer for an item that does not come back
        self._schedule.update(lane)
        return True

    def requeue(self, entries: Iterable[Entry], at: float) -> None:
        """Enqueue items again that have been in a batch, when the time ``at`` has come."""
        for entry in entries:
            self._enter(entry)
            if entry.lane is None:  # of a batch of a `BatchQueue`
                entry.lane = self._schedule.get_or_add(None, self.limits.max_costs)
            entry.lane.returning += 1
            self._delayed.add(at, entry)
            self._schedule.update(entry.lane)

    def restore(self, now: float) -> None:
        """Put the items into their lanes whose time has come."""
        if self._delayed.next > now:
            return
        lanes: dict[Lane, None] = {}
        # The last first: each goes in front of those after it.
        for entry in sorted(self._delayed.expire(now), key=lambda entry: -entry.ticket):
            lane = lane_of(entry)
            lane.returning -= 1
            # Not later than the oldest item, whose window it is.
            entry.enqueued_at = min(now, lane.oldest.enqueued_at) if lane.size else now
            lane.insert(entry)
            if entry.ticket < self.flush_until:
                lane.flush_until = self.flush_until
            lanes[lane] = None
        for lane in lanes:
            lane.find_head(self.max_batch_size)
            self._schedule.update(lane)

    def flush(self) -> None:
        """Make every item due that is here, and those that were here when they come back."""
        self.flush_until = self.next_ticket
        for lane in self._schedule.lanes.values():
            lane.flush_until = self.next_ticket
        self._schedule.update_all()

    def leave(self, entry: Entry) -> None:
        """Count an item that is no longer queued."""
        del self.entries[entry.ticket]
        self.limits.dequeue(entry.costs)

    def _enter(self, entry: Entry) -> None:
        self.entries[entry.ticket] = entry
        self.limits.enqueue(entry.costs)


def lane_of(entry: Entry) -> Lane:
    """Return the lane of an item that is queued."""
    assert entry.lane is not None  # noqa: S101 - it is queued
    return entry.lane
