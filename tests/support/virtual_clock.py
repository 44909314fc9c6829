"""An event loop whose time passes at once, and a runner that does what a test tells it."""

from __future__ import annotations

import asyncio
import selectors
from typing import TYPE_CHECKING, Any

from async_batcher._batching.lifecycle import Lifecycle
from async_batcher._runners.base import Runner
from async_batcher.batcher import AsyncBatcher
from async_batcher.exceptions import BatchError

if TYPE_CHECKING:
    from collections.abc import Callable

    from async_batcher._batching.scheduler import Scheduler
    from async_batcher._runners.base import CancelBatch
    from async_batcher._worker.results import Outcome
    from async_batcher.exceptions import BatchTimeoutError


FAKE = "tests.support.virtual_clock.FakeBatcher.process_batch"  # as errors and the log name it

_LIFE = "_AsyncBatcher__lifecycle"


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


class FakeRunner(Runner):
    """A runner that keeps each batch until the test ends it.

    Attributes:
        ended_early: The batches that were asked to end before their time, and whether by force.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ended_early: list[tuple[list[Any], bool]] = []
        self.batches: list[list[Any]] = []
        self.running: list[tuple[list[Any], Callable[[Outcome], None]]] = []
        self.late: list[Callable[[BatchTimeoutError], None]] = []  # of each batch
        self.closed: list[bool] = []
        self.abandoned = False

    def submit(
        self,
        batch: list[Any],
        on_done: Callable[[Outcome], None],
        on_timeout: Callable[[BatchTimeoutError], None],
        has_callers: Callable[[], bool],  # noqa: ARG002 - it begins at once
    ) -> CancelBatch | None:
        """Keep it."""
        self.batches.append(batch)
        self.late.append(on_timeout)
        self.running.append((batch, on_done))
        return lambda force: self._end_early(batch, force)

    def end(self, index: int = 0, outcome: Outcome | None = None) -> None:
        """End one of the running batches: with each item as its own result, if not told otherwise."""
        batch, done = self.running.pop(index)
        done(list(batch) if outcome is None else outcome)

    def _end_early(self, batch: list[Any], force: bool) -> None:  # noqa: FBT001 - as the session calls it
        self.ended_early.append((batch, force))
        if force:
            index = next(i for i, (running, _) in enumerate(self.running) if running is batch)
            self.end(index, BatchError("nobody waited for it"))

    async def close(self, *, kill: bool) -> None:
        """End what runs, if killed."""
        self.closed.append(kill)
        while kill and self.running:
            self.end(outcome=RuntimeError("killed"))

    def close_without_loop(self) -> None:
        """Note it."""
        self.abandoned = True


class FakeBatcher(AsyncBatcher[Any, Any]):
    """A batcher whose batches a `FakeRunner` keeps.

    Args:
        **options: As of `AsyncBatcher`; by default one batch at a time, which leaves in the next turn of the loop.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"max_queue_time": 0.0, "concurrency": 1, **options})
        self.runner = runner = FakeRunner()

        class ScriptedLife(Lifecycle):
            __slots__ = ()

            def _runner(self, batcher: Any, loop: Any) -> Any:  # noqa: ARG002 - as of `Lifecycle`
                return runner

        life: Lifecycle = getattr(self, _LIFE)
        setattr(self, _LIFE, ScriptedLife(life.options))

    async def process_batch(self, batch: list[Any]) -> list[Any]:
        """Never called."""
        raise AssertionError(batch)

    @property
    def scheduler(self) -> Scheduler:
        """The running scheduler."""
        life: Lifecycle = getattr(self, _LIFE)
        assert life.scheduler is not None
        return life.scheduler

    @property
    def batches(self) -> list[list[Any]]:
        """The batches that have left."""
        return self.runner.batches

    def call(self, item: Any, **kwargs: Any) -> asyncio.Task[Any]:
        """A caller of its own."""
        return asyncio.create_task(self.process(item, **kwargs))
