"""The demo: the same work without batching, in threads and in processes, compared.

::

    files --> 64 tasks a worker, each: await ask(path) --> one of _MODES --> _analysis.analyse_batch --> answers, in order
                                                                                                            |
    the table, or JSON <-- one Run for each mode <-- must be equal to those of the other modes <------------'

Rules:

- Every mode runs the same function, called by as many tasks, and is measured in the same way: a batch says how large it was
  and what processor time it took. Files are read once beforehand, so that no mode waits for the disk.
- Start-up is measured by itself: the clock of a mode starts when its workers have run some files.
- Ctrl-C cancels the main task (`asyncio.Runner` sees to that). Processes are killed; a thread looks before each file whether
  it is to stop.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import shutil
import signal
import sys
import sysconfig
import threading
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from async_batcher._analysis import Answer, analyse_batch, be_quiet
from async_batcher._comparison import THREADS, Comparison, Files, Run
from async_batcher._interrupts import start_fork_server
from async_batcher._pool.cpu_count import cpu_count
from async_batcher.batcher import batched
from async_batcher.loops import run

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from contextlib import AbstractAsyncContextManager
    from typing import TextIO, TypeAlias

    from async_batcher import BatchedFunction

    Ask: TypeAlias = Callable[[str], Awaitable[Answer]]

# A file takes 10 ms on average and the largest 0.3 s, so a batch takes some 80 ms: enough that the trip to a worker does not
# count, and little enough that at the end of a run no worker waits long for the others.
DEFAULT_BATCH_SIZE = 8

_TASKS_PER_WORKER = 64
_FILES_TO_START = 2  # for each worker: what has it start, and import what it needs
_NOT_STANDARD = ("site-packages", "dist-packages")  # folders inside the standard library's
_BAR_SECONDS = 0.1  # between two drawings
_BAR_WIDTH = 24


class DemoError(Exception):
    """It cannot be done; the message is one line for the user.

    Attributes:
        status: The exit status of the command.
    """

    def __init__(self, message: str, *, status: int = 2) -> None:
        super().__init__(message)
        self.status = status


class Settings(NamedTuple):
    """What the user asks for.

    Attributes:
        path: A folder; None: the standard library.
        workers: Threads, and processes.
        max_batch_size: Files in a batch at most.
        loop: As for `async_batcher.run`.
        as_json: Print one JSON object instead of a table.
    """

    path: str | None
    workers: int
    max_batch_size: int
    loop: Literal["auto", "asyncio", "uvloop"]
    as_json: bool


def demo(settings: Settings) -> None:
    """Run all modes, and print how they compare.

    Raises:
        DemoError: There is nothing to analyse, or no such loop; or the answers differ.
        AsyncBatchException: A worker process died.
        KeyboardInterrupt: Ctrl-C; everything that was started has ended.
    """
    files = find_files(settings.path)
    with warnings.catch_warnings():  # `be_quiet` alters the filters of this process too
        try:
            loop, runs = run(_main(settings, files), loop=settings.loop)
        except ModuleNotFoundError as exc:  # uvloop
            raise DemoError(str(exc)) from exc
    comparison = Comparison(
        files,
        runs,
        cores=cpu_count(),
        workers=settings.workers,
        tasks=_tasks(settings, files),
        max_batch_size=settings.max_batch_size,
        loop=loop,
    )
    if (difference := comparison.difference()) is not None:
        raise DemoError(difference, status=1)
    text = json.dumps(comparison.figures(), indent=2) if settings.as_json else comparison.text()
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"  # it may lack the characters of a name
    print(text.encode(encoding, "backslashreplace").decode(encoding))


def find_files(path: str | None) -> Files:
    """Every ``.py`` file below a folder, or of the standard library; each is read once.

    Raises:
        DemoError: There is no such folder, or no such file in it.
    """
    root = sysconfig.get_path("stdlib") if path is None else path
    left_out = {"__pycache__", *(_NOT_STANDARD if path is None else ())}
    if not Path(root).is_dir():
        msg = f"{root!r} is not a folder" if Path(root).exists() else f"there is no folder {root!r}"
        raise DemoError(msg)
    paths: list[str] = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in left_out]
        files = (Path(folder, name) for name in names if name.endswith(".py"))
        paths.extend(str(file) for file in files if file.is_file())
    if not paths:
        msg = f"there is no Python file in {root!r}"
        raise DemoError(msg)
    return Files(root, sorted(paths), sum(map(_size, paths)))


def _size(path: str) -> int:
    try:
        return len(Path(path).read_bytes())
    except OSError:  # not ours to read; that it cannot be parsed is an answer too
        return 0


# Each mode gives, when it is entered, the function that one file is handed to.


@contextlib.asynccontextmanager
async def _without_batching(settings: Settings, first: list[str]) -> AsyncIterator[Ask]:  # noqa: ARG001 - as the others
    be_quiet()
    turn = asyncio.Lock()  # one file in each turn of the loop: Ctrl-C, or whatever else the loop has to do, waits for one at most

    async def ask(path: str) -> Answer:
        async with turn:
            await asyncio.sleep(0)
            return analyse_batch([path])[0]

    yield ask


@contextlib.asynccontextmanager
async def _in_threads(settings: Settings, first: list[str]) -> AsyncIterator[Ask]:
    is_stopped = threading.Event()
    analyse = functools.partial(analyse_batch, is_stopped=is_stopped.is_set)
    async with batched(analyse, executor="thread", max_workers=settings.workers, setup_worker=be_quiet) as batcher:
        try:
            await _start(batcher, settings, first)
            yield batcher
        except BaseException:
            is_stopped.set()
            raise


@contextlib.asynccontextmanager
async def _in_processes(settings: Settings, first: list[str]) -> AsyncIterator[Ask]:
    await asyncio.to_thread(start_fork_server)
    async with batched(analyse_batch, executor="process", max_workers=settings.workers, setup_worker=be_quiet) as batcher:
        await _start(batcher, settings, first)
        yield batcher


async def _start(batcher: BatchedFunction[str, Answer], settings: Settings, first: list[str]) -> None:
    """Have every worker started, with some files in batches of one."""
    batcher.max_batch_size = 1
    await asyncio.gather(*map(batcher, first))
    batcher.max_batch_size = settings.max_batch_size


_MODES: dict[str, Callable[[Settings, list[str]], AbstractAsyncContextManager[Ask]]] = {
    "without batching": _without_batching,
    THREADS: _in_threads,
    "processes": _in_processes,
}


async def _main(settings: Settings, files: Files) -> tuple[str, list[Run]]:
    """Run all modes, in a task of its own: from the first Ctrl-C on, while that ends, others are ignored."""
    task = asyncio.create_task(_run_modes(settings, files))
    try:
        await asyncio.wait([task])
    except asyncio.CancelledError:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        raise
    return task.result()


async def _run_modes(settings: Settings, files: Files) -> tuple[str, list[Run]]:
    """The name of the loop, and a run in each mode."""
    loop = type(asyncio.get_running_loop()).__module__.partition(".")[0]
    return loop, [await _run_mode(mode, settings, files) for mode in _MODES]


async def _run_mode(mode: str, settings: Settings, files: Files) -> Run:
    bar = _Bar(mode, len(files.paths), is_shown=_is_terminal(sys.stderr) and not settings.as_json)
    with contextlib.closing(bar):
        began = time.perf_counter()
        async with _MODES[mode](settings, files.paths[: _FILES_TO_START * settings.workers]) as ask:
            started = time.perf_counter()
            answers = await _ask_for_all(ask, files.paths, _tasks(settings, files), bar)
            ended = time.perf_counter()
    return Run(mode, started - began, ended - started, answers)


def _tasks(settings: Settings, files: Files) -> int:
    return min(_TASKS_PER_WORKER * settings.workers, len(files.paths))


async def _ask_for_all(ask: Ask, paths: list[str], tasks: int, bar: _Bar) -> list[Answer]:
    answers: dict[str, Answer] = {}
    waiting = iter(paths)

    async def client() -> None:
        for path in waiting:
            answers[path] = await ask(path)
            bar.advance()

    bar.begin()
    await asyncio.gather(*(client() for _ in range(tasks)))
    return [answers[path] for path in paths]


def _is_terminal(stream: TextIO | None) -> bool:  # None where the program was started without it
    return stream is not None and stream.isatty()


class _Bar:
    """One line on a terminal that shows how far a mode has come.

    Args:
        mode: Its name.
        total: How many files there are.
        is_shown: Whether to show anything.
    """

    def __init__(self, mode: str, total: int, *, is_shown: bool) -> None:
        self._mode = mode
        self._total = total
        self._is_shown = is_shown
        self._done = 0
        self._began = self._drawn = time.perf_counter()
        self._draw("starting")

    def begin(self) -> None:
        """The workers have started."""
        self._began = time.perf_counter()
        self._draw_progress()

    def advance(self) -> None:
        """One more file is done."""
        self._done += 1
        if time.perf_counter() - self._drawn >= _BAR_SECONDS:
            self._draw_progress()

    def close(self) -> None:
        """Leave an empty line."""
        self._draw("")

    def _draw_progress(self) -> None:
        self._drawn = now = time.perf_counter()
        rate = self._done / (now - self._began) if self._done else 0
        filled = "#" * (_BAR_WIDTH * self._done // self._total)
        share = f"{100 * self._done // self._total:3d}%"
        self._draw(f"[{filled:-<{_BAR_WIDTH}}] {share}  {self._done:,} of {self._total:,} files, {rate:,.0f} a second")

    def _draw(self, text: str) -> None:
        if self._is_shown:
            columns = shutil.get_terminal_size().columns
            line = f"{self._mode}: {text}"[: columns - 1] if text else ""
            print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)
