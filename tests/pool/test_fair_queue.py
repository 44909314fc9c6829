"""Whose turn it is among the sources that share a pool: `FairQueue` against a model, and by example."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from async_batcher._pool.fair_queue import FairQueue

SOURCES = st.sampled_from(["a", "b", "c", None])


class TurnsMachine(RuleBasedStateMachine):
    """Nothing lost, nothing twice, order kept within a source, turns taken between them, whatever the interleaving.

    The model is a list of lines, the next one first, each with the things that wait in it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.turns: FairQueue[int] = FairQueue()
        self.lines: list[tuple[str | None, list[int]]] = []
        self.out: list[tuple[str | None, int]] = []  # taken
        self.made = 0

    def _line(self, source: str | None) -> list[int] | None:
        return next((line for name, line in self.lines if name == source), None)

    @rule(source=SOURCES)
    def put(self, source: str | None) -> None:
        """One more, at the end of its line; a new line comes last."""
        self.made += 1
        self.turns.put(source, self.made)
        line = self._line(source)
        if line is None:
            self.lines.append((source, [self.made]))
        else:
            line.append(self.made)

    @precondition(lambda self: self.lines)
    @rule()
    def take(self) -> None:
        """The first of the first line, which then goes to the end."""
        source, line = self.lines.pop(0)
        thing = line.pop(0)
        assert self.turns.get() == thing
        self.out.append((source, thing))
        if line:
            self.lines.append((source, line))

    @precondition(lambda self: self.out)
    @rule(data=st.data())
    def put_back(self, data: st.DataObject) -> None:
        """What was taken comes before everything else."""
        source, thing = self.out.pop(data.draw(st.integers(0, len(self.out) - 1)))
        self.turns.put_front(source, thing)
        rest = self._line(source) or []
        self.lines = [(source, [thing, *rest]), *(entry for entry in self.lines if entry[0] != source)]

    @rule(source=SOURCES, data=st.data())
    def remove(self, source: str | None, data: st.DataObject) -> None:
        """One that waits is taken out; one that does not is no matter."""
        line = self._line(source)
        waiting = sorted(line or [])
        thing = data.draw(st.sampled_from([*waiting, 0]))
        assert self.turns.remove(source, thing) == (thing in waiting)
        if line is not None and thing in line:
            line.remove(thing)
            self.lines = [entry for entry in self.lines if entry[1]]

    @rule()
    def clear(self) -> None:
        """Everything comes out, line by line."""
        assert self.turns.clear() == [thing for _, line in self.lines for thing in line]
        self.lines = []

    @precondition(lambda self: not self.lines)
    @rule()
    def take_from_nothing(self) -> None:
        """Nothing waits, and it says so."""
        with pytest.raises(LookupError):
            self.turns.get()

    @invariant()
    def the_same_waits(self) -> None:
        """What waits, and in which order, is what the model says."""
        assert list(self.turns) == [thing for _, line in self.lines for thing in line]
        assert len(self.turns) == sum(len(line) for _, line in self.lines)
        assert bool(self.turns) == bool(self.lines)


TestTurns = TurnsMachine.TestCase
TestTurns.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_a_source_with_much_to_do_holds_up_another_by_one() -> None:
    """One with a thousand things and two with a few take turns until the few are done."""
    turns: FairQueue[str] = FairQueue()
    for i in range(1000):
        turns.put("many", f"m{i}")
    for i in range(3):
        turns.put("few", f"f{i}")
    turns.put("one", "o0")
    assert [turns.get() for _ in range(9)] == ["m0", "f0", "o0", "m1", "f1", "m2", "f2", "m3", "m4"]


def test_a_source_that_comes_back_waits_its_turn() -> None:
    """Putting one after another, each when the last was taken, gives no source more than its share."""
    turns: FairQueue[str] = FairQueue()
    for source in "ab":
        turns.put(source, source)
    taken = []
    for _ in range(10):
        taken.append(turns.get())
        turns.put(taken[-1], taken[-1])
    assert taken == ["a", "b"] * 5
