"""The two parts of the demo: rounds in which approaches take turns, and crashes of a worker.

::

    files, again and again --> Approach.run, for some time --> results --> Speed, CrashCost
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
import os
import random
import signal
import time
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from async_batcher._serialization.exception_text import one_line
from async_batcher.cli._errors import CommandError
from async_batcher.cli.demo.approaches import CRASHES, new_approaches
from async_batcher.cli.demo.job import analyse_batch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from async_batcher.cli.demo.approaches import Approach
    from async_batcher.cli.demo.job import FileResult, TimedRun

# A batch takes so many seconds on one core: it hides the trip to a worker, and the last batches of
# a round, which leave some workers idle, count for little.
_BATCH_SECONDS = 0.025

_CHECK_SECONDS = 0.5  # between looks at whether the workers are busy again


class Timing(NamedTuple):
    """How long each part takes, in seconds."""

    sizing: float = 1.0
    rounds: int = 4
    turn: float = 0.6  # of each approach, in each round
    before_kill: float = 0.5
    after_kill: float = 1.3  # at least
    recovery: float = 10.0  # at most
    start: float = 30.0  # at most, until every worker has run a batch


class Job(NamedTuple):
    """The files that one core parses in ``Timing.sizing``, and what is in them."""

    found: dict[str, FileResult]
    batch_size: int


@dataclass
class Speed:
    """What an approach did in all its rounds."""

    name: str
    workers: int
    files: int = 0
    seconds: float = 0.0
    runs: set[TimedRun] = field(default_factory=set)

    @property
    def rate(self) -> float:
        return self.files / self.seconds

    @property
    def cpu_seconds(self) -> float:
        return sum(run.cpu_seconds for run in self.runs)


@dataclass
class CrashCost:
    """What an approach lost when one of its workers was killed.

    Attributes:
        recovery: Seconds from the kill until all workers ran a batch at once. None: they did not.
    """

    name: str
    batches: int
    files: int
    recovery: float | None


@dataclass
class Comparison:
    """Everything that was measured.

    Attributes:
        speeds: Of each approach; the first is one core.
        crashes: Of each approach except the first. None: its workers are not processes.
    """

    job: Job
    speeds: list[Speed]
    crashes: dict[str, CrashCost | None]


async def size_job(paths: Iterable[str], seconds: float, clock: Callable[[], float]) -> Job:
    """Parse files in random order, always the same, until the time is over."""
    shuffled = sorted(paths)
    random.Random(0).shuffle(shuffled)  # noqa: S311 - files of one package are alike
    end = clock() + seconds
    found: dict[str, FileResult] = {}
    for path in shuffled:
        found[path] = analyse_batch([path])[0]
        if clock() >= end:
            break
        await asyncio.sleep(0)  # Ctrl-C waits for one file
    cpu_seconds = sum(result.run.cpu_seconds for result in found.values())
    return Job(found, max(1, round(_BATCH_SECONDS * len(found) / max(cpu_seconds, 1e-6))))


def _kill(pid: int) -> None:
    os.kill(pid, getattr(signal, "SIGKILL", signal.SIGTERM))  # on Windows, SIGTERM is as hard


async def compare(
    paths: Iterable[str],
    workers: int,
    say: Callable[[str], object],
    timing: Timing = Timing(),  # noqa: B008 - immutable
    *,
    make: Callable[[int, int], list[Approach]] = new_approaches,
    clock: Callable[[], float] = time.perf_counter,
    kill: Callable[[int], object] = _kill,
) -> Comparison:
    """Measure the speed of all approaches, and what the crash of a worker costs them.

    Args:
        paths: The files to choose from.
        workers: Threads and processes of each approach.
        say: Gets what is being done.
        timing: How long each part takes.
        make: Makes the approaches, for a number of workers and a batch size.
        clock: The clock of `TimedRun`.
        kill: Kills a process.

    Raises:
        CommandError: A result is wrong or an exception.
    """
    say("one core: how many files it parses in a second")
    job = await size_job(paths, timing.sizing, clock)
    async with contextlib.AsyncExitStack() as stack:
        meter = _Meter(job, timing, clock)
        approaches = make(workers, job.batch_size)
        for approach in approaches:
            say(f"starting: {approach.name}")
            await stack.enter_async_context(approach)
            await meter.warm_up(approach)
        speeds = [Speed(approach.name, approach.workers) for approach in approaches]
        for number in range(1, timing.rounds + 1):
            for approach, speed in zip(approaches, speeds, strict=True):
                say(f"round {number} of {timing.rounds}: {approach.name}")
                await meter.measure(approach, speed)
        crashes: dict[str, CrashCost | None] = {}
        for approach in approaches[1:]:
            crashes[approach.name] = None
            if approach.has_processes:
                say(f"killing a worker: {approach.name}")
                crashes[approach.name] = await meter.crash(approach, kill)
    return Comparison(job, speeds, crashes)


class _Meter:
    """Passes files to approaches, and checks their results."""

    def __init__(self, job: Job, timing: Timing, clock: Callable[[], float]) -> None:
        self._job = job
        self._timing = timing
        self._clock = clock
        # Each approach goes on where it stopped, so that all of them get all files.
        self._next_files = defaultdict[str, "Iterator[str]"](lambda: itertools.cycle(job.found))

    async def warm_up(self, approach: Approach) -> None:
        """Keep an approach busy until each of its workers has run a batch."""
        seen: set[tuple[int, int]] = set()
        end = self._clock() + self._timing.start

        def is_over() -> bool:
            return len(seen) >= approach.workers or self._clock() >= end

        async with contextlib.aclosing(approach.run(self._files(approach, is_over))) as results:
            async for result in results:
                run = self._checked(approach, result).run
                seen.add((run.pid, run.thread))

    async def measure(self, approach: Approach, speed: Speed) -> None:
        began = self._clock()
        end = began + self._timing.turn
        files = self._files(approach, lambda: self._clock() >= end)
        async with contextlib.aclosing(approach.run(files)) as results:
            async for result in results:
                speed.runs.add(self._checked(approach, result).run)
                speed.files += 1
        speed.seconds += self._clock() - began

    async def crash(self, approach: Approach, kill: Callable[[int], object]) -> CrashCost:
        """Kill a worker that runs a batch; go on until all workers do so again."""
        timing, workers = self._timing, approach.workers
        began = self._clock()
        killed_at: float | None = None
        next_check = 0.0
        runs: set[TimedRun] = set()
        crash = CrashCost(approach.name, 0, 0, None)

        def is_over() -> bool:
            nonlocal next_check
            now = self._clock()
            if killed_at is None:
                return now >= began + timing.recovery
            if now < next_check:
                return False
            next_check = now + _CHECK_SECONDS
            crash.recovery = recovery_seconds(runs, killed_at, workers)
            return crash.recovery is not None or now >= killed_at + timing.recovery

        async with contextlib.aclosing(approach.run(self._files(approach, is_over))) as results:
            async for result in results:
                if isinstance(result, CRASHES):
                    crash.files += 1
                    continue
                run = self._checked(approach, result).run
                runs.add(run)
                if killed_at is None and self._clock() >= began + timing.before_kill:
                    # The worker has begun its next batch by now: kill it in the middle.
                    await asyncio.sleep((run.ended - run.began) / 2)
                    killed_at = self._clock()
                    next_check = killed_at + timing.after_kill
                    kill(run.pid)
        crash.batches = approach.lost_batches
        return crash

    def _files(self, approach: Approach, is_over: Callable[[], bool]) -> Iterator[str]:
        files = self._next_files[approach.name]
        while not is_over():
            yield next(files)

    def _checked(self, approach: Approach, result: FileResult | BaseException) -> FileResult:
        if isinstance(result, BaseException):
            msg = f"{approach.name}: {one_line(result)}"
            raise CommandError(msg, status=1) from result
        expected = self._job.found[result.path]
        if result[:4] != expected[:4]:
            msg = f"{approach.name}: {result[:4]} instead of {expected[:4]}: different results"
            raise CommandError(msg, status=1)
        return result


def recovery_seconds(runs: Iterable[TimedRun], killed_at: float, workers: int) -> float | None:
    """Return the seconds from the kill until so many batches ran at the same time."""
    ends: list[float] = []  # of batches that ran at that time
    for run in sorted(runs, key=lambda run: run.began):
        if run.ended <= killed_at:
            continue
        now = max(run.began, killed_at)
        while ends and ends[0] <= now:
            heapq.heappop(ends)
        heapq.heappush(ends, run.ended)
        if len(ends) >= workers:
            return now - killed_at
    return None


def waiting_share(speeds: Iterable[Speed], cores: int) -> float:
    """Return the share of their time for which batches waited for a core that others used.

    More workers than cores wait for each other; that is not counted.
    """
    cpu_seconds = expected = 0.0
    for speed in speeds:
        cpu_seconds += speed.cpu_seconds
        share = min(1.0, cores / speed.workers)
        expected += share * sum(run.ended - run.began for run in speed.runs)
    return max(0.0, 1 - cpu_seconds / expected) if expected else 0.0
