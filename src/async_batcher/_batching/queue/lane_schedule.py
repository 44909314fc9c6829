"""The lanes of a queue, and whose batch leaves next: of those that are due, the oldest. Pure.

::

    update(lane) --> due, by time --move_due(until)--> ready, by ticket --first()--> lane
         `--> held, until another update: other batches of its key run, or an item comes back

An entry of a heap whose lane has changed since then is dropped when it is met.
"""

from __future__ import annotations

from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING, Any

from async_batcher._batching.queue.base import ALREADY_DUE, NEVER
from async_batcher._batching.queue.lane import Lane

if TYPE_CHECKING:
    from collections.abc import Sequence

_MIN_CLEANUP_SIZE = 64  # entries of a heap


class LaneSchedule:
    """The lanes of one queue.

    Args:
        max_queue_time: Seconds that the oldest item of a lane waits at most for others.
        key_concurrency: Batches of one key that run at a time at most.

    Attributes:
        lanes: By key; only those that are used.
        closing: Whether all that is queued is due.
    """

    __slots__ = ("_due", "_ready", "closing", "key_concurrency", "lanes", "max_queue_time")

    def __init__(self, max_queue_time: float, key_concurrency: int) -> None:
        self.max_queue_time = max_queue_time
        self.key_concurrency = key_concurrency
        self.closing = False
        self.lanes: dict[Any, Lane] = {}
        self._due: list[tuple[float, int, int, Lane]] = []  # time, ticket, version, lane
        self._ready: list[tuple[int, int, Lane]] = []

    def get_or_add(self, key: Any, max_costs: Sequence[float]) -> Lane:
        lane = self.lanes.get(key)
        if lane is None:
            lane = self.lanes[key] = Lane(key, max_costs)
        return lane

    def keep(self, lane: Lane) -> None:
        """Schedule a lane that may have been dropped just before, since it was unused."""
        self.lanes[lane.key] = lane
        self.update(lane)

    def update(self, lane: Lane) -> None:
        """Schedule a lane anew after a change."""
        if not lane.head or self._is_held(lane):
            lane.version += 1
            lane.due_at = None
            if lane.is_unused:
                self.lanes.pop(lane.key, None)
            return
        oldest = lane.oldest
        due_at = oldest.enqueued_at + self.max_queue_time
        if self.closing or lane.is_full or oldest.ticket < lane.flush_until:
            due_at = ALREADY_DUE
        if (due_at, oldest.ticket) == (lane.due_at, lane.due_ticket):
            return
        lane.version += 1
        lane.due_at, lane.due_ticket = due_at, oldest.ticket
        due = self._due
        heappush(due, (due_at, oldest.ticket, lane.version, lane))
        if len(due) > _MIN_CLEANUP_SIZE + 2 * len(self.lanes):
            due[:] = [entry for entry in due if entry[2] == entry[3].version]
            heapify(due)

    def update_all(self) -> None:
        for lane in list(self.lanes.values()):
            self.update(lane)

    def may_run(self, lane: Lane) -> bool:
        """Tell whether one more batch of its key may run."""
        return lane.running < self.key_concurrency

    def move_due(self, until: float) -> None:
        """Make the lanes ready that are due by ``until``."""
        due = self._due
        while due and due[0][0] <= until:
            _, ticket, version, lane = heappop(due)
            if version == lane.version:
                heappush(self._ready, (ticket, version, lane))
        if len(self._ready) > _MIN_CLEANUP_SIZE + 2 * len(self.lanes):
            self._ready = [entry for entry in self._ready if entry[1] == entry[2].version]
            heapify(self._ready)

    def first(self) -> Lane | None:
        """Return the ready lane with the oldest item."""
        ready = self._ready
        while ready and ready[0][1] != ready[0][2].version:
            heappop(ready)
        return ready[0][2] if ready else None

    def next_due(self) -> float:
        """Return when the next lane is due that is not ready."""
        due = self._due
        while due and due[0][2] != due[0][3].version:
            heappop(due)
        return due[0][0] if due else NEVER

    def _is_held(self, lane: Lane) -> bool:
        """Tell whether the lane waits for other batches of its key."""
        if lane.running + lane.reruns >= self.key_concurrency:
            return True
        return lane.returning > 0 and self.key_concurrency == 1
