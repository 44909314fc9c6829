"""How worker processes exited, in words, and what probably ended them."""

from __future__ import annotations

import signal

_CRASH_SIGNALS = {
    getattr(signal, name, 0)
    for name in ("SIGSEGV", "SIGBUS", "SIGILL", "SIGFPE", "SIGABRT", "SIGTRAP")
}

_REFUSALS = {
    "SIGXCPU": "the limit of its CPU time (RLIMIT_CPU, ulimit -t)",
    "SIGXFSZ": "the limit of the size of files (RLIMIT_FSIZE, ulimit -f)",
    "SIGSYS": "a sandbox (seccomp) that does not allow a system call",
}


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
    for name, cause in _REFUSALS.items():
        if getattr(signal, name, 0) in signals:
            return f"Likely cause: {cause}."
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
