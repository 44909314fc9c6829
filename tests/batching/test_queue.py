"""`BatchQueue`: the items of the next batch, and when it is due."""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from async_batcher._batching.queue.base import ALREADY_DUE, NEVER
from async_batcher._batching.queue.batch_queue import BatchQueue

if TYPE_CHECKING:
    from async_batcher._batching.batch import Batch

NO_LIMIT = sys.maxsize
LIMITS = st.integers(1, 4) | st.just(NO_LIMIT) | st.just(10**30)
WINDOWS = st.sampled_from([0.0, 0.01, 1.0, 7, 1e12, math.inf])


class QueueMachine(RuleBasedStateMachine):
    """No item is lost or taken twice; order and limits hold in any interleaving.

    The model is a plain list of the queued items, searched from end to end at each step.
    """

    def __init__(self) -> None:
        super().__init__()
        self.queue: BatchQueue[int, str] = BatchQueue()
        self.known_wakeup = NEVER
        self.now = 1000.0
        self.queued: list[tuple[int, float, int]] = []  # ticket, arrival, item
        self.left: list[int] = []  # items that have left the queue
        self.tickets: set[int] = set()  # of single items
        self.calls: list[tuple[int, int]] = []  # first ticket and number of items
        self.items_of_calls: set[int] = set()  # the items of calls for many
        self.items_of_streams: set[int] = set()  # those of them that a stream has read
        self.flushed: set[int] = set()  # items due at once
        self.spread: set[int] = set()  # items of the last share
        self.share = 0
        self.divides_single_calls = False
        self.added = 0
        self.running = 0
        self.leaked = 0
        self.closing = False
        self.size, self.window, self.slots, self.capacity = NO_LIMIT, 0.0, 1, NO_LIMIT
        self.ahead = 0

    @precondition(lambda self: not self.added)
    @rule(
        size=LIMITS,
        window=WINDOWS,
        slots=LIMITS,
        capacity=LIMITS,
        ahead=st.sampled_from([0, 1, 3]),
        divides=st.booleans(),
    )
    def configure(
        self, size: int, window: float, slots: int, capacity: int, ahead: int, *, divides: bool
    ) -> None:
        """Set any options."""
        self.size, self.window, self.slots, self.capacity = size, window, slots, capacity
        self.ahead, self.divides_single_calls = ahead, divides
        self.queue = BatchQueue(
            max_batch_size=size,
            max_queue_time=window,
            concurrency=slots,
            max_queue_size=capacity,
            divides_single_calls=divides,
            ahead=ahead,
        )
        self.known_wakeup = NEVER
        self.running = self.leaked = 0
        self.closing = False

    @rule(count=st.integers(1, 6))
    def add(self, count: int) -> None:
        """Add items; they are rejected without capacity, after close, or with all slots leaked."""
        for _ in range(count):
            item = self.added
            ticket = self.queue.add(self.now, item, f"future of {item}")
            assert (ticket is None) == (
                self.closing or self.leaked >= self.slots or len(self.queued) >= self.capacity
            )
            if ticket is not None:
                assert ticket not in self.tickets
                self.added += 1
                self.tickets.add(ticket)
                self.queued.append((ticket, self.now, item))

    @rule(count=st.integers(1, 9), of_stream=st.booleans())
    def add_many(self, count: int, *, of_stream: bool) -> None:
        """Add items of one caller: all of them, or none."""
        has_capacity = (
            not self.closing
            and self.leaked < self.slots
            and len(self.queued) + count <= self.capacity
        )
        assert (self.queue.free_capacity >= count) == has_capacity
        items = range(self.added, self.added + count)
        ticket = self.queue.add_many(self.now, items, "future of many", of_stream=of_stream)
        assert (ticket is not None) == has_capacity
        if ticket is not None:
            self.added += count
            self.items_of_calls.update(items)
            if of_stream:
                self.items_of_streams.update(items)
            self.calls.append((ticket, count))
            self.queued.extend((ticket + place, self.now, item) for place, item in enumerate(items))

    @precondition(lambda self: self.calls)
    @rule(data=st.data())
    def discard_many(self, data: st.DataObject) -> None:
        """Cancel a call for many: its queued items are dropped."""
        ticket, count = data.draw(st.sampled_from(self.calls))
        self.calls.remove((ticket, count))
        discarded = [entry for entry in self.queued if ticket <= entry[0] < ticket + count]
        if discarded:
            assert self.queue.discard(discarded[0][0], len(discarded))
        else:
            assert not self.queue.discard(ticket, count)
        self.queued = [entry for entry in self.queued if entry not in discarded]
        self.left.extend(item for _, _, item in discarded)

    @rule()
    def flush(self) -> None:
        """Make all queued items due."""
        self.queue.flush()
        self.flushed = {item for _, _, item in self.queued}

    @precondition(lambda self: self.tickets)
    @rule(data=st.data())
    def discard(self, data: st.DataObject) -> None:
        """Cancel an item, queued or not, possibly again."""
        ticket = data.draw(st.sampled_from(sorted(self.tickets)))
        found = [entry for entry in self.queued if entry[0] == ticket]
        assert self.queue.discard(ticket) == bool(found)
        for entry in found:
            self.queued.remove(entry)
            self.left.append(entry[2])

    @rule(seconds=st.sampled_from([0.0, 0.005, 0.01, 1.0, 1e6]))
    def pass_time(self, seconds: float) -> None:
        """Advance the time."""
        self.now += seconds

    @rule()
    def take(self) -> None:
        """Take a batch if one is due and a slot is free: the oldest items, in order."""
        self.check_take(self.now)

    @precondition(lambda self: self.now < self.queue.next_wakeup < NEVER)
    @rule()
    def take_at_wakeup(self) -> None:
        """Take a batch at `next_wakeup`, when the model has one."""
        wakeup = self.now = self.queue.next_wakeup
        assert self.check_take(wakeup)

    def check_take(self, now: float) -> bool:
        """Take a batch, and compare it with the model."""
        batch = due_batch(self.queue, now)
        due = bool(self.queued) and (self.is_due_at_once or self.queued[0][1] + self.window <= now)
        if not due or not self.may_leave:
            assert batch is None
            return False
        size = self.batch_size()
        expected, self.queued = self.queued[:size], self.queued[size:]
        items = [item for _, _, item in expected]
        assert batch is not None
        futures = [
            "future of many" if item in self.items_of_calls else f"future of {item}"
            for item in items
        ]
        assert (batch.items, batch.futures) == (items, futures)
        assert batch.enqueued_at == [enqueued_at for _, enqueued_at, _ in expected]
        assert batch.has_slices or not self.items_of_calls.intersection(items)
        self.left.extend(item for _, _, item in expected)
        self.running += 1
        return True

    @property
    def may_leave(self) -> bool:
        """Return whether a slot is free; a full batch may leave ahead of one."""
        ahead = self.ahead if len(self.queued) >= self.size else 0
        return self.running < self.slots + ahead

    @property
    def is_due_at_once(self) -> bool:
        """Return whether the queued items are due before their window ends."""
        return self.closing or len(self.queued) >= self.size or self.queued[0][2] in self.flushed

    def batch_size(self) -> int:
        """Return the size limit of the next batch.

        Without max_batch_size it is a free slot's share of all queued items, and these are due; a
        stream, and a call for many that has waited for a slot, leave a share to each slot.
        """
        oldest = self.queued[0][2]
        is_single = oldest > max(self.items_of_calls, default=-1)
        if self.size < NO_LIMIT or (is_single and not self.divides_single_calls):
            return self.size
        if oldest not in self.spread:
            self.spread = self.flushed = {item for _, _, item in self.queued}
            slots = self.slots if self.slots < NO_LIMIT else 1
            is_of_stream = oldest <= max(self.items_of_streams, default=-1)
            waited = not is_single and self.queue._was_blocked
            free = slots if is_of_stream or waited else max(1, slots - self.running)
            self.share = math.ceil(len(self.queued) / free)
        return self.share

    @precondition(lambda self: self.running > self.leaked)
    @rule()
    def release(self) -> None:
        """Finish a batch."""
        self.queue.release_slot()
        self.running -= 1

    @precondition(lambda self: self.running > self.leaked)
    @rule()
    def leak(self) -> None:
        """Let a batch time out and run on."""
        self.queue.leak_slot()
        self.leaked += 1
        assert self.queue.all_slots_leaked == (self.leaked >= self.slots)

    @precondition(lambda self: self.leaked)
    @rule()
    def release_leaked(self) -> None:
        """Finish a batch that had timed out."""
        self.queue.release_slot(leaked=True)
        self.running -= 1
        self.leaked -= 1

    @rule()
    def close(self) -> None:
        """Close the queue: items are rejected, and queued ones are due."""
        self.queue.close()
        self.closing = True

    @rule()
    def clear(self) -> None:
        """Remove all queued items, in order."""
        items = [item for _, _, item in self.queued]
        futures = [
            "future of many" if item in self.items_of_calls else f"future of {item}"
            for item in items
        ]
        assert self.queue.clear() == futures
        self.left.extend(item for _, _, item in self.queued)
        self.queued = []

    @rule(size=LIMITS, window=WINDOWS)
    def resize(self, size: int, window: float) -> None:
        """Change the limits."""
        self.size, self.window = size, window
        self.queue.resize(max_batch_size=size, max_queue_time=window)

    @invariant()
    def limits_hold(self) -> None:
        """The counts are true and within the limits."""
        if self.queue.wakeup_changed:
            self.queue.wakeup_changed = False
            self.known_wakeup = self.queue.next_wakeup
        assert self.queue.next_wakeup == self.known_wakeup, "a change was not flagged"
        assert len(self.queue) == len(self.queued) <= self.capacity
        assert self.queue.running == self.running <= self.slots + self.ahead

    @invariant()
    def next_wakeup_is_right(self) -> None:
        """It is infinity if there is nothing to wait for, otherwise when the oldest item is due."""
        if not self.queued or not self.may_leave:
            assert self.queue.next_wakeup == NEVER
        elif self.is_due_at_once:
            assert self.queue.next_wakeup == ALREADY_DUE
        else:
            assert self.queue.next_wakeup == self.queued[0][1] + self.window

    @invariant()
    def nothing_lost_nothing_twice(self) -> None:
        """Each item is in the queue or has left it, once."""
        assert sorted([*self.left, *(item for _, _, item in self.queued)]) == list(
            range(self.added)
        )

    def teardown(self) -> None:
        """Take the remaining batches."""
        self.close()
        while self.queued:
            while self.running:
                self.release()
            assert self.check_take(self.now)
        assert self.queue.next_wakeup == NEVER
        self.nothing_lost_nothing_twice()


