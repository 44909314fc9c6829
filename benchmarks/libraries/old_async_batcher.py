"""async-batcher 0.2.2, the predecessor of this project, with which it shares its import name."""

from __future__ import annotations

import logging
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any

from async_batcher.batcher import AsyncBatcher
from benchmarks.libraries.base import BatcherAdapter, NotAvailableError
from benchmarks.scenarios import workloads


def open_batcher(load: dict[str, Any]) -> BatcherAdapter:
    """Make a batcher. `process` is its only call; its user makes and shuts down the executor."""
    limits = {"max_batch_size": load["max_batch_size"], "max_queue_time": load["max_queue_time"]}
    if load["place"] == "process":
        msg = "cannot use a process pool"
        raise NotAvailableError(msg)
    # The benchmarks do not measure how long it takes to write a traceback.
    logging.getLogger("async_batcher").setLevel(logging.CRITICAL)
    run = workloads.find(load).run

    class CoroutineBatcher(AsyncBatcher[Any, Any]):
        async def process_batch(self, batch: list[Any]) -> list[Any]:
            return run(batch)

    class FunctionBatcher(AsyncBatcher[Any, Any]):
        def process_batch(self, batch: list[Any]) -> list[Any]:
            return run(batch)

    pool: Executor | None = None
    batcher: AsyncBatcher[Any, Any]
    if load["place"] == "coroutine":
        batcher = CoroutineBatcher(**limits)
    else:
        pool = ThreadPoolExecutor(load["workers"]) if load["place"] == "thread" else None
        batcher = FunctionBatcher(executor=pool, concurrency=load["workers"], **limits)

    async def stop() -> None:
        await batcher.stop()
        if pool is not None:
            pool.shutdown()

    async def discard() -> None:
        await batcher.stop(force=True)  # an ordinary stop takes a second
        if pool is not None:
            pool.shutdown()

    return BatcherAdapter(batcher.process, batcher.process, stop, discard)


if __name__ == "__main__":
    from benchmarks.libraries.serve import serve

    serve(open_batcher, "async-batcher")
