"""The command ``async-batcher demo``: the same work without batching, in threads, in processes.

::

    files --> 64 tasks a worker: await process(path) --> a mode: analyse_batch --> results
                                                                                      |
    the table <-- a ModeResult for each mode, all with the same reports <-------------'

Every mode runs the same function for as many tasks. Files are read once beforehand, so that no mode
waits for the disk, and the clock of a mode starts when its workers have run some files.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import platform
import sys
import sysconfig
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from async_batcher import batched
from async_batcher.cli._cpu_count import cpu_count
from async_batcher.cli._errors import CommandError
from async_batcher.cli._signals import ignored_signals, run_interruptible
from async_batcher.cli._terminal import ProgressReporter, table
from async_batcher.cli.demo.analysis import FileResult, analyse_batch, be_quiet
from async_batcher.exceptions import AsyncBatchException

if TYPE_CHECKING:
    import argparse
    from collections.abc import AsyncIterator, Awaitable, Callable
    from contextlib import AbstractAsyncContextManager
    from typing import Literal, TypeAlias

    from async_batcher.cli._signals import Interruptible

    Process: TypeAlias = Callable[[str], Awaitable[FileResult]]

_TASKS_PER_WORKER = 64
_FILES_TO_START = 2  # for each worker, which starts, and imports what it needs
_NOT_STANDARD = ("site-packages", "dist-packages")  # folders inside the standard library's


class SourceFiles(NamedTuple):
    root: str
    paths: list[str]
    size: int  # of all files, in bytes


class ModeResult(NamedTuple):
    mode: str
    start_seconds: float
    seconds: float  # from when the workers had started
    results: list[FileResult]


class Demo:
    """A run over some files; ``modes`` has, for each mode, what gives its function for one file."""

    def __init__(self, files: SourceFiles, workers: int, max_batch_size: int) -> None:
        self.files = files
        self.modes: dict[str, Callable[[], AbstractAsyncContextManager[Process]]] = {
            "without batching": self._without_batching,
            "threads": lambda: self._batched("thread"),
            "processes": lambda: self._batched("process"),
        }
        self._workers = workers
        self._max_batch_size = max_batch_size
        self._tasks = min(_TASKS_PER_WORKER * workers, len(files.paths))
        self._loop = ""

    async def run(self, _: Interruptible) -> list[ModeResult]:
        self._loop = type(asyncio.get_running_loop()).__module__.partition(".")[0]
        return [await self._run_mode(mode) for mode in self.modes]

    def describe(self, modes: list[ModeResult]) -> list[str]:
        """Describe what was compared, how the modes compare, and what was found."""
        count, cores = len(self.files.paths), cpu_count()
        threads = next(mode.seconds for mode in modes if mode.mode == "threads")
        head = "files,MB,seconds,files/s,over threads,cores used,batches,mean size"
        rows = [["", *head.split(",")]]
        for mode in modes:
            cpu_seconds = sum(result.cpu_seconds for result in mode.results)
            batches = round(sum(1 / result.batch_size for result in mode.results))
            rows.append([
                mode.mode, f"{count:,}", f"{self.files.size / 1e6:.1f}", f"{mode.seconds:.2f}",
                f"{count / mode.seconds:,.0f}", f"{threads / mode.seconds:.2f} x",
                f"{100 * cpu_seconds / (mode.seconds * cores):.0f} %", f"{batches:,}",
                f"{count / batches:.1f}",
            ])  # fmt: skip
        reports = [result.report for result in modes[0].results]
        functions, classes = sum(r.functions for r in reports), sum(r.classes for r in reports)
        unparsable = sum(not report.is_parsed for report in reports)
        starts = ", ".join(f"{mode.mode} {mode.start_seconds:.2f} s" for mode in modes)
        tasks = f"{self._tasks} tasks, each with one file at a time"
        found = f"{functions:,} functions, {classes:,} classes"
        return [
            f"{self.files.root}, Python {platform.python_version()}, {self._loop}",
            f"{tasks}; {self._workers} workers on {cores} cores",
            "",
            *table(rows),
            "",
            f"The same results from each: {found}; files that cannot be parsed: {unparsable:,}.",
            f"Start-up, not counted above: {starts}.",
        ]

    @contextlib.asynccontextmanager
    async def _without_batching(self) -> AsyncIterator[Process]:
        be_quiet()
        turn = asyncio.Lock()  # one file in each iteration of the loop: Ctrl-C waits for one

        async def process(path: str) -> FileResult:
            async with turn:
                await asyncio.sleep(0)
                return analyse_batch([path])[0]

        yield process

    @contextlib.asynccontextmanager
    async def _batched(self, executor: Literal["thread", "process"]) -> AsyncIterator[Process]:
        batcher = batched(
            analyse_batch,
            executor=executor,
            max_workers=self._workers,
            max_batch_size=1,
            setup_worker=be_quiet,
        )
        async with batcher:
            await batcher.process_many(self.files.paths[: _FILES_TO_START * self._workers])
            batcher.max_batch_size = self._max_batch_size
            yield batcher

    async def _run_mode(self, mode: str) -> ModeResult:
        began = time.perf_counter()
        async with contextlib.AsyncExitStack() as stack:
            with contextlib.closing(ProgressReporter()) as reporter:
                reporter.status(f"{mode}: starting")
                process = await stack.enter_async_context(self.modes[mode]())
            started = time.perf_counter()
            results: dict[str, FileResult] = {}
            remaining = iter(self.files.paths)

            async def client() -> None:
                for path in remaining:
                    results[path] = await process(path)
                    reporter.show(len(results))

            total = len(self.files.paths)
            with contextlib.closing(ProgressReporter(total, unit="files", title=mode)) as reporter:
                await asyncio.gather(*(client() for _ in range(self._tasks)))
            ended = time.perf_counter()
        in_order = [results[path] for path in self.files.paths]
        return ModeResult(mode, started - began, ended - started, in_order)


def run_command(arguments: argparse.Namespace) -> int:
    """Run all modes, and print how they compare.

    Raises:
        CommandError: There is nothing to parse, results differ, or a worker crashed.
    """
    files = find_files(arguments.path)
    demo = Demo(files, arguments.workers or cpu_count(), arguments.max_batch_size)
    with warnings.catch_warnings():  # `be_quiet` changes the filters of this process, too
        try:
            modes = run_interruptible(demo.run, loop=arguments.loop, ignored=ignored_signals())
        except AsyncBatchException as exc:
            raise CommandError(" ".join(str(exc).split()), status=1) from exc
    for mode in modes[1:]:
        for left, right in zip(modes[0].results, mode.results, strict=True):
            if left.report != right.report:
                names = f"{modes[0].mode!r} and {mode.mode!r}"
                msg = f"{names} give different results: {left.report} and {right.report}"
                raise CommandError(msg, status=1)
    text = "\n".join(demo.describe(modes))
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"  # may lack characters of a path
    print(text.encode(encoding, "backslashreplace").decode(encoding))
    return 0


def find_files(path: str | None) -> SourceFiles:
    """Find every ``.py`` file below a folder, or of the standard library, and read it once.

    Raises:
        CommandError: There is no such folder, or no such file in it.
    """
    root = sysconfig.get_path("stdlib") if path is None else path
    left_out = {"__pycache__", *(_NOT_STANDARD if path is None else ())}
    if not Path(root).is_dir():
        msg = f"{root!r} is not a folder" if Path(root).exists() else f"there is no folder {root!r}"
        raise CommandError(msg)
    paths: list[str] = []
    size = 0
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in left_out]
        files = (Path(folder, name) for name in names if name.endswith(".py"))
        for file in filter(Path.is_file, files):
            paths.append(str(file))
            with contextlib.suppress(OSError):  # it counts as a file that cannot be parsed
                size += len(file.read_bytes())
    if not paths:
        msg = f"there is no Python file in {root!r}"
        raise CommandError(msg)
    return SourceFiles(root, sorted(paths), size)
