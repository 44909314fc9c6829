"""The standard library's threads: no trip to a process, no copy, and one lock for all that is computed."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import _work
from _rival import NotAvailableError, Pool

if TYPE_CHECKING:
    from collections.abc import Callable

_QUESTIONS = ("round_trip", "cores_busy")
# Threads take turns at the lock: by the clock on the wall, two would be busy while one waits.
_INSTEAD = {_work.spin: _work.burn}


def open_pool(load: dict[str, Any]) -> Pool:
    """Its executor."""
    if load["question"] not in _QUESTIONS:
        msg = "a thread can neither be killed nor has memory of its own"
        raise NotAvailableError(msg)
    loop = asyncio.get_running_loop()
    executor = ThreadPoolExecutor(load["workers"])

    async def call(function: Callable[..., Any], *args: Any) -> Any:
        return await loop.run_in_executor(executor, _INSTEAD.get(function, function), *args)

    async def stop() -> None:
        await asyncio.to_thread(executor.shutdown)

    return Pool(call, stop, load["workers"])


if __name__ == "__main__":
    from _protocol import serve

    serve(open_pool)
