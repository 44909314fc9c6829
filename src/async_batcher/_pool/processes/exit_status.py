"""How worker processes exited, and what probably ended them."""

from __future__ import annotations

import contextlib
import os
import signal
from typing import TYPE_CHECKING, TypeAlias

from async_batcher.exceptions import WorkerDiedError

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess

# Process id, and exit code (negative: the number of a signal).
ExitedProcess: TypeAlias = tuple[int | None, int | None]

_CRASH_SIGNALS = {
    getattr(signal, name, 0)
    for name in ("SIGSEGV", "SIGBUS", "SIGILL", "SIGFPE", "SIGABRT", "SIGSYS", "SIGTRAP")
}


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


def standard_pool_crash(
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


def exit_status_name(code: int | None) -> str:
    """Return an exit code in words: "exit code 3", "SIGSEGV"."""
    if code is None:
        return "unknown exit status"
    if code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


def exit_phrase(code: int | None) -> str:
    """Return what a process did, for a message: "was killed by SIGKILL"."""
    verb = "was killed by" if code is not None and code < 0 else "exited with"
    return f"{verb} {exit_status_name(code)}"


def probable_cause(codes: list[int | None], *, runs_main: bool = True) -> str:
    """Return a sentence on what exit codes probably mean.

    Args:
        codes: Exit codes; negative: the number of a signal, None: unknown.
        runs_main: Whether a worker first runs the user's main module.
    """
    signals = {-code for code in codes if code is not None and code < 0}
    if getattr(signal, "SIGKILL", 9) in signals:
        return "Likely cause: the kernel's OOM killer, or a manual kill."
    if signals & _CRASH_SIGNALS:
        return (
            "Likely cause: a crash in C code that process_batch calls (its stack is on standard "
            "error)."
        )
    if signals:
        return "Likely cause: a manual kill."
    if not any(code is not None for code in codes):
        return "Its standard error may tell more."
    if 1 in codes and runs_main:
        return (
            'Likely cause: the process could not start; a script that uses processes needs "if '
            "__name__ == '__main__':\" around the code that starts them."
        )
    return "Likely cause: process_batch, or code that it calls, used os._exit()."
