"""What is run again when a batch fails: `FailureIsolator` on its own."""

from __future__ import annotations

from collections import deque
from math import log2

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from async_batcher._batching.isolation import FailedBatch, FailureIsolator, Rerun
from async_batcher.exceptions import WorkerDiedError

MANY = 10**6
CRASH = WorkerDiedError("it crashed", pid=1)


class Finder:
    """Runs a batch, and again what `FailureIsolator` says; the guilty items make what they are in fail."""

    def __init__(self, guilty: set[int], *, error: Exception | None = None, per_batch: int = MANY) -> None:
        self.failed_items = guilty
        self.error = error or ValueError("bad item")
        self.gone: set[int] = set()
        self.recovery: FailureIsolator[int] = FailureIsolator(
            self.gone.__contains__, crashes_per_batch=per_batch, crashes_per_minute=MANY
        )
        self.done: list[int] = []
        self.alone: list[int] = []
        self.given_up: list[int] = []
        self.runs: list[list[int]] = []

    def find(self, count: int) -> FailedBatch:
        """All of it, one run after the other."""
        case = FailedBatch(count)
        self.run(list(range(count)), case)
        while (rerun := self.recovery.next_rerun(new_batch_is_due=False)) is not None:
            self.recovery.finished(rerun)
            self.run(rerun.entries, case)
        return case

    def run(self, entries: list[int], case: FailedBatch) -> None:
        """One run."""
        self.runs.append(entries)
        if self.failed_items.isdisjoint(entries):
            self.done += entries
            return
        why = self.recovery.split(entries, case, 0.0, self.error)
        if why == "":
            self.alone += entries
        elif why is not None:
            self.given_up += [*entries, *self.recovery.abandon(case)]


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 200), st.data(), st.booleans())
def test_the_guilty_stand_alone(count: int, data: st.DataObject, died: bool) -> None:  # noqa: FBT001 - drawn
    """Each guilty item ends alone, all others succeed, and it takes at most 2 k (log2(n / k) + 2) reruns."""
    guilty = data.draw(st.sets(st.integers(0, count - 1), min_size=1))
    finder = Finder(guilty, error=CRASH if died else None)
    case = finder.find(count)
    assert sorted(finder.alone) == sorted(guilty)
    assert sorted(finder.done) == sorted(set(range(count)) - guilty)
    assert case.reruns == len(finder.runs) - 1 <= 2 * len(guilty) * (log2(count / len(guilty)) + 2)
    assert (case.size, case.failed_items, case.pending) == (count, len(guilty), 0)
    assert not finder.recovery


@settings(deadline=None, max_examples=50)
@given(st.integers(2, 100), st.data(), st.integers(1, 8))
def test_a_batch_may_cost_so_many_workers(count: int, data: st.DataObject, budget: int) -> None:
    """Past that nothing more of it is run, and everybody has been told something."""
    guilty = data.draw(st.sets(st.integers(0, count - 1), min_size=1))
    finder = Finder(guilty, error=CRASH, per_batch=budget)
    case = finder.find(count)
    assert sorted(finder.done + finder.alone + finder.given_up) == list(range(count))
    assert set(finder.done).isdisjoint(guilty)
    assert set(finder.alone) <= guilty
    assert not finder.recovery
    assert case.pending == 0
    if finder.given_up:
        assert case.crashes >= budget
    else:
        assert set(finder.alone) == guilty


def test_so_many_workers_in_a_minute() -> None:
    """The limit is over all batches, and is forgotten a minute later."""
    recovery: FailureIsolator[int] = FailureIsolator(lambda _: False, crashes_per_minute=3)

    def fail(now: float) -> str | None:
        return recovery.split([1, 2], FailedBatch(2), now, CRASH)

    assert [fail(0.0), fail(30.0)] == [None, None]
    assert "minute" in (fail(59.9) or "")
    assert "minute" in (fail(59.9) or ""), "the first is not over yet"
    assert fail(120.0) is None


