"""The cases of `benchmarks.harness.compare`: ``python -m benchmarks.harness.cases NAME``.

Each case is a small program over the public API that every compared commit has. One run takes
about a second, checks every result and prints its figure.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks.harness.checkouts import check_source
from benchmarks.libraries.base import check
from benchmarks.scenarios.payloads import are_equal, array
from benchmarks.scenarios.worker_functions import same, spin

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine

ROUNDS = 7  # in one process, whose figure is their median
WORKERS = 2
WARM_UP_CALLS = 20


class Case(NamedTuple):
    """What is measured.

    Attributes:
        run: Returns the figure of one run.
        text: What the figure is.
        unit: ``"s"``, or ``"share"`` for a share of 1.
    """

    run: Callable[[], Coroutine[Any, Any, float]]
    text: str
    unit: str = "s"

    @property
    def better(self) -> str:
        """Which figures are better."""
        return "lower" if self.unit == "s" else "higher"


async def _process_batch(batch: list[int]) -> list[int]:
    return batch


def _batcher(**options: Any) -> Any:
    from async_batcher import batched

    return batched(_process_batch, max_batch_size=64, **options)


async def _clients(count: int, items: int, window: float) -> float:
    """Time per item of clients that each await one item after another."""
    batcher = _batcher(max_queue_time=window)

    async def client(first: int) -> None:
        for item in range(first, first + items):
            check(await batcher.process(item) == item)

    async def one_round() -> None:
        await asyncio.gather(*[client(number * items) for number in range(count)])

    async with batcher:
        return await _median_of_rounds(one_round) / (count * items)


async def clients_64() -> float:
    """Run 64 clients in a closed loop, which fill each batch."""
    return await _clients(64, 150, 0.01)


async def single_client() -> float:
    """Run one client without a window, whose items are alone in their batches."""
    return await _clients(1, 800, 0.0)


async def gather() -> float:
    """Gather over `submit`."""
    items = list(range(6_400))
    batcher = _batcher(max_queue_time=0.01)

    async def one_round() -> None:
        check(await asyncio.gather(*[batcher.submit(item) for item in items]) == items)

    async with batcher:
        return await _median_of_rounds(one_round) / len(items)


async def many() -> float:
    """Process all items in one call of `process_many`."""
    items = list(range(50_000))
    batcher = _batcher(max_queue_time=0.01)

    async def one_round() -> None:
        check(await batcher.process_many(items) == items)

    async with batcher:
        return await _median_of_rounds(one_round) / len(items)


async def round_trip_ints() -> float:
    """Send 64 ints to a worker and back, one call at a time."""
    return await _round_trip([list(range(64)), list(range(64, 128))], 2_000)


async def round_trip_array() -> float:
    """Send 10 MB to a worker and back, one call at a time."""
    return await _round_trip([array(10, seed) for seed in (1, 2)], 40)


async def _round_trip(payloads: list[Any], trips: int) -> float:
    """Median time of a trip."""
    from async_batcher import WorkerPool

    seconds = []
    async with WorkerPool(WORKERS) as pool:
        for number in range(-WARM_UP_CALLS, trips):
            payload = payloads[number % 2]
            began = time.perf_counter()
            result = await pool.run(same, payload)
            seconds.append(time.perf_counter() - began)
            check(are_equal(result, payload))
            del result  # its memory can be used again
    return statistics.median(seconds[WARM_UP_CALLS:])


async def busy_1ms() -> float:
    """Keep two workers busy with batches of 1 ms, two in flight."""
    return await _busy(0.001, 0.8)


async def busy_half_ms() -> float:
    """Keep two workers busy with batches of 0.5 ms, two in flight."""
    return await _busy(0.0005, 0.8)


async def _busy(batch: float, seconds: float) -> float:
    """Share of the workers' time that is spent in batches."""
    from async_batcher import WorkerPool

    async with WorkerPool(WORKERS) as pool:
        for number in range(WARM_UP_CALLS):
            check((await pool.run(spin, number, batch))[0] == number)
        done = 0
        began = time.perf_counter()

        async def client(number: int) -> None:
            nonlocal done
            while time.perf_counter() < began + seconds:
                check((await pool.run(spin, number, batch))[0] == number)
                done += 1

        await asyncio.gather(*[client(number) for number in range(WORKERS)])
        return done * batch / (WORKERS * (time.perf_counter() - began))


async def _median_of_rounds(one_round: Callable[[], Awaitable[None]]) -> float:
    """Run a round to warm up, then return the median seconds of the others."""
    await one_round()
    seconds = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        await one_round()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


CASES = {
    "clients": Case(clients_64, "64 clients, per item"),
    "gather": Case(gather, "gather over submit, per item"),
    "many": Case(many, "process_many, per item"),
    "single_client": Case(single_client, "one client, per item"),
    "round_trip_ints": Case(round_trip_ints, "64 ints to a worker and back"),
    "round_trip_array": Case(round_trip_array, "10 MB array to a worker and back"),
    "busy_1ms": Case(busy_1ms, "busy cores, batches of 1 ms", "share"),
    "busy_half_ms": Case(busy_half_ms, "busy cores, batches of 0.5 ms", "share"),
}


def main(name: str) -> None:
    """Run one case and print its figure."""
    check_source()
    with asyncio.Runner() as runner:
        print(json.dumps(runner.run(CASES[name].run())))


if __name__ == "__main__":
    main(sys.argv[1])
