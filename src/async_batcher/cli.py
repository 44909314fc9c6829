"""The command ``async-batcher``: reads its arguments, starts the job, and says how it ended.

===========  ==============================================================================================================
exit status
===========  ==============================================================================================================
0            done
1            it failed: answers differ, a worker died, the output could not be written; or, with ``map``, items have failed
2            it cannot be done as asked; one line on standard error says why
130, 143     Ctrl-C, SIGTERM
===========  ==============================================================================================================

The job is imported when it is asked for: each worker process imports the script that calls `main`, and so this module.
"""

from __future__ import annotations

import argparse
import os
import select
import sys
import threading
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["main"]

_PROGRAM = "async-batcher"
_SIGNALLED = 128  # and the signal's number, as shells have it
_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: The arguments after the program's name; None: those of this process.

    Returns:
        The exit status; see the head of this module.

    Raises:
        SystemExit: After ``--help``, and after arguments that cannot be understood (2).
    """
    _fill_descriptors()
    try:
        try:
            status = _run(_parser().parse_args(argv))
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except KeyboardInterrupt:
        return _INTERRUPTED
    except OSError as exc:  # standard output cannot be written
        _drop_stdout()
        return 1 if isinstance(exc, BrokenPipeError) else _complain(exc, 1)  # a reader who leaves has what it wanted
    if argv is None and status > _SIGNALLED:
        _leave_threads(status)
    return status


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{_PROGRAM}: {message}\n")


class _Intermixed(_Parser):
    """Takes an operand that may be left out after options, too: ``map TARGET --each INPUT``."""

    _is_asked = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self._is_asked:  # by what is called below
            return super().parse_known_args(args, namespace)
        self._is_asked = True
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._is_asked = False


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog=_PROGRAM, description="Collects single asyncio calls into batches and runs each batch somewhere.")
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    parser.set_defaults(job=None)
    commands = parser.add_subparsers(title="commands", parser_class=_Intermixed)
    _add_map(commands)
    _add_tune(commands)
    _add_demo(commands)
    return parser


def _add_map(commands: argparse._SubParsersAction[_Intermixed]) -> None:
    from async_batcher._map import DEFAULT_BATCH_SIZE, DEFAULT_QUEUE_TIME
    from async_batcher._pool.cpu_count import cpu_count

    parser = commands.add_parser(
        "map",
        help="run a function of yours over the lines of a file, in worker processes",
        description="Reads items, hands them in batches to a function in worker processes, and writes its results as JSON Lines, "
        "in order. A run that was interrupted goes on with --resume.",
    )
    parser.set_defaults(job=_map)
    parser.add_argument(
        "target", metavar="MODULE:FUNCTION", help="takes a list of items and gives one result for each; or FILE.py:FUNCTION"
    )
    parser.add_argument(
        "input", metavar="INPUT", nargs="?", default="-", help="a file, or a directory; standard input if left out"
    )
    parser.add_argument("-o", "--output", metavar="OUTPUT", default="-", help="a file; standard output if left out")
    _add_format(parser)
    parser.add_argument("--workers", type=_number, metavar="N", default=cpu_count(), help="processes (default: %(default)s)")
    _add_batch_size(parser, DEFAULT_BATCH_SIZE, "items")
    parser.add_argument(
        "--max-queue-time", type=_seconds, metavar="SECONDS", default=DEFAULT_QUEUE_TIME,
        help="an item waits so long at most for its batch to fill (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--timeout", type=_positive_seconds, metavar="SECONDS", help="for a batch; its worker is then ended")
    parser.add_argument("--isolate", action="store_true", help="bad items fail alone; otherwise the first failure ends the run")
    parser.add_argument(
        "--errors", metavar="FILE", help="with --isolate: where to write what has failed (default: standard error)"
    )
    parser.add_argument("--unordered", action="store_true", help="write results as they come")
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="go on after what an interrupted run has finished")
    again.add_argument("--restart", action="store_true", help="throw away what an interrupted run has finished")
    _add_loop(parser)


def _add_tune(commands: argparse._SubParsersAction[_Intermixed]) -> None:
    from async_batcher._pool.cpu_count import cpu_count

    parser = commands.add_parser(
        "tune",
        help="measure a function of yours, and recommend batch size, waiting time and workers",
        description="Measures a function on items of yours, over sizes of batches, in threads and in processes. Prints the "
        "throughput and latency of each, the options that suit the target, why, and the code to paste.",
    )
    parser.set_defaults(job=_tune)
    parser.add_argument(
        "function", metavar="MODULE:FUNCTION", help="takes a list of items and gives one result for each; or FILE.py:FUNCTION"
    )
    parser.add_argument("input", metavar="INPUT", help="a file, or a directory; '-': standard input. Its first items are used")
    _add_format(parser)
    target = parser.add_mutually_exclusive_group()
    target.add_argument("--target", choices=["throughput"], help="the most items a second; unless there is another target")
    target.add_argument(
        "--target-latency", type=_positive_seconds, metavar="SECONDS", help="the most items a second, none of which takes longer"
    )
    parser.add_argument(
        "--workers", type=_number, metavar="N", default=cpu_count(), help="threads, and processes (default: %(default)s)"
    )
    parser.add_argument(
        "--time", type=_positive_seconds, metavar="SECONDS", default=60.0, help="that it may take (default: %(default)g)"
    )
    parser.add_argument("--plot", metavar="FILE.svg", help="draw throughput against latency; needs the extra [tune]")
    _add_loop(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def _add_demo(commands: argparse._SubParsersAction[_Intermixed]) -> None:
    from async_batcher._demo import DEFAULT_BATCH_SIZE
    from async_batcher._pool.cpu_count import cpu_count

    parser = commands.add_parser(
        "demo",
        help="parse every file of the standard library without batching, in threads, and in processes",
        description="Analyses every .py file of this Python's standard library, or of a folder, three times: without batching, "
        "batched in threads, and batched in processes. Checks that the answers are the same, and compares the speed.",
    )
    parser.set_defaults(job=_demo)
    parser.add_argument("--path", metavar="DIR", help="a folder to analyse instead of the standard library")
    parser.add_argument(
        "--workers", type=_number, metavar="N", default=cpu_count(), help="threads, and processes (default: %(default)s)"
    )
    _add_batch_size(parser, DEFAULT_BATCH_SIZE, "files")
    _add_loop(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")


def _add_format(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--format",
        choices=["jsonl", "lines", "files"],
        default="jsonl",
        help="an item is a line of JSON, a line of text, or the bytes of a file whose path is on a line or which is in the "
        "directory INPUT (default: %(default)s)",
    )
    parser.add_argument("--each", action="store_true", help="the function takes one item instead of a list of them")


def _add_batch_size(parser: argparse.ArgumentParser, default: int, what: str) -> None:
    parser.add_argument(
        "--max-batch-size", type=_number, metavar="N", default=default, help=f"{what} in a batch (default: %(default)s)"
    )


def _add_loop(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--loop", choices=["auto", "asyncio", "uvloop"], default="auto", help="event loop (default: %(default)s)")


def _number(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        msg = f"must be a number from 1, not {text!r}"
        raise argparse.ArgumentTypeError(msg)
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        msg = f"must be a number of seconds, not {text!r}"
        raise argparse.ArgumentTypeError(msg)
    return seconds


def _positive_seconds(text: str) -> float:
    if not (seconds := _seconds(text)):
        msg = f"must be a number of seconds, more than 0, not {text!r}"
        raise argparse.ArgumentTypeError(msg)
    return seconds


def _run(arguments: argparse.Namespace) -> int:
    if arguments.version:
        from importlib.metadata import version

        print(_PROGRAM, version(_PROGRAM))
        return 0
    if arguments.job is None:
        _parser().print_help()
        return 0
    status: int = arguments.job(arguments)
    return status


def _map(arguments: argparse.Namespace) -> int:
    from async_batcher._map import Settings, map_items
    from async_batcher._mapping import MapError

    try:
        return map_items(Settings(**{name: getattr(arguments, name) for name in Settings._fields}))
    except MapError as exc:
        return _complain(exc, exc.status)


def _tune(arguments: argparse.Namespace) -> int:
    from async_batcher._tune import Settings, TuneError, tune

    try:
        tune(Settings(**{name: getattr(arguments, name) for name in Settings._fields}))
    except TuneError as exc:
        return _complain(exc, exc.status)
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    from async_batcher._demo import DemoError, Settings, demo
    from async_batcher.exceptions import AsyncBatchException

    settings = Settings(
        path=arguments.path,
        workers=arguments.workers,
        max_batch_size=arguments.max_batch_size,
        loop=arguments.loop,
        as_json=arguments.json,
    )
    try:
        demo(settings)
    except DemoError as exc:
        return _complain(exc, exc.status)
    except AsyncBatchException as exc:
        return _complain(exc, 1)
    return 0


def _complain(error: Exception, status: int) -> int:
    if sys.stderr is not None and (status <= _SIGNALLED or _is_writable(sys.stderr)):
        print(f"{_PROGRAM}: {error}", file=sys.stderr)
    return status


def _is_writable(stream: TextIO) -> bool:
    """Whether what is written there does not block; who does not read does not keep an interrupted program alive."""
    try:
        return bool(select.select([], [stream], [], 0)[1])
    except (OSError, ValueError):  # it has no descriptor, or the system cannot tell
        return True


def _fill_descriptors() -> None:
    """Where standard streams are closed have their descriptors taken, or the next file that is opened is one of them."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # it gets the lowest number that is free


def _leave_threads(status: int) -> None:
    """End now if the user's code has left threads that Python would wait for: the program was told to end."""
    if any(not thread.daemon and thread is not threading.main_thread() for thread in threading.enumerate()):
        for stream in (sys.stdout, sys.stderr):
            if stream is not None and _is_writable(stream):
                stream.flush()
        os._exit(status)


def _drop_stdout() -> None:
    """Let the interpreter not fail once more when it flushes at its end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
