"""The command ``async-batcher``: parses its arguments, runs a command, and reports how it ended.

===========  =====================================================================================
exit status
===========  =====================================================================================
0            done
1            failed: results differ, a worker crashed, the output cannot be written, or, with
             ``map``, items have failed
2            cannot be done as asked; one line on standard error says why
130, 143     Ctrl-C, SIGTERM
===========  =====================================================================================

The commands use public names of async_batcher only. What ends a command early is a `CommandError`,
which any function may raise. The module of a command is imported when that command runs. Worker
processes import this package, too: it imports nothing that they do not need.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, TextIO

from async_batcher import __version__

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["main"]

_PROGRAM = "async-batcher"
_SIGNAL_BASE = 128  # plus the number of the signal, as in shells
_SIGINT_STATUS = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: The arguments after the name of the program. None: those of this process.

    Returns:
        The exit status; see the head of this module.

    Raises:
        SystemExit: After ``--help``, and after arguments that cannot be parsed (status 2).
    """
    _reserve_std_fds()
    try:
        try:
            status = _run(argv)
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except KeyboardInterrupt:
        return _SIGINT_STATUS
    except OSError as exc:  # standard output cannot be written
        _detach_stdout()
        # A reader that closes the pipe has what it wanted.
        return 1 if isinstance(exc, BrokenPipeError) else _print_error(exc, 1)
    if argv is None and status > _SIGNAL_BASE:
        _exit_at_once(status)
    return status


def _run(argv: Sequence[str] | None) -> int:
    from async_batcher.cli._errors import CommandError
    from async_batcher.cli._parser import new_parser

    parser = new_parser(_PROGRAM)
    arguments = parser.parse_args(argv)
    if arguments.version:
        print(_PROGRAM, __version__)
        return 0
    if arguments.command is None:
        parser.print_help()
        return 0

    import signal
    from importlib import import_module
    from importlib.util import find_spec

    if arguments.loop == "uvloop" and find_spec("uvloop") is None:
        msg = "--loop uvloop: uvloop is not installed; pip install 'async-batcher[uvloop]'"
        return _print_error(CommandError(msg), 2)
    # Before user code, which may change them, is imported.
    signals = (signal.SIGINT, signal.SIGTERM)
    arguments.ignored_signals = [n for n in signals if signal.getsignal(n) == signal.SIG_IGN]
    try:
        status: int = import_module(arguments.command).run_command(arguments)
    except CommandError as exc:
        return _print_error(exc, exc.status)
    return status


def _print_error(error: Exception, status: int) -> int:
    if sys.stderr is not None and (status <= _SIGNAL_BASE or _is_writable(sys.stderr)):
        print(f"{_PROGRAM}: {error}", file=sys.stderr)
    return status


def _is_writable(stream: TextIO) -> bool:
    """Tell whether a write does not block: a reader that is stuck must not keep us alive."""
    import select

    try:
        return bool(select.select([], [stream], [], 0)[1])
    except (OSError, ValueError):  # no descriptor, or the system cannot tell
        return True


def _reserve_std_fds() -> None:
    """Open descriptors 0 to 2 if they are closed, so that no file that is opened gets them."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number


def _exit_at_once(status: int) -> None:
    """Exit if the interpreter would wait: for a thread of user code, or for a reader to read."""
    import threading

    main_thread = threading.main_thread()
    streams = [stream for stream in (sys.stdout, sys.stderr) if stream is not None]
    writable = [stream for stream in streams if _is_writable(stream)]
    waits = any(not thread.daemon and thread is not main_thread for thread in threading.enumerate())
    if waits or writable != streams:
        for stream in writable:
            stream.flush()
        os._exit(status)


def _detach_stdout() -> None:
    """Keep the interpreter from failing once more when it flushes at exit."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, sys.stdout.fileno())
    os.close(devnull)
