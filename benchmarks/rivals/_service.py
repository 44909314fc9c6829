"""A service under load: many clients at a time, each of whom waits for an answer before it asks again."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import _jobs

if TYPE_CHECKING:
    from _rival import Front

    Load = dict[str, Any]

_BATCHES_BEFORE = 3  # which every worker has run before anything is counted
_PATIENCE = 120.0  # seconds for all workers to have done so
_TICK = 0.005  # seconds between two looks at how late the loop is: so few that they cost nothing


async def job(front: Front, load: Load) -> dict[str, float]:
    """A real job, asked for by many clients (a closed loop), the next item going to the one who is free first.

    A request has to wait for its turn on the loop first, as one that comes through a socket has, and that time counts: else
    nobody would seem to wait for a rival that holds up the loop, since no other call could begin before the one before it ended.
    """
    work = _jobs.find(load)
    items = [work.item(number) for number in range(load["items"])]
    expected = [work.answer(item) for item in items]
    await _warm_up(front, load, items)
    answers: list[Any] = [None] * len(items)
    seconds: list[float] = []
    waiting = iter(enumerate(items))

    async def client() -> None:
        for number, item in waiting:
            asked = time.perf_counter()
            await asyncio.sleep(0)
            answers[number] = await front.process(item)
            seconds.append(time.perf_counter() - asked)

    late: list[float] = []
    watch = asyncio.create_task(_watch(late))
    await asyncio.sleep(0)
    began, cpu = time.perf_counter(), time.process_time()
    await asyncio.gather(*[client() for _ in range(load["clients"])])
    took, cpu = time.perf_counter() - began, time.process_time() - cpu
    watch.cancel()
    await asyncio.wait([watch])
    if [value for value, _, _ in answers] != expected:
        msg = "an item got a wrong answer"
        raise ValueError(msg)
    seconds.sort()
    return {
        "seconds_per_item": took / len(items),
        "cpu_seconds_per_item": cpu / len(items),  # of the process with the loop, and so of its threads
        "busy": sum(share for _, _, share in answers) / (load["workers"] * took),  # the share of the workers' time spent on items
        "p50_seconds": _percentile(seconds, 50),
        "p99_seconds": _percentile(seconds, 99),
        "worst_seconds": seconds[-1],
        "late_seconds": _percentile(sorted(late), 99),  # what everything else on the loop has to bear
    }


async def _warm_up(front: Front, load: Load, items: list[Any]) -> None:
    """Go on until every worker has run some batches: some start later, and each sets itself up with its first one."""
    processes = load["workers"] if load["place"] == "process" else 1
    some = list(itertools.islice(itertools.cycle(items), 2 * load["workers"] * load["max_batch_size"]))
    done: Counter[int] = Counter()
    async with asyncio.timeout(_PATIENCE):
        while len(done) < processes or min(done.values()) < _BATCHES_BEFORE * load["max_batch_size"]:
            done.update([pid for _, pid, _ in await asyncio.gather(*[front.process(item) for item in some])])


async def _watch(late: list[float]) -> None:
    """Note by how many seconds the loop is late for a timer, again and again until cancelled."""
    due = 0.0
    try:
        while True:
            due = time.perf_counter() + _TICK
            await asyncio.sleep(_TICK)
            late.append(time.perf_counter() - due)
    finally:
        late.append(max(0.0, time.perf_counter() - due))  # whoever holds the loop up all the time has no other


def _percentile(ascending: list[float], percent: int) -> float:
    return ascending[len(ascending) * percent // 100]
