"""Which items make the next batch, and when: `BatchQueue` against a model, and by example."""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from async_batcher._batching.queue import NOW, BatchQueue

if TYPE_CHECKING:
    from async_batcher._batching.batch import Batch

NO_LIMIT = sys.maxsize
LIMITS = st.integers(1, 4) | st.just(NO_LIMIT) | st.just(10**30)
WINDOWS = st.sampled_from([0.0, 0.01, 1.0, 7, 1e12, math.inf])


class FormingMachine(RuleBasedStateMachine):
    """Nothing lost, nothing twice, order and limits kept, whatever the interleaving.

    The model is a plain list of what waits, searched from end to end at each step.
    """

    def __init__(self) -> None:
        super().__init__()
        self.queue: BatchQueue[int, str] = BatchQueue()
        self.known_wakeup: float | None = None
        self.now = 1000.0
        self.queued: list[tuple[int, float, int]] = []  # ticket, arrival, item
        self.left: list[int] = []  # items that are out of the queue, for whatever reason
        self.tickets: set[int] = set()  # given out for single items
        self.many: list[tuple[int, int]] = []  # first ticket and count of those that came together, not discarded
        self.of_many: set[int] = set()  # their items
        self.flushed: set[int] = set()  # items that are due at once
        self.spread: set[int] = set()  # items among which a batch's share was worked out
        self.share = 0
        self.added = 0
        self.running = 0
        self.lost = 0
        self.closing = False
        self.size, self.window, self.slots, self.room = NO_LIMIT, 0.0, 1, NO_LIMIT

    @precondition(lambda self: not self.added)
    @rule(size=LIMITS, window=WINDOWS, slots=LIMITS, room=LIMITS)
    def configure(self, size: int, window: float, slots: int, room: int) -> None:
        """Any options."""
        self.size, self.window, self.slots, self.room = size, window, slots, room
        self.queue = BatchQueue(max_batch_size=size, max_queue_time=window, concurrency=slots, max_queue_size=room)
        self.known_wakeup = None
        self.running = self.lost = 0
        self.closing = False

    @rule(count=st.integers(1, 6))
    def add(self, count: int) -> None:
        """Items arrive; those beyond the room, after the close, or while every slot is lost, are refused."""
        for _ in range(count):
            item = self.added
            ticket = self.queue.add(self.now, item, f"future of {item}")
            assert (ticket is None) == (self.closing or self.lost >= self.slots or len(self.queued) >= self.room)
            if ticket is not None:
                assert ticket not in self.tickets
                self.added += 1
                self.tickets.add(ticket)
                self.queued.append((ticket, self.now, item))

    @rule(count=st.integers(1, 9))
    def add_many(self, count: int) -> None:
        """Items of one waiter arrive: all are taken, or none."""
        has_room = not self.closing and self.lost < self.slots and len(self.queued) + count <= self.room
        assert (self.queue.free_capacity >= count) == has_room
        items = range(self.added, self.added + count)
        ticket = self.queue.add_many(self.now, items, "future of many")
        assert (ticket is not None) == has_room
        if ticket is not None:
            self.added += count
            self.of_many.update(items)
            self.many.append((ticket, count))
            self.queued.extend((ticket + place, self.now, item) for place, item in enumerate(items))

    @precondition(lambda self: self.many)
    @rule(data=st.data())
    def discard_many(self, data: st.DataObject) -> None:
        """Who waits for many leaves: those that still wait are dropped."""
        ticket, count = data.draw(st.sampled_from(self.many))
        self.many.remove((ticket, count))
        leaving = [entry for entry in self.queued if ticket <= entry[0] < ticket + count]
        if leaving:
            self.queue.discard_many(leaving[0][0], len(leaving))
        else:
            self.queue.discard_many(ticket, count)  # changes nothing
        self.queued = [entry for entry in self.queued if entry not in leaving]
        self.left.extend(item for _, _, item in leaving)

    @rule()
    def flush(self) -> None:
        """What waits now is due at once."""
        self.queue.flush()
        self.flushed = {item for _, _, item in self.queued}

    @precondition(lambda self: self.tickets)
    @rule(data=st.data())
    def discard(self, data: st.DataObject) -> None:
        """A waiter leaves, early or late, and again."""
        ticket = data.draw(st.sampled_from(sorted(self.tickets)))
        found = [entry for entry in self.queued if entry[0] == ticket]
        assert self.queue.discard(ticket) == bool(found)
        for entry in found:
            self.queued.remove(entry)
            self.left.append(entry[2])

    @rule(seconds=st.sampled_from([0.0, 0.005, 0.01, 1.0, 1e6]))
    def pass_time(self, seconds: float) -> None:
        """Time passes."""
        self.now += seconds

    @rule()
    def take(self) -> None:
        """A batch is had exactly when it is due and a slot is free: the oldest, in order."""
        self.check_take(self.now)

    @precondition(lambda self: self.queue.next_wakeup is not None and self.now < self.queue.next_wakeup < math.inf)
    @rule()
    def take_at_wake(self) -> None:
        """A batch is had at `wake`, and not a moment before."""
        wake = self.queue.next_wakeup
        assert wake is not None
        assert self.queue.get_batch(math.nextafter(wake, -math.inf)) is None
        self.now = wake
        assert self.check_take(wake)

    def check_take(self, now: float) -> bool:
        """Take, and compare with the model."""
        batch = self.queue.get_batch(now)
        due = bool(self.queued) and (self.is_due_at_once or self.queued[0][1] + self.window <= now)
        if not due or self.running >= self.slots:
            assert batch is None
            return False
        size = self.batch_size()
        expected, self.queued = self.queued[:size], self.queued[size:]
        items = [item for _, _, item in expected]
        assert batch is not None
        futures = ["future of many" if item in self.of_many else f"future of {item}" for item in items]
        assert (batch.items, batch.futures) == (items, futures)
        assert batch.enqueued_at == [enqueued_at for _, enqueued_at, _ in expected]
        assert batch.has_slices or not self.of_many.intersection(items)
        self.left.extend(item for _, _, item in expected)
        self.running += 1
        return True

    @property
    def is_due_at_once(self) -> bool:
        """Whether what waits need not wait for its window."""
        return self.closing or len(self.queued) >= self.size or self.queued[0][2] in self.flushed

    def batch_size(self) -> int:
        """Items of the next batch at most: without a limit, of what came with others that came together, a worker's share."""
        oldest = self.queued[0][2]
        if self.size < NO_LIMIT or oldest > max(self.of_many, default=-1):
            return self.size
        if oldest not in self.spread:
            self.spread = {item for _, _, item in self.queued}
            self.share = math.ceil(len(self.queued) / (self.slots if self.slots < NO_LIMIT else 1))
        return self.share

    @precondition(lambda self: self.running > self.lost)
    @rule()
    def release(self) -> None:
        """A batch ends."""
        self.queue.release_slot()
        self.running -= 1

    @precondition(lambda self: self.running > self.lost)
    @rule()
    def lose(self) -> None:
        """A batch runs out of its time, and runs on."""
        self.queue.leak_slot()
        self.lost += 1
        assert self.queue.all_slots_leaked == (self.lost >= self.slots)

    @precondition(lambda self: self.lost)
    @rule()
    def release_lost(self) -> None:
        """One that ran out of its time ends after all."""
        self.queue.release_slot(leaked=True)
        self.running -= 1
        self.lost -= 1

    @rule()
    def close(self) -> None:
        """No more are taken; what waits is due at once."""
        self.queue.close()
        self.closing = True

    @rule()
    def clear(self) -> None:
        """Everything that waits comes out, in order."""
        items = [item for _, _, item in self.queued]
        futures = ["future of many" if item in self.of_many else f"future of {item}" for item in items]
        assert self.queue.clear() == futures
        self.left.extend(item for _, _, item in self.queued)
        self.queued = []

    @rule(size=LIMITS, window=WINDOWS)
    def resize(self, size: int, window: float) -> None:
        """Limits change on the way."""
        self.size, self.window = size, window
        self.queue.resize(max_batch_size=size, max_queue_time=window)

    @invariant()
    def limits_hold(self) -> None:
        """The counts are true, and within the limits."""
        if self.queue.wakeup_changed:
            self.queue.wakeup_changed = False
            self.known_wakeup = self.queue.next_wakeup
        assert self.queue.next_wakeup == self.known_wakeup, "a change of the wake-up is flagged"
        assert len(self.queue) == len(self.queued) <= self.room
        assert self.queue.running == self.running <= self.slots

    @invariant()
    def wake_is_right(self) -> None:
        """`wake` is None exactly when there is nothing to wait for, and otherwise when the oldest waiting item is due."""
        if not self.queued or self.running >= self.slots:
            assert self.queue.next_wakeup is None
        elif self.is_due_at_once:
            assert self.queue.next_wakeup == NOW
        else:
            assert self.queue.next_wakeup == self.queued[0][1] + self.window

    @invariant()
    def nothing_lost_nothing_twice(self) -> None:
        """Each item is in the queue or has left it, once."""
        assert sorted([*self.left, *(item for _, _, item in self.queued)]) == list(range(self.added))

    def teardown(self) -> None:
        """In the end everything comes out."""
        self.close()
        while self.queued:
            while self.running:
                self.release()
            assert self.check_take(self.now)
        assert self.queue.get_batch(math.inf) is None
        self.nothing_lost_nothing_twice()


