"""What the pools behind a `concurrent.futures.Executor` have in common."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import _work
from _protocol import Pool

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

    def call(function: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:
        return loop.run_in_executor(executor, function, *args)

    async def stop() -> None:
        await asyncio.to_thread(executor.shutdown)

    def pids() -> list[int]:
        return list(executor._processes)  # noqa: SLF001 - there is no other way to learn whom to kill

    async def recover(pid: int) -> None:  # noqa: ARG001 - the whole pool is lost
        nonlocal executor
        try:
            while True:  # until the loss shows; at once, most often
                await call(_work.hold, 0.0)
        except Exception:  # noqa: BLE001 - each has its own
            executor.shutdown(wait=False)
        executor = make()
        seen: set[int] = set()
        while len(seen) < workers:
            seen.update(await asyncio.gather(*[call(_work.hold, 0.005) for _ in range(workers)]))

    return Pool(call, stop, workers, pids, recover)
