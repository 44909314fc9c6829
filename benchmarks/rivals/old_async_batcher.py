"""async-batcher 0.2.2, which this project succeeds; in an environment of its own, since it has our import name."""

from __future__ import annotations

import logging
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any

import _jobs
from _rival import Front, NotAvailableError

from async_batcher.batcher import AsyncBatcher


def open_front(load: dict[str, Any]) -> Front:
    """A batcher; it has no other way in than `process`. A pool is its user's to make and to end."""
    limits = {"max_batch_size": load["max_batch_size"], "max_queue_time": load["max_queue_time"]}
    if load["place"] == "process":
        msg = "cannot use a process pool"
        raise NotAvailableError(msg)
    logging.getLogger("async_batcher").setLevel(logging.CRITICAL)  # a failure's traceback is not to be written, nor measured
    run = _jobs.find(load).run

    class Awaited(AsyncBatcher[Any, Any]):
        async def process_batch(self, batch: list[Any]) -> list[Any]:
            return run(batch)

    class Called(AsyncBatcher[Any, Any]):
        def process_batch(self, batch: list[Any]) -> list[Any]:
            return run(batch)

    pool: Executor | None = None
    batcher: AsyncBatcher[Any, Any]
    if load["place"] == "coroutine":
        batcher = Awaited(**limits)
    else:
        pool = ThreadPoolExecutor(load["workers"]) if load["place"] == "thread" else None
        batcher = Called(executor=pool, concurrency=load["workers"], **limits)

    async def stop() -> None:
        await batcher.stop()
        if pool is not None:
            pool.shutdown()

    async def discard() -> None:
        await batcher.stop(force=True)  # in good order it takes a second
        if pool is not None:
            pool.shutdown()

    return Front(batcher.process, batcher.process, stop, discard)


if __name__ == "__main__":
    from _protocol import serve

    serve(open_front, "async-batcher")
