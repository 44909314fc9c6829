"""The command ``async-batcher demo``: the same work without batching, in threads, in processes.

Every mode runs the same function for as many tasks. Files are read once beforehand, so that no mode
waits for the disk, and the clock of a mode starts when its workers have run some files.
"""

from __future__ import annotations

import ast
import asyncio
import contextlib
import os
import platform
import sys
import sysconfig
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from async_batcher import batched
from async_batcher.cli._cpu_count import cpu_count
from async_batcher.cli._errors import CommandError, message_of
from async_batcher.cli._items import read_error, walk_files
from async_batcher.cli._signals import run_interruptible
from async_batcher.cli._terminal import ProgressReporter, table
from async_batcher.exceptions import AsyncBatchException

if TYPE_CHECKING:
    import argparse
    from collections.abc import AsyncIterator, Awaitable, Callable
    from typing import TypeAlias

    Process: TypeAlias = Callable[[str], Awaitable["FileResult"]]

_TASKS_PER_WORKER = 64
_FILES_TO_START = 2  # for each worker, which starts, and imports what it needs
_NOT_STANDARD = ("site-packages", "dist-packages")  # folders inside the standard library's
_PARSE_ATTEMPTS = 10  # see `_parse`
MODES: dict[str, Literal["thread", "process"] | None] = {
    "without batching": None,
    "threads": "thread",
    "processes": "process",
}
_COLUMNS = "files,MB,seconds,files/s,over threads,cores used,batches,mean size"


class FileResult(NamedTuple):
    """What is in a file. One that cannot be read, decoded or parsed has a result, too."""

    path: str
    is_parsed: bool
    functions: int  # and methods, but not lambdas
    classes: int
    batch_size: int
    cpu_seconds: float  # its share of the batch's


class ModeResult(NamedTuple):
    mode: str
    start_seconds: float
    seconds: float  # from when the workers had started
    results: list[FileResult]


class Workload(NamedTuple):
    root: str
    paths: list[str]
    size: int  # of all files, in bytes
    workers: int
    max_batch_size: int

    @property
    def tasks(self) -> int:
        return min(_TASKS_PER_WORKER * self.workers, len(self.paths))


def analyse_batch(batch: list[str]) -> list[FileResult]:
    """Analyse files, one after the other; what all modes run."""
    started = time.thread_time()
    counts = [(path, *count_definitions(path)) for path in batch]
    share = (time.thread_time() - started) / len(batch)
    return [FileResult(*found, len(batch), share) for found in counts]


def count_definitions(path: str) -> tuple[bool, int, int]:
    """Return whether a file can be parsed, and how many functions and classes it defines."""
    try:
        nodes = list(ast.walk(_parse(Path(path).read_bytes())))  # not recursive: depth is no limit
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return False, 0, 0  # the last two: nested too deeply
    functions = sum(isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) for node in nodes)
    return True, functions, sum(isinstance(node, ast.ClassDef) for node in nodes)


def _parse(source: bytes) -> ast.Module:
    # Some releases of Python 3.11 and 3.12 count the depth of the tree in one place for all
    # threads, and raise if two of them parse at the same time:
    # https://github.com/python/cpython/issues/106905
    for _ in range(_PARSE_ATTEMPTS):
        with contextlib.suppress(SystemError):
            return ast.parse(source)
    return ast.parse(source)


def _be_quiet() -> None:
    """Keep the parser from warning of what it finds in other people's source."""
    warnings.simplefilter("ignore", SyntaxWarning)
    warnings.simplefilter("ignore", DeprecationWarning)  # of an escape, before Python 3.12


@contextlib.asynccontextmanager
async def open_mode(mode: str, load: Workload) -> AsyncIterator[Process]:
    """Start a mode; yield what it does to one file."""
    executor = MODES[mode]
    if executor is None:
        _be_quiet()
        turn = asyncio.Lock()  # one file in each iteration of the loop: Ctrl-C waits for one

        async def process(path: str) -> FileResult:
            async with turn:
                await asyncio.sleep(0)
                return analyse_batch([path])[0]

        yield process
        return
    batcher = batched(
        analyse_batch,
        executor=executor,
        max_workers=load.workers,
        max_batch_size=1,
        setup_worker=_be_quiet,
    )
    async with batcher:
        await batcher.process_many(load.paths[: _FILES_TO_START * load.workers])
        batcher.max_batch_size = load.max_batch_size
        yield batcher


