"""Batches that run as tasks on the event loop."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from async_batcher._eventloop.halts import LimitTimer
from async_batcher._runners.base import BatchHandle, Runner, RunningBatch
from async_batcher._runners.coroutine_setup import CANCEL_GRACE, CoroutineSetup
from async_batcher._serialization.caller_exceptions import (
    batch_numbers,
    begins_batch,
    raisable,
    raise_first,
)
from async_batcher._serialization.exception_text import counted
from async_batcher._worker.results import (
    BatchNotStartedError,
    Outcome,
    normalize_results,
    pass_on_async,
)
from async_batcher.current import leave_batch, running_batch
from async_batcher.exceptions import BatcherStoppedError, BatchTimeoutError

if TYPE_CHECKING:
    from contextvars import Context

    from async_batcher._runners.base import HasCallers, OnDone, OnLater, OnResults, OnTimeout
    from async_batcher._worker.results import OnResult
    from async_batcher._worker.user_function import UserFunction
    from async_batcher.current import BatchFacts

# A tuple: isinstance with a union would make the union anew for each batch.
_EXIT_EXCEPTIONS = (KeyboardInterrupt, SystemExit)


class CoroutineRunner(Runner):
    """Awaits an async ``process_batch``, each batch in a task and a copy of the context."""

    runs_on_loop = True

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        function: UserFunction,
        context: Context,
        batch_timeout: float | None = None,
    ) -> None:
        super().__init__()
        self._loop = loop
        self._user_function = function
        self._context = context
        self._timeout = batch_timeout
        self._tasks: set[asyncio.Task[Any]] = set()
        self._setup = CoroutineSetup(loop, function.setup, context)

    async def start(self) -> None:
        task = self._loop.create_task(self._setup.run(), context=self._context.copy())
        self._tasks.add(task)
        try:
            outcomes: list[Any] = [await task]
            if isinstance(outcomes[0], _EXIT_EXCEPTIONS):
                raise outcomes.pop()
            if outcomes[0] is not None:
                outcomes[0] = raisable(outcomes[0], "setup_worker")
            raise_first(outcomes, self._user_function.setup)
        except asyncio.CancelledError:
            own = asyncio.current_task()
            if own is not None and own.cancelling():
                raise
            msg = "the batcher was stopped before it had started"
            raise BatcherStoppedError(msg) from None
        finally:
            self._tasks.discard(task)

    def submit(
        self,
        batch: list[Any],
        on_done: OnDone,
        on_timeout: OnTimeout,
        has_callers: HasCallers,
        on_results: OnResults,
        facts: BatchFacts | None = None,
    ) -> BatchHandle | None:
        run = BatchRun(self, on_done, on_timeout, has_callers, on_results)
        coroutine = self._run(run, batch, facts)
        run.task = self._loop.create_task(coroutine, context=self._context.copy())
        if not run.has_started:  # an eager task may have, and may have ended
            self._tasks.add(run.task)
            run.task.add_done_callback(lambda _: self._on_task_done(run))
        return run

    def cancel(self, run: BatchRun, *, force: bool) -> None:
        """See `BatchHandle.cancel`."""
        if force or not run.has_started:
            run.task.cancel()
        if not run.has_started:
            self._finish(run, BatchNotStartedError())

    def owns_task(self, task: asyncio.Task[Any] | None) -> bool:
        return task in self._tasks

    def exclude_task(self, task: asyncio.Task[Any] | None) -> None:
        if task is not None:
            self._tasks.discard(task)

    @property
    def tears_down(self) -> bool:
        return self._setup.tears_down

    async def run_tear_downs(self) -> None:
        await self._setup.tear_down()

    async def close(self, *, kill: bool) -> None:
        tasks = self._tasks - {asyncio.current_task()}
        if kill:
            for task in tasks:
                task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=CANCEL_GRACE if kill else None)
        await self._setup.close()

    async def _run(self, run: BatchRun, batch: list[Any], facts: BatchFacts | None) -> None:
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - a coroutine of asyncio runs in a task
        run.task = task
        self._tasks.add(task)
        try:
            outcome: Outcome | None = None if run.is_wanted() else BatchNotStartedError()
            if outcome is None and not self._setup.done:
                outcome = await self._setup.run()
            if outcome is None:
                run.has_started = True
                if self._timeout is not None:
                    run.timer = LimitTimer(self._loop, self._timeout, self._on_timeout, run)
                outcome = await self._process(batch, run.take, facts)
        except asyncio.CancelledError as exc:
            self._finish(run, run.timed_out or exc)
            raise
        del batch
        if isinstance(outcome, _EXIT_EXCEPTIONS):  # on the loop's thread they end the program
            self._loop.call_soon(_raise, outcome)
        if not run.has_started and isinstance(outcome, BaseException):
            outcome = raisable(outcome, "setup_worker")
        try:
            self._finish(run, outcome)
        finally:
            del outcome  # its traceback may lead here: a reference cycle

    def _on_timeout(self, run: BatchRun) -> None:
        limit = f"(batch_timeout={counted(self._timeout or 0, 'second')})"
        run.timed_out = BatchTimeoutError(f"the batch timed out and was cancelled {limit}")
        run.task.cancel()
        # A batch that suppresses the cancellation, or takes long to end, must not keep its callers.
        msg = f"the batch timed out {limit}; it was cancelled, but runs on, and holds its slot"
        survived = BatchTimeoutError(msg)
        run.timer = self._loop.call_later(CANCEL_GRACE, run.on_timeout, survived)  # type: ignore[arg-type]

    def _on_task_done(self, run: BatchRun) -> None:
        if not run.has_started:  # its first step never ran
            msg = "the batch's task was cancelled before it started"
            self._finish(run, asyncio.CancelledError(msg))

    def _finish(self, run: BatchRun, outcome: Outcome) -> None:
        self._tasks.discard(run.task)
        run.finish(outcome)

    @begins_batch
    async def _process(
        self, batch: list[Any], on_result: OnResult, facts: BatchFacts | None
    ) -> Outcome:
        _batch_number = next(batch_numbers)  # caller_exceptions reads this frame
        count = len(batch)  # now: the user's code may empty its list
        token = running_batch.set((count, facts, self))
        try:
            returned = self._user_function.call(batch)
            if hasattr(returned, "__aiter__"):
                return await pass_on_async(returned, count, on_result)
            return normalize_results(await returned, count, on_result)
        except asyncio.CancelledError as exc:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            return exc  # user code raised it: the task was not cancelled
        except BaseException as exc:  # noqa: BLE001 - the callers get it
            return exc
        finally:
            leave_batch(token)


def _raise(exc: BaseException) -> None:
    raise exc


class BatchRun(RunningBatch, BatchHandle):
    """A batch in a ``task``.

    Attributes:
        has_started: Whether the user's function has been called; the set-up comes before that.
        timed_out: Why the task was cancelled, if the batch timed out.
    """

    task: asyncio.Task[None]
    has_started = False
    timed_out: BatchTimeoutError | None = None

    def __init__(
        self,
        runner: CoroutineRunner,
        on_done: OnDone,
        on_timeout: OnTimeout,
        has_callers: HasCallers,
        on_results: OnResults,
    ) -> None:
        super().__init__(on_done, on_timeout, has_callers, on_results)
        self._runner = runner

    def cancel(self, *, force: bool, on_later: OnLater) -> None:  # noqa: ARG002 - it is the outcome
        self._runner.cancel(self, force=force)
