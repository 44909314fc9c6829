"""The least that a batch costs on an event loop: a list of futures, and one task that settles 64 of them.

It has no window, no limit, no stop, and no care for who has left; it is the floor, not a rival.
"""

from __future__ import annotations

import asyncio
from typing import Any

import _jobs
from _rival import Front, NotAvailableError, no_stop


def open_front(load: dict[str, Any]) -> Front:
    """A list; it counts on the number of items being a multiple of the batch's size."""
    loop, size, process_batch = asyncio.get_running_loop(), load["max_batch_size"], _jobs.as_coroutine(_jobs.find(load).run)
    if load.get("clients", size) < size:
        msg = "knows full batches only: fewer clients than a batch holds would wait for ever"
        raise NotAvailableError(msg)
    waiting: list[tuple[int, asyncio.Future[int]]] = []
    tasks: set[asyncio.Task[None]] = set()

    async def run(entries: list[tuple[int, asyncio.Future[int]]]) -> None:
        answers = await process_batch([item for item, _ in entries])
        for (_, future), answer in zip(entries, answers, strict=True):
            if not future.done():
                future.set_result(answer)

    def submit(item: int) -> asyncio.Future[int]:
        future: asyncio.Future[int] = loop.create_future()
        waiting.append((item, future))
        if len(waiting) == size:
            task = loop.create_task(run(waiting.copy()))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            waiting.clear()
        return future

    return Front(submit, submit, no_stop)


if __name__ == "__main__":
    from _protocol import serve

    serve(open_front)
