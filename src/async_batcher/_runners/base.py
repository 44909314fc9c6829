"""Runners: where a batch runs. Each takes one batch at a time, and knows nothing of the items' futures.

::

    coroutine.py        on the event loop, as a task
    worker_pool.py      in the workers of a `WorkerPool`
    executor.py         in any `concurrent.futures.Executor`: one call for each batch, there and back
    adapters.py         the executors themselves: the loop's threads, one that is given
    owned_executor.py   ... one that the batcher makes by a factory, and makes again
    factory.py          the user's factory, and the time until it has returned
    slots.py            the slots in this process, each with its set-up and tear-down

Rules of a runner:

- `submit` never raises for the batch's sake, and calls ``done`` exactly once, on the event loop's thread.
- A batch's slot is free when ``done`` is called, not before: the work may run on after its waiters have left.
- It runs in a copy of the context that was captured when the batcher was made, not in a caller's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from async_batcher.exceptions import BatchError

if TYPE_CHECKING:
    import asyncio
    from collections import deque
    from collections.abc import Callable
    from typing import TypeAlias

    from async_batcher._worker.results import Outcome
    from async_batcher.exceptions import BatchTimeoutError
    from async_batcher.stats import WorkerCounts

    # Ends a batch that nobody waits for any more. Called with False, only if it has not begun: then its ``done`` is called before
    # this returns. Called with True, also if it has; then its ``done`` is called sooner or later.
    CancelBatch: TypeAlias = Callable[[bool], object]


class BatchNotStartedError(BatchError):
    """Nobody waited for a batch any more when it was to begin."""

    def __init__(self, message: str = "nobody waited for the batch any more, so it was not begun") -> None:
        """Say so; the argument is for copies."""
        super().__init__(message)


class Runner(Protocol):
    """What the front end asks of a place to run batches.

    Attributes:
        runs_on_loop: Whether batches run on the event loop's own thread.
        tears_down: Whether a set-up has run that has, or may have, something to tear down.
        spent: When workers died of what ran in them, or time limits were reached, lately; see `isolation.FailureIsolator`.
    """

    runs_on_loop: bool
    spent: deque[float]

    @property
    def tears_down(self) -> bool:
        """See above."""

    async def start(self) -> None:
        """Get ready ahead of the first batch.

        Raises:
            SerializationError: The function cannot be sent to a worker.
            PoolBrokenError: The executor that was given is broken.
            WorkerDiedError: A worker ended while it got ready.
            Exception: What ``setup_worker`` raised.
        """

    def submit(
        self,
        batch: list[Any],
        done: Callable[[Outcome], None],
        late: Callable[[BatchTimeoutError], None],
        has_callers: Callable[[], bool],
    ) -> CancelBatch | None:
        """Run one batch, then call ``done`` with what came of it.

        Args:
            batch: The items.
            done: See above.
            late: Called before that, at most once, if the batch is out of time, cannot be ended, and runs on.
            has_callers: Says, in any thread, whether anybody waits for it: asked where it is to begin in this process.

        Returns:
            What ends the batch before its time, if anything can.
        """

    def owns_task(self, task: asyncio.Task[Any] | None) -> bool:
        """Whether ``task`` is one of its batches."""

    def exclude_task(self, task: asyncio.Task[Any] | None) -> None:
        """Leave ``task``, one of its batches, out of `close`: it is the one that closes."""

    async def run_tear_downs(self) -> None:
        """Run every tear-down, when no batch runs, and wait until that has been done; `close` comes next, also if cancelled."""

    async def close(self, *, kill: bool) -> None:
        """End what we made: with ``kill`` at once, otherwise when it is idle. What we were given is left running.

        With ``kill``, tear-downs that can run now get a moment to do so; the others run when their batches return.
        """

    def workers(self) -> WorkerCounts | None:
        """What is known of worker processes; None where there are none, or they are somebody else's business."""

    def close_without_loop(self) -> None:
        """The loop has closed without `close`: end what can be ended without it."""
