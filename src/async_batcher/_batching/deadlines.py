"""Deadlines: whose time is over, and when the next one's will be. Pure: the time goes in, those whose time is over come out."""

from __future__ import annotations

import math
from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

W = TypeVar("W")

_FEW = 64  # entries that need no clearing up


class DeadlineHeap(Generic[W]):
    """The deadlines of those who wait.

    One who has got an answer is not taken out, which would cost every item something, but passed over when the deadline comes;
    and whenever there are twice as many as when it was last looked, all such are dropped: amortised, O(log n) each.

    Args:
        is_over: Whether one who waited has an answer.

    Attributes:
        next: When there is next something to do; infinity while there is nothing.
    """

    __slots__ = ("_clear_at", "_count", "_heap", "_is_over", "next")

    def __init__(self, is_over: Callable[[W], bool]) -> None:
        self._is_over = is_over
        self._heap: list[tuple[float, int, W]] = []
        self._count = 0
        self._clear_at = _FEW
        self.next = math.inf

    def __len__(self) -> int:
        """How many are kept, those included that have an answer and have not been dropped yet."""
        return len(self._heap)

    def add(self, deadline: float, waiter: W) -> None:
        """Note that ``waiter`` waits until ``deadline`` and no longer."""
        self._count += 1  # so that waiters are never compared
        heappush(self._heap, (deadline, self._count, waiter))
        if len(self._heap) >= self._clear_at:
            self._heap = [entry for entry in self._heap if not self._is_over(entry[2])]
            heapify(self._heap)
            self._clear_at = max(_FEW, 2 * len(self._heap))
        self.next = self._heap[0][0] if self._heap else math.inf

    def expire(self, now: float) -> list[W]:
        """Those without an answer whose deadline has come, the earliest first; they are dropped."""
        heap = self._heap
        expired: list[W] = []
        while heap and (heap[0][0] <= now or self._is_over(heap[0][2])):
            waiter = heappop(heap)[2]
            if not self._is_over(waiter):
                expired.append(waiter)
        self.next = heap[0][0] if heap else math.inf
        return expired
