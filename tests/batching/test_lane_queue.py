"""The queue with keys, limits and items that come back, in any interleaving."""

from __future__ import annotations

import math
import sys
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from async_batcher._batching.queue.base import ALREADY_DUE, NEVER
from async_batcher._batching.queue.lane_queue import LaneQueue
from async_batcher.limits import Limit

NO_LIMIT = sys.maxsize


def test_full_batches_leave_ahead_of_a_slot_before_and_after_a_pause() -> None:
    """What waits at a worker when the next pause begins is taken back."""
    queue = LaneQueue(max_batch_size=1, concurrency=1, ahead=1)
    for number in range(4):
        queue.add(0.0, queue.prepare(number), Future())

    def batches(now: float) -> int:
        queue.refresh(now, now)
        return len(list(iter(queue.get_batch, None)))

    assert batches(0.0) == 2
    queue.pause(1.0)
    for _ in range(2):
        queue.release_slot(0.5, lane=queue.prepare(0).lane)
    assert batches(0.5) == 0
    assert batches(1.0) == 2


def test_a_batch_may_grow_again_when_what_did_not_fit_is_cancelled() -> None:
    """So it waits for its window."""
    limit = Limit(by=lambda item: item, per_batch=10)
    queue = LaneQueue(max_queue_time=5.0, limits=[limit])
    queue.add(0.0, queue.prepare(6), Future())
    ticket = queue.add(0.0, queue.prepare(6), Future())
    assert ticket is not None
    assert queue.next_wakeup == ALREADY_DUE
    queue.discard(ticket)
    assert queue.next_wakeup == 5.0


class Future:
    """What the queue holds in place of a caller's future."""

    def done(self) -> bool:
        """It is never asked."""
        raise NotImplementedError


class Item:
    """An item of the model."""

    def __init__(self, key: int, cost: float) -> None:
        self.key = key
        self.cost = cost
        self.ticket = -1
        self.came_at = 0.0
        self.back_at: float | None = None  # if it comes back later
        self.flushed = False