def run_command(arguments: argparse.Namespace) -> int:
    """Run all modes, and print how they compare."""
    workers = arguments.workers or cpu_count()
    load = Workload(*find_files(arguments.path), workers, arguments.max_batch_size)
    with warnings.catch_warnings():  # `_be_quiet` changes the filters of this process, too
        try:
            lines = run_interruptible(lambda _: _compare(load), arguments)
        except AsyncBatchException as exc:
            raise CommandError(message_of(exc), status=1) from exc
    text = "\n".join(lines)
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"  # may lack characters of a path
    print(text.encode(encoding, "backslashreplace").decode(encoding))
    return 0


def find_files(path: str | None) -> tuple[str, list[str], int]:
    """Return the folder, every ``.py`` file below it, and their size; read each file once."""
    root = sysconfig.get_path("stdlib") if path is None else path
    left_out = {"__pycache__", *(_NOT_STANDARD if path is None else ())}
    if not Path(root).is_dir():
        msg = f"{root!r} is not a folder" if Path(root).exists() else f"there is no folder {root!r}"
        raise CommandError(msg)
    depth = len(Path(root).parts)
    try:
        files = [Path(os.fsdecode(path)) for path in walk_files(root)]
    except OSError as exc:
        raise read_error(root, exc) from exc
    paths = []
    size = 0
    for file in files:
        if file.suffix == ".py" and left_out.isdisjoint(file.parts[depth:]):
            paths.append(str(file))
            with contextlib.suppress(OSError):  # it counts as a file that cannot be parsed
                size += len(file.read_bytes())
    if not paths:
        msg = f"there is no Python file in {root!r}"
        raise CommandError(msg)
    return root, paths, size


async def _compare(load: Workload) -> list[str]:
    modes = [await _run_mode(mode, load) for mode in MODES]
    first = modes[0]
    for other in modes[1:]:
        for pair in zip(first.results, other.results, strict=True):
            left, right = (result[:4] for result in pair)
            if left != right:
                names = f"{first.mode!r} and {other.mode!r}"
                msg = f"{names} give different results: {left} and {right}"
                raise CommandError(msg, status=1)
    loop = type(asyncio.get_running_loop()).__module__.partition(".")[0]
    return [f"{load.root}, Python {platform.python_version()}, {loop}", *describe(modes, load)]


async def _run_mode(mode: str, load: Workload) -> ModeResult:
    began = time.perf_counter()
    results: dict[str, FileResult] = {}
    async with contextlib.AsyncExitStack() as stack:
        with contextlib.closing(ProgressReporter()) as reporter:
            reporter.status(f"{mode}: starting")
            process = await stack.enter_async_context(open_mode(mode, load))
        started = time.perf_counter()
        remaining = iter(load.paths)

        async def client() -> None:
            for path in remaining:
                results[path] = await process(path)
                reporter.show(len(results))

        total = len(load.paths)
        with contextlib.closing(ProgressReporter(total, unit="files", title=mode)) as reporter:
            await asyncio.gather(*(client() for _ in range(load.tasks)))
        ended = time.perf_counter()
    return ModeResult(mode, started - began, ended - started, [results[p] for p in load.paths])


def describe(modes: list[ModeResult], load: Workload) -> list[str]:
    """Describe what was compared, how the modes compare, and what was found."""
    count, cores = len(load.paths), cpu_count()
    threads = next(mode.seconds for mode in modes if mode.mode == "threads")
    rows = [["", *_COLUMNS.split(",")]]
    for mode in modes:
        cpu_seconds = sum(result.cpu_seconds for result in mode.results)
        batches = round(sum(1 / result.batch_size for result in mode.results))
        rows.append([
            mode.mode, f"{count:,}", f"{load.size / 1e6:.1f}", f"{mode.seconds:.2f}",
            f"{count / mode.seconds:,.0f}", f"{threads / mode.seconds:.2f} x",
            f"{100 * cpu_seconds / (mode.seconds * cores):.0f} %", f"{batches:,}",
            f"{count / batches:.1f}",
        ])  # fmt: skip
    _, parsed, functions, classes, *_ = zip(*modes[0].results, strict=True)
    starts = ", ".join(f"{mode.mode} {mode.start_seconds:.2f} s" for mode in modes)
    tasks = f"{load.tasks} tasks, each with one file at a time"
    found = f"{sum(functions):,} functions, {sum(classes):,} classes"
    unparsable = parsed.count(False)
    return [
        f"{tasks}; {load.workers} workers on {cores} cores",
        "",
        *table(rows),
        "",
        f"The same results from each: {found}; files that cannot be parsed: {unparsable:,}.",
        f"Start-up, not counted above: {starts}.",
    ]
