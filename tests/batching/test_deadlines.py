"""`DeadlineHeap` against a model."""

from __future__ import annotations

import math

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from async_batcher._batching.deadlines import _MIN_CLEANUP_SIZE, DeadlineHeap


class DeadlinesMachine(RuleBasedStateMachine):
    """No item expires early, late or twice, or after it was resolved.

    The model is a dictionary of the pending items.
    """

    def __init__(self) -> None:
        super().__init__()
        self.resolved: set[int] = set()
        self.deadlines: DeadlineHeap[int] = DeadlineHeap(self.resolved.__contains__)
        self.pending: dict[int, float] = {}
        self.now = 0.0
        self.added = 0

    @rule(seconds=st.floats(0.001, 100.0), count=st.integers(1, 50))
    def add(self, seconds: float, count: int) -> None:
        """Add items with the same deadline."""
        for _ in range(count):
            self.deadlines.add(self.now + seconds, self.added)
            self.pending[self.added] = self.now + seconds
            self.added += 1

    @rule(data=st.data())
    def resolve(self, data: st.DataObject) -> None:
        """Resolve some items."""
        if not self.added:
            return
        for item in data.draw(st.sets(st.integers(0, self.added - 1), max_size=60)):
            self.resolved.add(item)
            self.pending.pop(item, None)

    @rule(seconds=st.floats(0.0, 60.0))
    def expire(self, seconds: float) -> None:
        """Advance the time."""
        self.now += seconds
        due = {item for item, deadline in self.pending.items() if deadline <= self.now}
        expired = self.deadlines.expire(self.now)
        assert sorted(expired) == sorted(due)
        assert [self.pending[item] for item in expired] == sorted(
            self.pending[item] for item in expired
        )
        for item in expired:
            del self.pending[item]
        assert self.deadlines.next == min(self.pending.values(), default=math.inf), (
            "the next deadline is that of a resolved item"
        )

    @invariant()
    def next_is_in_time(self) -> None:
        """The next deadline is never later than that of a pending item."""
        assert self.deadlines.next <= min(self.pending.values(), default=math.inf)


DeadlinesMachine.TestCase.settings = settings(max_examples=30, stateful_step_count=30)
TestDeadlines = DeadlinesMachine.TestCase


def test_resolved_items_are_dropped() -> None:
    """However distant their deadlines are, the heap is about as large as what is pending."""
    resolved: set[int] = set()
    deadlines: DeadlineHeap[int] = DeadlineHeap(resolved.__contains__)
    for item in range(10_000):
        deadlines.add(1e9 + item, item)
        if item >= 10:
            resolved.add(item - 10)
        assert len(deadlines) <= _MIN_CLEANUP_SIZE
