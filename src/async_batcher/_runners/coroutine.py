"""Batches that run as tasks on the event loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncGenerator, Generator
from typing import TYPE_CHECKING, Any

from async_batcher._runners.base import BatchNotStartedError
from async_batcher._serialization.caller_exceptions import begins_batch, order, raisable, raise_first
from async_batcher._worker.results import Outcome, normalize_results
from async_batcher._worker.user_function import first_part, log_tear_down, tear_down
from async_batcher.exceptions import BatcherStoppedError, BatchTimeoutError

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextvars import Context

    from async_batcher._runners.base import CancelBatch
    from async_batcher._worker.user_function import UserFunction

# Seconds that tasks get to end after they were cancelled; one that swallows its cancellation must not hold up `stop`.
_CANCEL_GRACE = 1.0

# Seconds that a set-up gets which the batch that began it no longer waits for. Twice as many after each that was cancelled, so
# that a slow set-up finishes at last.
_UNWANTED_SETUP = 2.0
_MOST_UNWANTED_SETUP = 60.0

_EXIT_EXCEPTIONS = (KeyboardInterrupt, SystemExit)  # a tuple: a union would be made anew for each batch


class CoroutineRunner:
    """Awaits ``process_batch`` on the event loop.

    Args:
        loop: The loop.
        program: An async function (or an async generator function) and its set-up.
        context: A copy of it is made for each batch.
        batch_timeout: Seconds that a batch may run; None: as long as it likes.
    """

    runs_on_loop = True

    def __init__(
        self, loop: asyncio.AbstractEventLoop, program: UserFunction, context: Context, batch_timeout: float | None = None
    ) -> None:
        self._loop = loop
        self._user_function = program
        self._context = context
        self._timeout = batch_timeout
        self.spent: deque[float] = deque()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._not_started: dict[asyncio.Task[None], Callable[[Outcome], None]] = {}
        self._preparing: dict[asyncio.Task[None], Callable[[Outcome], None]] = {}  # batches that wait for the set-up
        self._timers: dict[asyncio.Task[None], asyncio.TimerHandle] = {}
        self._timed_out: dict[asyncio.Task[None], BatchTimeoutError] = {}  # what those get that were cancelled for it
        self._is_set_up = program.setup is None
        self._setup: _CoroutineSetup | None = None  # under way, or done
        self._unwanted_setup = _UNWANTED_SETUP

    async def start(self) -> None:
        """Run the set-up, in a copy of the context."""
        task = self._loop.create_task(self._prepare(), context=self._context.copy())
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
        done: Callable[[Outcome], None],
        late: Callable[[BatchTimeoutError], None],
        has_callers: Callable[[], bool],
    ) -> CancelBatch | None:
        """Run one batch as a task."""
        task = self._loop.create_task(self._run(batch, done, late, has_callers), context=self._context.copy())
        if self._is_set_up and not task.done():
            self._arm_timer(task, late)
        if task not in self._tasks and not task.done():  # an eager task has begun, and may have ended
            self._not_started[task] = done
            task.add_done_callback(self._on_cancelled_early)
        return lambda force: self._end(task, force=force)

    def _end(self, task: asyncio.Task[None], *, force: bool) -> None:
        """End a batch that no caller waits for; one that waits for the set-up has not begun."""
        done = self._preparing.pop(task, None)
        if done is not None:
            self._tasks.discard(task)
            task.cancel()
            done(BatchNotStartedError())
        elif force:
            task.cancel()

    def owns_task(self, task: asyncio.Task[Any] | None) -> bool:
        """Whether ``task`` is one of the batches."""
        return task in self._tasks

    def exclude_task(self, task: asyncio.Task[Any] | None) -> None:
        """Let the batch that stops its own batcher run to its end."""
        if task is not None:
            self._tasks.discard(task)

    @property
    def tears_down(self) -> bool:
        """Whether the set-up has something to tear down."""
        return self._setup is not None and self._setup.ready.done() and not self._setup.task.done()

    async def run_tear_downs(self) -> None:
        """Run the tear-down."""
        if self._setup is not None and self._setup.ready.done():  # else `close` cancels the set-up
            self._setup.end()
            await asyncio.wait([self._setup.task])

    async def close(self, *, kill: bool) -> None:
        """Cancel the tasks that still run, if any may, and wait for them; then the set-up, or what it has to tear down."""
        tasks = (self._tasks | self._not_started.keys()) - {asyncio.current_task()}
        if kill:
            for task in tasks:
                task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=_CANCEL_GRACE if kill else None)
        setup = self._setup
        if setup is not None and not setup.task.done():
            if setup.ready.done():
                setup.end()
                await asyncio.wait([setup.task], timeout=_CANCEL_GRACE)
            setup.task.cancel()
            await asyncio.wait([setup.task], timeout=_CANCEL_GRACE)

    def workers(self) -> None:
        """None to see."""

    def close_without_loop(self) -> None:
        """Nothing lives on without its loop."""

    def _on_timeout(self, task: asyncio.Task[None], late: Callable[[BatchTimeoutError], None]) -> None:
        msg = f"the batch ran for longer than batch_timeout={self._timeout} seconds, and has been cancelled"
        error = self._timed_out[task] = BatchTimeoutError(msg)
        task.cancel()
        # One that does not heed it, or takes long to end, need not keep its callers.
        self._timers[task] = self._loop.call_later(_CANCEL_GRACE, late, error)

    def _arm_timer(self, task: asyncio.Task[None], late: Callable[[BatchTimeoutError], None]) -> None:
        """The batch's time runs, from when it begins."""
        if self._timeout is not None and task not in self._timers:
            self._timers[task] = self._loop.call_later(self._timeout, self._on_timeout, task, late)

    async def _prepare(self) -> BaseException | None:
        """Wait for the set-up.

        Returns:
            What it raised, for the one that has begun it; the others that wait try again.
        """
        # In a task of its own: what it enters must be left in the same task, and a set-up that takes longer
        # than callers wait must come to its end.
        while not self._is_set_up:
            setup, is_ours = self._setup, self._setup is None
            if setup is None:
                assert self._user_function.setup is not None  # noqa: S101 - else it would be set up
                setup = self._setup = _CoroutineSetup(self._loop, self._user_function.setup, self._context.copy())
            try:
                await asyncio.wait([setup.ready])
            except asyncio.CancelledError:
                if is_ours:
                    self._limit_setup(setup)
                raise
            error = setup.ready.result()
            if error is None:
                self._is_set_up = True
                self._unwanted_setup = _UNWANTED_SETUP
            elif self._setup is setup:
                self._setup = None
            if is_ours:
                return error
        return None

    def _limit_setup(self, setup: _CoroutineSetup) -> None:
        """The callers of the batch that began this set-up are gone."""
        timer = self._loop.call_at(setup.began_at + self._unwanted_setup, self._end_setup, setup)
        setup.ready.add_done_callback(lambda _: timer.cancel())

    def _end_setup(self, setup: _CoroutineSetup) -> None:
        """Cancel a set-up that takes too long, and whose batch has no callers; batches that wait for it begin another."""
        if not setup.ready.done():
            self._unwanted_setup = min(2 * self._unwanted_setup, _MOST_UNWANTED_SETUP)
            setup.task.cancel()

    def _on_cancelled_early(self, task: asyncio.Task[None]) -> None:
        done = self._not_started.pop(task)  # cancelled before its first step, so that it could not answer
        done(self._clear_timeout(task) or asyncio.CancelledError("the batch's task was cancelled before it began"))

    def _clear_timeout(self, task: asyncio.Task[None]) -> BatchTimeoutError | None:
        """No time runs for that batch any more.

        Returns:
            What it gets if it was cancelled for having run out of it.
        """
        timer = self._timers.pop(task, None)
        if timer is not None:
            timer.cancel()
        return self._timed_out.pop(task, None)

    async def _run(
        self,
        batch: list[Any],
        done: Callable[[Outcome], None],
        late: Callable[[BatchTimeoutError], None],
        has_callers: Callable[[], bool],
    ) -> None:
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - a coroutine of asyncio runs in a task
        if self._not_started.pop(task, None) is not None:
            task.remove_done_callback(self._on_cancelled_early)
        self._tasks.add(task)
        try:
            begins = has_callers()
            del has_callers  # it knows who waits, and so what is raised there, whose traceback leads here
            outcome: Outcome | None = None if begins else BatchNotStartedError()
            if begins and not self._is_set_up:
                self._preparing[task] = done
                try:
                    outcome = await self._prepare()
                except asyncio.CancelledError:
                    if self._preparing.pop(task, None) is None:  # `_end` has called `done`
                        return
                    raise
                del self._preparing[task]
                self._arm_timer(task, late)
            if outcome is None:
                outcome = await self._outcome(batch)
        except asyncio.CancelledError as exc:
            self._tasks.discard(task)
            done(self._clear_timeout(task) or exc)
            raise
        self._clear_timeout(task)
        del batch
        self._tasks.discard(task)
        if isinstance(outcome, _EXIT_EXCEPTIONS):  # on the loop's own thread they end the program, as anywhere
            self._loop.call_soon(_raise, outcome)
        if not self._is_set_up and isinstance(outcome, BaseException):
            outcome = raisable(outcome, "setup_worker")
        try:
            done(outcome)
        finally:
            del outcome  # its traceback may lead here: with it, they would live until the garbage collector comes by

    @begins_batch
    async def _outcome(self, batch: list[Any]) -> Outcome:
        _began = next(order)
        count = len(batch)  # now: the user's code may use up its list
        try:
            returned = self._user_function.call(batch)
            if hasattr(returned, "__aiter__"):
                returned = [answer async for answer in returned]
            else:
                returned = await returned
            return normalize_results(returned, count)
        except asyncio.CancelledError as exc:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            return exc  # raised by user code: nobody has cancelled the task
        except BaseException as exc:  # noqa: BLE001 - an answer to the callers
            return exc


