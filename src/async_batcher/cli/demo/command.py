"""The command ``async-batcher demo``: a batcher against threads and a ProcessPoolExecutor.

All run the same job one after another, in rounds; then a worker process of each is killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sysconfig
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from async_batcher.cli._cpu_count import cpu_count
from async_batcher.cli._errors import CommandError, message_of, silenced_logger
from async_batcher.cli._items import read_error, walk_files
from async_batcher.cli._signals import run_interruptible
from async_batcher.cli._terminal import ProgressReporter
from async_batcher.cli.demo.compare import Timing, compare
from async_batcher.cli.demo.job import silence_parser
from async_batcher.cli.demo.report import describe
from async_batcher.exceptions import AsyncBatchException

if TYPE_CHECKING:
    import argparse

TIMING = Timing()

_MAX_FILE_SIZE = 20_000  # bytes; larger ones would make batches of very unequal length
_INSTALLED = {"site-packages", "dist-packages"}  # folders inside the standard library's


def run_command(arguments: argparse.Namespace) -> int:
    """Run the comparison, and print what was measured."""
    paths = find_files(sysconfig.get_path("stdlib"))
    workers = arguments.workers or cpu_count()
    # `silence_parser` changes the filters of this process, where threads and one core parse.
    with warnings.catch_warnings(), silenced_logger():
        silence_parser()
        try:
            lines = run_interruptible(lambda _: _measure(paths, workers), arguments)
        except AsyncBatchException as exc:
            raise CommandError(message_of(exc), status=1) from exc
    print("\n".join(lines))
    return 0


async def _measure(paths: list[str], workers: int) -> list[str]:
    with contextlib.closing(ProgressReporter()) as reporter:
        comparison = await compare(paths, workers, reporter.status, TIMING)
    loop = type(asyncio.get_running_loop()).__module__.partition(".")[0]
    return describe(comparison, workers=workers, cores=cpu_count(), loop=loop)


def find_files(root: str) -> list[str]:
    """Return the small ``.py`` files in a folder and below it, without installed packages.

    Raises:
        CommandError: There is none, or the folder cannot be read.
    """
    depth = len(Path(root).parts)
    try:
        files = [Path(os.fsdecode(path)) for path in walk_files(root)]
        found = [
            str(file)
            for file in files
            if file.suffix == ".py"
            and _INSTALLED.isdisjoint(file.parts[depth:])
            and 0 < file.stat().st_size <= _MAX_FILE_SIZE
        ]
    except OSError as exc:
        raise read_error(root, exc) from exc
    if not found:
        msg = f"this Python has no source files of its standard library in {root!r}"
        raise CommandError(msg)
    return found