TestQueue = QueueMachine.TestCase
TestQueue.settings = settings(max_examples=60, stateful_step_count=40)
TestQueue = pytest.mark.slow(TestQueue)


def due_batch(queue: BatchQueue[int, str], now: float) -> Batch[int, str] | None:
    """Return the next batch, if it is due."""
    return queue.get_batch() if queue.next_wakeup <= now else None


def due_items(queue: BatchQueue[int, str], now: float) -> list[int] | None:
    """Return the items of the next batch, if it is due."""
    batch = due_batch(queue, now)
    return None if batch is None else batch.items


def filled(
    count: int, *, size: int = NO_LIMIT, window: float = 1.0, slots: int = 1
) -> BatchQueue[int, str]:
    """Return a queue with the items 0, 1, ..., one of which arrived in each second."""
    queue: BatchQueue[int, str] = BatchQueue(
        max_batch_size=size, max_queue_time=window, concurrency=slots
    )
    for item in range(count):
        queue.add(float(item), item, "future")
    return queue


def test_a_later_item_does_not_restart_the_window() -> None:
    """The window runs from the oldest queued item."""
    queue = filled(5, window=10.0)
    assert queue.next_wakeup == 10.0
    assert due_items(queue, 10.0) == [0, 1, 2, 3, 4]


