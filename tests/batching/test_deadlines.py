"""Whose time is over, and when the next one's will be: `DeadlineHeap` against a model."""

from __future__ import annotations

import math

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from async_batcher._batching.deadlines import _MIN_CLEANUP_SIZE, DeadlineHeap


class DeadlinesMachine(RuleBasedStateMachine):
    """Nobody is told too early, nobody too late, nobody twice, and nobody who has an answer.

    The model is a dictionary of those who wait.
    """

    def __init__(self) -> None:
        super().__init__()
        self.answered: set[int] = set()
        self.deadlines: DeadlineHeap[int] = DeadlineHeap(self.answered.__contains__)
        self.waiting: dict[int, float] = {}
        self.now = 0.0
        self.made = 0

    @rule(seconds=st.floats(0.001, 100.0), count=st.integers(1, 50))
    def add(self, seconds: float, count: int) -> None:
        """Some wait, with one deadline."""
        for _ in range(count):
            self.deadlines.add(self.now + seconds, self.made)
            self.waiting[self.made] = self.now + seconds
            self.made += 1

    @rule(data=st.data())
    def answer(self, data: st.DataObject) -> None:
        """Some get an answer."""
        if not self.made:
            return
        for waiter in data.draw(st.sets(st.integers(0, self.made - 1), max_size=60)):
            self.answered.add(waiter)
            self.waiting.pop(waiter, None)

    @rule(seconds=st.floats(0.0, 60.0))
    def expire(self, seconds: float) -> None:
        """Time passes."""
        self.now += seconds
        due = {waiter for waiter, deadline in self.waiting.items() if deadline <= self.now}
        expired = self.deadlines.expire(self.now)
        assert sorted(expired) == sorted(due)
        assert [self.waiting[waiter] for waiter in expired] == sorted(self.waiting[waiter] for waiter in expired)
        for waiter in expired:
            del self.waiting[waiter]
        assert self.deadlines.next == min(self.waiting.values(), default=math.inf), "nobody is woken for one with an answer"

    @invariant()
    def in_time(self) -> None:
        """The next time is never later than that of anyone who waits."""
        assert self.deadlines.next <= min(self.waiting.values(), default=math.inf)


DeadlinesMachine.TestCase.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)
TestDeadlines = DeadlinesMachine.TestCase


def test_those_with_an_answer_are_dropped() -> None:
    """However far their deadlines are: what is kept is in proportion to those who wait."""
    answered: set[int] = set()
    deadlines: DeadlineHeap[int] = DeadlineHeap(answered.__contains__)
    for waiter in range(10_000):
        deadlines.add(1e9 + waiter, waiter)
        if waiter >= 10:
            answered.add(waiter - 10)
        assert len(deadlines) <= _MIN_CLEANUP_SIZE
