"""Arrivals at planned times (an open loop): waits below the capacity, and results above it.

A seeded Poisson process plans the times. Every wait is counted from the planned time, so that a
client that starts late, because the program was busy, has waited since its planned time.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from typing import TYPE_CHECKING, Any

from benchmarks.libraries.base import check
from benchmarks.scenarios import workloads
from benchmarks.scenarios.front_end import warm_up
from benchmarks.scenarios.memory import resident, trim

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from benchmarks.libraries.base import BatcherAdapter

    Load = dict[str, Any]

CLIENTS_PER_WORKER = 48  # to measure the capacity: three full batches each
START_TIMEOUT = 60.0  # seconds for the workers to start
DRAIN_SECONDS = 1.0  # after the last arrival; a pending client counts with its wait so far
QUANTILES = {"p50_seconds": 0.5, "p95_seconds": 0.95, "p99_seconds": 0.99, "p999_seconds": 0.999}


async def capacity(batcher: BatcherAdapter, load: Load) -> dict[str, float]:
    """Count items per second while there are always enough of them (a closed loop)."""
    workload, numbers = workloads.find(load), itertools.count()
    await warm_up(batcher, load)
    done = 0
    # Counting starts after the first results, and does not wait for the last ones.
    counted_from = time.perf_counter() + load["settle"] / 4
    end = counted_from + load["settle"]

    async def client() -> None:
        nonlocal done
        while time.perf_counter() < end:
            item = workload.item(next(numbers))
            check(await batcher.process(item) == workload.result(item))
            done += counted_from <= time.perf_counter() < end

    await asyncio.gather(*[client() for _ in range(CLIENTS_PER_WORKER * load["workers"])])
    per_second = done / load["settle"]
    return {"seconds_per_item": 1 / per_second, "per_second": per_second}


async def latency(batcher: BatcherAdapter, load: Load) -> dict[str, float]:
    """Measure the quantiles of the waits at ``per_second`` arrivals, below the capacity."""
    workload = workloads.find(load)
    await warm_up(batcher, load)
    waits: list[float] = []
    pending = 0

    async def client(number: int, planned: float) -> None:
        nonlocal pending
        item = workload.item(number)
        try:
            check(await batcher.process(item) == workload.result(item))
        except asyncio.CancelledError:
            pending += 1
        waits.append(time.perf_counter() - planned)

    arrivals = _Arrivals()
    await arrivals.start(client, load["per_second"], load)
    await arrivals.finish(DRAIN_SECONDS)
    waits.sort()
    count = len(waits)
    # A quantile needs at least one wait above it.
    known = {name: share for name, share in QUANTILES.items() if count * (1 - share) >= 1}
    return {
        **{name: waits[int(share * count)] for name, share in known.items()},
        "arrivals": float(count),
        "unanswered": float(pending),
    }


async def overload(batcher: BatcherAdapter, load: Load) -> dict[str, float]:
    """Count results in time at a multiple of the capacity.

    A result counts if it arrives within ``patience`` seconds of the item's planned time. The
    client of a later result has given up, but a batcher without deadlines cannot know.
    """
    workload, possible = workloads.find(load), load["capacity"]
    await _warm_up(batcher, load)
    in_time = [0] * load["seconds"]
    memory: list[float] = []
    late = failed = 0
    trim()
    began = time.perf_counter()
    before = resident()

    async def client(number: int, planned: float) -> None:
        nonlocal late, failed
        while len(memory) < min(load["seconds"] - 1, int(planned - began)):
            memory.append((resident() - before) / 1e6)
        item = workload.item(number)
        try:
            result = await batcher.process(item)
        except (Exception, asyncio.CancelledError):  # noqa: BLE001 - expired, refused or stopped
            failed += 1
            return
        check(result == workload.result(item))
        second = int(time.perf_counter() - began)
        if time.perf_counter() - planned <= load["patience"] and second < load["seconds"]:
            in_time[second] += 1
        else:
            late += 1

    arrivals = _Arrivals()
    await arrivals.start(client, load["times_capacity"] * possible, load)
    memory.append((resident() - before) / 1e6)
    await arrivals.finish()
    good = sum(in_time)
    return {
        "seconds_per_good_item": load["seconds"] / max(1, good),
        "goodput": good / (possible * load["seconds"]),
        "late": float(late),
        "unanswered": float(failed),
        "memory_growth": memory[-1] - memory[0],
        **{f"good_{second}": count / possible for second, count in enumerate(in_time)},
        **{f"memory_{second}": grown for second, grown in enumerate(memory)},
    }


async def _warm_up(batcher: BatcherAdapter, load: Load) -> None:
    """Warm up although the first items may expire while the workers start."""
    end = time.perf_counter() + START_TIMEOUT
    while True:
        try:
            return await warm_up(batcher, load)
        except TimeoutError:
            if time.perf_counter() > end:
                raise


class _Arrivals:
    """The tasks of clients that have arrived. An error of one is raised at the end."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()
        self._errors: list[BaseException] = []

    async def start(
        self,
        client: Callable[[int, float], Coroutine[Any, Any, None]],
        per_second: float,
        load: Load,
    ) -> None:
        """Start a client at each planned time; each gets its number and that time."""
        plan = random.Random(load["seed"])  # noqa: S311 - arrivals
        planned, number = time.perf_counter(), 0
        end = planned + load["seconds"]
        while planned < end:
            await asyncio.sleep(max(0.0, planned - time.perf_counter()))
            now = min(end, time.perf_counter())
            while planned < now:
                task = asyncio.create_task(client(number, planned))
                self._tasks.add(task)
                task.add_done_callback(self._on_done)
                planned += plan.expovariate(per_second)
                number += 1

    async def finish(self, drain: float = 0.0) -> None:
        """Wait up to ``drain`` seconds for pending clients, and cancel the others."""
        if self._tasks and drain:
            await asyncio.wait(self._tasks, timeout=drain)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._errors:
            raise self._errors[0]

    def _on_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._errors.append(error)
