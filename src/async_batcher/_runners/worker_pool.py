"""Batches that run in a `WorkerPool`, ours or one that is given."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from async_batcher._pool.batch_request import BatchRequest, PickledFunction
from async_batcher._pool.work_item import WorkItem
from async_batcher._pool.worker_handle import SHUTDOWN_GRACE
from async_batcher._serialization.caller_exceptions import raise_first
from async_batcher.exceptions import BatcherStoppedError

if TYPE_CHECKING:
    from collections.abc import Callable

    from async_batcher._pool.dispatcher import PoolDispatcher
    from async_batcher._pool.pool import WorkerPool
    from async_batcher._runners.base import CancelBatch
    from async_batcher._worker.results import Outcome
    from async_batcher._worker.user_function import UserFunction
    from async_batcher.exceptions import BatchTimeoutError
    from async_batcher.stats import WorkerCounts


class WorkerPoolRunner:
    """Runs batches in the workers of a pool.

    Args:
        loop: The loop that all happens on.
        program: The user's function and its set-up.
        pool: The pool.
        is_ours: Whether we made the pool, and so end it.
        batch_timeout: Seconds that a batch may run; None: as long as it likes.
    """

    runs_on_loop = False

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        program: UserFunction,
        pool: WorkerPool,
        *,
        is_ours: bool,
        batch_timeout: float | None,
    ) -> None:
        self._loop = loop
        self._pool = pool
        self._is_ours = is_ours
        self._timeout = batch_timeout
        self.spent = pool.spent
        self._setup = program.setup
        self._pickled_function = PickledFunction(program, out_of_band=True)
        self._client_key = object()  # see `WorkerPool`
        self._dispatcher: PoolDispatcher | None = None  # that our batches are with
        self._tasks: dict[WorkItem, Callable[[Outcome], None]] = {}

    async def start(self) -> None:
        """Start the pool, and load the program in each worker."""
        self._pickled_function.pickle()
        if self._is_ours:
            await self._pool.start()
        else:
            await self._pool.dispatcher().start()
        outcomes: list[Outcome] = []
        ready = self._loop.create_future()

        def done(outcome: Outcome) -> None:
            outcomes.append(outcome)
            if len(outcomes) == wanted and not ready.done():
                ready.set_result(None)

        def task() -> WorkItem:
            task = WorkItem(
                self._client_key,
                BatchRequest(self._pickled_function, None),
                None,
                lambda outcome: self._on_outcome(task, outcome),
            )
            self._tasks[task] = done
            return task

        self._dispatcher = self._pool.dispatcher()
        wanted = 0
        tasks = [task() for _ in range(self._pool.max_workers)]
        wanted = self._dispatcher.prepare(self._pickled_function, tasks)
        for unneeded in tasks[wanted:]:
            del self._tasks[unneeded]
        if wanted > len(outcomes):
            try:
                await ready
            except asyncio.CancelledError:
                for unfinished in tasks[:wanted]:
                    self._dispatcher.end(unfinished, force=False)
                raise
        raise_first(outcomes, self._setup)

    def submit(
        self,
        batch: list[Any],
        done: Callable[[Outcome], None],
        late: Callable[[BatchTimeoutError], None],  # noqa: ARG002 - a worker that takes too long is ended
        has_callers: Callable[[], bool],  # noqa: ARG002 - what waits for a worker is ended too
    ) -> CancelBatch | None:
        """Send one batch."""
        try:
            crossing = BatchRequest(self._pickled_function, batch)
            if crossing.outcome is not None:
                self._loop.call_soon(done, crossing.outcome)
                return None
            dispatcher = self._dispatcher = self._pool.dispatcher()
        except Exception as exc:  # noqa: BLE001 - whatever it is, it is this batch's
            self._loop.call_soon(done, exc)
            return None
        task = WorkItem(self._client_key, crossing, self._timeout, lambda outcome: self._on_outcome(task, outcome))
        self._tasks[task] = done
        dispatcher.submit(task)
        return lambda force: dispatcher.end(task, force=force)

    def _on_outcome(self, task: WorkItem, outcome: Outcome) -> None:
        done = self._tasks.pop(task, None)
        if done is not None:
            done(outcome)

    def owns_task(self, task: asyncio.Task[Any] | None) -> bool:  # noqa: ARG002 - batches run in no task
        """Never: batches run elsewhere."""
        return False

    def exclude_task(self, task: asyncio.Task[Any] | None) -> None:
        """No task is a batch of it."""

    @property
    def tears_down(self) -> bool:
        """Whether workers may have run the set-up."""
        return self._pickled_function.has_setup and self._dispatcher is not None and not self._dispatcher.closing

    async def run_tear_downs(self) -> None:
        """Have every worker drop the function, after the tear-down of its set-up."""
        if self._dispatcher is not None:
            await self._dispatcher.dismiss(self._pickled_function.key, None)

    async def close(self, *, kill: bool) -> None:
        """End the pool if we made it; with ``kill``, leave what is under way to itself, but for set-ups and tear-downs."""
        if self._dispatcher is not None:
            for task in list(self._tasks):
                self._dispatcher.cut_off(task)
                self._on_outcome(task, BatcherStoppedError("the batcher was stopped before the batch had ended"))
            if kill and not self._is_ours and self.tears_down:
                await self._dispatcher.dismiss(self._pickled_function.key, SHUTDOWN_GRACE)
            self._dispatcher.staff.forget_program(self._pickled_function.key)
        if self._is_ours:
            await self._pool.stop(force=kill)

    def workers(self) -> WorkerCounts:
        """Those of the pool."""
        return self._pool.worker_counts()

    def close_without_loop(self) -> None:
        """End what can be ended without the loop."""
        self._tasks.clear()
        if self._is_ours:
            self._pool.close_without_loop()
