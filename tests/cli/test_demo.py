"""The command ``async-batcher demo``: its job, its measurements, its tables, and whole runs."""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections import Counter
from concurrent.futures import BrokenExecutor, Executor, Future, ThreadPoolExecutor
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from async_batcher import cli
from async_batcher.cli._errors import CommandError
from async_batcher.cli.demo.approaches import (
    Approach,
    HandWritten,
    new_approaches,
)
from async_batcher.cli.demo.command import find_files
from async_batcher.cli.demo.compare import (
    Comparison,
    CrashCost,
    Job,
    Speed,
    Timing,
    compare,
    recovery_seconds,
    size_job,
    waiting_share,
)
from async_batcher.cli.demo.job import FileResult, TimedRun, analyse_batch, count_definitions
from async_batcher.cli.demo.report import describe
from async_batcher.exceptions import WorkerDiedError
from tests.support import scripts
from tests.support.terminal import OnTerminal

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterator

OF_JSON = ("__init__.py", "decoder.py", "encoder.py", "scanner.py", "tool.py")
NAMES = ("one core", "threads", "ProcessPoolExecutor", "batcher")
WIDTH = 80


# What is in a file.


def counts_of(folder: Path, source: str | bytes) -> tuple[bool, int, int]:
    """Count what a file with that source defines."""
    file = folder / "source.py"
    file.write_bytes(source if isinstance(source, bytes) else source.encode())
    return count_definitions(str(file))


@pytest.mark.parametrize(
    ("source", "functions", "classes"),
    [
        ("", 0, 0),
        ("def f(): pass", 1, 0),
        ("async def f():\n  async for x in y: pass", 1, 0),
        ("class A:\n  class B:\n    def f(self): return lambda: 1", 1, 2),
        ("def f():\n  if x:\n    def g(): pass", 2, 0),
        ("h = lambda x: x", 0, 0),
        (b"# -*- coding: latin-1 -*-\ndef caf\xe9(): pass\n", 1, 0),
    ],
)
def test_what_is_in_a_file(
    tmp_path: Path, source: str | bytes, functions: int, classes: int
) -> None:
    """Functions, methods and classes are counted at any depth, in the encoding the file declares."""
    assert counts_of(tmp_path, source) == (True, functions, classes)


@pytest.mark.parametrize(
    "source",
    [
        "def",
        "print 'two'",
        "x = 1\0",
        b"x = '\xff'",
        "# coding: no-such-encoding",
        "(" * 1000 + ")" * 1000,
        "-" * 20_000 + "1",
    ],
    ids=["syntax", "python 2", "null byte", "not utf-8", "encoding", "parentheses", "too deep"],
)
def test_a_file_that_cannot_be_parsed_is_counted_as_such(
    tmp_path: Path, source: str | bytes
) -> None:
    """Invalid source raises nothing, and defines nothing."""
    assert counts_of(tmp_path, source) == (False, 0, 0)


def test_a_missing_file_counts_as_one_that_cannot_be_parsed(tmp_path: Path) -> None:
    """A file that was removed after it was found raises nothing."""
    assert count_definitions(str(tmp_path / "missing.py")) == (False, 0, 0)


