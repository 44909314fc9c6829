"""The standard library's threads: no trip to a process, no copy, and the GIL for all of them."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from benchmarks.libraries.base import NotAvailableError, PoolAdapter
from benchmarks.scenarios import worker_functions

if TYPE_CHECKING:
    from collections.abc import Callable

_SCENARIOS = ("round_trip", "cores_busy")
# Threads wait for the GIL in turn. By wall-clock time both would count as busy.
_INSTEAD = {worker_functions.spin: worker_functions.burn}


def open_pool(load: dict[str, Any]) -> PoolAdapter:
    """Open its executor."""
    if load["scenario"] not in _SCENARIOS:
        msg = "a thread cannot be killed and has no memory of its own"
        raise NotAvailableError(msg)
    loop = asyncio.get_running_loop()
    executor = ThreadPoolExecutor(load["workers"])

    async def call(function: Callable[..., Any], *args: Any) -> Any:
        return await loop.run_in_executor(executor, _INSTEAD.get(function, function), *args)

    async def stop() -> None:
        await asyncio.to_thread(executor.shutdown)

    return PoolAdapter(call, stop, load["workers"])


if __name__ == "__main__":
    from benchmarks.libraries.serve import serve

    serve(open_pool)
