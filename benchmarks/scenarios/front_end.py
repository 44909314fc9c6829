"""What an item, an idle batcher and a stop cost in the front end."""

from __future__ import annotations

import asyncio
import functools
import resource
import time
from statistics import median
from typing import TYPE_CHECKING, Any

from benchmarks.libraries.base import check
from benchmarks.scenarios import workloads

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from benchmarks.libraries.base import BatcherAdapter

    Load = dict[str, Any]


async def clients(batcher: BatcherAdapter, load: Load) -> dict[str, float]:
    """Run clients that each await one item after another (a closed loop)."""
    process, count, workload = batcher.process, load["items"], workloads.find(load)
    items = [workload.item(number) for number in range(load["clients"] * count)]
    expected = [workload.result(item) for item in items]
    await warm_up(batcher, load)

    async def client(first: int) -> list[Any]:
        results = []
        for item in items[first : first + count]:
            results.append(await process(item))  # noqa: PERF401 - as a client does
        return results

    async def run_all() -> list[list[Any]]:
        return await asyncio.gather(*[client(n * count) for n in range(load["clients"])])

    measures, results = await _timed(run_all, len(items))
    check([result for some in results for result in some] == expected)
    return measures


async def gather(batcher: BatcherAdapter, load: Load) -> dict[str, float]:
    """Submit all items at once."""
    items = range(load["items"])
    await warm_up(batcher, load)

    async def submit_all() -> list[Any]:
        submit = batcher.submit
        return await asyncio.gather(*[submit(item) for item in items])

    measures, results = await _timed(submit_all, len(items))
    check(results == list(items))
    return measures


async def many(batcher: BatcherAdapter, load: Load) -> dict[str, float]:
    """Process all items in one call if the library has one."""
    if batcher.many is None:
        return await gather(batcher, load)
    items = list(range(load["items"]))
    await warm_up(batcher, load)
    measures, results = await _timed(functools.partial(batcher.many, items), len(items))
    check(results == items)
    return measures


async def single_request(batcher: BatcherAdapter, load: Load) -> dict[str, float]:
    """Await one item at a time in an idle program, and a bare timer of the window after each."""
    delay = load["max_queue_time"]
    await warm_up(batcher, load)
    waits, timers = [], []
    for item in range(load["pairs"]):
        began = time.perf_counter()
        result = await batcher.process(item)
        waits.append(time.perf_counter() - began)
        check(result == item)
        began = time.perf_counter()
        await _timer(delay)
        timers.append(time.perf_counter() - began)
    return {
        "wait_seconds": median(waits),
        "timer_seconds": median(timers),
        "excess_seconds": median(waits) - median(timers),
    }


async def stop(batcher: BatcherAdapter, load: Load) -> dict[str, float]:
    """Stop an idle batcher that has run one batch."""
    check(await batcher.process(1) == 1)
    await asyncio.sleep(load["settle"])
    began = time.perf_counter()
    await batcher.stop()
    return {"seconds": time.perf_counter() - began}


async def idle(batcher: BatcherAdapter, load: Load) -> dict[str, float]:
    """Do nothing for a while; count wake-ups of the process's threads and its CPU time."""
    check(await batcher.process(1) == 1)
    await asyncio.sleep(load["settle"])
    iterations = _count_iterations()
    before, began = resource.getrusage(resource.RUSAGE_SELF), iterations()
    await asyncio.sleep(load["seconds"])
    after, ended = resource.getrusage(resource.RUSAGE_SELF), iterations()
    measures = {
        "wakes": float(after.ru_nvcsw - before.ru_nvcsw),
        "cpu_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
    }
    if began is not None and ended is not None:
        measures["turns"] = float(ended - began)
    return measures


async def warm_up(batcher: BatcherAdapter, load: Load) -> None:
    """Run some batches, and go on for ``settle`` seconds, in which a pool starts all workers."""
    workload = workloads.find(load)
    items = [workload.item(number) for number in range(4 * load["max_batch_size"])]
    expected = [workload.result(item) for item in items]
    end = None
    while end is None or time.perf_counter() < end:
        results = await asyncio.gather(*[batcher.process(item) for item in items])
        check(results == expected)
        if end is None:
            end = time.perf_counter() + load.get("settle", 0.0)


async def _timed(call: Callable[[], Awaitable[Any]], items: int) -> tuple[dict[str, float], Any]:
    """Await the call, and return the time and CPU time per item with its results."""
    began, cpu = time.perf_counter(), time.process_time()
    results = await call()
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    return {"seconds_per_item": seconds / items, "cpu_seconds_per_item": cpu / items}, results


async def _timer(delay: float) -> None:
    loop = asyncio.get_running_loop()
    future: asyncio.Future[None] = loop.create_future()
    loop.call_at(loop.time() + delay, future.set_result, None)
    await future


def _count_iterations() -> Callable[[], int | None]:
    """Count the iterations of asyncio's loop from now on. uvloop's cannot be counted."""
    selector: Any = getattr(asyncio.get_running_loop(), "_selector", None)
    if selector is None:
        return lambda: None
    select, count = selector.select, 0

    def counted(timeout: float | None = None) -> Any:
        nonlocal count
        count += 1
        return select(timeout)

    selector.select = counted  # the loop belongs to this round
    return lambda: count
