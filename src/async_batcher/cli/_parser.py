"""The arguments of the command, and their help."""

from __future__ import annotations

import argparse
import textwrap
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
_TUNE_CLIENTS = "1,4,16,256"  # a script, a few users, a service, a service under load

_HELP_WIDTH = 78  # columns, of a terminal with 80


class _Parser(argparse.ArgumentParser):
    def __init__(self, **options: Any) -> None:
        # The epilog is an example, whose lines are left as they are.
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(add_help=False, formatter_class=formatter, **options)
        self.add_argument("-h", "--help", action="help", help="Show this help and exit.")

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
    parser = _Parser(prog=program, description=_ABOUT, epilog=_EPILOG)
    version_help = "Print the version and exit."
    parser.add_argument("--version", action="store_true", help=version_help)
    parser.set_defaults(command=None)
    commands = parser.add_subparsers(
        title="commands", metavar="COMMAND", parser_class=_IntermixedParser
    )
    for name, module, add_arguments, summary, details, example in (
        ("map", "map.command", _add_map, _MAP, _MAP_DETAILS, _MAP_EXAMPLE),
        ("tune", "tune.command", _add_tune, _TUNE, _TUNE_DETAILS, _TUNE_EXAMPLE),
        ("demo", "demo.command", _add_demo, _DEMO, _DEMO_DETAILS, _DEMO_EXAMPLE),
    ):
        command = commands.add_parser(
            name,
            help=summary,
            description=textwrap.fill(f"{summary} {details}", _HELP_WIDTH),
            epilog=example,
        )
        command.set_defaults(command=f"async_batcher.cli.{module}")
        add_arguments(command.add_argument, command)
    return parser


_ABOUT = "Run a Python function over many items in batches, in worker processes."
_EPILOG = """
examples:
  async-batcher map parse.py:parse pages.jsonl -o results.jsonl
  async-batcher tune parse.py:parse pages.jsonl
  async-batcher demo
"""

_MAP = "Run a Python function over the items of a file, in worker processes."
_MAP_DETAILS = (
    "The function gets batches of items and returns one result for each. Results are written as "
    "JSON Lines, in the order of the items. After an interruption, --resume continues the run."
)
_MAP_EXAMPLE = """
example:
  async-batcher map parse.py:parse pages.jsonl -o results.jsonl

  The file parse.py:

    def parse(batch):
        return [len(page["text"].split()) for page in batch]
"""


def _add_map(add: Add, parser: argparse.ArgumentParser) -> None:
    _add_function(add, "target")
    input_help = "A file or a directory to read items from. The default is standard input."
    add("input", metavar="INPUT", nargs="?", default="-", help=input_help)
    output_help = "The file to write results to. The default is standard output."
    add("-o", "--output", metavar="OUTPUT", default="-", help=output_help)
    _add_format(add)
    _add_workers(add, "The number of worker processes.")
    _add_batch_size(add, _MAP_BATCH_SIZE, "items")
    wait_help = "How long an item may wait for its batch to fill. The default is %(default)s."
    queue_time = {"type": _seconds, "default": _MAP_QUEUE_TIME}
    add("--max-queue-time", metavar="SECONDS", help=wait_help, **queue_time)
    timeout_help = "How long a batch may run. After that its worker is killed and replaced."
    add("--timeout", type=_positive_seconds, metavar="SECONDS", help=timeout_help)
    isolate_help = (
        "Find the items that fail, and run the others without them. Otherwise the first failure "
        "ends the run."
    )
    add("--isolate", action="store_true", help=isolate_help)
    errors_help = (
        "The file to write failed items to; needs --isolate. The default is the output with "
        "--records, and otherwise standard error."
    )
    add("--errors", metavar="FILE", help=errors_help)
    add("--unordered", action="store_true", help="Write each result as soon as it is there.")
    records_help = (
        'Write one JSON object per item: {"line": 3, "result": ...}, with "path" for files. A '
        'failed item has "error" and "traceback" instead, unless --errors takes it. This is the '
        "default for --format files."
    )
    add("--records", action=argparse.BooleanOptionalAction, help=records_help)
    again = parser.add_mutually_exclusive_group().add_argument
    resume_help = (
        "Keep the results of an interrupted run, and run the remaining items. A complete run "
        "stays as it is."
    )
    again("--resume", action="store_true", help=resume_help)
    restart_help = "Discard the results of an interrupted run, and start again."
    again("--restart", action="store_true", help=restart_help)
    _add_loop(add)


