"""Arrivals that nobody holds back (an open loop): what callers wait for below the capacity, and what becomes of them above it.

The times are planned ahead, by a seeded Poisson process, and every wait is counted from the planned time: who comes late because
the program was busy has waited from when he would have come.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from typing import TYPE_CHECKING, Any

import _jobs
from _front_end import warm_up
from _memory import give_back, resident
from _rival import check

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from _rival import Front

    Load = dict[str, Any]

_PER_WORKER = 48  # clients at a time for each worker, to see what can be done at most: three times as many items as it takes
_PATIENCE = 60.0  # seconds for the workers to start
_DRAIN = 1.0  # seconds after the last arrival for the last answers; who has none by then counts with what he has waited
_QUANTILES = {"p50_seconds": 0.5, "p95_seconds": 0.95, "p99_seconds": 0.99, "p999_seconds": 0.999}


async def capacity(front: Front, load: Load) -> dict[str, float]:
    """Items that are processed in a second when there are always enough of them (a closed loop)."""
    job, numbers = _jobs.find(load), itertools.count()
    await warm_up(front, load)
    done = 0
    middle = time.perf_counter() + load["settle"] / 4  # until the first have been answered, and the last ones are not waited for
    end = middle + load["settle"]

    async def client() -> None:
        nonlocal done
        while time.perf_counter() < end:
            item = job.item(next(numbers))
            check(await front.process(item) == job.answer(item))
            done += middle <= time.perf_counter() < end

    await asyncio.gather(*[client() for _ in range(_PER_WORKER * load["workers"])])
    per_second = done / load["settle"]
    return {"seconds_per_item": 1 / per_second, "per_second": per_second}


async def latency(front: Front, load: Load) -> dict[str, float]:
    """So many arrivals a second, below the capacity: the quantiles of the waits."""
    job = _jobs.find(load)
    await warm_up(front, load)
    waits: list[float] = []
    unanswered = 0

    async def client(number: int, planned: float) -> None:
        nonlocal unanswered
        item = job.item(number)
        try:
            check(await front.process(item) == job.answer(item))
        except asyncio.CancelledError:
            unanswered += 1
        waits.append(time.perf_counter() - planned)

    clients = _Clients()
    await clients.arrive(client, load["per_second"], load)
    await clients.leave(_DRAIN)
    waits.sort()
    return {
        **{name: waits[int(share * len(waits))] for name, share in _QUANTILES.items() if len(waits) * (1 - share) >= 1},
        "arrivals": float(len(waits)),
        "unanswered": float(unanswered),
    }


async def overload(front: Front, load: Load) -> dict[str, float]:
    """Arrivals at so many times the capacity, from clients who wait for so long and no longer: what comes in time.

    An answer counts if it is there within ``patience`` of the time that the item was planned to be sent at. A client who has
    had none by then has gone, which a batcher without deadlines is not told.
    """
    job, can = _jobs.find(load), load["capacity"]
    await _warm_up(front, load)
    in_time = [0] * load["seconds"]
    memory: list[float] = []
    late = unanswered = 0
    give_back()
    began = time.perf_counter()
    before = resident()

    async def client(number: int, planned: float) -> None:
        nonlocal late, unanswered
        while len(memory) < min(load["seconds"] - 1, int(planned - began)):
            memory.append((resident() - before) / 1e6)
        item = job.item(number)
        try:
            answer = await front.process(item)
        except (Exception, asyncio.CancelledError):  # noqa: BLE001 - a deadline, a full queue, the end
            unanswered += 1
            return
        check(answer == job.answer(item))
        second = int(time.perf_counter() - began)
        if time.perf_counter() - planned <= load["patience"] and second < load["seconds"]:
            in_time[second] += 1
        else:
            late += 1

    clients = _Clients()
    await clients.arrive(client, load["times_capacity"] * can, load)
    memory.append((resident() - before) / 1e6)
    await clients.leave()
    good = sum(in_time)
    return {
        "seconds_per_good_item": load["seconds"] / max(1, good),
        "goodput": good / (can * load["seconds"]),
        "late": float(late),
        "unanswered": float(unanswered),
        "memory_growth": memory[-1] - memory[0],
        **{f"good_{second}": count / can for second, count in enumerate(in_time)},
        **{f"memory_{second}": grown for second, grown in enumerate(memory)},
    }


async def _warm_up(front: Front, load: Load) -> None:
    """As `warm_up`, where items have deadlines, which the first ones may miss while the workers start."""
    end = time.perf_counter() + _PATIENCE
    while True:
        try:
            return await warm_up(front, load)
        except TimeoutError:
            if time.perf_counter() > end:
                raise


class _Clients:
    """Those who have come and have not ended; what went wrong for any of them is raised in the end."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()
        self._failures: list[BaseException] = []

    async def arrive(self, client: Callable[[int, float], Coroutine[Any, Any, None]], per_second: float, load: Load) -> None:
        """Start a client at each planned time, given its number and that time, until the time is over."""
        plan = random.Random(load["seed"])  # noqa: S311 - arrivals
        planned, number = time.perf_counter(), 0
        end = planned + load["seconds"]
        while planned < end:
            await asyncio.sleep(max(0.0, planned - time.perf_counter()))
            now = min(end, time.perf_counter())
            while planned < now:
                task = asyncio.create_task(client(number, planned))
                self._tasks.add(task)
                task.add_done_callback(self._end)
                planned += plan.expovariate(per_second)
                number += 1

    async def leave(self, patience: float = 0.0) -> None:
        """Wait for so many seconds for those who are left, and have the others go."""
        if self._tasks and patience:
            await asyncio.wait(self._tasks, timeout=patience)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._failures:
            raise self._failures[0]

    def _end(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (failure := task.exception()) is not None:
            self._failures.append(failure)
