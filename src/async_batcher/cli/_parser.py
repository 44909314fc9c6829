"""The arguments of the command, and their help."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeAlias

    Add: TypeAlias = Callable[..., object]  # the method add_argument

# Items in a batch of ``map``: enough that the trip to a worker counts for little beside items of
# 0.1 ms and more, and few enough that a run of some thousand items keeps every worker busy.
_MAP_BATCH_SIZE = 64
_MAP_QUEUE_TIME = 0.01  # seconds, as the library's

_TUNE_SECONDS = 60.0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog.partition(' ')[0]}: {message}\n")


class _IntermixedParser(_Parser):
    """Accept an optional positional after options, too: ``map TARGET --each INPUT``."""

    _is_intermixed = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self._is_intermixed:  # called by parse_known_intermixed_args
            return super().parse_known_args(args, namespace)
        self._is_intermixed = True
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._is_intermixed = False


def new_parser(program: str) -> argparse.ArgumentParser:
    about = "Collects single asyncio calls into batches and runs each batch somewhere."
    parser = _Parser(prog=program, description=about)
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    parser.set_defaults(command=None)
    commands = parser.add_subparsers(title="commands", parser_class=_IntermixedParser)
    for name, module, add_arguments, summary, details in (
        ("map", "map.command", _add_map, _MAP, _MAP_DETAILS),
        ("tune", "tune.command", _add_tune, _TUNE, _TUNE_DETAILS),
        ("demo", "demo.command", _add_demo, _DEMO, _DEMO_DETAILS),
    ):
        description = f"{summary[0].upper()}{summary[1:]}. {details}"
        command = commands.add_parser(name, help=summary, description=description)
        command.set_defaults(command=f"async_batcher.cli.{module}")
        add_arguments(command.add_argument, command)
    return parser


_MAP = "run a function of yours over the lines of a file, in worker processes"
_MAP_DETAILS = (
    "The function gets batches of items; its results are written as JSON Lines, in order. A run "
    "that was interrupted goes on with --resume."
)


def _add_map(add: Add, parser: argparse.ArgumentParser) -> None:
    _add_function(add, "target")
    input_help = "a file, or a directory; standard input if left out"
    add("input", metavar="INPUT", nargs="?", default="-", help=input_help)
    output_help = "a file; standard output if left out"
    add("-o", "--output", metavar="OUTPUT", default="-", help=output_help)
    _add_format(add)
    _add_workers(add, "processes")
    _add_batch_size(add, _MAP_BATCH_SIZE, "items")
    wait_help = "an item waits so long at most for its batch to fill (default: %(default)s)"
    queue_time = {"type": _seconds, "default": _MAP_QUEUE_TIME}
    add("--max-queue-time", metavar="SECONDS", help=wait_help, **queue_time)
    timeout_help = "for a batch; its worker is then ended"
    add("--timeout", type=_positive_seconds, metavar="SECONDS", help=timeout_help)
    isolate_help = "bad items fail alone; otherwise the first failure ends the run"
    add("--isolate", action="store_true", help=isolate_help)
    errors_help = "with --isolate: where to write what has failed (default: standard error)"
    add("--errors", metavar="FILE", help=errors_help)
    add("--unordered", action="store_true", help="write results as they come")
    again = parser.add_mutually_exclusive_group().add_argument
    again("--resume", action="store_true", help="go on after what an interrupted run has finished")
    again("--restart", action="store_true", help="throw away what an interrupted run has finished")
    _add_loop(add)


_TUNE = "measure a function of yours, and recommend batch size, waiting time and workers"
_TUNE_DETAILS = (
    "Prints the throughput and latency of batches of many sizes, in threads and in processes, the "
    "options that suit the target, why, and the code to paste."
)


def _add_tune(add: Add, parser: argparse.ArgumentParser) -> None:
    _add_function(add, "function")
    input_help = "a file, or a directory; '-': standard input. Its first items are used"
    add("input", metavar="INPUT", help=input_help)
    _add_format(add)
    target = parser.add_mutually_exclusive_group().add_argument
    target_help = "the most items a second; unless there is another target"
    target("--target", choices=["throughput"], help=target_help)
    latency_help = "the most items a second, none of which takes longer"
    target("--target-latency", type=_positive_seconds, metavar="SECONDS", help=latency_help)
    _add_workers(add, "threads, and processes")
    time = {"type": _positive_seconds, "default": _TUNE_SECONDS}
    add("--time", metavar="SECONDS", help="that it may take (default: %(default)g)", **time)
    plot_help = "draw throughput against latency; needs the extra [tune]"
    add("--plot", metavar="FILE.svg", help=plot_help)
    _add_loop(add)
    add("--json", action="store_true", help="print one JSON object instead of text")


_DEMO = "compare a batcher with threads and a ProcessPoolExecutor, in 20 seconds"
_DEMO_DETAILS = (
    "Each parses source files of Python's standard library. Then a worker process of each is "
    "killed, to show what its crash costs."
)


def _add_demo(add: Add, _: argparse.ArgumentParser) -> None:
    _add_workers(add, "threads, and processes")
    _add_loop(add)


def _add_function(add: Add, name: str) -> None:
    function_help = "takes a list of items and gives one result for each; or FILE.py:FUNCTION"
    add(name, metavar="MODULE:FUNCTION", help=function_help)


def _add_format(add: Add) -> None:
    format_help = (
        "an item is a line of JSON, a line of text, or the bytes of a file whose path is on a line "
        "or which is in the directory INPUT (default: %(default)s)"
    )
    add("--format", choices=["jsonl", "lines", "files"], default="jsonl", help=format_help)
    each_help = "the function takes one item instead of a list of them"
    add("--each", action="store_true", help=each_help)


def _add_workers(add: Add, what: str) -> None:
    workers_help = f"{what} (default: as many as there are usable cores)"
    add("--workers", type=_number, metavar="N", help=workers_help)


def _add_batch_size(add: Add, default: int, what: str) -> None:
    size_help = f"{what} in a batch (default: %(default)s)"
    add("--max-batch-size", type=_number, metavar="N", default=default, help=size_help)


def _add_loop(add: Add) -> None:
    loops = ["auto", "asyncio", "uvloop"]
    add("--loop", choices=loops, default="auto", help="event loop (default: %(default)s)")


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
