"""What overlaps the work of a batch: the trip of the next one, and the first of its own results."""

from __future__ import annotations

import asyncio
import time
from itertools import pairwise
from statistics import mean, median
from typing import TYPE_CHECKING, Any

from benchmarks.libraries.base import check
from benchmarks.scenarios import workloads
from benchmarks.scenarios.front_end import warm_up

if TYPE_CHECKING:
    from benchmarks.libraries.base import BatcherAdapter

    Load = dict[str, Any]


async def batch_gap(batcher: BatcherAdapter, load: Load) -> dict[str, float]:
    """Measure how long the worker waits between two full batches of arrays while more are queued.

    Returns:
        ``gap_seconds``: the median time from the end of one batch's own code to the start of the
        next one's, on the worker's clock; ``trip_seconds``: the median time of a batch that does
        nothing, alone; ``gap_share``: the gap as a share of the trip.
    """
    workload = workloads.find(load)
    items = [workload.item(number) for number in range(load["max_batch_size"])]
    expected = [workload.result(item) for item in items]

    async def caller(item: Any, right: Any) -> tuple[float, float]:
        began, ended, result = await batcher.process(item)
        check(result is right or result[-1] == right[-1])  # the arrays are random
        return began, ended  # and drop the array, so that its memory can be used again

    async def run(batches: int, seconds: float) -> list[tuple[float, float]]:
        """Return the start and end of each batch."""
        batch = [
            ((seconds, *rest), right) for (_, *rest), right in zip(items, expected, strict=True)
        ]
        times = await asyncio.gather(*[caller(item, right) for item, right in batch * batches])
        return sorted(set(times))

    trips = []
    for _ in range(load["warm_up"] + load["trips"]):
        began = time.perf_counter()
        await run(1, 0.0)
        trips.append(time.perf_counter() - began)
    trip = median(trips[load["warm_up"] :])
    times = await run(load["batches"], load["spin_ms"] / 1e3)
    check(len(times) == load["batches"])
    gap = median(began - ended for (_, ended), (began, _) in pairwise(times))
    return {"gap_seconds": gap, "trip_seconds": trip, "gap_share": gap / trip}


async def early_results(batcher: BatcherAdapter, load: Load) -> dict[str, float]:
    """Run one full batch at a time, and measure when its callers have their results.

    Returns:
        Medians of the batches: of the first caller, of the mean over callers, of the last one.
    """
    workload, count = workloads.find(load), load["max_batch_size"]
    await warm_up(batcher, load)
    measured = []

    async def caller(item: Any) -> float:
        check(await batcher.process(item) == workload.result(item))
        return time.perf_counter()

    for _ in range(load["batches"]):
        items = [workload.item(number) for number in range(count)]
        began = time.perf_counter()
        ends = await asyncio.gather(*[caller(item) for item in items])
        measured.append((min(ends) - began, mean(ends) - began, max(ends) - began))
    first, middle, last = (median(column) for column in zip(*measured, strict=True))
    return {"first_seconds": first, "mean_seconds": middle, "last_seconds": last}