class _CoroutineSetup:
    """The set-up and its tear-down, in one task.

    Args:
        loop: The loop.
        setup: The user's ``setup_worker``.
        context: What it runs in.

    Attributes:
        began_at: The loop's time when it began.
        task: That task; it ends after the tear-down, or after the set-up if nothing is to be torn down.
        ready: Done when the set-up has run; its result is what that raised, or None.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, setup: Callable[[], Any], context: Context) -> None:
        self.began_at = loop.time()
        self.ready: asyncio.Future[BaseException | None] = loop.create_future()
        self._end: asyncio.Future[None] = loop.create_future()
        self.task = loop.create_task(_set_up_and_tear_down(setup, self.ready, self._end), context=context)
        self.task._log_destroy_pending = False  # type: ignore[attr-defined]  # noqa: SLF001 - of a batcher that is dropped

    def end(self) -> None:
        """Let the tear-down run."""
        if not self._end.done():
            self._end.set_result(None)


@begins_batch
async def _set_up_and_tear_down(
    setup: Callable[[], Any], ready: asyncio.Future[BaseException | None], end: asyncio.Future[None]
) -> None:
    _began = next(order)
    try:
        returned: Any = setup()
        if isinstance(returned, AsyncGenerator):
            async for _ in returned:
                break
            else:
                returned = None
        elif hasattr(returned, "__await__"):
            returned = await returned
        else:
            returned = first_part(returned)
    except BaseException as exc:  # noqa: BLE001 - it is for the batch that has begun it
        ready.set_result(exc)
        return
    ready.set_result(None)
    if not isinstance(returned, AsyncGenerator | Generator):
        return
    with contextlib.suppress(asyncio.CancelledError):  # as every task is when the loop ends
        await end
    if isinstance(returned, Generator):
        tear_down(returned)
        return
    try:
        async for _ in returned:
            log_tear_down(None)
            await returned.aclose()
    except Exception as exc:  # noqa: BLE001 - user code; the stop goes on
        log_tear_down(exc)


def _raise(exc: BaseException) -> None:
    raise exc
