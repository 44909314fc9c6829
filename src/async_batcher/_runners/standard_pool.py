"""The worker processes of a standard pool, or one like it: how they are killed, and crashed."""

from __future__ import annotations

import contextlib
import os
import signal
from typing import TYPE_CHECKING, TypeAlias

from async_batcher._pool.processes.exit_status import exit_phrase, probable_cause
from async_batcher.exceptions import WorkerDiedError

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess

# Process id, and exit code (negative: the number of a signal).
ExitedProcess: TypeAlias = tuple[int | None, int | None]


def processes_of(pool: object) -> list[BaseProcess]:
    return list((getattr(pool, "_processes", None) or {}).values())


def kill_process(process: BaseProcess) -> None:
    try:
        process.kill()
    except AttributeError:  # loky can only terminate, which a stopped process does not notice
        if process.pid is not None and process.exitcode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, getattr(signal, "SIGKILL", signal.SIGTERM))


def kill_rather_than_terminate(pool: object) -> None:
    """Have a standard pool of ours send SIGKILL when it breaks: its workers ignore SIGTERM."""
    for process in processes_of(pool):
        process.terminate = process.kill  # type: ignore[method-assign]


def exited_processes(pool: object) -> list[ExitedProcess]:
    """Return the workers of a standard pool that exited by themselves.

    Exact in the pool's own thread, which reports the failure before it ends the other workers.
    """
    from multiprocessing.connection import wait

    processes = processes_of(pool)
    ready = set(wait([process.sentinel for process in processes], timeout=0))
    for process in processes:
        if process.sentinel in ready:
            process.join(1.0)  # the exit code may come a moment after the sentinel
    return [
        (process.pid, process.exitcode)
        for process in processes
        if process.sentinel in ready or process.exitcode is not None
    ]


def worker_crash(
    exited: list[ExitedProcess], error: BaseException, *, has_initializer: bool = False
) -> WorkerDiedError:
    """Return the error for a batch of a standard pool that broke.

    Args:
        exited: The workers that exited by themselves.
        error: What the pool raised.
        has_initializer: Whether the pool has an initializer of the user's: if that raises, a worker
            exits with 0.
    """
    pid, exit_code = exited[0] if len(exited) == 1 else (None, None)
    who = " and ".join(f"{pid} {exit_phrase(code)}" for pid, code in exited) or "(unknown) exited"
    codes = [code for _, code in exited]
    cause = probable_cause(codes)
    if has_initializer and 0 in codes:
        cause = (
            "Likely cause: the initializer of the pool raised (its traceback is on standard error)."
        )
    msg = (
        f"worker process {who} while batches were running, which broke the standard pool; items of "
        f"this batch may have been partially processed. {cause} The next batch gets a new pool"
    )
    crash = WorkerDiedError(msg, pid=pid, exit_code=exit_code, may_have_run=True)
    crash.__cause__ = error
    return crash


def start_failure(error: BaseException) -> WorkerDiedError:
    """Return the error for a batch for which no worker process could be started."""
    msg = (
        f"no worker process could be started ({type(error).__name__}: {error}), so this batch has "
        f"not run. {probable_cause([1])}"
    )
    return WorkerDiedError(msg, may_have_run=False)
