"""How worker processes ended, and what is likely to have ended them."""

from __future__ import annotations

import contextlib
import os
import signal
from typing import TYPE_CHECKING, TypeAlias

from async_batcher.exceptions import WorkerDiedError

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess

ExitedProcess: TypeAlias = tuple[int | None, int | None]  # process id, exit code (negative: the number of a signal)

_CRASHES = {getattr(signal, name, 0) for name in ("SIGSEGV", "SIGBUS", "SIGILL", "SIGFPE", "SIGABRT", "SIGSYS", "SIGTRAP")}


def processes_of(pool: object) -> list[BaseProcess]:
    return list((getattr(pool, "_processes", None) or {}).values())


def kill(process: BaseProcess) -> None:
    """Kill a worker of a pool."""
    try:
        process.kill()
    except AttributeError:  # those of loky can only be terminated, which one that is stopped does not notice
        if process.pid is not None and process.exitcode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, getattr(signal, "SIGKILL", signal.SIGTERM))


def kill_rather_than_terminate(pool: object) -> None:
    """Have a standard pool of ours end its workers by SIGKILL when it breaks: they do not obey SIGTERM (`signals.py`)."""
    for process in processes_of(pool):
        process.terminate = process.kill  # type: ignore[method-assign]


def exited_processes(pool: object) -> list[ExitedProcess]:
    """Process id and exit code of the workers that have ended by themselves.

    Exact in the pool's own thread, which reports the failure before it ends the other workers.
    """
    from multiprocessing.connection import wait

    processes = processes_of(pool)
    ready = set(wait([process.sentinel for process in processes], timeout=0))
    for process in processes:
        if process.sentinel in ready:
            process.join(1.0)  # it has ended or is about to: its exit code may come a moment after its sentinel
    return [(process.pid, process.exitcode) for process in processes if process.sentinel in ready or process.exitcode is not None]


def standard_pool_crash(dead: list[ExitedProcess], error: BaseException, *, has_initializer: bool = False) -> WorkerDiedError:
    """Return the error for a batch of a standard pool that broke.

    Args:
        dead: The workers that ended by themselves.
        error: What the pool raised.
        has_initializer: Whether the pool has an initializer of the user's: where that raises, a worker exits with 0.
    """
    pid, exit_code = dead[0] if len(dead) == 1 else (None, None)
    who = " and ".join(f"{pid} ({exit_status_name(code)})" for pid, code in dead) or "(unknown)"
    codes = [code for _, code in dead]
    cause = probable_cause(codes)
    if has_initializer and 0 in codes:
        cause = "Likely cause: the initializer of the pool raised (its traceback is on standard error)."
    msg = (
        f"worker process {who} ended while batches were running, and the standard pool ends with it, so this batch is lost and "
        f"may have run in part. {cause} The next batch gets a fresh pool"
    )
    died = WorkerDiedError(msg, pid=pid, exit_code=exit_code, may_have_run=True)
    died.__cause__ = error
    return died


def start_failure(error: BaseException) -> WorkerDiedError:
    """The error for a batch that no worker process could be started for."""
    msg = f"no worker process could be started: {type(error).__name__}: {error}. The batch has not run. {probable_cause([1])}"
    return WorkerDiedError(msg, may_have_run=False)


def exit_status_name(code: int | None) -> str:
    """An exit code in words: "exit code 3", "SIGSEGV"."""
    if code is None:
        return "how is not known"
    if code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


def probable_cause(codes: list[int | None], *, runs_main: bool = True) -> str:
    """A sentence on what exit codes are likely to mean.

    Args:
        codes: Exit codes; negative: the number of a signal, None: unknown.
        runs_main: Whether a worker runs the user's main module first.
    """
    signals = {-code for code in codes if code is not None and code < 0}
    if getattr(signal, "SIGKILL", 9) in signals:
        return "Likely cause: the system ran out of memory, or somebody killed it."
    if signals & _CRASHES:
        return "Likely cause: a crash in C code that process_batch calls (its stack is on standard error)."
    if signals:
        return "Likely cause: somebody ended it."
    if not any(code is not None for code in codes):
        return "Its standard error may tell more."
    if 1 in codes and runs_main:
        return (
            "Likely cause: it could not start; a script that uses processes needs \"if __name__ == '__main__':\" around what "
            "starts it."
        )
    return "Likely cause: process_batch, or what it calls, used os._exit()."
