"""An event loop whose time passes at once, and a runner that does what a test tells it."""

from __future__ import annotations

import asyncio
import selectors
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from async_batcher._outcome import Outcome
    from async_batcher.exceptions import BatchTimeoutError


class _ClockSelector(selectors.DefaultSelector):
    """Instead of waiting, puts the clock forward."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if ready or timeout == 0:
            return ready
        if timeout is None:
            msg = "every task waits, and no timer is set: this would hang for ever"
            raise AssertionError(msg)
        if timeout > 0:
            self.now += timeout
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """asyncio's loop on a virtual clock; it cannot wait for threads or processes."""

    def __init__(self) -> None:
        self._clock_selector = _ClockSelector()
        super().__init__(self._clock_selector)

    def time(self) -> float:
        """Virtual seconds."""
        return self._clock_selector.now

    def timers(self) -> int:
        """Timers that are set and not cancelled."""
        return sum(not handle.cancelled() for handle in self._scheduled)  # type: ignore[attr-defined]


class ScriptedRunner:
    """A runner that keeps each batch until the test ends it."""

    def __init__(self) -> None:
        self.batches: list[list[Any]] = []
        self.running: list[tuple[list[Any], Callable[[Outcome], None]]] = []
        self.late: list[Callable[[BatchTimeoutError], None]] = []  # of each batch
        self.closed: list[bool] = []
        self.abandoned = False

    async def start(self) -> None:
        """Nothing to start."""

    def run(self, batch: list[Any], done: Callable[[Outcome], None], late: Callable[[BatchTimeoutError], None]) -> None:
        """Keep it."""
        self.batches.append(batch)
        self.late.append(late)
        self.running.append((batch, done))

    def end(self, index: int = 0, outcome: Outcome | None = None) -> None:
        """End one of the running batches: with each item as its own result, if not told otherwise."""
        batch, done = self.running.pop(index)
        done(list(batch) if outcome is None else outcome)

    def runs_in(self, task: asyncio.Task[Any] | None) -> bool:  # noqa: ARG002 - batches run in no task
        """Never."""
        return False

    def spare(self, task: asyncio.Task[Any] | None) -> None:
        """No task is a batch of it."""

    async def close(self, *, kill: bool) -> None:
        """End what runs, if killed."""
        self.closed.append(kill)
        while kill and self.running:
            self.end(outcome=RuntimeError("killed"))

    def abandon(self) -> None:
        """Note it."""
        self.abandoned = True
