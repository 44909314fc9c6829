"""`FailureIsolator`: the reruns of a failed batch."""

from __future__ import annotations

from collections import deque
from math import log2

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from async_batcher._batching.failures.isolation import FailedBatch, FailureIsolator, Rerun
from async_batcher.exceptions import WorkerDiedError

MANY = 10**6
CRASH = WorkerDiedError("it crashed", pid=1)


class Rerunner:
    """Runs a batch and its reruns; a run with a failing item fails."""

    def __init__(
        self, failing: set[int], *, error: Exception | None = None, per_batch: int = MANY
    ) -> None:
        self.failed_items = failing
        self.error = error or ValueError("bad item")
        self.cancelled: set[int] = set()
        self.isolator: FailureIsolator[int] = FailureIsolator(
            self.cancelled.__contains__, crashes_per_batch=per_batch, crashes_per_minute=MANY
        )
        self.done: list[int] = []
        self.alone: list[int] = []
        self.abandoned: list[int] = []
        self.runs: list[list[int]] = []

    def run_all(self, count: int) -> FailedBatch:
        """Run a batch, then its reruns one after the other."""
        failed_batch = FailedBatch(count)
        self.run(list(range(count)), failed_batch)
        while (rerun := self.isolator.next_rerun(new_batch_is_due=False)) is not None:
            self.isolator.finished(rerun)
            self.run(rerun.entries, failed_batch)
        return failed_batch

    def run(self, entries: list[int], failed_batch: FailedBatch) -> None:
        """Run some of the items."""
        self.runs.append(entries)
        if self.failed_items.isdisjoint(entries):
            self.done += entries
            return
        why = self.isolator.split(entries, failed_batch, 0.0, self.error)
        if why == "":
            self.alone += entries
        elif why is not None:
            self.abandoned += [*entries, *self.isolator.abandon(failed_batch)]


@settings(max_examples=100)
@given(st.integers(1, 200), st.data(), st.booleans())
def test_failing_items_are_isolated(count: int, data: st.DataObject, crashed: bool) -> None:
    """Each ends alone, in at most 2 k (log2(n / k) + 2) reruns; all others succeed."""
    failing = data.draw(st.sets(st.integers(0, count - 1), min_size=1))
    rerunner = Rerunner(failing, error=CRASH if crashed else None)
    failed_batch = rerunner.run_all(count)
    assert sorted(rerunner.alone) == sorted(failing)
    assert sorted(rerunner.done) == sorted(set(range(count)) - failing)
    assert (
        failed_batch.reruns
        == len(rerunner.runs) - 1
        <= 2 * len(failing) * (log2(count / len(failing)) + 2)
    )
    assert (failed_batch.size, failed_batch.failed_items, failed_batch.pending) == (
        count,
        len(failing),
        0,
    )
    assert not rerunner.isolator


@settings(max_examples=50)
@given(st.integers(2, 100), st.data(), st.integers(1, 8))
def test_crashes_of_one_batch_are_limited(count: int, data: st.DataObject, budget: int) -> None:
    """Beyond the limit none of it is rerun, and every item has an outcome."""
    failing = data.draw(st.sets(st.integers(0, count - 1), min_size=1))
    rerunner = Rerunner(failing, error=CRASH, per_batch=budget)
    failed_batch = rerunner.run_all(count)
    assert sorted(rerunner.done + rerunner.alone + rerunner.abandoned) == list(range(count))
    assert set(rerunner.done).isdisjoint(failing)
    assert set(rerunner.alone) <= failing
    assert not rerunner.isolator
    assert failed_batch.pending == 0
    if rerunner.abandoned:
        assert failed_batch.crashes >= budget
    else:
        assert set(rerunner.alone) == failing


def test_crashes_in_a_minute_are_limited() -> None:
    """The limit counts all batches of the last minute."""
    isolator: FailureIsolator[int] = FailureIsolator(lambda _: False, crashes_per_minute=3)

    def fail_at(now: float) -> str | None:
        return isolator.split([1, 2], FailedBatch(2), now, CRASH)

    assert [fail_at(0.0), fail_at(30.0)] == [None, None]
    assert "minute" in (fail_at(59.9) or "")
    assert "minute" in (fail_at(59.9) or ""), "the first crash is less than a minute ago"
    assert fail_at(120.0) is None


