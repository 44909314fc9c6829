"""The command ``async-batcher``: reads its arguments, starts the job, and says how it ended.

===========  ============================================================================
exit status
===========  ============================================================================
0            done
1            it failed: answers differ, a worker died, the output could not be written
2            it cannot be done as asked; one line on standard error says why
130          Ctrl-C
===========  ============================================================================

The job is imported when it is asked for: each worker process imports the script that calls `main`, and so this module.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["main"]

_PROGRAM = "async-batcher"
_INTERRUPTED = 130  # 128 + SIGINT, as shells have it


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: The arguments after the program's name; None: those of this process.

    Returns:
        The exit status; see the head of this module.

    Raises:
        SystemExit: After ``--help``, and after arguments that cannot be understood (2).
    """
    try:
        try:
            return _run(_parser().parse_args(argv))
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except KeyboardInterrupt:
        return _INTERRUPTED
    except OSError as exc:  # standard output cannot be written
        _drop_stdout()
        return 1 if isinstance(exc, BrokenPipeError) else _complain(exc, 1)  # a reader who leaves has what it wanted


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{_PROGRAM}: {message}\n")


def _parser() -> argparse.ArgumentParser:
    from async_batcher._cores import usable_cores
    from async_batcher._demo import DEFAULT_BATCH_SIZE

    parser = _Parser(prog=_PROGRAM, description="Collects single asyncio calls into batches and runs each batch somewhere.")
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    parser.set_defaults(job=None)
    demo = parser.add_subparsers(title="commands").add_parser(
        "demo",
        help="parse every file of the standard library without batching, in threads, and in processes",
        description="Analyses every .py file of this Python's standard library, or of a folder, three times: without batching, "
        "batched in threads, and batched in processes. Checks that the answers are the same, and compares the speed.",
    )
    demo.set_defaults(job=_demo)
    demo.add_argument("--path", metavar="DIR", help="a folder to analyse instead of the standard library")
    demo.add_argument(
        "--workers", type=_number, metavar="N", default=usable_cores(), help="threads, and processes (default: %(default)s)"
    )
    demo.add_argument(
        "--max-batch-size", type=_number, metavar="N", default=DEFAULT_BATCH_SIZE, help="files in a batch (default: %(default)s)"
    )
    demo.add_argument("--loop", choices=["auto", "asyncio", "uvloop"], default="auto", help="event loop (default: %(default)s)")
    demo.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    return parser


def _number(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        msg = f"must be a number from 1, not {text!r}"
        raise argparse.ArgumentTypeError(msg)
    return int(text)


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
    print(f"{_PROGRAM}: {error}", file=sys.stderr)
    return status


def _drop_stdout() -> None:
    """Let the interpreter not fail once more when it flushes at its end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
