"""Threads or processes: one function and one batcher over each executor, on pytest-benchmark's own clock.

``pytest benchmarks/test_executors.py --benchmark-group-by=group`` prints a table for each kind of work and each loop, with a row
for each executor. It needs pytest-benchmark and uvloop.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import multiprocessing
import time
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

from async_batcher import batched
from async_batcher.loops import loop_factory
from benchmarks.modes import loads

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

WORKERS = 2
ITEMS = {10: (2_048, 64), 200: (256, 16), 5_000: (12, 1)}  # by the microseconds of an item: items in a round, in a batch
METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"  # fork is not safe beside threads
EXECUTORS: dict[str, Any] = {  # by name, what makes them
    "ThreadPoolExecutor": lambda: ThreadPoolExecutor(WORKERS),
    "ProcessPoolExecutor": lambda: ProcessPoolExecutor(WORKERS, mp_context=multiprocessing.get_context(METHOD)),
    "thread": lambda: "thread",
    "process": lambda: "process",
}


def work(steps: int, *, gil: bool) -> int | bytes:
    """Work of so many steps, with the GIL or, as hashing is, without it; the same steps have the same result."""
    return sum(step * step for step in range(steps)) if gil else hashlib.pbkdf2_hmac("sha256", b"password", b"salt", steps)


def work_through(batch: list[int], *, gil: bool) -> list[int | bytes]:
    """The function that runs in batches: each item is its steps."""
    return [work(steps, gil=gil) for steps in batch]


@functools.cache
def steps_in(seconds: float, *, gil: bool) -> int:
    """How many steps take that long on an idle core."""
    steps, took = 20_000, []
    for _ in range(10):
        began = time.perf_counter()
        work(steps, gil=gil)
        took.append(time.perf_counter() - began)
    return max(1, round(steps * seconds / min(took)))


@pytest.mark.parametrize("name", EXECUTORS)
@pytest.mark.parametrize("item_us", loads(quick=[200], usual=[10, 5_000]))
@pytest.mark.parametrize("gil", [True, False], ids=["GIL held", "GIL released"])
def test_executor(benchmark: BenchmarkFixture, loop: str, name: str, item_us: int, gil: bool) -> None:  # noqa: FBT001
    """Time in which all items of a round have their results, which are checked."""
    benchmark.group = f"{item_us:,} us an item, {'GIL held' if gil else 'GIL released'}, {loop}"
    (count, size), steps = ITEMS[item_us], steps_in(item_us / 1e6, gil=gil)
    executor, limits = EXECUTORS[name](), {"concurrency": WORKERS, "max_workers": WORKERS, "max_batch_size": size}
    limits |= {} if executor == name else {"max_workers": None}
    function: Any = batched(functools.partial(work_through, gil=gil), executor=executor, max_queue_time=0.002, **limits)

    async def all_items() -> list[int | bytes]:
        return await asyncio.gather(*(function(steps) for _ in range(count)))

    with asyncio.Runner(loop_factory=loop_factory(loop)) as runner:
        try:
            runner.run(function.start())
            found = benchmark.pedantic(lambda: runner.run(all_items()), rounds=5, warmup_rounds=1)
            assert found == [work(steps, gil=gil)] * count
        finally:
            runner.run(function.stop())
            if isinstance(executor, Executor):
                executor.shutdown()
