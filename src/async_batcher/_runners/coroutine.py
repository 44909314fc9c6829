"""Batches that run as tasks on the event loop."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from async_batcher._runners.base import BatchNotStartedError, Runner
from async_batcher._runners.coroutine_setup import CANCEL_GRACE, CoroutineSetup
from async_batcher._serialization.caller_exceptions import (
    begins_batch,
    order,
    raisable,
    raise_first,
)
from async_batcher._worker.results import Outcome, normalize_results
from async_batcher.exceptions import BatcherStoppedError, BatchTimeoutError

if TYPE_CHECKING:
    from contextvars import Context

    from async_batcher._runners.base import CancelBatch, HasCallers, OnDone, OnTimeout
    from async_batcher._worker.user_function import UserFunction

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
        self._not_started: dict[asyncio.Task[None], OnDone] = {}
        self._awaiting_setup: dict[asyncio.Task[None], OnDone] = {}
        self._timers: dict[asyncio.Task[None], asyncio.TimerHandle] = {}
        self._timed_out: dict[asyncio.Task[None], BatchTimeoutError] = {}  # cancelled for it
        self._setup = CoroutineSetup(loop, function.setup, context)
        self._is_set_up = self._setup.done

    async def start(self) -> None:
        task = self._loop.create_task(self._run_setup(), context=self._context.copy())
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
        self, batch: list[Any], on_done: OnDone, on_timeout: OnTimeout, has_callers: HasCallers
    ) -> CancelBatch | None:
        coro = self._run(batch, on_done, on_timeout, has_callers)
        task = self._loop.create_task(coro, context=self._context.copy())
        if self._is_set_up and not task.done():
            self._arm_timer(task, on_timeout)
        # An eager task has started by now, and may have ended.
        if task not in self._tasks and not task.done():
            self._not_started[task] = on_done
            task.add_done_callback(self._on_cancelled_early)
        return lambda force: self._cancel(task, force=force)

    def _cancel(self, task: asyncio.Task[None], *, force: bool) -> None:
        on_done = self._awaiting_setup.pop(task, None)
        if on_done is not None:  # it has not started
            self._tasks.discard(task)
            task.cancel()
            on_done(BatchNotStartedError())
        elif force:
            task.cancel()

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
        tasks = (self._tasks | self._not_started.keys()) - {asyncio.current_task()}
        if kill:
            for task in tasks:
                task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=CANCEL_GRACE if kill else None)
        await self._setup.close()

    def _on_timeout(self, task: asyncio.Task[None], on_timeout: OnTimeout) -> None:
        msg = f"the batch timed out and was cancelled (batch_timeout={self._timeout} seconds)"
        error = self._timed_out[task] = BatchTimeoutError(msg)
        task.cancel()
        # A batch that suppresses the cancellation, or takes long to end, must not keep its callers.
        self._timers[task] = self._loop.call_later(CANCEL_GRACE, on_timeout, error)

    def _arm_timer(self, task: asyncio.Task[None], on_timeout: OnTimeout) -> None:
        if self._timeout is not None and task not in self._timers:
            self._timers[task] = self._loop.call_later(
                self._timeout, self._on_timeout, task, on_timeout
            )

    def _clear_timeout(self, task: asyncio.Task[None]) -> BatchTimeoutError | None:
        """Cancel the timer; return the error of a batch that was cancelled because it timed out."""
        timer = self._timers.pop(task, None)
        if timer is not None:
            timer.cancel()
        return self._timed_out.pop(task, None)

    async def _run_setup(self) -> BaseException | None:
        error = await self._setup.run()
        self._is_set_up = self._setup.done
        return error

    def _on_cancelled_early(self, task: asyncio.Task[None]) -> None:
        on_done = self._not_started.pop(task)  # cancelled before its first step
        on_done(
            self._clear_timeout(task)
            or asyncio.CancelledError("the batch's task was cancelled before it started")
        )

    async def _run(
        self, batch: list[Any], on_done: OnDone, on_timeout: OnTimeout, has_callers: HasCallers
    ) -> None:
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - a coroutine of asyncio runs in a task
        if self._not_started.pop(task, None) is not None:
            task.remove_done_callback(self._on_cancelled_early)
        self._tasks.add(task)
        try:
            starts = has_callers()
            # It refers to the callers, thus to what is raised there, whose traceback leads here.
            del has_callers
            outcome: Outcome | None = None if starts else BatchNotStartedError()
            if starts and not self._is_set_up:
                self._awaiting_setup[task] = on_done
                try:
                    outcome = await self._run_setup()
                except asyncio.CancelledError:
                    if self._awaiting_setup.pop(task, None) is None:  # `_cancel` called `on_done`
                        return
                    raise
                del self._awaiting_setup[task]
                self._arm_timer(task, on_timeout)
            if outcome is None:
                outcome = await self._process(batch)
        except asyncio.CancelledError as exc:
            self._tasks.discard(task)
            on_done(self._clear_timeout(task) or exc)
            raise
        self._clear_timeout(task)
        del batch
        self._tasks.discard(task)
        if isinstance(outcome, _EXIT_EXCEPTIONS):  # on the loop's thread they end the program
            self._loop.call_soon(_raise, outcome)
        if not self._is_set_up and isinstance(outcome, BaseException):
            outcome = raisable(outcome, "setup_worker")
        try:
            on_done(outcome)
        finally:
            del outcome  # its traceback may lead here: a reference cycle

    @begins_batch
    async def _process(self, batch: list[Any]) -> Outcome:
        _began = next(order)
        count = len(batch)  # now: the user's code may empty its list
        try:
            returned = self._user_function.call(batch)
            if hasattr(returned, "__aiter__"):
                returned = [result async for result in returned]
            else:
                returned = await returned
            return normalize_results(returned, count)
        except asyncio.CancelledError as exc:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            return exc  # user code raised it: the task was not cancelled
        except BaseException as exc:  # noqa: BLE001 - the callers get it
            return exc


def _raise(exc: BaseException) -> None:
    raise exc
