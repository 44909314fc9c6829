"""The queue of a batcher with keys, limits, or items that come back. Pure: `now` is an argument.

::

    prepare(item) --> Entry: key, costs --add--> the lane of its key --get_batch--> Batch
                                                  ^    |
    requeue(entries, at) --> when it is time -----'    `--> due --> ready: the oldest item first

It does what `BatchQueue` does, which is faster and has one lane, and beyond that:

Rules:

- A batch has items of one key. Each key has its window, from its oldest item on.
- Of the batches that are due, the one with the oldest item leaves first. What a rate or a pause
  holds back, holds back all behind it, so that no key starves.
- With ``key_concurrency``, a key with that many batches that run, or are to run again, waits; with
  1, so does a key of which an item comes back later. Other keys do not wait for it.
- Items that come back are in front of those that came after them. Their window starts anew.
- A batch that a rate holds back stays in the queue: it may grow, lose items, and has no slot.
"""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, Any

from async_batcher._batching.batch import Batch
from async_batcher._batching.bulk.slices import Slice
from async_batcher._batching.queue.base import ALREADY_DUE, NEVER, QueueBase
from async_batcher._batching.queue.lane import Entry, Lane, sum_costs
from async_batcher._batching.queue.lane_items import LaneItems
from async_batcher._batching.queue.lane_schedule import LaneSchedule

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from async_batcher._batching.records.recorder import StatsRecorder
    from async_batcher.limits import Limit
    from async_batcher.stats import Reason