TestForming = FormingMachine.TestCase
TestForming.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestForming = pytest.mark.slow(TestForming)


def items_of(batch: Batch[int, str] | None) -> list[int] | None:
    """Return the items alone."""
    return None if batch is None else batch.items


def filled(count: int, *, size: int = NO_LIMIT, window: float = 1.0, slots: int = 1) -> BatchQueue[int, str]:
    """A queue with the items 0, 1, ..., one of which arrives each second from 0 on."""
    queue: BatchQueue[int, str] = BatchQueue(max_batch_size=size, max_queue_time=window, concurrency=slots)
    for item in range(count):
        queue.add(float(item), item, "waiter")
    return queue


def test_a_later_item_does_not_restart_the_window() -> None:
    """The window runs from the oldest waiting item, however many come after it."""
    queue = filled(5, window=10.0)
    assert queue.next_wakeup == 10.0
    assert items_of(queue.get_batch(10.0)) == [0, 1, 2, 3, 4]


def test_the_next_oldest_sets_the_window_when_the_oldest_leaves() -> None:
    """The age that counts is that of the oldest item that still waits."""
    queue = filled(3, window=10.0)
    assert queue.discard(0)
    assert queue.next_wakeup == 11.0
    assert queue.discard(2)  # not the oldest: nothing changes
    assert queue.next_wakeup == 11.0
    assert queue.discard(1)
    assert queue.next_wakeup is None


