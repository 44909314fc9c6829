"""What the demo prints: two tables, and what to know about them, in lines of 80 columns."""

from __future__ import annotations

import platform
import sys
import textwrap
from typing import TYPE_CHECKING

from async_batcher.cli._terminal import table
from async_batcher.cli.demo.compare import waiting_share

if TYPE_CHECKING:
    from async_batcher.cli.demo.compare import Comparison, CrashCost, Speed

_COLUMNS = 80

# The share of time for which batches waited for a core. On an idle machine it is below 3 %: the
# event loop, which hands out the batches, uses as much of the cores.
_BUSY_SHARE = 0.1

_SPEED_HEAD = ["", "files/s", "against one core", "of all cores"]
_CRASH_HEAD = ["", "batches lost", "files lost", "all workers busy after"]


def describe(comparison: Comparison, *, workers: int, cores: int, loop: str) -> list[str]:
    """Describe what was measured.

    Args:
        comparison: The measurements.
        workers: Threads or processes of each approach.
        cores: The cores that this process may use.
        loop: The name of the event loop.
    """
    found = comparison.job.found.values()
    functions, classes = sum(file.functions for file in found), sum(file.classes for file in found)
    job = (
        f"The job: count functions and classes in source files of Python "
        f"{platform.python_version()}, in batches of {_count(comparison.job.batch_size, 'file')}, "
        f"with {_count(workers, 'worker')} on {_count(cores, 'core')} and {loop}."
    )
    same = (
        f"All gave the same results for {_count(len(found), 'file')}: {functions:,} functions, "
        f"{classes:,} classes."
    )
    speeds = [_speed_row(speed, comparison.speeds[0], cores) for speed in comparison.speeds]
    crashes = [_crash_row(*named) for named in comparison.crashes.items()]
    killed = "Then one worker process of each was killed while it ran a batch:"
    return [
        *_wrap(job),
        "",
        *table([_SPEED_HEAD, *speeds]),
        "",
        *_busy_warning(comparison, cores),
        *_wrap(same),
        "",
        *_wrap(killed),
        "",
        *table([_CRASH_HEAD, *crashes]),
        "",
        *_wrap(_notes()),
    ]


def _speed_row(speed: Speed, one_core: Speed, cores: int) -> list[str]:
    return [
        speed.name,
        f"{speed.rate:,.0f}",
        f"{speed.rate / one_core.rate:.2f} x",
        f"{100 * speed.cpu_seconds / (speed.seconds * cores):.0f} %",
    ]


def _crash_row(name: str, crash: CrashCost | None) -> list[str]:
    if crash is None:
        return [name, "-", "-", "-"]
    recovery = "not again" if crash.recovery is None else f"{crash.recovery:.2f} s"
    return [name, f"{crash.batches:,}", f"{crash.files:,}", recovery]


def _busy_warning(comparison: Comparison, cores: int) -> list[str]:
    share = waiting_share((s for s in comparison.speeds if s.name != "threads"), cores)
    if share <= _BUSY_SHARE:
        return []
    warning = (
        f"The machine is busy: batches waited for a core for {100 * share:.0f} % of their time. "
        "Take these figures with care, or measure again when it is idle."
    )
    return _wrap(warning)


def _notes() -> str:
    notes = (
        "Lost batches raised an exception in the caller. The last column is the time until all "
        "workers ran a batch at once again. A thread cannot be killed. ProcessPoolExecutor is used "
        "with run_in_executor and two batches per worker in flight; after BrokenProcessPool, the "
        "caller makes a new pool."
    )
    if sys.platform == "win32":
        notes += " On Windows the batcher uses a ProcessPoolExecutor, too, and loses as much."
    return notes


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _wrap(text: str) -> list[str]:
    return textwrap.wrap(text, _COLUMNS)
