"""Round trips to worker processes: their latency and CPU time, busy cores, the loop's block time.

Every round opens a new pool. It measures when every worker has returned a result.
"""

from __future__ import annotations

import asyncio
import math
import sys
import time
from statistics import mean, median
from types import FunctionType
from typing import TYPE_CHECKING, Any

from benchmarks.libraries.base import check
from benchmarks.scenarios import worker_functions
from benchmarks.scenarios.payloads import COPIED, PAYLOADS, are_equal, array
from benchmarks.scenarios.readiness import wait_ready

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.libraries.base import PoolAdapter

    Load = dict[str, Any]

IDLE_SECONDS = 0.2  # for the block time of an idle loop, at most
TICK_SECONDS = 0.001  # of the timer that measures block time; timers of the system are no finer


async def round_trip(pool: PoolAdapter, load: Load) -> dict[str, float]:
    """Run one call at a time, there and back."""
    copies = load["payload"] == COPIED
    function = worker_functions.copied if copies else worker_functions.same
    payloads = [PAYLOADS[load["payload"]](seed) for seed in (1, 2)]
    await wait_ready(pool)
    seconds = []
    for number in range(-load["warm_up"], load["trips"]):
        payload = payloads[number % 2]
        began = time.perf_counter()
        result = await pool.call(function, payload)
        seconds.append(time.perf_counter() - began)
        check(are_equal(result, payload))
        del result
    seconds = seconds[load["warm_up"] :]
    return {
        "seconds": median(seconds),
        "mean_seconds": mean(seconds),
        "worst_seconds": max(seconds),
    }


async def call_cpu(pool: PoolAdapter, load: Load) -> dict[str, float]:
    """Run calls that do nothing, one at a time, and measure this process's CPU time."""
    await wait_ready(pool)
    for number in range(load["warm_up"]):
        await pool.call(worker_functions.same, number)
    began = time.process_time()
    for number in range(load["calls"]):
        check(await pool.call(worker_functions.same, number) == number)
    return {"cpu_seconds_per_call": (time.process_time() - began) / load["calls"]}


async def cores_busy(
    pool: PoolAdapter, load: Load, spin: Callable[..., Any] = worker_functions.spin
) -> dict[str, float]:
    """Run batches that keep a core busy, ``in_flight`` at a time (a closed loop).

    A batch lasts for ``batch_ms`` of wall-clock time, so what a worker waits for is between them.

    Returns:
        ``busy``: the batches' own time as a share of all workers' time, so 1.0 is perfect scaling
        on as many cores as workers; ``processor``: the share that the system gave to them.
    """
    batch = load["batch_ms"] / 1e3

    async def run(batches: int, until: float) -> list[tuple[int, float]]:
        numbers, results = iter(range(batches)), []

        async def client() -> None:
            while time.perf_counter() < until and (number := next(numbers, None)) is not None:
                results.append(await pool.call(spin, number, batch))

        await asyncio.gather(*[client() for _ in range(load["in_flight"])])
        return results

    await wait_ready(pool)
    await run(load["warm_up"], math.inf)
    began = time.perf_counter()
    results = await run(load["batches"], began + load["seconds"])
    seconds, total = time.perf_counter() - began, len(results)
    check(sorted(number for number, _ in results) == list(range(total)))
    cores = load["workers"] * seconds
    return {
        "seconds_per_batch": seconds / total,
        "busy": total * batch / cores,
        "processor": sum(processor for _, processor in results) / cores,
    }


async def script_busy(pool: PoolAdapter, load: Load) -> dict[str, float]:
    """Run `cores_busy` with a function of the main module, which pools send by value."""
    function, namespace = worker_functions.spin, vars(sys.modules["__main__"])
    script_function = FunctionType(function.__code__, namespace, function.__name__)
    namespace.update({"time": time, function.__name__: script_function})
    return await cores_busy(pool, load, script_function)


async def loop_block_time(pool: PoolAdapter, load: Load) -> dict[str, float]:
    """Measure the longest delay of a 1 ms timer while a large array is out and back.

    Returns:
        ``hold_up_seconds``: the median of the trips but the first; ``first_hold_up_seconds``: of
        the first; ``idle_seconds``: of an idle loop; ``trip_seconds``: the time of a trip.
    """
    payloads = [array(load["megabytes"], seed) for seed in (1, 2)]
    await wait_ready(pool)
    worst, seconds, idle = [], [], []
    for number in range(1 + load["trips"]):
        ticker = _Ticker()
        await asyncio.sleep(10 * TICK_SECONDS)
        ticker.worst = 0.0
        began = time.perf_counter()
        result = await pool.call(worker_functions.same, payloads[number % 2])
        seconds.append(time.perf_counter() - began)
        await asyncio.sleep(3 * TICK_SECONDS)  # work that follows on the loop counts too
        worst.append(ticker.worst)
        ticker.worst = 0.0
        await asyncio.sleep(min(IDLE_SECONDS, seconds[-1]))
        idle.append(ticker.worst)
        ticker.stop()
        check(are_equal(result, payloads[number % 2]))
        del result
    return {
        "hold_up_seconds": median(worst[1:]),
        "first_hold_up_seconds": worst[0],
        "idle_seconds": median(idle[1:]),
        "trip_seconds": median(seconds[1:]),
    }


class _Ticker:
    """A periodic timer on the loop that records its longest delay."""

    def __init__(self) -> None:
        self.worst = 0.0  # seconds
        self._loop = asyncio.get_running_loop()
        self._arm(time.perf_counter())

    def stop(self) -> None:
        self._timer.cancel()

    def _arm(self, now: float) -> None:
        self._due = now + TICK_SECONDS
        self._timer = self._loop.call_later(TICK_SECONDS, self._on_timer)

    def _on_timer(self) -> None:
        now = time.perf_counter()
        self.worst = max(self.worst, now - self._due)
        self._arm(now)
