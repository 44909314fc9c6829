"""Batches that run as tasks on the event loop."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from async_batcher._outcome import Outcome, as_answers

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextvars import Context

    from async_batcher._program import Program

# Seconds that tasks get to end after they were cancelled; one that swallows its cancellation must not hold up `stop`.
_CANCEL_GRACE = 1.0


class CoroutineRunner:
    """Awaits ``process_batch`` on the event loop.

    Args:
        loop: The loop.
        program: An async function (or an async generator function) and its set-up.
        context: A copy of it is made for each batch.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, program: Program, context: Context) -> None:
        self._loop = loop
        self._program = program
        self._context = context
        self._tasks: set[asyncio.Task[None]] = set()
        self._setup: asyncio.Future[None] | None = None

    async def start(self) -> None:
        """Run the set-up, in a copy of the context."""
        await self._loop.create_task(self._prepare(), context=self._context.copy())

    def run(self, batch: list[Any], done: Callable[[Outcome], None]) -> None:
        """Run one batch as a task."""
        task = self._loop.create_task(self._run(batch, done), context=self._context.copy())
        if not task.done():  # an eager task may have ended already
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def is_running(self, task: asyncio.Task[Any] | None) -> bool:
        """Whether ``task`` is one of the batches."""
        return task in self._tasks

    async def close(self, *, kill: bool) -> None:
        """Cancel the tasks that still run, if any may, and wait for them."""
        tasks = self._tasks - {asyncio.current_task()}
        if kill:
            for task in tasks:
                task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=_CANCEL_GRACE if kill else None)

    def abandon(self) -> None:
        """Nothing lives on without its loop."""

    async def _prepare(self) -> None:
        # The set-up may be async too: then batches that come meanwhile wait for the one that runs it.
        setup = self._program.setup
        if setup is None:
            return
        while self._setup is not None:
            if self._setup.done():
                return
            await asyncio.wait([self._setup])
        self._setup = self._loop.create_future()
        try:
            returned: Any = setup()
            if hasattr(returned, "__await__"):
                await returned
        except BaseException:
            self._setup.cancel()
            self._setup = None
            raise
        self._setup.set_result(None)

    async def _run(self, batch: list[Any], done: Callable[[Outcome], None]) -> None:
        outcome: Outcome
        passed_on: BaseException | None = None
        try:
            if self._program.setup is not None:
                await self._prepare()
            returned = self._program.call(batch)
            if hasattr(returned, "__aiter__"):
                returned = [answer async for answer in returned]
            else:
                returned = await returned
            outcome = as_answers(returned, len(batch))
        except (KeyboardInterrupt, SystemExit) as exc:  # on the loop's own thread they end the program, as anywhere
            outcome = passed_on = exc
        except asyncio.CancelledError as exc:
            outcome = exc
            task = asyncio.current_task()
            if task is not None and task.cancelling():  # the task itself was cancelled; otherwise user code raised it
                passed_on = exc
        except BaseException as exc:  # noqa: BLE001 - an answer to the callers
            outcome = exc
        # The exceptions' tracebacks hold this frame: it must not hold them, or they would live until the collector comes by.
        del batch
        try:
            done(outcome)
        finally:
            del outcome
        if passed_on is not None:
            try:
                raise passed_on
            finally:
                del passed_on
