"""Without a batcher: the batch function is called for each item by itself, inline or in an executor, as one writes it by hand."""

from __future__ import annotations

import asyncio
import multiprocessing
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from typing import Any

import _jobs
from _rival import Front, NotAvailableError, no_stop


def open_front(load: dict[str, Any]) -> Front:
    """With ``place``: a coroutine or a call on the loop itself, or one call to an executor for each item."""
    run = _jobs.find(load).run
    if load["place"] in ("coroutine", "inline"):
        process_batch = _jobs.as_coroutine(run)

        async def process(item: Any) -> Any:
            return (await process_batch([item]))[0]

        return Front(process, process, no_stop)
    executor = _executor(load["place"], load["workers"])
    loop = asyncio.get_running_loop()

    async def call(item: Any) -> Any:
        return (await loop.run_in_executor(executor, run, [item]))[0]

    async def stop() -> None:
        await asyncio.to_thread(executor.shutdown)

    return Front(call, call, stop)


def _executor(place: str, workers: int) -> Executor:
    if place == "thread":
        return ThreadPoolExecutor(workers)
    if place == "process":
        return ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("forkserver"))
    msg = f"there is nothing like {place!r} by hand"
    raise NotAvailableError(msg)


if __name__ == "__main__":
    from _protocol import serve

    serve(open_front)