def test_the_next_oldest_item_sets_the_window() -> None:
    """When the oldest item is discarded, the window runs from the next one."""
    queue = filled(3, window=10.0)
    assert queue.discard(0)
    assert queue.next_wakeup == 11.0
    assert queue.discard(2)  # not the oldest
    assert queue.next_wakeup == 11.0
    assert queue.discard(1)
    assert queue.next_wakeup == NEVER


def test_the_window_of_remaining_items_runs_from_their_arrival() -> None:
    """A slot that becomes free does not start a new window."""
    queue = filled(5, size=2, window=10.0)
    assert due_items(queue, 4.0) == [0, 1]
    assert due_batch(queue, 4.0) is None
    queue.release_slot()
    assert due_items(queue, 4.0) == [2, 3]
    queue.release_slot()
    assert queue.next_wakeup == 14.0
    assert due_batch(queue, 13.9) is None
    assert due_items(queue, 14.0) == [4]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_one_more_than_a_full_batch(size: int) -> None:
    """Of n + 1 items n are due at once; the last one waits for its window."""
    queue = filled(size + 1, size=size, slots=2)
    assert due_items(queue, ALREADY_DUE) == list(range(size))
    if size > 1:
        assert due_batch(queue, ALREADY_DUE) is None
        assert queue.next_wakeup == size + 1.0
    assert due_items(queue, size + 1.0) == [size]


