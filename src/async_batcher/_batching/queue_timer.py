"""The timer for the queue's next wake-up."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable
    from contextvars import Context

MAX_TIMER_DELAY = 86_400.0  # seconds; loops do not take any number, so a longer wait has parts


class QueueTimer:
    """Calls back when the queue's next batch is due.

    Args:
        loop: The loop.
        context: What the callback runs in.
        callback: Called with the time twice: batches that are due by it leave, and it is now.

    Attributes:
        armed_for: The wake-up; infinity if it is not armed.
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
        self.armed_for = math.inf
        self._handle: asyncio.Handle | None = None

    def arm(self, wakeup: float, now: float) -> None:
        """Fire at ``wakeup`` instead of any other time; infinity: not at all."""
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None
        self.armed_for = wakeup
        if wakeup != math.inf:
            step = self._fire if wakeup <= now else self._arm_late
            self._handle = self._loop.call_soon(step, wakeup, context=self._context)

    def _arm_late(self, wakeup: float) -> None:
        # In the next iteration: a batch that fills up in the one in which it began needs no timer,
        # and a timer costs more than this call.
        now = self._loop.time()
        if wakeup <= now:
            self._fire(wakeup)
        else:
            when = min(wakeup, now + MAX_TIMER_DELAY)
            self._handle = self._loop.call_at(when, self._fire, when, context=self._context)

    def _fire(self, when: float) -> None:
        self._handle, self.armed_for = None, math.inf
        now = max(self._loop.time(), when)  # a timer that fires a little early counts as due
        self._callback(now, now)
