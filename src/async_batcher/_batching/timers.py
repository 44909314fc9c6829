"""Timers on the event loop: for the queue's next wake-up, and for the next deadline."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Generic, TypeVar

from async_batcher._batching.deadlines import DeadlineHeap

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable
    from contextvars import Context

E = TypeVar("E")

_MAX_TIMER_DELAY = 86_400.0  # seconds; loops do not take any number, so a longer wait has parts
_TIMER_TOLERANCE = 0.01  # seconds that a timer may fire early: some loops count milliseconds


class WakeupTimer:
    """Calls back when the queue's next batch is due.

    Args:
        loop: The loop.
        context: What the callback runs in.
        callback: Called with the time twice: batches that are due by it leave, and it is now.

    Attributes:
        armed_for: The wake-up; None if it is not armed.
    """

    __slots__ = ("_callback", "_context", "_handle", "_loop", "armed_for")

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        context: Context,
        callback: Callable[[float, float], object],
    ) -> None:
        self._loop = loop
        self._context = context
        self._callback = callback
        self.armed_for: float | None = None
        self._handle: asyncio.Handle | None = None

    def arm(self, wakeup: float | None, now: float) -> None:
        """Fire at ``wakeup`` instead of any other time; None: not at all."""
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None
        self.armed_for = wakeup
        if wakeup is not None:
            step = self._fire if wakeup <= now else self._arm_late
            self._handle = self._loop.call_soon(step, wakeup, context=self._context)

    def _arm_late(self, wakeup: float) -> None:
        # In the next iteration: a batch that fills up in the one in which it began needs no timer,
        # and a timer costs more than this call.
        now = self._loop.time()
        if wakeup <= now:
            self._fire(wakeup)
        else:
            when = min(wakeup, now + _MAX_TIMER_DELAY)
            self._handle = self._loop.call_at(when, self._fire, when, context=self._context)

    def _fire(self, when: float) -> None:
        self._handle = self.armed_for = None
        now = max(self._loop.time(), when)  # a timer that fires a little early counts as due
        self._callback(now, now)


class DeadlineTimer(Generic[E]):
    """Deadlines, and a timer for the next.

    Args:
        loop: The loop.
        context: What the callback runs in.
        is_done: Whether the deadline of an entry no longer matters.
        callback: Called with the time when a deadline has come; it calls `expire`.

    Attributes:
        next: The next deadline; infinity without one.
        handle: Of the timer, while it is armed.
    """

    __slots__ = ("_armed_for", "_callback", "_context", "_heap", "_loop", "handle", "next")

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        context: Context,
        is_done: Callable[[E], bool],
        callback: Callable[[float], object],
    ) -> None:
        self._loop = loop
        self._context = context
        self._callback = callback
        self._heap: DeadlineHeap[E] = DeadlineHeap(is_done)
        self._armed_for = math.inf
        self.next = math.inf
        self.handle: asyncio.TimerHandle | None = None

    def add(self, seconds: float, entry: E) -> None:
        """Add an entry whose deadline is that many seconds from now."""
        self._heap.add(self._loop.time() + seconds, entry)
        self.arm()

    def expire(self, now: float) -> list[E]:
        """Remove and return the entries whose deadline has come; `arm` when they are handled."""
        expired = self._heap.expire(now)
        self.next = self._heap.next
        return expired

    def arm(self) -> None:
        """Fire at the next deadline."""
        self.next = when = self._heap.next
        if self.handle is not None:
            if self._armed_for <= when != math.inf:
                return
            self.cancel()
        if when != math.inf:
            self._armed_for = when
            self.handle = self._loop.call_at(
                min(when, self._loop.time() + _MAX_TIMER_DELAY),
                self._fire,
                when,
                context=self._context,
            )

    def cancel(self) -> None:
        if self.handle is not None:
            self.handle.cancel()
            self.handle = None

    def _fire(self, when: float) -> None:
        self.handle = None
        now = self._loop.time()
        if now < when <= now + _TIMER_TOLERANCE:
            now = when
        self._callback(now)
        self.arm()
