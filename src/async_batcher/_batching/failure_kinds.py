"""What a failed batch is to be blamed on: whether parts of it may do better, and what it has cost. Pure."""

from __future__ import annotations

import asyncio

from async_batcher.exceptions import (
    BatcherStoppedError,
    BatchTimeoutError,
    PoolBrokenError,
    SerializationError,
    WorkerDiedError,
)

# What a batch fails with whatever is in it; items that cannot be pickled have failed alone before.
_NOT_RETRYABLE = (BatcherStoppedError, PoolBrokenError, SerializationError)
# On the loop's own thread these end the program, or say that somebody has cancelled the batch.
_LOOP_CONTROL_FLOW = (asyncio.CancelledError, KeyboardInterrupt, SystemExit)


def is_retryable(error: BaseException, *, on_loop: bool) -> bool:
    """Whether a batch may have failed for what is in it, so that parts of it may do better.

    Args:
        error: What it failed with.
        on_loop: Whether it ran on the event loop's own thread.
    """
    if isinstance(error, WorkerDiedError):
        return error.may_have_run
    if on_loop and isinstance(error, _LOOP_CONTROL_FLOW):
        return False
    return not isinstance(error, _NOT_RETRYABLE)


def is_crash(error: BaseException) -> bool:
    """Whether its worker has died with it."""
    return isinstance(error, WorkerDiedError)


def consumes_budget(error: BaseException) -> bool:
    """Whether it has cost a worker, or all the time that a batch may take."""
    return isinstance(error, WorkerDiedError | BatchTimeoutError)


def budget_exhausted_error(error: BaseException, why: str) -> BaseException:
    """What those get who are not run again, since that has cost too much."""
    text = f"its batch failed, and it was not run again alone, since {why}; so it may be innocent. The batch's error: {error}"
    if isinstance(error, WorkerDiedError):
        instead: BaseException = WorkerDiedError(text, pid=error.pid, exit_code=error.exit_code)
    else:
        instead = BatchTimeoutError(text)
    instead.__cause__ = error
    return instead
