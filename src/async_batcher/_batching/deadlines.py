"""A heap of times: of deadlines, and of items that come back. Pure."""

from __future__ import annotations

import math
from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

E = TypeVar("E")

_MIN_CLEANUP_SIZE = 64  # entries


class DeadlineHeap(Generic[E]):
    """Entries with a deadline each.

    To remove an entry that is done would cost every item something. Such entries are skipped at
    their deadline, and dropped whenever the heap has doubled since they last were: amortised O(log
    n) for each entry.

    Args:
        is_done: Whether the deadline of an entry no longer matters.

    Attributes:
        next: The next deadline; infinity without one.
    """

    __slots__ = ("_cleanup_at", "_count", "_heap", "_is_done", "next")

    def __init__(self, is_done: Callable[[E], bool]) -> None:
        self._is_done = is_done
        self._heap: list[tuple[float, int, E]] = []
        self._count = 0
        self._cleanup_at = _MIN_CLEANUP_SIZE
        self.next = math.inf

    def __len__(self) -> int:
        """Entries, including those that are done and not dropped yet."""
        return len(self._heap)

    def add(self, deadline: float, entry: E) -> None:
        self._count += 1  # so that entries are never compared
        heappush(self._heap, (deadline, self._count, entry))
        if len(self._heap) >= self._cleanup_at:
            self._heap = [element for element in self._heap if not self._is_done(element[2])]
            heapify(self._heap)
            self._cleanup_at = max(_MIN_CLEANUP_SIZE, 2 * len(self._heap))
        self.next = self._heap[0][0] if self._heap else math.inf

    def expire(self, now: float) -> list[E]:
        """Remove and return the entries that are not done and whose deadline has come, in order."""
        heap = self._heap
        expired: list[E] = []
        while heap and (heap[0][0] <= now or self._is_done(heap[0][2])):
            entry = heappop(heap)[2]
            if not self._is_done(entry):
                expired.append(entry)
        self.next = heap[0][0] if heap else math.inf
        return expired