def test_batchers_that_share_a_pool_share_its_minute() -> None:
    """What one has spent, another cannot spend again."""
    spent: deque[float] = deque()
    one: FailureIsolator[int] = FailureIsolator(lambda _: False, crashes_per_minute=3, crash_times=spent)
    other: FailureIsolator[int] = FailureIsolator(lambda _: False, crashes_per_minute=3, crash_times=spent)
    for recovery in (one, other):
        assert recovery.split([1, 2], FailedBatch(2), 0.0, CRASH) is None
    assert "minute" in (one.split([1, 2], FailedBatch(2), 0.0, CRASH) or "")
    assert "minute" in (other.split([1, 2], FailedBatch(2), 0.0, CRASH) or "")


def fail(recovery: FailureIsolator[int], entries: list[int], case: FailedBatch, *, died: bool) -> None:
    """A batch fails and is to be run again."""
    assert recovery.split(entries, case, 0.0, CRASH if died else ValueError("bad item")) is None


def taken(recovery: FailureIsolator[int], *, fresh: bool = False) -> list[int] | None:
    """What is run again next."""
    rerun = recovery.next_rerun(new_batch_is_due=fresh)
    return None if rerun is None else rerun.entries


def test_suspects_run_one_at_a_time() -> None:
    """Others may run beside one."""
    recovery: FailureIsolator[int] = FailureIsolator(lambda _: False)
    fail(recovery, [1, 2], FailedBatch(2), died=True)
    first = recovery.next_rerun(new_batch_is_due=False)
    assert isinstance(first, Rerun)
    assert first.entries == [1]
    assert taken(recovery) is None
    fail(recovery, [3, 4], FailedBatch(2), died=False)
    assert [taken(recovery), taken(recovery), taken(recovery)] == [[3], [4], None]
    recovery.finished(first)
    assert taken(recovery) == [2]


def test_fresh_batches_get_their_turns() -> None:
    """Two reruns, then a fresh batch, as long as any is due; otherwise one rerun after the other."""
    recovery: FailureIsolator[int] = FailureIsolator(lambda _: False)
    fail(recovery, list(range(8)), FailedBatch(8), died=False)
    fail(recovery, list(range(8)), FailedBatch(8), died=False)
    fail(recovery, list(range(8)), FailedBatch(8), died=False)
    turns = [taken(recovery, fresh=True) is None for _ in range(6)]
    assert turns == [False, False, True, False, False, True]
    assert taken(recovery, fresh=True) is not None
    assert taken(recovery, fresh=False) is not None
    assert taken(recovery, fresh=False) is None, "there is nothing left"


def test_who_has_gone_is_not_run_again() -> None:
    """Alone, in part or in whole."""
    finder = Finder({0, 1, 2, 3})
    finder.gone.update([0, 1])
    case = FailedBatch(5)
    finder.run([0, 1, 2, 3, 4], case)
    finder.gone.update([2])
    assert taken(finder.recovery) == [3, 4], "all of the first half have gone"
    assert not finder.recovery
    assert case.pending == 1


def test_clear() -> None:
    """What was to be run again comes out."""
    recovery: FailureIsolator[int] = FailureIsolator(lambda _: False)
    fail(recovery, [1, 2, 3], FailedBatch(3), died=True)
    fail(recovery, [4, 5], FailedBatch(2), died=False)
    assert sorted(recovery.clear()) == [1, 2, 3, 4, 5]
    assert not recovery
    assert taken(recovery) is None


@pytest.mark.parametrize("died", [True, False])
def test_giving_up_one_batch_leaves_others(died: bool) -> None:  # noqa: FBT001 - a parameter
    """Only its own parts are dropped."""
    recovery: FailureIsolator[int] = FailureIsolator(lambda _: False)
    one, other = FailedBatch(2), FailedBatch(2)
    fail(recovery, [1, 2], one, died=died)
    fail(recovery, [3, 4], other, died=died)
    assert sorted(recovery.abandon(one)) == [1, 2]
    assert (one.pending, other.pending) == (0, 2)
    assert taken(recovery) == [3]
