"""Threads or processes: one batch function over each executor, on pytest-benchmark's own clock.

``pytest benchmarks/test_executors.py --benchmark-group-by=group`` prints a table for each kind of
work and each loop, with a row for each executor. It needs pytest-benchmark and uvloop.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import multiprocessing
import timeit
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from typing import Any

import pytest

from async_batcher import batched
from async_batcher.loops import loop_factory
from benchmarks.harness.sizes import loads

WORKERS = 2
SIZES = {10: (2_048, 64), 200: (256, 16), 5_000: (12, 1)}  # us per item: items, batch size
METHODS = multiprocessing.get_all_start_methods()  # fork is not safe beside threads
CONTEXT: Any = multiprocessing.get_context("forkserver" if "forkserver" in METHODS else "spawn")
EXECUTORS: dict[str, Any] = {
    "ThreadPoolExecutor": lambda: ThreadPoolExecutor(WORKERS),
    "ProcessPoolExecutor": lambda: ProcessPoolExecutor(WORKERS, mp_context=CONTEXT),
    "thread": lambda: "thread",
    "process": lambda: "process",
}


def work(steps: int, *, gil: bool) -> int | bytes:
    """Work that holds the GIL, or hashing, which releases it."""
    if gil:
        return sum(step * step for step in range(steps))
    return hashlib.pbkdf2_hmac("sha256", b"password", b"salt", steps)


def process_batch(batch: list[int], *, gil: bool) -> list[int | bytes]:
    """Work on each item, which is its number of steps."""
    return [work(steps, gil=gil) for steps in batch]


@functools.cache
def steps_in(seconds: float, *, gil: bool) -> int:
    """Return how many steps take ``seconds`` on an idle core."""
    once = functools.partial(work, 20_000, gil=gil)
    return max(1, round(20_000 * seconds / min(timeit.repeat(once, number=1, repeat=10))))


@pytest.mark.parametrize("name", EXECUTORS)
@pytest.mark.parametrize("item_us", loads(quick=[200], usual=[10, 5_000]))
@pytest.mark.parametrize("kind", ["GIL held", "GIL released"])
def test_executor(benchmark: Any, loop: str, name: str, item_us: int, kind: str) -> None:
    """Time until all items of a round have their results, which are checked."""
    benchmark.group = f"{item_us:,} us per item, {kind}, {loop}"
    gil = kind == "GIL held"
    (count, size), steps = SIZES[item_us], steps_in(item_us / 1e6, gil=gil)
    benchmark.extra_info["items"] = count
    executor, is_named = EXECUTORS[name](), name in ("thread", "process")
    options: Any = {"concurrency": WORKERS, "max_batch_size": size}
    options |= {"max_workers": WORKERS} if is_named else {}
    run: Any = functools.partial(process_batch, gil=gil)
    function: Any = batched(run, executor=executor, max_queue_time=0.002, **options)

    async def process_all() -> Any:
        return await asyncio.gather(*(function(steps) for _ in range(count)))

    with asyncio.Runner(loop_factory=loop_factory(loop)) as runner:
        try:
            runner.run(function.start())
            found = benchmark.pedantic(lambda: runner.run(process_all()), rounds=5, warmup_rounds=1)
            assert found == [work(steps, gil=gil)] * count
        finally:
            runner.run(function.stop())
            if isinstance(executor, Executor):
                executor.shutdown()
