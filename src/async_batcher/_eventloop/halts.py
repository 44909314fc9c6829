"""Time limits for which it does not count that the whole program was halted.

A program is halted by ``docker pause``, Ctrl-Z, a debugger. Its workers and threads are halted with
it, so nothing in them has hung. The event loop cannot tell this from being blocked, for which it
does not matter: a timer of the loop fires long after it was due. A timer that fires now and then
before the limit also notices a halt that ends before the limit.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, TypeVarTuple

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

Ts = TypeVarTuple("Ts")

_MIN_LATENESS = 0.1  # seconds; a busy machine is as late without a halt
_CHECKS = 8  # while a time limit runs; a halt is noticed up to this fraction of what is left
_MIN_DELAY = 0.05  # seconds between two checks, so that time goes on even if each is late
_MAX_DELAY = 86_400.0  # seconds; loops do not take any number


def check_delay(left: float) -> float:
    """Return when to check for a halt, in seconds from now, with ``left`` seconds to the limit."""
    return max(0.0, min(left, max(left / _CHECKS, _MIN_DELAY), _MAX_DELAY))


def halted_since(due_at: float, now: float) -> float:
    """Return for how many seconds the program was halted, from how late its timer fires."""
    return now - due_at if now - due_at > _MIN_LATENESS else 0.0


class LimitTimer:
    """Calls back after a time, except for time for which the program was halted."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        seconds: float,
        callback: Callable[[*Ts], object],
        *args: *Ts,
    ) -> None:
        self._loop = loop
        self._callback: Callable[[], object] = partial(callback, *args)
        self._due_at = loop.time() + seconds
        self._arm()

    def cancel(self) -> None:
        self._handle.cancel()

    def _arm(self) -> None:
        now = self._loop.time()
        self._checks_at = now + check_delay(self._due_at - now)
        self._handle = self._loop.call_at(self._checks_at, self._check)

    def _check(self) -> None:
        now = self._loop.time()
        self._due_at += halted_since(self._checks_at, now)
        if now < self._due_at:
            self._arm()
        else:
            self._callback()
