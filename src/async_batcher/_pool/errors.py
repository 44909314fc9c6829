"""The errors that a pool gives to its callers."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any

from async_batcher._pool.processes.exit_status import exit_phrase, probable_cause
from async_batcher._pool.processes.interpreter import start_failure_cause
from async_batcher._pool.state.worker import CHANNEL_CLOSED, CHANNEL_UNREADABLE, TIMEOUT
from async_batcher._serialization.exception_text import counted
from async_batcher._transport.protocol import EXIT_INTERNAL_ERROR
from async_batcher._worker.results import BatchNotStartedError, BatchRecalledError
from async_batcher.exceptions import (
    BatchError,
    BatcherStoppedError,
    BatchTimeoutError,
    PoolBrokenError,
    WorkerDiedError,
)

if TYPE_CHECKING:
    from async_batcher._pool.state.worker import Progress, Worker
    from async_batcher._pool.work_item import WorkItem
    from async_batcher._worker.results import Outcome


_ADVICE = {
    errno.EMFILE: "Raise the limit of open files (ulimit -n)",
    errno.EFBIG: "Raise the limit of the size of files (ulimit -f)",
}


def pool_stopped_error() -> BatcherStoppedError:
    return BatcherStoppedError("the pool has been stopped; start() reopens it")


def stopped_midway_error() -> BatcherStoppedError:
    return BatcherStoppedError("the pool was stopped before the batch was finished")


def abandoned_error() -> BatchError:
    return BatchError("all callers of the batch were cancelled, so the batch was cancelled too")


def recalled_error() -> BatchRecalledError:
    return BatchRecalledError("the batch was put off before it started")


def unstarted_outcome(item: WorkItem) -> Outcome | None:
    """Return the outcome of a work item that no worker has begun; None: it is to be run."""
    if item.verdict is not None:  # the worker lacked something
        return item.verdict
    if item.is_abandoned:
        return BatchNotStartedError()
    if item.is_recalled:
        return recalled_error()
    return None


def internal_error(cause: Exception, events: list[Any]) -> PoolBrokenError:
    """Return the error for all callers of a pool whose own code failed."""
    msg = (
        f"the pool failed with an internal error ({type(cause).__name__}: {cause}), and all its "
        "workers were killed; items may have been partially processed. Please report it, with this "
        "traceback. The next call starts new workers"
    )
    error = PoolBrokenError(msg)
    error.__cause__ = cause
    error.add_note(f"The last events of the pool: {events}")
    return error


def shm_exhausted_text(error: OSError) -> str:
    """Return the warning for batches that are too large for the shared memory there is."""
    advice = _ADVICE.get(error.errno or 0, "Give the program more memory, or make batches smaller")
    return (
        f"no shared memory for a large batch ({error}); it is sent through a socket instead, which "
        f"is slower. {advice}"
    )


def timeout_error(worker: Worker, seconds: float | None) -> BatchTimeoutError:
    msg = (
        f"the batch ran for longer than {counted(seconds or 0, 'second')}, so worker process "
        f"{worker.pid} was interrupted and replaced. Raise the timeout, make batches smaller, or "
        "find out what hangs"
    )
    return BatchTimeoutError(msg)


def setup_timeout_error(worker: Worker, seconds: float) -> WorkerDiedError:
    msg = (
        "loading the function and running setup_worker took longer than "
        f"{counted(seconds, 'second')}, so worker process {worker.pid} was killed. Find out what "
        "hangs, raise start_timeout of the WorkerPool, or await start() first, which has no time "
        "limit"
    )
    return WorkerDiedError(msg, pid=worker.pid, may_have_run=False)


def idle_crash_text(worker: Worker) -> str:
    code = worker.exit_code
    cause = probable_cause([code], runs_main=False)
    return (
        f"worker process {worker.pid} {exit_phrase(code)} while it was idle, and is replaced. "
        f"{cause}"
    )


def crash_error(
    worker: Worker, progress: Progress, *, started: bool, in_setup: bool = False
) -> WorkerDiedError:
    """Return the error for the batch of a worker that crashed, or the cause of a failed start.

    Args:
        worker: The worker, which has exited.
        progress: What it had done.
        started: Whether the worker had started its batch.
        in_setup: Whether the worker exited while it set up the function.
    """
    if not worker.ever_ready:
        when = "before it was ready"
    elif in_setup:
        when = "while loading the function or running setup_worker"
    elif started:
        when = "while running this batch; items may have been partially processed"
    else:
        when = "before starting this batch, as other workers did before"
    code = worker.exit_code
    cause = probable_cause([code], runs_main=False)
    if not worker.ever_ready and (code or 0) > 0:
        cause = "Likely cause: the pool's initializer, or code that it calls, used os._exit()."
        if progress.failure or not progress.is_running:
            cause = start_failure_cause(code, progress.failure)
    if worker.kill_reason == CHANNEL_CLOSED and code is not None:
        cause = (
            "It had closed its channel to the pool, and was killed for that. Likely cause: code in "
            "the worker closes file descriptors that are not its own, or has replaced the process "
            "by another program."
        )
    elif worker.kill_reason == CHANNEL_UNREADABLE:
        cause = (
            "Something else than messages of the pool came from its channel, and it was killed for "
            "that. Likely cause: code in the worker writes to a file descriptor that is not its "
            "own."
        )
    elif worker.kill_reason == TIMEOUT:
        cause = (
            "It had not begun the batch within its timeout, and was killed for that. Likely cause: "
            "the process was halted, or the machine has too much to do."
        )
    elif code == EXIT_INTERNAL_ERROR and worker.ever_ready:
        raised = f"raised {progress.failure}" if progress.failure else "failed"
        cause = (
            f"The worker's own code {raised} (its traceback is on standard error). Likely cause: "
            "memory or file descriptors are used up, or process_batch has changed a signal handler "
            "or a descriptor that the worker needs."
        )
    msg = f"worker process {worker.pid} {exit_phrase(code)} {when}. {cause}"
    return WorkerDiedError(msg, pid=worker.pid, exit_code=code, may_have_run=started)
