"""Uses that only the type checker reads: it must find these types, and no error."""

from __future__ import annotations

import asyncio
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, assert_type

from async_batcher import (
    AsyncBatcher,
    BatchInfo,
    WorkerInfo,
    WorkerPool,
    batched,
    current_batch,
    run,
    worker_number,
)
from async_batcher.failures import isolate
from async_batcher.integrations.opentelemetry import BatchTracer
from async_batcher.stats import BatchRecord, BatchStart, Explanation, Stats

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Sequence

    import numpy as np
    import numpy.typing as npt


class Sync(AsyncBatcher[str, int]):
    """A sync batcher."""

    def process_batch(self, batch: list[str]) -> list[int]:
        """Lengths."""
        return [len(item) for item in batch]


class Async(AsyncBatcher[str, int]):
    """An async batcher, whose results may be errors."""

    async def process_batch(self, batch: list[str]) -> Sequence[int | ValueError]:
        """Lengths."""
        return [len(item) or ValueError("empty") for item in batch]


class Nothing(AsyncBatcher[str, None]):
    """A batcher without results."""

    async def process_batch(self, batch: list[str]) -> None:
        """Nothing."""


class Streamed(AsyncBatcher[int, int]):
    """An async generator."""

    async def process_batch(self, batch: list[int]) -> AsyncIterator[int]:
        """The same."""
        for item in batch:
            yield item


class Arrays(AsyncBatcher[float, float]):
    """An array of results."""

    def process_batch(self, batch: list[float]) -> npt.NDArray[np.float64]:
        """The same."""
        raise NotImplementedError


class Observer:
    """What observes batches."""

    def started(self, start: BatchStart) -> None:
        """Nothing."""

    def finished(self, end: BatchRecord) -> None:
        """Nothing."""


@batched
def plain(batch: list[str]) -> list[int]:
    """Lengths."""
    return [len(item) for item in batch]


@batched(max_batch_size=8, executor="process", max_workers=2)
def with_options(batch: list[str]) -> Iterator[int]:
    """Lengths."""
    return (len(item) for item in batch)


@batched(executor=partial(ProcessPoolExecutor, 4, initializer=print, initargs=("ready",)))
def with_a_factory(batch: list[str]) -> list[int]:
    """Lengths."""
    return [len(item) for item in batch]


@batched(max_queue_time=0)
async def on_the_loop(batch: list[str]) -> list[int]:
    """Lengths."""
    return [len(item) for item in batch]


async def main() -> str:
    """Every way to call."""
    async with Sync(executor=ThreadPoolExecutor(), concurrency=2, max_batch_size=None) as sync:
        assert_type(sync, Sync)
        assert_type(await sync.process("a"), int)
        assert_type(await sync.process(item="a"), int)
        assert_type(sync.submit("a"), asyncio.Future[int])
        assert_type(await sync.is_running(), bool)
        await sync.stop(force=True, timeout=1.5)
    assert_type(await Async().process("a"), int)
    await Nothing().process("a")
    assert_type(await Streamed().process(1), int)
    assert_type(await Arrays().process(1.0), float)
    assert_type(await plain("a"), int)
    assert_type(await with_options("a"), int)
    assert_type(await with_a_factory("a"), int)
    for factory in (ProcessPoolExecutor, WorkerPool, partial(WorkerPool, 2)):
        assert_type(await Sync(executor=factory).process("a"), int)
    assert_type(await Sync(executor=lambda: ThreadPoolExecutor(2)).process("a"), int)
    Sync(executor="threads")  # type: ignore[arg-type]
    Sync(executor=len)  # type: ignore[arg-type]
    assert_type(await on_the_loop("a"), int)
    async with WorkerPool(2, mp_context="spawn", max_tasks_per_child=10) as pool:
        assert_type(pool, WorkerPool)
        assert_type(await pool.run(len, "abc", timeout=1.0), int)
        assert_type(pool.workers(), list[WorkerInfo])
        assert_type(await pool.restart_workers(), None)
        assert_type(await pool.run(worker_number), int | None)
        assert_type(await pool.run(current_batch), BatchInfo | None)
        assert_type(pool.workers()[0].pid, int | None)
        assert_type(await Sync(executor=pool, batch_timeout=2.0).process("a", timeout=1.0), int)
    watched = Sync(
        on_failure=isolate(),
        item_timeout=1.0,
        when_full="wait",
        cancel_abandoned=True,
        on_batch=print,
    )
    Sync(on_batch=Observer())
    Sync(on_batch=[Observer(), print])
    Sync(on_batch=(print, BatchTracer()))
    Sync(on_batch=Observer)  # type: ignore[arg-type]
    assert_type(watched.submit("a", timeout=1), asyncio.Future[int])
    assert_type(watched.stats(), Stats)
    assert_type(watched.stats().queue_waits.p99, float)
    assert_type(watched.explain(), Explanation)
    assert_type(watched.explain().expected_gain, float | None)
    assert_type(await plain("a", timeout=1.0), int)
    with WorkerPool().as_executor() as executor:
        assert_type(executor.submit(len, "abc").result(), int)
    assert_type(await asyncio.gather(plain("a"), plain.process("b")), tuple[int, int])
    assert_type(await plain.process_many(["a", "b"], timeout=1), list[int])
    assert_type(
        await plain.process_many(("a", "b"), return_exceptions=True), list[int | BaseException]
    )
    async for result in watched.map(["a", "b"], ordered=False, window=10):
        assert_type(result, int)
    async for either in watched.map(["a", "b"], return_exceptions=True, read_in_thread=True):
        assert_type(either, int | BaseException)
    async for item, result in watched.map(["a", "b"], ordered=False, pairs=True):
        assert_type((item, result), tuple[str, int])
    async for item, either in watched.map(["a", "b"], return_exceptions=True, pairs=True):
        assert_type((item, either), tuple[str, int | BaseException])
    pairs = {item: result async for item, result in plain.map(["a"], pairs=True)}
    assert_type(pairs, dict[str, int])
    return "done"


assert_type(run(main(), loop="auto"), str)
