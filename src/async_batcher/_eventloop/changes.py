"""Waiting until something has changed, and until a time that may become earlier."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

from async_batcher._eventloop.halts import check_delay, halted_since

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from async_batcher._eventloop.guarded_loop import GuardedLoop


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
    """Calls back at a time on `time.monotonic`, and after the program was halted.

    The loop's timer is left alone when the time becomes later, as it does with each batch.

    Args:
        loop: The event loop.
        callback: Called with the seconds for which the program was halted, mostly 0.

    Attributes:
        due_at: When; infinity: never. In that case the loop has no timer, which would cost it time.
    """

    def __init__(self, loop: GuardedLoop, callback: Callable[[float], None]) -> None:
        self.due_at = math.inf
        self._loop = loop
        self._callback = callback
        self._handle: asyncio.TimerHandle | None = None
        self._checks_at = math.inf

    def set(self, due_at: float) -> None:
        """Call back at ``due_at`` in place of any other time."""
        if due_at == math.inf:
            self.cancel()
            return
        self.due_at = due_at
        now = time.monotonic()
        delay = check_delay(due_at - now)
        if now + delay < self._checks_at:
            if self._handle is not None:
                self._handle.cancel()
            self._checks_at = now + delay
            self._handle = self._loop.call_later(delay, self._check)

    def cancel(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None
        self.due_at = self._checks_at = math.inf

    def _check(self) -> None:
        now, due_at = time.monotonic(), self.due_at
        halted = halted_since(self._checks_at, now)
        self._handle = None
        self.due_at = self._checks_at = math.inf
        if halted or now >= due_at:
            self._callback(halted)
        else:
            self.set(due_at)
