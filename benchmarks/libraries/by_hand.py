"""No batching: the batch function is called for each item alone, inline or in an executor."""

from __future__ import annotations

import asyncio
import multiprocessing
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from typing import Any

from benchmarks.libraries.base import BatcherAdapter, NotAvailableError, no_stop
from benchmarks.scenarios import workloads


def open_batcher(load: dict[str, Any]) -> BatcherAdapter:
    """Call the batch function on the event loop or in an executor, as ``place`` says."""
    run = workloads.find(load).run
    if load["place"] in ("coroutine", "inline"):
        process_batch = workloads.as_coroutine(run)

        async def process(item: Any) -> Any:
            return (await process_batch([item]))[0]

        return BatcherAdapter(process, process, no_stop)
    executor = _executor(load["place"], load["workers"])
    loop = asyncio.get_running_loop()

    async def call(item: Any) -> Any:
        return (await loop.run_in_executor(executor, run, [item]))[0]

    async def stop() -> None:
        await asyncio.to_thread(executor.shutdown)

    return BatcherAdapter(call, call, stop)


def _executor(place: str, workers: int) -> Executor:
    if place == "thread":
        return ThreadPoolExecutor(workers)
    if place == "process":
        context = multiprocessing.get_context("forkserver")
        return ProcessPoolExecutor(workers, mp_context=context)
    msg = f"there is no executor for the place {place!r}"
    raise NotAvailableError(msg)


if __name__ == "__main__":
    from benchmarks.libraries.serve import serve

    serve(open_batcher)
