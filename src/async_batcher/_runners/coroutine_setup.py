"""An async ``setup_worker`` and its tear-down, on the event loop.

Both run in one task of their own: a cancel scope that the set-up enters must be left in the same
task, and a set-up outlives the batch that started it, within a limit. If it fails, that batch gets
the error, and the next one that waits starts it again.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Generator
from typing import TYPE_CHECKING, Any

from async_batcher._eventloop.future import resolve
from async_batcher._serialization.caller_exceptions import batch_numbers, begins_batch
from async_batcher._worker.user_function import first_part, log_tear_down, tear_down

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextvars import Context

# Seconds that a task gets to end after it was cancelled; one that suppresses its cancellation must
# not block `stop`.
CANCEL_GRACE = 1.0

# Seconds that a set-up gets after the batch that started it was cancelled. The limit doubles with
# each set-up that it cancels, so that a slow set-up completes in the end.
_ABANDONED_SETUP_LIMIT = 2.0
_MAX_ABANDONED_SETUP_LIMIT = 60.0


class CoroutineSetup:
    """Runs ``setup_worker`` until it succeeds once.

    Attributes:
        done: Whether it has succeeded, or there is none.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, setup: Callable[[], Any] | None, context: Context
    ) -> None:
        self._loop = loop
        self._setup = setup
        self._context = context
        self._attempt: SetupAttempt | None = None  # running or done
        self._limit = _ABANDONED_SETUP_LIMIT
        self.done = setup is None

    async def run(self) -> BaseException | None:
        """Wait for the set-up; return what it raised, if this call started it."""
        while not self.done:
            attempt, is_ours = self._attempt, self._attempt is None
            if attempt is None:
                assert self._setup is not None  # noqa: S101 - else it would be done
                attempt = SetupAttempt(self._loop, self._setup, self._context.copy())
                self._attempt = attempt
            try:
                await asyncio.wait([attempt.ready])
            except asyncio.CancelledError:
                if is_ours:
                    self._limit_time(attempt)
                raise
            error = attempt.ready.result()
            if error is None:
                self.done = True
            elif self._attempt is attempt:
                self._attempt = None
            if is_ours:
                return error
        return None

    @property
    def tears_down(self) -> bool:
        attempt = self._attempt
        return attempt is not None and attempt.ready.done() and not attempt.task.done()

    async def tear_down(self, timeout: float | None = None) -> None:  # noqa: ASYNC109
        """Run the tear-down if the set-up is done; otherwise `close` cancels the set-up."""
        if self._attempt is not None and self._attempt.ready.done():
            resolve(self._attempt.end, None)
            await asyncio.wait([self._attempt.task], timeout=timeout)

    async def close(self) -> None:
        """Run the tear-down within the grace period, or cancel what still runs."""
        attempt = self._attempt
        if attempt is not None and not attempt.task.done():
            await self.tear_down(CANCEL_GRACE)
            attempt.task.cancel()
            await asyncio.wait([attempt.task], timeout=CANCEL_GRACE)

    def _limit_time(self, attempt: SetupAttempt) -> None:
        when = attempt.started_at + self._limit
        timer = self._loop.call_at(when, self._cancel_abandoned, attempt)
        attempt.ready.add_done_callback(lambda _: timer.cancel())

    def _cancel_abandoned(self, attempt: SetupAttempt) -> None:
        if not attempt.ready.done():
            self._limit = min(2 * self._limit, _MAX_ABANDONED_SETUP_LIMIT)
            attempt.task.cancel()


class SetupAttempt:
    """One run of the set-up, and its tear-down.

    Attributes:
        started_at: The loop's time when it started.
        task: Ends after the tear-down, or after the set-up if there is nothing to tear down.
        ready: Done when the set-up has run. The result is what that raised, or None.
        end: Set to let the tear-down run.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, setup: Callable[[], Any], context: Context
    ) -> None:
        self.started_at = loop.time()
        self.ready: asyncio.Future[BaseException | None] = loop.create_future()
        self.end: asyncio.Future[None] = loop.create_future()
        coro = _set_up_and_tear_down(setup, self.ready, self.end)
        self.task = loop.create_task(coro, context=context)
        # A batcher that is dropped without a stop leaves it pending.
        self.task._log_destroy_pending = False  # type: ignore[attr-defined]  # noqa: SLF001


@begins_batch
async def _set_up_and_tear_down(
    setup: Callable[[], Any], ready: asyncio.Future[BaseException | None], end: asyncio.Future[None]
) -> None:
    _batch_number = next(batch_numbers)  # caller_exceptions reads this frame
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
    except BaseException as exc:  # noqa: BLE001 - the batch that started the set-up gets it
        ready.set_result(exc)
        return
    ready.set_result(None)
    if not isinstance(returned, AsyncGenerator | Generator):
        return
    with contextlib.suppress(asyncio.CancelledError):  # by the loop's shutdown
        await end
    if isinstance(returned, Generator):
        tear_down(returned)
        return
    try:
        async for _ in returned:
            log_tear_down(returned, None)
            await returned.aclose()
    except Exception as exc:  # noqa: BLE001 - user code; the stop goes on
        log_tear_down(returned, exc)
