"""A service under load: clients that each wait for a result before they send the next request."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

from benchmarks.scenarios import workloads

if TYPE_CHECKING:
    from benchmarks.libraries.base import BatcherAdapter

    Load = dict[str, Any]

WARM_UP_BATCHES = 3  # per worker
WARM_UP_TIMEOUT = 120.0  # seconds
TICK_SECONDS = 0.005  # of the timer that measures lateness; rare enough to cost nothing


async def service(batcher: BatcherAdapter, load: Load) -> dict[str, float]:
    """Process items for many clients (a closed loop); an idle client takes the next item.

    Each request first waits for one iteration of the loop, as a request from a socket does, and
    that time counts. Otherwise a library that blocks the loop would seem to have no waits at all,
    because no other request could begin meanwhile.
    """
    workload = workloads.find(load)
    items = [workload.item(number) for number in range(load["items"])]
    expected = [workload.result(item) for item in items]
    await _warm_up(batcher, load, items)
    results: list[Any] = [None] * len(items)
    seconds: list[float] = []
    queue = iter(enumerate(items))

    async def client() -> None:
        for number, item in queue:
            sent = time.perf_counter()
            await asyncio.sleep(0)
            results[number] = await batcher.process(item)
            seconds.append(time.perf_counter() - sent)

    late: list[float] = []
    watch = asyncio.create_task(_measure_lateness(late))
    await asyncio.sleep(0)
    began, cpu = time.perf_counter(), time.process_time()
    await asyncio.gather(*[client() for _ in range(load["clients"])])
    took, cpu = time.perf_counter() - began, time.process_time() - cpu
    watch.cancel()
    await asyncio.wait([watch])
    if [value for value, _, _ in results] != expected:
        msg = "an item got a wrong result"
        raise ValueError(msg)
    seconds.sort()
    return {
        "seconds_per_item": took / len(items),
        # Of the process that runs the loop, including its threads.
        "cpu_seconds_per_item": cpu / len(items),
        # The share of the workers' time that the items took.
        "busy": sum(share for _, _, share in results) / (load["workers"] * took),
        "p50_seconds": _percentile(seconds, 50),
        "p99_seconds": _percentile(seconds, 99),
        "worst_seconds": seconds[-1],
        "late_seconds": _percentile(sorted(late), 99),
    }


async def _warm_up(batcher: BatcherAdapter, load: Load, items: list[Any]) -> None:
    """Run batches until every worker has had some: workers start late and set up on first use."""
    processes = load["workers"] if load["place"] == "process" else 1
    count = 2 * load["workers"] * load["max_batch_size"]
    some = list(itertools.islice(itertools.cycle(items), count))
    needed = WARM_UP_BATCHES * load["max_batch_size"]
    done: Counter[int] = Counter()
    async with asyncio.timeout(WARM_UP_TIMEOUT):
        while len(done) < processes or min(done.values()) < needed:
            results = await asyncio.gather(*[batcher.process(item) for item in some])
            done.update([pid for _, pid, _ in results])


async def _measure_lateness(late: list[float]) -> None:
    """Record by how many seconds a timer of the loop is late, until cancelled."""
    due = 0.0
    try:
        while True:
            due = time.perf_counter() + TICK_SECONDS
            await asyncio.sleep(TICK_SECONDS)
            late.append(time.perf_counter() - due)
    finally:
        # A library that blocks the loop throughout has no other record.
        late.append(max(0.0, time.perf_counter() - due))


def _percentile(ascending: list[float], percent: int) -> float:
    return ascending[len(ascending) * percent // 100]
