"""A scheduler without a batcher, on a virtual clock."""

from __future__ import annotations

import contextvars
import sys
from typing import TYPE_CHECKING, Any

from async_batcher._batching.queue.batch_queue import BatchQueue
from async_batcher._batching.records.recorder import StatsRecorder
from async_batcher._batching.scheduler import Scheduler
from tests.support.virtual_clock import FakeRunner, virtual_loop

if TYPE_CHECKING:
    import asyncio

    from async_batcher._batching.callers import SubmitFuture

NO_LIMIT = sys.maxsize


class Rig:
    """A scheduler with a `FakeRunner` on the running `VirtualLoop`."""

    def __init__(
        self,
        *,
        size: int = NO_LIMIT,
        window: float = 1.0,
        slots: int = 1,
        capacity: int = NO_LIMIT,
    ) -> None:
        self.loop = virtual_loop()
        self.queue: BatchQueue[Any, asyncio.Future[Any]] = BatchQueue(
            max_batch_size=size, max_queue_time=window, concurrency=slots, max_queue_size=capacity
        )
        self.runner = FakeRunner()
        self.scheduler = Scheduler(
            self.loop, self.queue, self.runner, contextvars.copy_context(), StatsRecorder()
        )

    def ask(self, item: Any) -> SubmitFuture:
        """Submit an item, as `AsyncBatcher.submit` does."""
        return self.scheduler.callers.submit(item, None)

    def ask_all(self, *items: Any) -> list[SubmitFuture]:
        """Submit several items."""
        return [self.ask(item) for item in items]

    async def stop(self, *, force: bool = False, timeout: float | None = None) -> None:  # noqa: ASYNC109 - as of `AsyncBatcher.stop`
        """Stop the scheduler."""
        await self.scheduler.close(force=force, timeout=timeout)

    @property
    def batches(self) -> list[list[Any]]:
        """Return the batches that were submitted to the runner."""
        return self.runner.batches

    def timers(self) -> int:
        """Return the number of active timers and ready callbacks, except the test's own task."""
        ready = self.loop._ready  # type: ignore[attr-defined]
        return self.loop.timers() + sum(not handle.cancelled() for handle in ready)
