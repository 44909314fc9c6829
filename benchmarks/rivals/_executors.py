"""What the pools behind a `concurrent.futures.Executor` have in common."""

from __future__ import annotations

import asyncio
import contextlib
from concurrent.futures import BrokenExecutor
from typing import TYPE_CHECKING, Any

import _work
from _ready import answers_of_all
from _rival import Pool

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Executor


def open_executor(make: Callable[[], Executor], workers: int) -> Pool:
    """A pool over an executor, called through `run_in_executor`.

    Args:
        make: Makes the executor; called again when a dead worker has broken it, which is what its user would have to do.
        workers: Its worker processes.
    """
    loop = asyncio.get_running_loop()
    executor: Any = make()

    async def call(function: Callable[..., Any], *args: Any) -> Any:
        nonlocal executor
        used = executor
        try:
            return await loop.run_in_executor(used, function, *args)
        except BrokenExecutor:
            if used is executor:  # the first caller to see it makes it anew, for all
                executor = make()
                used.shutdown(wait=False)
            raise

    async def stop() -> None:
        await asyncio.to_thread(executor.shutdown)

    def pids() -> list[int]:
        return list(executor._processes)  # noqa: SLF001 - there is no other way to learn whom to kill

    async def recover(pid: int) -> None:  # noqa: ARG001 - the whole pool is lost
        with contextlib.suppress(BrokenExecutor):
            while True:  # until the loss shows; at once, most often
                await call(_work.hold, 0.0)
        await answers_of_all(call, workers)

    return Pool(call, stop, workers, pids, recover)