class LaneQueue(QueueBase):
    """The queue of one batcher; see `BatchQueue` for what is not described here.

    Args:
        limits: What a batch and the queue may cost, and what may be dispatched in a time.
        key: Returns the key of an item.
        key_concurrency: Batches of one key that run at a time at most.
        counts: Counts, as ``rate_limited``, items in batches that a rate has held back.
        **settings: Those of `BatchQueue`.

    Attributes:
        limits: See above.
        items: All that are queued, or come back later.
        keeps_order: Whether batches of a key run one after the other.
    """

    __slots__ = (
        "_counts", "_divides", "_held", "_paused_until", "_reruns_at", "_schedule", "_time",
        "_workers", "items", "keeps_order", "limits",
    )  # fmt: skip

    def __init__(
        self,
        *,
        limits: Iterable[Limit] = (),
        key: Callable[[Any], Any] | None = None,
        key_concurrency: int | None = None,
        counts: StatsRecorder | None = None,
        workers: int | None = None,
        divides_single_calls: bool = False,
        ahead: int = 0,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        self._schedule = LaneSchedule(self._max_queue_time, key_concurrency or sys.maxsize)
        self.keeps_order = key_concurrency == 1
        self.items = LaneItems(self._schedule, limits, key, self._max_batch_size)
        self.limits = self.items.limits
        self._counts = counts
        # By a rate, last: items with a ticket before this, until when.
        self._held = (0, ALREADY_DUE)
        self._paused_until = ALREADY_DUE
        self._reruns_at = NEVER  # when a rate or a pause lets a rerun start
        self._time = (ALREADY_DUE, ALREADY_DUE)  # of the last `refresh`: now, and until when
        self.set_concurrency(
            self._concurrency,
            workers=workers or (self._concurrency if self._concurrency < sys.maxsize else 1),
            divides_single_calls=divides_single_calls,
            ahead=ahead,
        )

    def __len__(self) -> int:
        """Queued items, and those that come back."""
        return len(self.items.entries)

    @property
    def free_capacity(self) -> int:
        """Items that the queue has capacity for, as far as their number counts."""
        if self._closing or self.all_slots_leaked:
            return 0
        return max(0, self.max_queue_size - len(self))

    # --- items

    def prepare(self, item: Any) -> Entry:
        """Return an item with its key and costs, for `add`; see `LaneItems.prepare`."""
        return self.items.prepare(item)

    def has_capacity(self, entries: Sequence[Entry]) -> bool:
        """Tell whether all of them may be added."""
        return len(entries) <= self.free_capacity and self.limits.have_capacity(sum_costs(entries))

    def fullness(self, size: int) -> str:
        full = [limit for limit in self.limits.states if limit.limits_queue]
        if size > self.free_capacity or not full:
            return super().fullness(size)
        return "; ".join(map(str, full))

    def add(self, now: float, entry: Entry, future: Any) -> int | None:
        """Enqueue what `prepare` returned, and return its ticket; None without capacity for it."""
        if not self.has_capacity((entry,)):
            return None
        ticket = self.items.add(now, entry, future)
        self._time = now, min(self._time[1], math.nextafter(now, ALREADY_DUE))
        self._update()
        return ticket

    def discard(self, ticket: int, count: int = 1) -> bool:
        """Remove ``count`` items from that ticket on; return whether any was still queued."""
        found = [self.items.discard(number) for number in range(ticket, ticket + count)]
        self._update()
        return any(found)

    def requeue(self, entries: Iterable[Entry], at: float) -> None:
        """Enqueue items again that have been in a batch, when the time ``at`` has come."""
        self.items.requeue(entries, at)
        self._update()

    def pause(self, until: float) -> None:
        """Let no batch leave before that time."""
        self._paused_until = max(self._paused_until, until)
        self._update()

    def flush(self) -> None:
        """Make every item that is queued now due."""
        self.items.flush()
        self._update()

    def futures(self) -> list[Any]:
        """Return the futures of all items, in order."""
        entries = sorted(self.items.entries.values(), key=lambda entry: entry.ticket)
        return [entry.future for entry in entries]

    def clear(self) -> list[Any]:
        """Remove all items, and return their futures."""
        futures = self.futures()
        for ticket in sorted(self.items.entries, reverse=True):  # the heads last, which costs less
            self.items.discard(ticket)
        self._update()
        return futures

    # --- batches

    def refresh(self, now: float, until: float) -> None:
        """Take notice of the time: before `get_batch`, and before `may_rerun`.

        Args:
            now: The time.
            until: Batches that are due by then may leave. `ALREADY_DUE`: those that were due before
                now, so that what is added with a window of 0 can wait for others.
        """
        until = now if until >= now else math.nextafter(now, ALREADY_DUE)
        self._time = now, until
        self._reruns_at = NEVER
        if self._paused_until <= now:
            self._paused_until = ALREADY_DUE
        self.items.restore(now)
        self._update()

    def get_batch(self) -> Batch[Any, Any] | None:
        """Dequeue the next batch and take a slot for it; None if there is none at that time."""
        now = self._time[0]
        lane = self._schedule.first()
        if lane is None or self._leaves_at(lane) > now:
            self._update()
            return None
        held_before, held_until = self._held
        was_held = lane.due_at is not None and lane.due_at <= held_until
        reason: Reason = "full" if lane.due_at == ALREADY_DUE else "timeout"
        entries = lane.take(self._batch_size(lane))
        for entry in entries:
            self.items.leave(entry)
        held = sum(entry.ticket < held_before for entry in entries) if was_held else 0
        if held and self._counts is not None:
            self._counts.rate_limited += held
        if self._closing:
            reason = "drain"
        elif held:
            reason = "rate"
        elif self._was_blocked:
            reason = "slot_available"
        self.limits.dispatch(lane.head_costs, now)
        self.running += 1
        lane.running += 1
        lane.find_head(self._max_batch_size)
        self._schedule.update(lane)
        self._was_blocked = False
        self._update()
        batch: Batch[Any, Any] = Batch.of_entries(entries, reason)
        return batch

    def may_rerun(self, entries: Sequence[Entry]) -> bool:
        """Tell whether a part of a failed batch may run again now, if there is a slot for it."""
        now, lane = self._time[0], entries[0].lane
        if lane is not None and not self._schedule.may_run(lane):
            return False
        at = self._paused_until
        if at <= now:
            at = self.limits.free_at(sum_costs(entries), now)
        if at > now:
            self._reruns_at = min(self._reruns_at, at)
            self._update()
        return at <= now

    def acquire_slot(self, entries: Sequence[Entry] = ()) -> None:
        """Take a slot for a batch that does not come from the queue."""
        self.running += 1
        if entries:
            self.limits.dispatch(sum_costs(entries), self._time[0])
            if entries[0].lane is not None:
                entries[0].lane.running += 1
                self._schedule.keep(entries[0].lane)
        self._update()

    def release_slot(
        self, now: float = ALREADY_DUE, *, leaked: bool = False, lane: Lane | None = None
    ) -> None:
        """Give back the slot of a batch that has finished."""
        was_busy = self.running >= self._concurrency
        self.running -= 1
        self.leaked_slots -= leaked
        if lane is not None:
            lane.running -= 1
            self._schedule.update(lane)
        self._update()
        self._was_blocked = was_busy and self.next_wakeup <= now

    def count_rerun(self, entries: Sequence[Entry], change: int) -> None:
        """Count a part of a failed batch that waits to run again, or no longer does."""
        lane = entries[0].lane
        if lane is not None:
            lane.reruns += change
            self._schedule.update(lane)
            self._update()

    def set_concurrency(
        self, concurrency: int, *, workers: int, divides_single_calls: bool = False, ahead: int = 0
    ) -> None:
        """Change the limits of what runs, and over how many workers items are divided."""
        self._concurrency = concurrency
        # What waits at a worker begins later than it was dispatched, and could exceed a rate.
        self._ahead = 0 if self.limits.have_rates else ahead
        self._workers = workers
        self._divides = divides_single_calls
        self._update()

    def close(self) -> None:
        self._schedule.closing = True
        self._schedule.update_all()
        super().close()

    def resize(self, *, max_batch_size: int, max_queue_time: float) -> None:
        self._schedule.max_queue_time = max_queue_time
        self.items.max_batch_size = max_batch_size
        for lane in self._schedule.lanes.values():
            lane.find_head(max_batch_size)
        self._schedule.update_all()
        super().resize(max_batch_size=max_batch_size, max_queue_time=max_queue_time)

    # --- inside

    def _batch_size(self, lane: Lane) -> int:
        """Return how many items the next batch has at most; see `shares`."""
        queued = lane.size
        is_divided = self._divides or type(lane.oldest.future) is Slice
        if self._max_batch_size < sys.maxsize or not is_divided:
            return min(queued, self._max_batch_size)
        lane.flush_until = self.items.next_ticket  # what is left is due, too
        return -(-queued // max(1, self._workers - self.running))

    def _leaves_at(self, lane: Lane) -> float:
        """Return when a lane that is due may leave, or is to be looked at again.

        `NEVER` without a slot for it.
        """
        if self.running >= self._concurrency + (self._ahead if lane.is_full else 0):
            return NEVER
        now = self._time[0]
        if self._paused_until > now:
            return self._paused_until
        at = self.limits.free_at(lane.head_costs, now)
        if at > now:
            self._held = self.items.next_ticket, at
        return at

    def _update(self) -> None:
        self._schedule.move_due(self._time[1])
        lane = self._schedule.first()
        may_leave = self._paused_until <= self._time[0]
        self.limits.has_due = may_leave and (lane is not None or self._reruns_at < NEVER)
        if lane is not None:
            wakeup = self._leaves_at(lane)
            if wakeup <= self._time[0]:
                wakeup = ALREADY_DUE
            elif wakeup < NEVER:
                # Before that, a lane with an older item may become due, and fit the rate.
                wakeup = min(wakeup, max(self._schedule.next_due(), self._paused_until))
        elif self.running >= self._concurrency + self._ahead:
            wakeup = NEVER
        else:
            wakeup = max(self._schedule.next_due(), self._paused_until)
        self._set_wakeup(min(wakeup, self.items.next_return, self._reruns_at))