class LaneQueueMachine(RuleBasedStateMachine):
    """Nothing is lost or taken twice; order, limits, rates and keys hold in any interleaving."""

    @initialize(
        size=st.sampled_from([1, 2, 3, NO_LIMIT]),
        window=st.sampled_from([0.0, 2.0]),
        slots=st.sampled_from([1, 2, 5]),
        capacity=st.sampled_from([2, 6, NO_LIMIT]),
        per_batch=st.sampled_from([None, 3, 5]),
        queued=st.sampled_from([None, 8]),
        rate=st.sampled_from([None, (4, 3.0), (6, 1.0)]),
        batch_rate=st.sampled_from([None, (1, 1.0), (2, 5.0)]),
        key_concurrency=st.sampled_from([None, 1, 2]),
    )
    def make(
        self,
        size: int,
        window: float,
        slots: int,
        capacity: int,
        per_batch: int | None,
        queued: int | None,
        rate: tuple[float, float] | None,
        batch_rate: tuple[float, float] | None,
        key_concurrency: int | None,
    ) -> None:
        """Make a queue with any limits."""
        limits = []
        if per_batch or queued or rate:
            limits.append(
                Limit(lambda item: item.cost, per_batch=per_batch, queued=queued, rate=rate)
            )
        if batch_rate:
            limits.append(Limit("batches", rate=batch_rate))
        self.queue = LaneQueue(
            max_batch_size=size,
            max_queue_time=window,
            concurrency=slots,
            max_queue_size=capacity,
            limits=limits,
            key=lambda item: item.key,
            key_concurrency=key_concurrency,
        )
        self.size, self.window, self.slots, self.capacity = size, window, slots, capacity
        self.max_cost = min(per_batch or math.inf, rate[0] if rate else math.inf)
        self.queued, self.rate, self.batch_rate = queued, rate, batch_rate
        self.key_concurrency = key_concurrency or NO_LIMIT
        self.now = 0.0
        self.waiting: list[Item] = []
        self.running: list[list[Any]] = []
        self.parts: list[list[Any]] = []  # of failed batches, which wait to run again
        self.log: list[tuple[float, float]] = []
        self.paused_until = 0.0
        self.closing = False
        self.added = self.ended = 0

    # --- what a batcher does

    @rule(key=st.integers(0, 2), cost=st.integers(0, 4))
    def add(self, key: int, cost: int) -> None:
        """Add an item if there is capacity."""
        if self.rate is not None:
            cost = min(cost, int(self.rate[0]))
        item = Item(key, float(cost))
        used = sum(other.cost for other in self.waiting)
        fits = len(self.waiting) < self.capacity and not self.closing
        if self.queued is not None:
            fits = fits and used + cost <= self.queued
        ticket = self.queue.add(self.now, self.queue.prepare(item), Future())
        assert (ticket is not None) == fits
        if ticket is not None:
            item.ticket, item.came_at = ticket, self.now
            self.waiting.append(item)
            self.added += 1
        self.pump(ALREADY_DUE)

    @rule(index=st.integers(0, 10))
    def discard(self, index: int) -> None:
        """Cancel an item, which waits or runs."""
        if index < len(self.waiting):
            item = self.waiting.pop(index)
            assert self.queue.discard(item.ticket)
            assert not self.queue.discard(item.ticket)
            self.ended += 1
        elif self.running:
            assert not self.queue.discard(self.running[0][0].ticket)
        self.pump(ALREADY_DUE)

    @rule(seconds=st.sampled_from([0.5, 1.0, 2.5]))
    def wait(self, seconds: float) -> None:
        """Let time pass, with the timer."""
        until = self.now + seconds
        while self.queue.next_wakeup <= until:
            self.now = max(self.now, self.queue.next_wakeup)
            self.pump(self.now)
            assert self.queue.next_wakeup > self.now, "the timer would fire for ever"
        self.now = until

    @rule(index=st.integers(0, 4))
    def end(self, index: int) -> None:
        """Let a batch succeed."""
        if index < len(self.running):
            entries = self.running.pop(index)
            self.ended += len(entries)
            self.release(entries)

    @rule(index=st.integers(0, 4), first=st.integers(0, 2), after=st.sampled_from([0.0, 1.5, 4.0]))
    def put_back(self, index: int, first: int, after: float) -> None:
        """Let the items of a batch, or the last ones, come back."""
        if index < len(self.running):
            entries = self.running.pop(index)
            self.ended += len(entries[:first])
            for entry in entries[first:]:
                entry.item.back_at = self.now + after
                self.waiting.append(entry.item)
            self.queue.requeue(entries[first:], self.now + after)
            self.release(entries)

    @rule(index=st.integers(0, 4))
    def split(self, index: int) -> None:
        """Let a batch fail and run again in parts."""
        if index < len(self.running):
            entries = self.running.pop(index)
            middle = (len(entries) + 1) // 2
            for part in (entries[:middle], entries[middle:]):
                if part:
                    self.parts.append(part)
                    self.queue.count_rerun(part, 1)
            self.release(entries)

    @rule(after=st.sampled_from([1.0, 3.0]))
    def pause(self, after: float) -> None:
        """Let nothing start for some time."""
        self.paused_until = max(self.paused_until, self.now + after)
        self.queue.pause(self.now + after)
        self.pump(ALREADY_DUE)

    @rule()
    def flush(self) -> None:
        """Make all that waits due, and what comes back."""
        in_batches = [entry.item for part in [*self.running, *self.parts] for entry in part]
        for item in [*self.waiting, *in_batches]:
            item.flushed = True
        self.queue.flush()
        self.pump(ALREADY_DUE)

    @precondition(lambda self: self.added > 5)
    @rule()
    def close(self) -> None:
        """Accept nothing more."""
        self.closing = True
        self.queue.close()
        self.pump(ALREADY_DUE)

    def release(self, entries: list[Any]) -> None:
        """Give back the slot of a batch."""
        self.queue.release_slot(self.now, lane=entries[0].lane)
        self.pump(self.now)

    def pump(self, until: float) -> None:
        """Dispatch what may leave, as `Scheduler.pump` does."""
        self.queue.refresh(self.now, until)
        for item in sorted(self.waiting, key=lambda item: -item.ticket):
            if item.back_at is not None and item.back_at <= self.now:
                item.came_at = min([self.now, *(o.came_at for o in self.ready(item.key)[:1])])
                item.back_at = None
        while True:
            for part in list(self.parts):
                if len(self.running) < self.slots and self.queue.may_rerun(part):
                    self.parts.remove(part)
                    self.queue.count_rerun(part, -1)
                    self.queue.acquire_slot(part)
                    self.check_dispatch([entry.item for entry in part])
                    self.running.append(part)
            if self.queue.next_wakeup > until:
                break
            batch = self.queue.get_batch()
            if batch is None:
                break
            self.check_batch(batch)
        self.queue.wakeup_changed = False

    # --- what must hold

    def ready(self, key: int) -> list[Item]:
        """Return the queued items of a key, in order."""
        items = [item for item in self.waiting if item.key == key and item.back_at is None]
        return sorted(items, key=lambda item: item.ticket)

    def head(self, key: int) -> tuple[list[Item], bool]:
        """Return the items that make the next batch of a key, and whether it is full."""
        head: list[Item] = []
        has_costs = any(not limit.counts_batches for limit in self.queue.limits.states)
        max_cost = self.max_cost if has_costs else math.inf
        is_full = False
        for item in self.ready(key):
            used = sum(other.cost for other in head)
            if len(head) == self.size or (head and used + item.cost > max_cost):
                return head, True
            head.append(item)
            is_full = len(head) == self.size or used + item.cost >= max_cost
        return head, is_full

    def is_held(self, key: int) -> bool:
        """Whether a key waits for its other batches."""
        busy = sum(part[0].item.key == key for part in [*self.running, *self.parts])
        returning = any(item.back_at is not None for item in self.waiting if item.key == key)
        return busy >= self.key_concurrency or (returning and self.key_concurrency == 1)

    def due_keys(self, until: float) -> list[int]:
        """Return the keys whose batch is due, the oldest item first."""
        due = []
        for key in range(3):
            head, is_full = self.head(key)
            if not head or self.is_held(key):
                continue
            at = head[0].came_at + self.window
            if is_full or self.closing or head[0].flushed:
                at = ALREADY_DUE
            if at <= until:
                due.append((head[0].ticket, key))
        return [key for _, key in sorted(due)]

    def allowed(self, cost: float) -> bool:
        """Whether the rates allow a batch of that cost now."""
        for rate, of in ((self.rate, lambda used: used), (self.batch_rate, lambda _: 1.0)):
            if rate is not None:
                used = sum(of(c) for at, c in self.log if self.now < at + (rate[1] + 0.002))
                if used + of(cost) > rate[0]:
                    return False
        return True

    def check_dispatch(self, items: list[Item]) -> None:
        """Check what holds for new batches and for parts of failed ones."""
        cost = sum(item.cost for item in items)
        assert self.now >= self.paused_until, "started in a pause"
        assert self.allowed(cost), "exceeded a rate"
        assert len(self.running) < self.slots
        same_key = sum(part[0].item.key == items[0].key for part in self.running)
        assert same_key < self.key_concurrency
        self.log.append((self.now, cost))

    def check_batch(self, batch: Any) -> None:
        """Check a batch that has left."""
        key = batch.key
        head, _ = self.head(key)
        assert batch.items == head, (
            "not the oldest items",
            [(i.ticket, i.cost) for i in batch.items],
            [(i.ticket, i.cost) for i in head],
            [(i.ticket, i.key, i.cost, i.back_at) for i in self.waiting],
        )
        assert not self.is_held(key)
        just_before = math.nextafter(self.now, -math.inf)
        assert key in [*self.due_keys(self.now)[:1], *self.due_keys(just_before)[:1]]
        if self.key_concurrency == 1:
            behind = {item.ticket for item in self.waiting if item.key == key} - {
                item.ticket for item in head
            }
            assert not behind or min(behind) > head[-1].ticket, "overtook an item of its key"
        self.check_dispatch(head)
        for item in head:
            self.waiting.remove(item)
        self.running.append(batch.entries())

    @invariant()
    def counts_are_right(self) -> None:
        """Each item is in one place, and in the counts."""
        if not hasattr(self, "queue"):
            return
        in_batches = sum(map(len, [*self.running, *self.parts]))
        assert self.added == len(self.waiting) + in_batches + self.ended
        assert len(self.queue) == len(self.waiting)
        assert self.queue.running == len(self.running)
        lanes = self.queue._schedule.lanes
        used = {item.key for item in self.waiting}
        used |= {part[0].item.key for part in [*self.running, *self.parts]}
        assert set(lanes) == used, "a key without items costs something"

    @invariant()
    def nothing_waits_that_could_leave(self) -> None:
        """After each event, what is full has left if a slot, the rates and its key allow it."""
        if hasattr(self, "queue") and len(self.running) < self.slots:
            due = self.due_keys(ALREADY_DUE)
            older = self.due_keys(self.now)
            if due and due[0] == older[0] and self.now >= self.paused_until:
                assert not self.allowed(sum(item.cost for item in self.head(due[0])[0]))

    def teardown(self) -> None:
        """Everything leaves in the end."""
        if not hasattr(self, "queue"):
            return
        for _ in range(10_000):
            if not (self.waiting or self.running or self.parts):
                break
            while self.running:
                self.end(0)
            if self.queue.next_wakeup < NEVER:
                self.wait(max(0.0, self.queue.next_wakeup - self.now))
        assert [*self.waiting, *self.running, *self.parts] == []
        assert not self.queue._schedule.lanes
        assert all(not limit._queued for limit in self.queue.limits.states)


LaneQueueMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=50)
TestLaneQueue = pytest.mark.slow(LaneQueueMachine.TestCase)
