"""How a new Python interpreter is started, which becomes a worker or a fork server.

::

    python -c BOOTSTRAP                           --> sys.path of this process --> the function
    program --multiprocessing-fork pipe_handle=N  --> freeze_support() --> FrozenStart
                                                      --> the function   (if sys.frozen is set)

Rules:

- Nothing is imported from the current folder unless this process would find it there: BOOTSTRAP
  imports only builtin modules before it sets ``sys.path``.
- A program that was started in place of an interpreter, and runs into its own pool, gets an error
  from that pool. So a program never starts itself without end.
"""

from __future__ import annotations

import marshal
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

from async_batcher._pool.processes.exit_status import probable_cause
from async_batcher._serialization.by_value import BOOT_MARK, START_MARK
from async_batcher._transport import shared_memory
from async_batcher._transport.protocol import EXIT_INTERNAL_ERROR
from async_batcher._transport.status_page import FAILURE_OFFSET, FAILURE_SIZE
from async_batcher._worker import signals as worker_signals
from async_batcher._worker.bootstrap import FrozenStart

# Standard input is a pipe at its end: a sandbox may have no /dev/null.
_BOOTSTRAP = f"""\
{BOOT_MARK} = True
import sys, marshal
sys.path[:], module, name, args, page = marshal.load(sys.stdin.buffer)
import os
try:
    import importlib
    os.environ.pop({START_MARK!r}, None)
    try:
        null = os.open(os.devnull, os.O_RDONLY)
    except OSError:  # a sandbox without /dev
        null, pipe = os.pipe()
        os.close(pipe)
    os.dup2(null, 0)
    os.close(null)
    getattr(importlib.import_module(module), name)(*args)
except Exception as error:
    try:
        text = f"{{type(error).__name__}}: {{error}}".encode(errors="replace")
        if page is not None:
            os.pwrite(page, text[:{FAILURE_SIZE}], {FAILURE_OFFSET})
        sys.excepthook(type(error), error, error.__traceback__)
    finally:
        os._exit({EXIT_INTERNAL_ERROR})
"""


def search_path() -> list[str]:
    """Return ``sys.path`` for another process: strings only, the current folder by its name."""
    here = current_dir()
    entries: list[object] = list(sys.path)
    return [
        str.__str__(entry) or here
        for entry in entries
        if isinstance(entry, str) and (entry or here)
    ]


def current_dir() -> str:
    """Return the current folder; an empty string if it has been removed."""
    try:
        return str(Path.cwd())
    except OSError:
        return ""


def program_argv() -> list[str]:
    """Return ``sys.argv`` for another process, as strings."""
    argv: list[object] = list(getattr(sys, "argv", ()))  # missing in some embedding programs
    return [str.__str__(arg) if isinstance(arg, str) else str(arg) for arg in argv]


def spawn_python(
    module: str,
    name: str,
    args: tuple[Any, ...],
    fds: tuple[int, ...] | None = None,
    page: int | None = None,
) -> int:
    """Start a Python that calls a function.

    Args:
        module: A module of this package.
        name: The function in it.
        args: Its arguments, which are builtins.
        fds: The descriptors that it inherits. None means that these are the arguments.
        page: The one of them that is the descriptor of a status page, for what is raised.

    Returns:
        Its process id. The caller must reap it.

    Raises:
        OSError: The process could not be started.
        RuntimeError: There is no interpreter to start, or this program was itself started in place
            of one.
    """
    if _started_as_interpreter():
        msg = (
            "this process was started to be a worker of its own program, but runs the program from "
            f"the beginning, and its pool would do so again. {_advice()}"
        )
        raise RuntimeError(msg)
    is_frozen = getattr(sys, "frozen", False)
    start = (search_path(), module, name, args)
    fds = args if fds is None else fds
    payload = marshal.dumps((*start, page))
    if is_frozen:
        payload = pickle.dumps({}) + pickle.dumps(FrozenStart(*start))
    # Not a pipe: an executable that is not an interpreter may never read it.
    payload_fd = shared_memory.create_anonymous(len(payload))
    try:
        os.pwrite(payload_fd, payload, 0)
        command = _command(payload_fd)
        with worker_signals.blocked():
            process = subprocess.Popen(  # noqa: S603 - Python
                command,
                stdin=subprocess.DEVNULL if is_frozen else payload_fd,
                pass_fds=(*fds, payload_fd) if is_frozen else fds,
                # Python 3.13.0 fails to import in a folder that has been removed.
                cwd=None if current_dir() else os.sep,
                env={**os.environ, START_MARK: "1"},
            )
    finally:
        os.close(payload_fd)
    process.returncode = 0  # so that Popen neither reaps it nor warns
    return process.pid


