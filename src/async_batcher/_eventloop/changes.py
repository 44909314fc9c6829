"""Waiting until something has changed, and until a time that may become earlier."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from async_batcher._eventloop.guarded_loop import GuardedLoop

_MAX_DELAY = 86_400.0  # seconds; loops do not take any number, so a longer wait has parts


class Changes:
    """Wakes the coroutines that wait for something to change; each looks for itself what did.

    Attributes:
        futures: Of those that wait; code that runs often looks here before it calls `notify`.
    """

    def __init__(self, loop: GuardedLoop) -> None:
        self.futures: list[asyncio.Future[None]] = []
        self._loop = loop

    async def wait(self) -> None:
        future: asyncio.Future[None] = self._loop.create_future()
        self.futures.append(future)
        await future

    def notify(self) -> None:
        for future in self.futures:
            if not future.done():
                future.set_result(None)
        self.futures.clear()


class DeadlineTimer:
    """Calls back at a time on `time.monotonic`, or earlier.

    The loop's timer is left alone when the time becomes later, as it does with each batch.

    Attributes:
        due_at: When; infinity: never. In that case the loop has no timer, which would cost it time.
    """

    def __init__(self, loop: GuardedLoop, callback: Callable[[], None]) -> None:
        self.due_at = math.inf
        self._loop = loop
        self._callback = callback
        self._handle: asyncio.TimerHandle | None = None
        self._armed_for = math.inf

    def set(self, due_at: float) -> None:
        """Call back at ``due_at`` in place of any other time."""
        if due_at == math.inf or due_at < self._armed_for:
            self.cancel()
        self.due_at = due_at
        if due_at < self._armed_for:
            self._armed_for = due_at
            delay = min(max(0.0, due_at - time.monotonic()), _MAX_DELAY)
            self._handle = self._loop.call_later(delay, self._fire)

    def cancel(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None
        self.due_at = self._armed_for = math.inf

    def _fire(self) -> None:
        self._handle = None
        self.due_at = self._armed_for = math.inf
        self._callback()