_TUNE = "Measure a Python function, and recommend the options of its batcher."
_TUNE_DETAILS = (
    "Prints the options with the best throughput, why they were chosen, throughput and latency by "
    "number of callers, and the code to paste."
)
_TUNE_EXAMPLE = """
example:
  async-batcher tune parse.py:parse pages.jsonl --target-latency 0.05
"""


def _add_tune(add: Add, _: argparse.ArgumentParser) -> None:
    _add_function(add, "function")
    input_help = "A file or a directory to read the first items from. - stands for standard input."
    add("input", metavar="INPUT", help=input_help)
    _add_format(add)
    latency_help = (
        "The longest 99th percentile of a call. Options that keep it are preferred. By default, "
        "throughput counts."
    )
    add("--target-latency", type=_positive_seconds, metavar="SECONDS", help=latency_help)
    clients_help = (
        "The numbers of callers to measure with, separated by commas. Each caller awaits one item "
        "after another. The default is %(default)s."
    )
    clients = {"type": _numbers, "default": _TUNE_CLIENTS}
    add("--clients", metavar="N,N,...", help=clients_help, **clients)
    _add_workers(add, "The largest number of threads or worker processes.")
    time = {"type": _positive_seconds, "default": _TUNE_SECONDS}
    time_help = "How long the measurements may take. The default is %(default)g."
    add("--time", metavar="SECONDS", help=time_help, **time)
    plot_help = (
        "Draw throughput against batch size to this file. Needs pip install 'async-batcher[tune]'."
    )
    add("--plot", metavar="FILE.svg", help=plot_help)
    _add_loop(add)
    add("--json", action="store_true", help="Print one JSON object instead of text.")


_DEMO = "Compare a batcher with threads and a ProcessPoolExecutor, in 20 seconds."
_DEMO_DETAILS = (
    "Each parses source files of Python's standard library. Then a worker process of each is "
    "killed, to show what its crash costs."
)
_DEMO_EXAMPLE = """
example:
  async-batcher demo --workers 2
"""


def _add_demo(add: Add, _: argparse.ArgumentParser) -> None:
    _add_workers(add, "The number of threads and of worker processes.")
    _add_loop(add)


def _add_function(add: Add, name: str) -> None:
    function_help = (
        "The function to call: a module and a name in it. FILE.py:FUNCTION names it in a file."
    )
    add(name, metavar="MODULE:FUNCTION", help=function_help)


def _add_format(add: Add) -> None:
    format_help = (
        "What an item is. jsonl: the JSON value on a line. lines: the text of a line. files: the "
        "bytes of a file, whose path is on a line or which is in the directory INPUT. The default "
        "is %(default)s."
    )
    add("--format", choices=["jsonl", "lines", "files"], default="jsonl", help=format_help)
    each_help = "Call the function with one item at a time instead of a list of items."
    add("--each", action="store_true", help=each_help)


def _add_workers(add: Add, what: str) -> None:
    workers_help = f"{what} The default is the number of usable CPU cores."
    add("--workers", type=_number, metavar="N", help=workers_help)


def _add_batch_size(add: Add, default: int, what: str) -> None:
    size_help = f"The largest number of {what} in a batch. The default is %(default)s."
    add("--max-batch-size", type=_number, metavar="N", default=default, help=size_help)


def _add_loop(add: Add) -> None:
    loops = ["auto", "asyncio", "uvloop"]
    loop_help = "The event loop. auto, the default, takes uvloop if it is installed."
    add("--loop", choices=loops, default="auto", help=loop_help)


def _number(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        msg = f"must be a number from 1, not {text!r}"
        raise argparse.ArgumentTypeError(msg)
    return int(text)


def _numbers(text: str) -> list[int]:
    return sorted({_number(number.strip()) for number in text.split(",")})


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
