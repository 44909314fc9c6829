"""Batches that run in a `WorkerPool`, ours or a given one."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from async_batcher._pool.pickled_function import PickledFunction
from async_batcher._pool.state.worker_events import SHUTDOWN_GRACE
from async_batcher._pool.work_item import WorkItem
from async_batcher._runners.base import BatchHandle, Runner
from async_batcher._serialization.caller_exceptions import raise_first
from async_batcher.exceptions import BatcherStoppedError

if TYPE_CHECKING:
    from async_batcher._pool.dispatcher import PoolDispatcher
    from async_batcher._pool.pool import WorkerPool
    from async_batcher._runners.base import HasCallers, OnDone, OnLater, OnResults, OnTimeout
    from async_batcher._worker.results import Outcome
    from async_batcher._worker.user_function import UserFunction
    from async_batcher.current import BatchFacts
    from async_batcher.stats import WorkerCounts


class PooledBatch(WorkItem, BatchHandle):
    """A batch in a pool.

    Attributes:
        dispatcher: The pool's, which has it.
    """

    __slots__ = ("dispatcher",)

    dispatcher: PoolDispatcher

    def cancel(self, *, force: bool, on_later: OnLater) -> None:
        self.on_later = on_later
        self.dispatcher.cancel(self, force=force)

    @property
    def is_waiting(self) -> bool:  # type: ignore[override]
        return self.dispatcher.is_waiting(self)


class WorkerPoolRunner(Runner):
    """Runs batches in the workers of a pool, which is stopped at the end if it is ours.

    With ``counts_until_end``, a batch that timed out ends when no worker runs it any longer.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        function: UserFunction,
        pool: WorkerPool,
        *,
        is_ours: bool,
        batch_timeout: float | None,
        counts_until_end: bool,
    ) -> None:
        self.crash_times = pool.crash_times
        self._loop = loop
        self._pool = pool
        self._is_ours = is_ours
        self._timeout = batch_timeout
        self._counts_until_end = counts_until_end
        self._setup = function.setup
        self._pickled_function = PickledFunction(function, out_of_band=True)
        self._client_key = object()  # names us in a pool that batchers share
        self._dispatcher: PoolDispatcher | None = None  # that has our batches

    def full_batches_ahead(self, concurrency: int) -> int:
        """Return how many make two batches for each worker; 0 if not all workers are used."""
        workers = self._pool.max_workers
        return max(0, 2 * workers - concurrency) if concurrency >= workers else 0

    async def start(self) -> None:
        """Start the pool, and load the function in each worker."""
        self._pickled_function.pickle()
        # `WorkerPool.start` reopens a stopped pool, which is not for us to do with a given one.
        if self._is_ours:
            await self._pool.start()
        else:
            await self._pool.dispatcher().start()
        outcomes: list[Outcome] = []
        ready = self._loop.create_future()

        # An item may have its outcome before `preload` returns how many there will be.
        wanted = 0

        def on_done(outcome: Outcome) -> None:
            outcomes.append(outcome)
            if len(outcomes) == wanted and not ready.done():
                ready.set_result(None)

        self._dispatcher = self._pool.dispatcher()
        work_items = [
            WorkItem(self._pickled_function, None, self._client_key, on_outcome=on_done)
            for _ in range(self._pool.max_workers)
        ]
        wanted = self._dispatcher.preload(self._pickled_function, work_items)
        if wanted > len(outcomes):
            try:
                await ready
            except asyncio.CancelledError:
                for unfinished in work_items[:wanted]:
                    self._dispatcher.cancel(unfinished, force=False)
                raise
        raise_first(outcomes, self._setup)

    def submit(
        self,
        batch: list[Any],
        on_done: OnDone,
        on_timeout: OnTimeout,  # noqa: ARG002 - the worker is killed
        has_callers: HasCallers,  # noqa: ARG002 - an abandoned batch is cancelled
        on_results: OnResults,
        facts: BatchFacts | None = None,
    ) -> BatchHandle | None:
        function = self._pickled_function
        try:
            if not function.is_current():
                self._refresh()
            work_item = PooledBatch(
                function,
                batch,
                self._client_key,
                self._timeout,
                on_done,
                on_early=on_results,
                facts=facts,
                counts_until_end=self._counts_until_end,
            )
            if work_item.outcome is not None:
                self._loop.call_soon(on_done, work_item.outcome)
                return None
            dispatcher = self._dispatcher
            if dispatcher is None or dispatcher.closing:
                dispatcher = self._dispatcher = self._pool.dispatcher()
        except Exception as exc:  # noqa: BLE001 - the callers of this batch get it
            self._loop.call_soon(on_done, exc)
            return None
        work_item.dispatcher = dispatcher
        dispatcher.submit(work_item)
        return work_item

    def _refresh(self) -> None:
        """Pickle the function again, since a global in its pickle has been bound anew."""
        function = self._pickled_function
        before = function.payload
        try:
            function.refresh(rename=False)
        finally:  # also if a log filter raises
            if function.payload is not before is not None and self._dispatcher is not None:
                self._dispatcher.refresh(function)

    def recall(self) -> None:
        if self._dispatcher is not None:
            self._dispatcher.recall(self._client_key)

    @property
    def tears_down(self) -> bool:
        return (
            self._pickled_function.has_setup
            and self._dispatcher is not None
            and not self._dispatcher.closing
        )

    async def run_tear_downs(self) -> None:
        """Make every worker drop the function, after the tear-down of its set-up."""
        if self._dispatcher is not None:
            await self._dispatcher.forget_function(self._pickled_function.key, None)

    async def close(self, *, kill: bool) -> None:
        """Stop the pool if it is ours; otherwise leave to it what runs there."""
        if self._dispatcher is not None:
            msg = "the batcher was stopped before the batch had ended"
            self._dispatcher.abort(self._client_key, BatcherStoppedError(msg))
            if kill and not self._is_ours and self.tears_down:
                await self._dispatcher.forget_function(self._pickled_function.key, SHUTDOWN_GRACE)
            self._dispatcher.forget_setup(self._pickled_function.key)
        if self._is_ours:
            await self._pool.stop(force=kill)

    def workers(self) -> WorkerCounts:
        return self._pool.worker_counts()

    def close_without_loop(self) -> None:
        if self._is_ours:
            self._pool.close_without_loop()