def test_batchers_of_one_pool_share_the_limit() -> None:
    """Crashes of one batcher count against the other."""
    crash_times: deque[float] = deque()
    one: FailureIsolator[int] = FailureIsolator(
        lambda _: False, crashes_per_minute=3, crash_times=crash_times
    )
    other: FailureIsolator[int] = FailureIsolator(
        lambda _: False, crashes_per_minute=3, crash_times=crash_times
    )
    for isolator in (one, other):
        assert isolator.split([1, 2], FailedBatch(2), 0.0, CRASH) is None
    assert "minute" in (one.split([1, 2], FailedBatch(2), 0.0, CRASH) or "")
    assert "minute" in (other.split([1, 2], FailedBatch(2), 0.0, CRASH) or "")


def fail_batch(
    isolator: FailureIsolator[int], entries: list[int], failed_batch: FailedBatch, *, crashed: bool
) -> None:
    """Record the failure of a batch that is to be rerun."""
    assert (
        isolator.split(entries, failed_batch, 0.0, CRASH if crashed else ValueError("bad item"))
        is None
    )


def next_items(isolator: FailureIsolator[int], *, new_batch: bool = False) -> list[int] | None:
    """Return the items of the next rerun."""
    rerun = isolator.next_rerun(new_batch_is_due=new_batch)
    return None if rerun is None else rerun.entries


def test_suspects_of_a_crash_are_rerun_one_at_a_time() -> None:
    """Other reruns may run at the same time."""
    isolator: FailureIsolator[int] = FailureIsolator(lambda _: False)
    fail_batch(isolator, [1, 2], FailedBatch(2), crashed=True)
    first = isolator.next_rerun(new_batch_is_due=False)
    assert isinstance(first, Rerun)
    assert first.entries == [1]
    assert next_items(isolator) is None
    fail_batch(isolator, [3, 4], FailedBatch(2), crashed=False)
    assert [next_items(isolator), next_items(isolator), next_items(isolator)] == [[3], [4], None]
    isolator.finished(first)
    assert next_items(isolator) == [2]


def test_new_batches_run_between_reruns() -> None:
    """After two reruns comes a new batch, if one is due."""
    isolator: FailureIsolator[int] = FailureIsolator(lambda _: False)
    fail_batch(isolator, list(range(8)), FailedBatch(8), crashed=False)
    fail_batch(isolator, list(range(8)), FailedBatch(8), crashed=False)
    fail_batch(isolator, list(range(8)), FailedBatch(8), crashed=False)
    is_new_batch = [next_items(isolator, new_batch=True) is None for _ in range(6)]
    assert is_new_batch == [False, False, True, False, False, True]
    assert next_items(isolator, new_batch=True) is not None
    assert next_items(isolator, new_batch=False) is not None
    assert next_items(isolator, new_batch=False) is None, "no rerun is left"


def test_cancelled_items_are_left_out_of_reruns() -> None:
    """A rerun without remaining items is skipped; others have only the remaining ones."""
    rerunner = Rerunner({0, 1, 2, 3})
    rerunner.cancelled.update([0, 1])
    failed_batch = FailedBatch(5)
    rerunner.run([0, 1, 2, 3, 4], failed_batch)
    rerunner.cancelled.update([2])
    assert next_items(rerunner.isolator) == [3, 4], "the first half is cancelled"
    assert not rerunner.isolator
    assert failed_batch.pending == 1


def test_clear_returns_the_items_to_rerun() -> None:
    """The isolator is empty after it."""
    isolator: FailureIsolator[int] = FailureIsolator(lambda _: False)
    fail_batch(isolator, [1, 2, 3], FailedBatch(3), crashed=True)
    fail_batch(isolator, [4, 5], FailedBatch(2), crashed=False)
    assert sorted(isolator.clear()) == [1, 2, 3, 4, 5]
    assert not isolator
    assert next_items(isolator) is None


@pytest.mark.parametrize("crashed", [True, False])
def test_abandoning_one_batch_keeps_the_reruns_of_others(crashed: bool) -> None:
    """Only its own reruns are dropped."""
    isolator: FailureIsolator[int] = FailureIsolator(lambda _: False)
    one, other = FailedBatch(2), FailedBatch(2)
    fail_batch(isolator, [1, 2], one, crashed=crashed)
    fail_batch(isolator, [3, 4], other, crashed=crashed)
    assert sorted(isolator.abandon(one)) == [1, 2]
    assert (one.pending, other.pending) == (0, 2)
    assert next_items(isolator) == [3]
