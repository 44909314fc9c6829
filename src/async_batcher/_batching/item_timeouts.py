"""Timeouts of items: past its deadline a caller fails, and its queued item never runs."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, TypeAlias

from async_batcher._batching.bulk.slices import BulkFuture, Slice
from async_batcher._batching.deadlines import DeadlineHeap
from async_batcher._batching.queue.base import ALREADY_DUE
from async_batcher._batching.queue_timer import MAX_TIMER_DELAY
from async_batcher._serialization.exception_text import counted
from async_batcher.exceptions import ItemTimeoutError

if TYPE_CHECKING:
    import asyncio
    from contextvars import Context
    from typing import Any

    from async_batcher._batching.batch import Batch, CallerFuture, ItemFuture
    from async_batcher._batching.callers import QueueHandle
    from async_batcher._batching.delivery import Delivery
    from async_batcher._batching.scheduler import Scheduler

    Deadline: TypeAlias = tuple[CallerFuture, QueueHandle, float]

_TIMER_TOLERANCE = 0.01  # seconds that a timer may fire early: some loops count milliseconds
_MIN_DROP_COUNT = 64  # callers; see `ItemTimeouts._drop_done`


class ItemTimeouts:
    """The deadlines of a scheduler's callers, and a timer for the next.

    Attributes:
        next: The next deadline; infinity without one.
        handle: Of the timer, while it is armed.
    """

    __slots__ = (
        "_armed_for", "_attempts", "_context", "_deadlines", "_delivery", "_heap", "_scheduler",
        "handle", "next",
    )  # fmt: skip

    def __init__(self, scheduler: Scheduler, delivery: Delivery, context: Context) -> None:
        self._scheduler = scheduler
        self._delivery = delivery
        self._context = context
        self._heap: DeadlineHeap[Deadline] = DeadlineHeap(lambda entry: entry[0].done())
        # By caller, for `first_and_last`; see `_drop_done`.
        self._deadlines: dict[CallerFuture, float] = {}
        self._attempts: dict[CallerFuture, int] = {}  # of some of them, which failed
        self._armed_for = math.inf
        self.next = math.inf
        self.handle: asyncio.TimerHandle | None = None

    def add(self, future: CallerFuture, handle: QueueHandle, seconds: float) -> None:
        """Give a caller that many seconds."""
        deadline = self._scheduler.loop.time() + seconds
        self._heap.add(deadline, (future, handle, seconds))
        self._deadlines[future] = deadline
        self._drop_done()
        self._arm()

    def note_attempt(self, future: ItemFuture, attempt: int) -> None:
        """Note that an item has been tried so often, and comes back."""
        if not isinstance(future, Slice) and future in self._deadlines:
            self._attempts[future] = attempt

    def expire(self, now: float) -> None:
        """Fail the callers whose deadline has come."""
        scheduler = self._scheduler
        still_running: list[CallerFuture] = []
        for future, handle, seconds in self._heap.expire(now):
            was_queued = scheduler.callers.remove(handle)
            if isinstance(future, BulkFuture):
                what = f"{future.left} of {len(future.results)} items"
                where = "those that were still queued were removed"
            else:
                what = "the item"
                attempts = self._attempts.pop(future, 0)
                where = "its batch was still running"
                if was_queued:
                    after = f" after {counted(attempts, 'attempt')}" if attempts > 1 else ""
                    where = f"it was still queued{after}, and was removed"
                elif attempts:
                    where += f", in attempt {attempts + 1}"
            error = ItemTimeoutError(
                f"{what} had no result within {counted(seconds, 'second')}: {where}"
            )
            scheduler.recorder.timed_out += self._delivery.reject([future], error)
            if isinstance(future, BulkFuture) or not was_queued:
                still_running.append(future)
        for future in still_running:
            scheduler.inflight.on_caller_gone(future)
        self._drop_done()
        self._arm()

    def first_and_last(self, batch: Batch[Any, Any]) -> tuple[float | None, float | None]:
        """Return when the first and the last items of a batch time out, on `time.monotonic`.

        The first one is None if no item has a deadline, the last one if some have none.
        """
        if not self._deadlines:
            return None, None
        # An infinite timeout is none.
        deadlines = [self._deadlines.get(caller, math.inf) for caller in batch.callers()]
        first, last = min(deadlines), max(deadlines)
        if first == math.inf:
            return None, None
        offset = time.monotonic() - self._scheduler.loop.time()
        return first + offset, last + offset if last < math.inf else None

    def cancel(self) -> None:
        """Cancel the timer."""
        if self.handle is not None:
            self.handle.cancel()
            self.handle = None

    def _drop_done(self) -> None:
        """Drop the deadlines of callers that the heap has dropped, if they are more than half."""
        left = len(self._heap)
        if not left:
            self._deadlines.clear()
            self._attempts.clear()
        elif len(self._deadlines) > 2 * left + _MIN_DROP_COUNT:
            pending = [item for item in self._deadlines.items() if not item[0].done()]
            self._deadlines = dict(pending)
            for future in [future for future in self._attempts if future.done()]:
                del self._attempts[future]

    def _arm(self) -> None:
        self.next = when = self._heap.next
        if self.handle is not None:
            if self._armed_for <= when != math.inf:
                return
            self.cancel()
        if when != math.inf:
            loop = self._scheduler.loop
            self._armed_for = when
            at = min(when, loop.time() + MAX_TIMER_DELAY)
            self.handle = loop.call_at(at, self._fire, when, context=self._context)

    def _fire(self, when: float) -> None:
        self.handle = None
        now = self._scheduler.loop.time()
        if now < when <= now + _TIMER_TOLERANCE:
            now = when
        self._scheduler.pump(ALREADY_DUE, now)
        self._arm()
