"""An event loop on a virtual clock, and a batcher whose batches the test finishes."""

from __future__ import annotations

import asyncio
import math
import selectors
import warnings
from typing import TYPE_CHECKING, Any

from async_batcher._batching.instance import LIFECYCLE_ATTR
from async_batcher._batching.lifecycle import BatcherLifecycle
from async_batcher._runners.base import BatchHandle, Runner
from async_batcher._worker.results import BatchRecalledError
from async_batcher.batcher import AsyncBatcher
from async_batcher.exceptions import BatchError

if TYPE_CHECKING:
    from collections.abc import Callable

    from async_batcher._batching.scheduler import Scheduler
    from async_batcher._runners.base import OnLater, OnResults
    from async_batcher._worker.results import Outcome
    from async_batcher.current import BatchFacts
    from async_batcher.exceptions import BatchTimeoutError


# The name of a `FakeBatcher` in errors and in the log.
FAKE = "tests.support.virtual_clock.FakeBatcher.process_batch"


class _ClockSelector(selectors.DefaultSelector):
    """Advances the clock instead of waiting."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if ready or timeout == 0:
            return ready
        if timeout is None:
            msg = "every task waits, and no timer is set: this would hang"
            raise AssertionError(msg)
        if timeout > 0:
            self.now += timeout
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """asyncio's event loop on a virtual clock; it cannot wait for threads or processes."""

    def __init__(self) -> None:
        self._clock_selector = _ClockSelector()
        super().__init__(self._clock_selector)

    def time(self) -> float:
        """Return the virtual time in seconds."""
        return self._clock_selector.now

    def timers(self) -> int:
        """Return the number of active timers."""
        return sum(not handle.cancelled() for handle in self._scheduled)  # type: ignore[attr-defined]

    def advance(self, seconds: float) -> None:
        """Advance the clock within this iteration, as code that blocks does."""
        self._clock_selector.now += seconds


