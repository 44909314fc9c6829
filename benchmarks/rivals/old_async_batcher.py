"""async-batcher 0.2.2, which this project succeeds; in an environment of its own, since it has our import name."""

from __future__ import annotations

from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any

from _protocol import Front, NotAvailableError, serve

from async_batcher.batcher import AsyncBatcher


class Awaited(AsyncBatcher[int, int]):
    """Does nothing, as a coroutine."""

    async def process_batch(self, batch: list[int]) -> list[int]:
        """The items."""
        return batch


class Called(AsyncBatcher[int, int]):
    """Does nothing, in a thread."""

    def process_batch(self, batch: list[int]) -> list[int]:
        """The items."""
        return batch


def open_front(load: dict[str, Any]) -> Front:
    """A batcher; it has no other way in than `process`. A pool is its user's to make and to end."""
    limits = {"max_batch_size": load["max_batch_size"], "max_queue_time": load["max_queue_time"]}
    if load["place"] == "process":
        msg = "cannot use a process pool"
        raise NotAvailableError(msg)
    pool: Executor | None = None
    batcher: AsyncBatcher[int, int]
    if load["place"] == "coroutine":
        batcher = Awaited(**limits)
    else:
        pool = ThreadPoolExecutor(load["workers"]) if load["place"] == "thread" else None
        batcher = Called(executor=pool, **limits)

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
    serve(open_front, "async-batcher")