def test_a_full_batch_is_not_due_after_a_discard() -> None:
    """A batch is due as full only while it is full."""
    queue = filled(3, size=2)
    queue.get_batch()
    queue.add(3.0, 3, "future")
    queue.discard(2)
    queue.release_slot()
    assert due_batch(queue, ALREADY_DUE) is None
    assert queue.next_wakeup == 4.0


def test_discarded_items_do_not_count_for_the_queue_limit() -> None:
    """Their capacity is free at once, also behind other items."""
    queue: BatchQueue[int, str] = BatchQueue(max_queue_size=2)
    tickets = [queue.add(0.0, item, "future") for item in range(2)]
    assert queue.add(0.0, 2, "future") is None
    assert tickets[1] is not None
    assert queue.discard(tickets[1])
    assert queue.add(0.0, 3, "future") is not None
    assert due_items(queue, 0.0) == [0, 3]


@pytest.mark.parametrize("size", [1, 2, NO_LIMIT])
def test_a_rejected_item_changes_nothing(size: int) -> None:
    """However often it is added, and whether or not the batch is full."""
    queue: BatchQueue[int, str] = BatchQueue(max_batch_size=size, max_queue_size=2)
    for item in range(2):
        queue.add(0.0, item, "future")
    assert [queue.add(0.0, item, "future") for item in range(2, 5)] == [None] * 3
    assert len(queue) == 2
    assert due_items(queue, 0.0) == list(range(min(size, 2)))
    assert queue.add(0.0, 5, "future") is not None


@pytest.mark.parametrize(
    "order", ["oldest first", "newest first", "all but the oldest", "every other"]
)
def test_discarding_takes_linear_time(order: str) -> None:
    """Of 100,000 queued items any number may be discarded one by one."""
    count = 100_000
    queue = filled(count, size=10**30, window=math.inf)
    discarded = {
        "oldest first": range(count),
        "newest first": range(count - 1, -1, -1),
        "all but the oldest": range(1, count),
        "every other": range(1, count, 2),
    }[order]
    for ticket in discarded:
        queue.discard(ticket)
    assert len(queue) == count - len(discarded)
    kept = len(queue._items._tickets)
    assert kept <= 2 * len(queue) + 1, "discarded items are kept"
    queue.close()
    remaining = sorted(set(range(count)) - set(discarded))
    assert due_items(queue, ALREADY_DUE) == (remaining or None)