def start_failure_cause(code: int | None, failure: str) -> str:
    """Return why a new process exited before it was a worker or a fork server.

    Args:
        code: Its exit code.
        failure: What it raised; see `StatusPage.failure`.
    """
    if failure:
        return f"{_executable()!r} raised {failure} (its traceback is on standard error)."
    if code is None or code < 0:
        return probable_cause([code], runs_main=False)
    is_frozen = getattr(sys, "frozen", False)
    kind = (
        "a frozen program that runs from the beginning"
        if is_frozen
        else "not a Python interpreter, or could not start for lack of memory or descriptors"
    )
    return (
        f"Its standard error may tell more. Likely cause: {_executable()!r} is {kind}. {_advice()}"
    )


def start_timeout_error(importing: str = "") -> TimeoutError:
    """Return the error for a process that did not get as far as this package.

    Args:
        importing: The module of ``preload`` that it was importing, if it got as far.
    """
    if importing:
        return TimeoutError(f"importing {importing!r} for preload took longer than start_timeout")
    msg = (
        f"{_executable()!r} was started, and did not import async_batcher within start_timeout. "
        "Likely cause: it is not a Python interpreter, or the machine has too much to do. "
        f"{_advice()}"
    )
    return TimeoutError(msg)


def _command(payload_fd: int) -> list[str]:
    executable = _executable()
    if not executable:
        msg = (
            "there is no Python interpreter to start workers with (sys.executable is empty). Name "
            "one with multiprocessing.set_executable(), or use mp_context='fork'"
        )
        raise RuntimeError(msg)
    if getattr(sys, "frozen", False):  # see multiprocessing.spawn.get_command_line
        return [sys.executable, "--multiprocessing-fork", f"pipe_handle={payload_fd}"]
    flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]  # noqa: SLF001 - as multiprocessing does
    return [executable, *flags, "-c", _BOOTSTRAP]


def _executable() -> str:
    from multiprocessing.spawn import get_executable

    is_frozen = getattr(sys, "frozen", False)
    named: Any = sys.executable if is_frozen else get_executable() or sys.executable
    return os.fsdecode(named) if named else ""


def _started_as_interpreter() -> bool:
    """Tell whether this program got the arguments of a worker, or of a multiprocessing helper.

    A real worker does not see them: Python keeps what follows ``-c`` to itself, and
    `freeze_support` does not return.
    """
    # The program may have changed sys.argv. Of sys.orig_argv only this one is not what a real
    # worker has, too.
    tracker = "from multiprocessing.resource_tracker"
    if START_MARK in os.environ or any(arg.startswith(tracker) for arg in sys.orig_argv):
        return True
    argv = getattr(sys, "argv", ())[1:]
    return "--multiprocessing-fork" in argv or any(
        isinstance(arg, str) and (arg == _BOOTSTRAP or arg.startswith("from multiprocessing."))
        for arg in argv
    )


def _advice() -> str:
    if getattr(sys, "frozen", False):
        return "A frozen program must call multiprocessing.freeze_support() first of all"
    return "Name an interpreter with multiprocessing.set_executable(), or use mp_context='fork'"