def test_a_parser_that_mixes_up_its_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file is parsed again if the parser failed because another thread used it, too."""
    file = tmp_path / "fine.py"
    file.write_text("def f(): pass")
    original, failures = ast.parse, iter([SystemError, SystemError])

    def parse(source: bytes) -> ast.Module:
        for error in failures:
            raise error
        return original(source)

    monkeypatch.setattr("async_batcher.cli.demo.job.ast.parse", parse)
    assert count_definitions(str(file)) == (True, 1, 0)


def test_results_say_where_and_when_their_batch_ran(tmp_path: Path) -> None:
    """All results of a batch share its process, its times and its CPU time."""
    file = tmp_path / "source.py"
    file.write_text("def f(): pass")
    one, other = analyse_batch([str(file), str(file)])
    assert one == other
    assert one[:4] == (str(file), True, 1, 0)
    assert one.run.pid == os.getpid()
    assert one.run.began < one.run.ended
    assert one.run.cpu_seconds > 0


# Which files.


@pytest.fixture(name="folder", scope="module")
def _folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 7 small Python files, one invalid and one with a warning, and files to leave out."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "json").mkdir()
    for name in OF_JSON:
        shutil.copy(Path(json.__file__).with_name(name), folder / "json" / name)
    (folder / "broken.py").write_text("def")
    (folder / "warns.py").write_text("x = '\\d'\n")
    (folder / "empty.py").touch()
    (folder / "large.py").write_text("x = 1\n" * 4_000)
    (folder / "not_python.txt").write_text("def")
    (folder / "site-packages").mkdir()
    (folder / "site-packages" / "other.py").write_text("class A: pass")
    (folder / "folder.py").mkdir()
    (folder / "dangling.py").symlink_to("nowhere")
    return folder


def test_which_files_are_parsed(folder: Path) -> None:
    """Small regular ``.py`` files are found, without installed packages."""
    names = [os.path.relpath(path, folder) for path in find_files(str(folder))]
    assert names == ["broken.py", *(f"json{os.sep}{name}" for name in OF_JSON), "warns.py"]


@pytest.mark.slow
def test_the_standard_library_has_files() -> None:
    """There is enough to parse in the standard library; installed packages do not count."""
    root = sysconfig.get_path("stdlib")
    names = {os.path.relpath(path, root) for path in find_files(root)}
    assert len(names) > 300
    assert os.path.join("json", "decoder.py") in names  # noqa: PTH118 - they are text
    assert not any("-packages" in name for name in names)


def test_a_python_without_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line of error, and exit status 2."""
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    assert cli.main(["demo"]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert "no source files of its standard library" in output.err
    assert output.err.count("\n") == 1


# How much work there is.


class Clock:
    """A clock that goes on by a number of seconds whenever it is read, or when it is set."""

    def __init__(self, step: float = 0.0) -> None:
        """Start at 0."""
        self.now = 0.0
        self.step = step

    def __call__(self) -> float:
        """Return the time."""
        self.now += self.step
        return self.now


async def test_one_core_parses_until_its_time_is_over(folder: Path) -> None:
    """The job is as many files as one core parses in that time, in the same order each time."""
    paths = find_files(str(folder))
    job = await size_job(paths, 3.0, Clock(step=1.0))
    assert len(job.found) == 3
    assert list(job.found) == list((await size_job(paths[::-1], 3.0, Clock(step=1.0))).found)
    assert all(job.found[path][1:4] == count_definitions(path) for path in job.found)
    assert set((await size_job(paths, 100.0, Clock(step=1.0))).found) == set(paths)


@pytest.mark.parametrize(("milliseconds", "size"), [(1, 25), (5, 5), (100, 1)])
async def test_a_batch_keeps_one_core_busy_for_25_ms(
    folder: Path, monkeypatch: pytest.MonkeyPatch, milliseconds: int, size: int
) -> None:
    """The batch size depends on the CPU time of a file; it is at least 1."""

    def analyse(batch: list[str]) -> list[FileResult]:
        return [FileResult(path, True, 1, 1, _run(1, 0, 1, milliseconds / 1000)) for path in batch]  # noqa: FBT003 - a row

    monkeypatch.setattr("async_batcher.cli.demo.compare.analyse_batch", analyse)
    assert (await size_job(find_files(str(folder)), 100.0, Clock())).batch_size == size


# What is measured.


counts = functools.cache(count_definitions)


def _run(pid: int, began: float, ended: float, cpu_seconds: float = 0.0) -> TimedRun:
    return TimedRun(pid, 1, began, ended, cpu_seconds)


class Scripted(Approach):
    """Two workers, or one, that finish a batch each every 0.1 s of a `Clock`."""

    def __init__(self, clock: Clock, name: str, workers: int, *, batch_size: int = 5) -> None:
        """Begin with workers whose pids are 1 and 2."""
        super().__init__(name, workers, batch_size)
        self.clock = clock
        self.pids = list(range(1, workers + 1))
        self.killed = 0
        self.replaced_at = 0.0
        self.replacement_time = 0.3
        self.error: type[Exception] = WorkerDiedError
        self.lie = False
        self.turns: list[Counter[str]] = []

    async def __aexit__(self, *_: object) -> None:
        """Leave nothing."""

    def kill(self, pid: int) -> None:
        """Lose the next batch of a worker, which is replaced some time later."""
        self.killed = pid
        self.replaced_at = self.clock.now + self.replacement_time

    async def run(self, files: Iterator[str]) -> AsyncGenerator[FileResult | BaseException, None]:
        """Run batches of all workers side by side."""
        self.turns.append(Counter())
        while True:
            began = self.clock.now
            killed = self.killed  # this batch of it is lost, not the one whose results are read now
            is_missing = len(self.pids) < self.workers
            if is_missing and began >= self.replaced_at - 1e-9:
                self.pids.append(99)
            chunks = {pid: list(islice(files, self._batch_size)) for pid in self.pids}
            if not any(chunks.values()):
                return
            self.clock.now = began + 0.1
            for pid, chunk in chunks.items():
                run = _run(pid, began, began + 0.1, 0.05)
                if pid == killed:
                    self.lost_batches += 1
                    self.pids.remove(pid)
                for path in chunk:
                    self.turns[-1][path] += 1
                    parsed, functions, classes = counts(path)
                    result = FileResult(path, parsed, functions + self.lie, classes, run)
                    yield self.error("gone") if pid == killed else result


class Rig:
    """Measures `Scripted` approaches: one core, threads of one worker, and two processes."""

    def __init__(self, folder: Path) -> None:
        """Make the approaches."""
        self.clock = Clock()
        self.one = Scripted(self.clock, "one core", 1)
        self.threads = Scripted(self.clock, "threads", 1)
        self.two = Scripted(self.clock, "two", 2)
        self.two.has_processes = True
        self.said: list[str] = []
        self.asked: list[tuple[int, int]] = []
        self.paths = find_files(str(folder))

    def make(self, workers: int, batch_size: int) -> list[Approach]:
        """Note what is asked for."""
        self.asked.append((workers, batch_size))
        return [self.one, self.threads, self.two]

    async def compare(self) -> Comparison:
        """Measure with a time of 1 s for each turn."""
        timing = Timing(sizing=1, rounds=2, turn=1.0, before_kill=0.5, after_kill=1.0, recovery=5.0)
        return await compare(
            self.paths, 2, self.said.append, timing,
            make=self.make, clock=self.clock, kill=self.two.kill,
        )  # fmt: skip


@pytest.fixture(name="rig")
def _rig(folder: Path) -> Rig:
    return Rig(folder)


async def test_the_approaches_take_turns(rig: Rig) -> None:
    """In each round all approaches run one after another; then a worker of each is killed."""
    comparison = await rig.compare()
    assert rig.said[1:] == [
        *(f"starting: {name}" for name in ("one core", "threads", "two")),
        *(f"round {n} of 2: {name}" for n in (1, 2) for name in ("one core", "threads", "two")),
        "killing a worker: two",
    ]
    assert rig.asked == [(2, comparison.job.batch_size)]


async def test_the_speed_of_each(rig: Rig) -> None:
    """Files are counted against the time of all turns; batches give the CPU time."""
    comparison = await rig.compare()
    one, _, two = comparison.speeds
    assert [(speed.name, speed.workers) for speed in (one, two)] == [("one core", 1), ("two", 2)]
    assert (one.rate, two.rate) == pytest.approx((50, 100), rel=0.01)
    assert one.seconds == pytest.approx(2.0, abs=0.21)
    assert (len(one.runs), len(two.runs)) == (one.files / 5, two.files / 5)
    assert two.cpu_seconds == pytest.approx(0.05 * len(two.runs))


async def test_all_files_get_their_turn(rig: Rig) -> None:
    """A turn goes on with the files after those of the turn before."""
    await rig.compare()
    counts = sum(rig.one.turns, Counter())
    assert set(counts) == set(rig.paths)
    assert max(counts.values()) - min(counts.values()) <= 1


async def test_the_cost_of_a_crash(rig: Rig) -> None:
    """The lost batches and files are counted, and the time until all workers are busy again."""
    comparison = await rig.compare()
    assert list(comparison.crashes) == ["threads", "two"]
    assert comparison.crashes["threads"] is None
    crash = comparison.crashes["two"]
    assert crash is not None
    assert (crash.batches, crash.files) == (1, 5)
    assert crash.recovery == pytest.approx(0.3)
    assert rig.two.killed in (1, 2)


async def test_workers_that_do_not_come_back(rig: Rig) -> None:
    """The measurement ends, and says that the workers were not busy again."""
    rig.two.replacement_time = float("inf")
    crash = (await rig.compare()).crashes["two"]
    assert crash is not None
    assert crash.recovery is None


async def test_another_error_is_not_the_cost_of_a_crash(rig: Rig) -> None:
    """An exception that does not come from the crash ends the comparison."""
    rig.two.error = ValueError
    with pytest.raises(CommandError, match="two: ValueError: gone") as caught:
        await rig.compare()
    assert caught.value.status == 1


async def test_a_crash_that_was_not_asked_for(rig: Rig) -> None:
    """A crash while the speed is measured ends the comparison."""
    rig.two.killed = 1
    with pytest.raises(CommandError, match="two: WorkerDiedError: gone") as caught:
        await rig.compare()
    assert caught.value.status == 1


async def test_different_results(rig: Rig) -> None:
    """A result that is not that of one core ends the comparison."""
    rig.threads.lie = True
    with pytest.raises(CommandError, match=r"threads: .* different results") as caught:
        await rig.compare()
    assert caught.value.status == 1


@pytest.mark.parametrize(
    ("runs", "expected"),
    [
        ([], None),
        ([_run(1, 0, 9)], None),
        ([_run(1, 0, 9), _run(2, 0, 9)], None),  # both ended before
        ([_run(1, 9, 11), _run(2, 9, 12)], 0),
        ([_run(1, 9, 15), _run(3, 13, 16)], 3),
        ([_run(1, 9, 13), _run(3, 13, 16)], None),  # one after the other
        ([_run(1, 9, 11), _run(4, 15, 18), _run(3, 14, 17), _run(1, 11, 12)], 5),
    ],
)
def test_when_all_workers_are_busy_again(runs: list[TimedRun], expected: float | None) -> None:
    """Two workers are busy as soon as two batches run at the same time after the kill at 10."""
    assert recovery_seconds(runs, 10, 2) == expected


@pytest.mark.parametrize(
    ("runs", "expected"),
    [([_run(1, 0, 9)], None), ([_run(1, 0, 9), _run(2, 13, 14)], 3), ([_run(1, 0, 11)], 0)],
)
def test_when_the_only_worker_is_busy_again(runs: list[TimedRun], expected: float | None) -> None:
    """A batch that ended before the kill does not count."""
    assert recovery_seconds(runs, 10, 1) == expected


@pytest.mark.parametrize(
    ("workers", "cores", "cpu_seconds", "expected"),
    [
        (2, 2, 1.0, 0.0),
        (2, 2, 0.6, 0.4),
        (1, 8, 0.75, 0.25),
        (4, 2, 0.5, 0.0),  # workers that wait for each other
        (4, 2, 0.25, 0.5),
        (2, 2, 1.1, 0.0),  # a coarse clock
    ],
)
def test_the_share_of_time_for_which_batches_wait(
    workers: int, cores: int, cpu_seconds: float, expected: float
) -> None:
    """It is the part of their time that is no CPU time, unless workers are more than cores."""
    runs = {_run(pid, 0, 1, cpu_seconds) for pid in range(workers)}
    speed = Speed("any", workers, 1, 1.0, runs)
    assert waiting_share([speed, speed], cores) == pytest.approx(expected)
    assert waiting_share([], cores) == 0


# How the approaches run.


class Failing(Executor):
    """Breaks with its second call, as a pool does: what is in flight, and every later call."""

    made: list[Failing]

    def __init__(self, workers: int) -> None:
        """Count it."""
        self.workers = workers
        self.pending: list[Future[Any]] = []
        self.is_shut_down = False
        self.made.append(self)

    def submit(self, function: Any, /, *args: Any, **_: Any) -> Future[Any]:
        """Return a future that is pending; the first executor breaks."""
        future: Future[Any] = Future()
        if len(self.made) > 1:
            future.set_result(function(*args))
            return future
        if len(self.pending) == 2:
            raise BrokenExecutor
        self.pending.append(future)
        if len(self.pending) == 2:
            for broken in self.pending:
                broken.set_exception(BrokenExecutor("broken"))
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:  # noqa: ARG002, FBT002 - as the original
        """Note it."""
        self.is_shut_down = True


async def test_an_executor_that_breaks_is_replaced(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By hand: what was in flight is lost, the executor is replaced, and the rest is run."""
    monkeypatch.setattr(Failing, "made", [], raising=False)
    paths = find_files(str(folder))
    async with HandWritten("by hand", 1, 2, Failing) as approach:
        results = [result async for result in approach.run(iter(paths))]
    lost = [result for result in results if isinstance(result, BrokenExecutor)]
    parsed = [result.path for result in results if isinstance(result, FileResult)]
    assert (len(lost), sorted(parsed)) == (4, sorted(paths[4:]))
    assert approach.lost_batches == 2
    assert [(made.workers, made.is_shut_down) for made in Failing.made] == [(1, True), (1, True)]


@pytest.mark.parametrize(
    "name", ["one core", "threads", *(pytest.param(n, marks=pytest.mark.slow) for n in NAMES[2:])]
)
async def test_every_file_once(folder: Path, name: str) -> None:
    """An approach gives one result for each file, from batches that are full, and stops."""
    paths = find_files(str(folder)) * 4
    (approach,) = (each for each in new_approaches(2, 7) if each.name == name)
    async with approach:
        results = [result async for result in approach.run(iter(paths))]
    assert all(isinstance(result, FileResult) for result in results)
    assert Counter(result.path for result in results) == Counter(paths)  # type: ignore[union-attr]
    assert len({result.run for result in results}) == 4  # type: ignore[union-attr]
    assert approach.lost_batches == 0


def test_who_has_processes() -> None:
    """Only a worker process can be killed."""
    approaches = new_approaches(2, 7)
    assert tuple(approach.name for approach in approaches) == NAMES
    assert [approach.has_processes for approach in approaches] == [False, False, True, True]
    assert [approach.workers for approach in approaches] == [1, 2, 2, 2]


@pytest.mark.usefixtures("no_noise")
async def test_a_run_that_is_left_early(folder: Path) -> None:
    """Batches in flight are cancelled or finish; nothing is left."""
    async with HandWritten("threads", 2, 1, ThreadPoolExecutor) as approach:
        results = approach.run(cycle(find_files(str(folder))))
        async with contextlib.aclosing(results):
            async for _ in results:
                break


@pytest.mark.usefixtures("no_noise")
async def test_a_run_that_is_left_when_the_executor_breaks(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exceptions that are not read are not logged."""
    monkeypatch.setattr(Failing, "made", [], raising=False)
    async with HandWritten("by hand", 1, 2, Failing) as approach:
        results = approach.run(iter(find_files(str(folder))))
        async with contextlib.aclosing(results):
            assert isinstance(await anext(results), BrokenExecutor)


# What is printed.


def _speed(name: str, files: int, *, workers: int = 2, cpu_share: float = 1.0) -> Speed:
    runs = {_run(pid, 0, 2.0, 2.0 * cpu_share) for pid in range(workers)}
    return Speed(name, workers, files, 2.0, runs)


def _comparison(*, cpu_share: float = 1.0, scale: int = 1) -> Comparison:
    found = {name: FileResult(name, True, 3 * scale, 1, _run(1, 0, 1)) for name in ("a", "b")}  # noqa: FBT003 - a row
    return Comparison(
        Job(found, 8),
        [
            _speed("one core", 160 * scale, workers=1, cpu_share=cpu_share),
            _speed("threads", 180 * scale, cpu_share=0.5),
            _speed("ProcessPoolExecutor", 380 * scale, cpu_share=cpu_share),
            _speed("batcher", 392 * scale, cpu_share=cpu_share),
        ],
        {
            "threads": None,
            "ProcessPoolExecutor": CrashCost("ProcessPoolExecutor", 4 * scale, 32 * scale, None),
            "batcher": CrashCost("batcher", 1, 8, 0.074),
        },
    )


def _table(lines: list[str], column: str) -> dict[str, list[str]]:
    """Return the rows of the table that has the column, and its head with the key ``""``."""
    start = next(number for number, line in enumerate(lines) if column in line)
    rows = lines[start : lines.index("", start)]
    return {"": re.split(" {2,}", rows[0].strip())} | {
        row[0]: row[1:] for row in (re.split(" {2,}", line) for line in rows[1:])
    }


def test_the_tables() -> None:
    """Each number in the tables is what its column says."""
    lines = describe(_comparison(), workers=2, cores=2, loop="asyncio")
    assert " ".join(lines[:2]).endswith(
        "in batches of 8 files, with 2 workers on 2 cores and asyncio."
    )
    assert _table(lines, "files/s") == {
        "": ["files/s", "against one core", "of all cores"],
        "one core": ["80", "1.00 x", "50 %"],
        "threads": ["90", "1.12 x", "50 %"],
        "ProcessPoolExecutor": ["190", "2.38 x", "100 %"],
        "batcher": ["196", "2.45 x", "100 %"],
    }
    assert _table(lines, "batches lost") == {
        "": ["batches lost", "files lost", "all workers busy after"],
        "threads": ["-", "-", "-"],
        "ProcessPoolExecutor": ["4", "32", "not again"],
        "batcher": ["1", "8", "0.07 s"],
    }
    assert "All gave the same results for 2 files: 6 functions, 2 classes." in lines
    assert not any("busy: batches" in line for line in lines)


def test_a_busy_machine() -> None:
    """A warning beside the figures says for how long batches waited for a core."""
    lines = describe(_comparison(cpu_share=0.7), workers=2, cores=2, loop="asyncio")
    (warning,) = (number for number, line in enumerate(lines) if "The machine is busy" in line)
    assert "batches waited for a core for 30 % of their time." in lines[warning]
    assert lines[warning - 2].startswith("batcher")


@pytest.mark.parametrize("platform", ["linux", "win32"])
@pytest.mark.parametrize(("scale", "workers"), [(1, 1), (10_000, 1_000)])
def test_eighty_columns(
    monkeypatch: pytest.MonkeyPatch, platform: str, scale: int, workers: int
) -> None:
    """No line is longer, also with large numbers; on Windows a note says what is different."""
    monkeypatch.setattr(sys, "platform", platform)
    comparison = _comparison(cpu_share=0.5, scale=scale)
    lines = describe(comparison, workers=workers, cores=workers, loop="asyncio")
    assert max(map(len, lines)) <= WIDTH
    assert ("On Windows" in " ".join(lines)) == (platform == "win32")


# The command as a user runs it.


@pytest.fixture(name="environment", scope="module")
def _environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return an environment that shows every warning, with a bytecode cache of its own."""
    environment = {
        **scripts.environment(),
        "PYTHONWARNINGS": "always",
        "PYTHONPYCACHEPREFIX": str(tmp_path_factory.mktemp("cache")),
    }
    for name in ("PYTHONDONTWRITEBYTECODE", "PYTHONUNBUFFERED"):
        environment.pop(name, None)
    return environment


QUICK = "sizing=0.1, rounds=1, turn=0.1, before_kill=0.05, after_kill=0.05, recovery=60"
ENDLESS = "sizing=0.1, rounds=1000, turn=0.3"


def _command(*arguments: object, timing: str = QUICK, names: tuple[str, ...] = NAMES) -> list[str]:
    program = f"""
import functools, sys
from async_batcher import cli
from async_batcher.cli.demo import approaches, command, compare
def make(workers, batch_size):
    made = approaches.new_approaches(workers, batch_size)
    return [approach for approach in made if approach.name in {names}]
command.TIMING = compare.Timing({timing})
command.compare = functools.partial(compare.compare, make=make)
sys.exit(cli.main(sys.argv[1:]))
"""
    return [sys.executable, "-c", program, "demo", *map(str, arguments)]


@pytest.mark.slow
@pytest.mark.parametrize("loop", ["asyncio", "auto"])
@pytest.mark.parametrize("workers", [1, 3])
def test_a_whole_run(environment: dict[str, str], loop: str, workers: int) -> None:
    """Both tables have a row for each approach; a pipe gets no progress, and no warning is printed."""
    command = _command("--workers", workers, "--loop", loop)
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= WIDTH
    text = " ".join(lines)
    assert f"with {workers} worker{'s' * (workers > 1)} on " in text
    assert "asyncio." in text or (loop == "auto" and "uvloop." in text)
    speeds = _table(lines, "files/s")
    assert tuple(speeds) == ("", *NAMES)
    assert speeds["one core"][1] == "1.00 x"
    crashes = _table(lines, "batches lost")
    assert tuple(crashes) == ("", *NAMES[1:])
    assert crashes["threads"] == ["-", "-", "-"]
    assert int(crashes["ProcessPoolExecutor"][0]) >= 1
    if sys.platform != "win32":
        # The killed worker may have been between two batches.
        assert crashes["batcher"][0] in ("0", "1")
    for name in NAMES[2:]:
        assert re.fullmatch(r"\d+\.\d\d s", crashes[name][2])


@pytest.mark.slow
def test_the_module_runs_it(environment: dict[str, str]) -> None:
    """``python -m async_batcher demo`` is the same command; its help names what it compares."""
    done = subprocess.run(
        [sys.executable, "-m", "async_batcher", "demo", "--help"],
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    )
    assert "ProcessPoolExecutor" in done.stdout


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="a pipe of POSIX")
def test_a_reader_that_closes_the_pipe(environment: dict[str, str]) -> None:
    """The command ends without a message if the reader of its output has closed the pipe."""
    ours, theirs = os.pipe()
    os.close(ours)
    done = subprocess.run(
        _command("--workers", 1),
        stdout=theirs,
        stderr=subprocess.PIPE,
        env=environment,
        check=False,
    )
    os.close(theirs)
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_output_that_cannot_be_written(environment: dict[str, str]) -> None:
    """A full disk is reported in one line."""
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            _command("--workers", 1),
            stdout=full,
            stderr=subprocess.PIPE,
            env=environment,
            check=False,
        )
    assert done.returncode == 1
    assert done.stderr.startswith(b"async-batcher: ")
    assert done.stderr.count(b"\n") == 1


on_terminal = pytest.mark.skipif(sys.platform == "win32", reason="a terminal of POSIX")
has_tqdm = pytest.mark.skipif(importlib.util.find_spec("tqdm") is None, reason="of the extra [cli]")


@pytest.mark.slow
@has_tqdm
@on_terminal
def test_the_progress_on_a_terminal(environment: dict[str, str]) -> None:
    """Each part rewrites one line of the terminal, which is cleared before the tables are printed."""
    with contextlib.closing(OnTerminal(_command("--workers", 1), environment)) as program:
        assert program.end() == 0
    shown = program.shown.decode()
    for name in NAMES:
        assert f"starting: {name}" in shown
        assert f"round 1 of 1: {name}" in shown
        assert (f"killing a worker: {name}" in shown) == (name in NAMES[2:])
    assert "\n" not in shown
    assert shown.endswith("\r")
    assert b"files/s" in program.output
    assert b"\r" not in program.output


@pytest.mark.slow
@has_tqdm
@on_terminal
@pytest.mark.parametrize(
    "stage",
    [
        "one core: how",
        *(f"starting: {name}" for name in NAMES[1:]),
        *(f"round 1 of 1000: {name}" for name in NAMES),
    ],
)
def test_ctrl_c(environment: dict[str, str], stage: str) -> None:
    """Ctrl-C ends any part with status 130 and one word; no process is left or prints anything."""
    command = _command("--workers", 2, timing=ENDLESS)
    with contextlib.closing(OnTerminal(command, environment)) as program:
        program.wait_for(stage.encode())
        program.press_ctrl_c()
        status = program.end()
    assert (status, program.output) == (130, b"")
    assert program.shown.endswith(b"\rasync-batcher: interrupted\r\n")
    assert program.shown.count(b"\n") == 1


@pytest.mark.slow
@has_tqdm
@on_terminal
@pytest.mark.parametrize("name", NAMES[2:])
def test_ctrl_c_while_a_worker_is_replaced(environment: dict[str, str], name: str) -> None:
    """Ctrl-C ends the second part in the same way."""
    timing = "sizing=0.1, rounds=1, turn=0.05, before_kill=0, after_kill=300"
    command = _command("--workers", 2, timing=timing, names=("one core", name))
    with contextlib.closing(OnTerminal(command, environment)) as program:
        program.wait_for(f"killing a worker: {name}".encode())
        program.press_ctrl_c()
        status = program.end()
    assert (status, program.output) == (130, b"")
    assert program.shown.endswith(b"\rasync-batcher: interrupted\r\n")
    assert program.shown.count(b"\n") == 1