def test_the_window_of_what_stays_behind_runs_from_its_own_arrival() -> None:
    """Items that waited for a slot do not start a new window when it frees."""
    queue = filled(5, size=2, window=10.0)
    assert items_of(queue.get_batch(4.0)) == [0, 1]
    assert queue.get_batch(4.0) is None
    queue.release_slot()
    assert items_of(queue.get_batch(4.0)) == [2, 3]
    queue.release_slot()
    assert queue.next_wakeup == 14.0
    assert queue.get_batch(13.9) is None
    assert items_of(queue.get_batch(14.0)) == [4]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_one_more_than_a_full_batch(size: int) -> None:
    """Of n + 1 items n leave at once; the last one waits out its window."""
    queue = filled(size + 1, size=size, slots=2)
    assert items_of(queue.get_batch(NOW)) == list(range(size))
    if size > 1:
        assert queue.get_batch(NOW) is None
        assert queue.next_wakeup == size + 1.0
    assert items_of(queue.get_batch(size + 1.0)) == [size]


def test_a_full_batch_is_no_longer_due_when_one_of_it_leaves() -> None:
    """A batch that was full counts as such only while it is."""
    queue = filled(3, size=2)
    queue.get_batch(NOW)
    queue.add(3.0, 3, "waiter")
    queue.discard(2)
    queue.release_slot()
    assert queue.get_batch(NOW) is None
    assert queue.next_wakeup == 4.0


def test_those_who_left_do_not_count_for_the_queue_limit() -> None:
    """A place in the queue is free again when its waiter leaves, also behind others."""
    queue: BatchQueue[int, str] = BatchQueue(max_queue_size=2)
    tickets = [queue.add(0.0, item, "waiter") for item in range(2)]
    assert queue.add(0.0, 2, "waiter") is None
    assert tickets[1] is not None
    assert queue.discard(tickets[1])
    assert queue.add(0.0, 3, "waiter") is not None
    assert items_of(queue.get_batch(0.0)) == [0, 3]


@pytest.mark.parametrize("size", [1, 2, NO_LIMIT])
def test_a_refused_item_leaves_no_trace(size: int) -> None:
    """However often it is tried, and whether or not the batch is full by then."""
    queue: BatchQueue[int, str] = BatchQueue(max_batch_size=size, max_queue_size=2)
    for item in range(2):
        queue.add(0.0, item, "waiter")
    assert [queue.add(0.0, item, "waiter") for item in range(2, 5)] == [None] * 3
    assert len(queue) == 2
    assert items_of(queue.get_batch(0.0)) == list(range(min(size, 2)))
    assert queue.add(0.0, 5, "waiter") is not None


@pytest.mark.parametrize("order", ["oldest first", "newest first", "all but the oldest", "every other"])
def test_leaving_costs_the_same_however_many_leave(order: str) -> None:
    """Of 100,000 waiting items any number may leave one by one, in linear time."""
    count = 100_000
    queue = filled(count, size=10**30, window=math.inf)
    leaving = {
        "oldest first": range(count),
        "newest first": range(count - 1, -1, -1),
        "all but the oldest": range(1, count),
        "every other": range(1, count, 2),
    }[order]
    for ticket in leaving:
        queue.discard(ticket)
    assert len(queue) == count - len(leaving)
    kept = len(queue._tickets)
    assert kept <= 2 * len(queue) + 1, "the items of those who left are let go"
    queue.close()
    staying = sorted(set(range(count)) - set(leaving))
    assert items_of(queue.get_batch(NOW)) == (staying or None)