def virtual_loop() -> VirtualLoop:
    """Return the running loop."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)
    return loop


def now() -> float:
    """Return the time of the running loop."""
    return asyncio.get_running_loop().time()


class FakeRunner(Runner):
    """A runner that keeps each batch until the test finishes it.

    Attributes:
        batches: The batches that were submitted, in order.
        facts: What each of them knows of itself.
        running: What is left of those that are not finished, with their callbacks.
        on_timeouts: For each batch, the callback of a timeout that cannot stop it.
        cancelled: The batches that were asked to end early, and whether by force.
        on_laters: For each of those, what is called with a `Later` that it raises all the same.
        closed: The argument of each `close`.
        begins_at_most: Batches that run at a time. As many full ones wait ahead of a slot, and can
            be recalled. 0: all begin when they are submitted.
        on_begin: Called with what is left of each batch that begins, and its facts.
        recalls_late: Whether a batch that is recalled ends only when it is its turn to begin.
    """

    def __init__(self) -> None:
        super().__init__()
        self.cancelled: list[tuple[list[Any], bool]] = []
        self.on_laters: list[OnLater] = []
        self.batches: list[list[Any]] = []
        self.facts: list[BatchFacts | None] = []
        self.running: list[tuple[list[Any], Callable[[Outcome], None]]] = []
        self._on_results: list[OnResults] = []  # of the running batches
        self.on_timeouts: list[Callable[[BatchTimeoutError], None]] = []
        self.closed: list[bool] = []
        self.begins_at_most = 0
        self.on_begin: Callable[[list[Any], BatchFacts | None], None] = lambda _left, _facts: None
        self.recalls_late = False
        self._handles: list[FakeHandle] = []  # of the running batches

    def full_batches_ahead(self, concurrency: int) -> int:
        """Return how many wait."""
        return max(0, 2 * self.begins_at_most - concurrency)

    def submit(
        self,
        batch: list[Any],
        on_done: Callable[[Outcome], None],
        on_timeout: Callable[[BatchTimeoutError], None],
        has_callers: Callable[[], bool],  # noqa: ARG002 - it starts at once
        on_results: OnResults,
        facts: BatchFacts | None = None,
    ) -> BatchHandle | None:
        """Keep the batch."""
        self.facts.append(facts)
        self.batches.append(batch)
        self.on_timeouts.append(on_timeout)
        left = list(batch)
        self.running.append((left, on_done))
        self._on_results.append(on_results)
        handle = FakeHandle(self, batch, left, facts)
        self._handles.append(handle)
        self._begin()
        return handle

    def yield_results(
        self, count: int = 1, *, index: int = 0, results: list[Any] | None = None
    ) -> None:
        """Give the results of the next items; by default each item is its own result."""
        left = self.running[index][0]
        items, left[:count] = left[:count], []
        self._on_results[index](items if results is None else results)

    def end(self, index: int = 0, outcome: Outcome | None = None) -> None:
        """Finish a running batch; by default each item that is left is its own result."""
        left, done = self.running.pop(index)
        del self._on_results[index], self._handles[index]
        done(left if outcome is None else outcome)
        self._begin()

    @property
    def begun(self) -> int:
        """The number of batches that run; those that wait come after them."""
        return sum(not handle.is_waiting for handle in self._handles)

    def recall(self) -> None:
        """End the batches that wait, now or when it is their turn."""
        waiting = [handle for handle in self._handles if handle.is_waiting]
        for handle in waiting:
            handle.is_recalled = True
        for handle in waiting:
            if not self.recalls_late and handle in self._handles:
                self.end(self._handles.index(handle), BatchRecalledError("recalled"))

    def _begin(self) -> None:
        for handle in self._handles[: self.begins_at_most or None]:
            if handle.is_waiting and handle in self._handles:
                if handle.is_recalled:
                    self.end(self._handles.index(handle), BatchRecalledError("recalled"))
                    return
                handle.is_waiting, handle.began_at = False, now() if self.begins_at_most else 0.0
                self.on_begin(handle.left, handle.facts)

    def cancel(self, batch: list[Any], left: list[Any], *, force: bool) -> None:
        """End a running batch if it is forced."""
        self.cancelled.append((batch, force))
        if force:
            index = next(i for i, (running, _) in enumerate(self.running) if running is left)
            self.end(index, BatchError("abandoned"))

    async def close(self, *, kill: bool) -> None:
        """Fail the running batches, if killed."""
        self.closed.append(kill)
        while kill and self.running:
            self.end(-1, RuntimeError("killed"))  # the last first: no other begins


class FakeHandle(BatchHandle):
    """The handle of a batch in a `FakeRunner`.

    Attributes:
        left: What is left of it.
        facts: What it knows of itself.
        is_recalled: Whether it is to be taken back before it begins.
    """

    def __init__(
        self, runner: FakeRunner, batch: list[Any], left: list[Any], facts: BatchFacts | None
    ) -> None:
        self._runner = runner
        self._batch = batch
        self.left = left
        self.facts = facts
        self.is_recalled = False
        self.is_waiting = True
        self.began_at = math.inf

    def cancel(self, *, force: bool, on_later: OnLater) -> None:
        """See `FakeRunner.cancel`."""
        self._runner.on_laters.append(on_later)
        self._runner.cancel(self._batch, self.left, force=force or self.is_waiting)


class _FakeLifecycle(BatcherLifecycle):
    """Has the runner of a `FakeBatcher`."""

    runner: FakeRunner

    def make_runner(self, *_: Any) -> Runner:
        return self.runner


class FakeBatcher(AsyncBatcher[Any, Any]):
    """A batcher with a `FakeRunner`.

    Args:
        **options: Options of `AsyncBatcher`. By default one batch runs at a time, and starts in
            the next iteration of the loop.
    """

    def __init__(self, **options: Any) -> None:
        with warnings.catch_warnings():
            # Of a queue smaller than a batch, which keeps a test short.
            warnings.filterwarnings("ignore", "max_batch_size=")
            super().__init__(**{"max_queue_time": 0.0, "concurrency": 1, **options})
        self.runner = FakeRunner()
        lifecycle = _FakeLifecycle(self._lifecycle.options)
        lifecycle.runner = self.runner
        setattr(self, LIFECYCLE_ATTR, lifecycle)

    async def process_batch(self, batch: list[Any]) -> list[Any]:
        """Fail: the runner never calls it."""
        raise AssertionError(batch)

    @property
    def _lifecycle(self) -> BatcherLifecycle:
        lifecycle: BatcherLifecycle = getattr(self, LIFECYCLE_ATTR)
        return lifecycle

    @property
    def scheduler(self) -> Scheduler:
        """Return the running scheduler."""
        assert self._lifecycle.session is not None
        return self._lifecycle.session

    @property
    def batches(self) -> list[list[Any]]:
        """Return the batches that were submitted to the runner."""
        return self.runner.batches

    def call(self, item: Any, **kwargs: Any) -> asyncio.Task[Any]:
        """Call `process` in a task."""
        return asyncio.create_task(self.process(item, **kwargs))

    def call_many(self, items: Any, **kwargs: Any) -> asyncio.Task[Any]:
        """Call `process_many` in a task."""
        return asyncio.create_task(self.process_many(items, **kwargs))
