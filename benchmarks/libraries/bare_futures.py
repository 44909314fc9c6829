"""The lower limit for a batch on an event loop: a list of futures, and a task that resolves them.

It has no window, no limits, no stop, and ignores cancelled callers. It is a limit, not a library.
"""

from __future__ import annotations

import asyncio
from typing import Any

from benchmarks.libraries.base import BatcherAdapter, NotAvailableError, no_stop
from benchmarks.scenarios import workloads


def open_batcher(load: dict[str, Any]) -> BatcherAdapter:
    """Collect items in a list. Their number must be a multiple of the batch size."""
    loop, size = asyncio.get_running_loop(), load["max_batch_size"]
    process_batch = workloads.as_coroutine(workloads.find(load).run)
    if load.get("clients", size) < size:
        msg = "it runs full batches only: with fewer clients than a batch holds, none ever runs"
        raise NotAvailableError(msg)
    queue: list[tuple[int, asyncio.Future[int]]] = []
    tasks: set[asyncio.Task[None]] = set()

    async def run(entries: list[tuple[int, asyncio.Future[int]]]) -> None:
        results = await process_batch([item for item, _ in entries])
        for (_, future), result in zip(entries, results, strict=True):
            if not future.done():
                future.set_result(result)

    def submit(item: int) -> asyncio.Future[int]:
        future: asyncio.Future[int] = loop.create_future()
        queue.append((item, future))
        if len(queue) == size:
            task = loop.create_task(run(queue.copy()))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            queue.clear()
        return future

    return BatcherAdapter(submit, submit, no_stop)


if __name__ == "__main__":
    from benchmarks.libraries.serve import serve

    serve(open_batcher)
