"""How a new Python interpreter is started, which then is a worker or a fork server.

::

    python -c BOOT                                --> sys.path as it is here            --> the function
    program --multiprocessing-fork pipe_handle=N  --> freeze_support() --> FrozenStart  --> the function    if sys.frozen is set

Rules:

- Nothing is imported from the current folder unless this process would find it there: BOOT imports only builtin modules before it
  has set ``sys.path``.
- A program that is started in place of an interpreter, and comes to its own pool, is refused one. So it never starts itself
  without end.
"""

from __future__ import annotations

import marshal
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

from async_batcher._serialization.by_value import BOOT_MARK, START_MARK
from async_batcher._transport import shared_memory
from async_batcher._worker import signals as worker_signals
from async_batcher._worker.bootstrap import FrozenStart

_BOOTSTRAP = (
    f"{BOOT_MARK} = True; "
    "import sys, marshal; sys.path[:], module, name, args = marshal.load(sys.stdin.buffer); "
    f"import os, importlib; os.environ.pop({START_MARK!r}, None); "
    "null = os.open(os.devnull, os.O_RDONLY); os.dup2(null, 0); os.close(null); "
    "getattr(importlib.import_module(module), name)(*args)"
)


def search_path() -> list[str]:
    """``sys.path`` as it holds for another process: the current folder by its name, and only what import looks at."""
    here = current_dir()
    entries: list[object] = list(sys.path)
    return [str.__str__(entry) or here for entry in entries if isinstance(entry, str) and (entry or here)]


def current_dir() -> str:
    """The current folder; empty when it has been removed."""
    try:
        return str(Path.cwd())
    except OSError:
        return ""


def arguments() -> list[str]:
    """``sys.argv`` for another process, as strings."""
    given: list[object] = list(getattr(sys, "argv", ()))  # an embedding program may have none
    return [str.__str__(arg) if isinstance(arg, str) else str(arg) for arg in given]


def spawn_python(module: str, name: str, args: tuple[int, ...]) -> int:
    """Start a Python that calls a function of this package with descriptors, which it inherits.

    Returns:
        Its process id; reaping it is the caller's matter.

    Raises:
        OSError: It could not be started.
        RuntimeError: There is no interpreter to start, or this program was itself started in place of one.
    """
    if _is_in_place_of_an_interpreter():
        msg = (
            "this process was started to be a worker of its own program, but runs the program from the beginning, and its pool "
            f"would do so again. {_advice()}"
        )
        raise RuntimeError(msg)
    is_frozen = getattr(sys, "frozen", False)
    start = (search_path(), module, name, args)
    payload = pickle.dumps({}) + pickle.dumps(FrozenStart(*start)) if is_frozen else marshal.dumps(start)
    given = shared_memory.create_anonymous(len(payload))  # not a pipe: an executable that is no interpreter may never read it
    try:
        os.pwrite(given, payload, 0)
        command, stdin, descriptors = _command(given), given, args
        if is_frozen:
            stdin, descriptors = subprocess.DEVNULL, (*args, given)
        with worker_signals.blocked():
            # Not in a folder that has been removed, in which Python 3.13.0 fails to import.
            folder = None if current_dir() else os.sep
            environment = {**os.environ, START_MARK: "1"}
            process = subprocess.Popen(command, stdin=stdin, pass_fds=descriptors, cwd=folder, env=environment)  # noqa: S603 - Python
    finally:
        os.close(given)
    process.returncode = 0  # it is looked after here: Popen shall neither reap it nor warn of it
    return process.pid


def cause_of_no_start() -> str:
    """What is likely to be wrong when what was started ends before it is a worker or a fork server."""
    kind = "a frozen program that runs from the beginning" if getattr(sys, "frozen", False) else "not a Python interpreter"
    return f"Its standard error may tell more. Likely cause: {_executable()!r} is {kind}. {_advice()}"


def _command(payload: int) -> list[str]:
    executable = _executable()
    if not executable:
        msg = (
            "there is no Python interpreter to start workers with: sys.executable is empty. Name one with "
            "multiprocessing.set_executable(), or use mp_context='fork'"
        )
        raise RuntimeError(msg)
    if getattr(sys, "frozen", False):  # see multiprocessing.spawn.get_command_line
        return [sys.executable, "--multiprocessing-fork", f"pipe_handle={payload}"]
    flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]  # noqa: SLF001 - as multiprocessing does
    return [executable, *flags, "-c", _BOOTSTRAP]


def _executable() -> str:
    from multiprocessing.spawn import get_executable

    named: Any = sys.executable if getattr(sys, "frozen", False) else get_executable() or sys.executable
    return os.fsdecode(named) if named else ""


def _is_in_place_of_an_interpreter() -> bool:
    """Whether this program was given the arguments of an interpreter that is to be a worker, or a helper of multiprocessing.

    Such an interpreter does not see them: Python keeps what follows ``-c`` to itself, and `freeze_support` does not return.
    """
    # The program may have changed its arguments. Of the original ones, those of a worker are also what a true worker has.
    if START_MARK in os.environ or any(arg.startswith("from multiprocessing.resource_tracker") for arg in sys.orig_argv):
        return True
    given = getattr(sys, "argv", ())[1:]
    return "--multiprocessing-fork" in given or any(
        isinstance(arg, str) and (arg == _BOOTSTRAP or arg.startswith("from multiprocessing.")) for arg in given
    )


def _advice() -> str:
    if getattr(sys, "frozen", False):
        return "A frozen program must call multiprocessing.freeze_support() first of all"
    return "Name an interpreter with multiprocessing.set_executable(), or use mp_context='fork'"
