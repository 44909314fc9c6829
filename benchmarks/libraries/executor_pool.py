"""The adapter for every pool that is a `concurrent.futures.Executor`."""

from __future__ import annotations

import asyncio
import contextlib
from concurrent.futures import BrokenExecutor
from typing import TYPE_CHECKING, Any

from benchmarks.libraries.base import PoolAdapter
from benchmarks.scenarios import worker_functions
from benchmarks.scenarios.readiness import call_every_worker

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Executor


def open_executor(make: Callable[[], Executor], workers: int) -> PoolAdapter:
    """Call an executor through `run_in_executor`.

    Args:
        make: Makes the executor, and makes another one after a crashed worker has broken it.
        workers: Number of worker processes.
    """
    loop = asyncio.get_running_loop()
    executor: Any = make()

    async def call(function: Callable[..., Any], *args: Any) -> Any:
        nonlocal executor
        used = executor
        try:
            return await loop.run_in_executor(used, function, *args)
        except BrokenExecutor:
            if used is executor:  # the first caller replaces it
                executor = make()
                used.shutdown(wait=False)
            raise

    async def stop() -> None:
        await asyncio.to_thread(executor.shutdown)

    def pids() -> list[int]:
        return list(executor._processes)  # noqa: SLF001 - no public name has the process ids

    async def recover(pid: int) -> None:  # noqa: ARG001 - the crash breaks the whole pool
        with contextlib.suppress(BrokenExecutor):
            while True:  # until the executor notices, mostly at once
                await call(worker_functions.hold, 0.0)
        await call_every_worker(call, workers)

    return PoolAdapter(call, stop, workers, pids, recover)
