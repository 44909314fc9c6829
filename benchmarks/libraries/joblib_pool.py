"""joblib over loky, called from threads, because it blocks its caller.

A `Parallel` runs one list of calls at a time. The adapter has one for each worker, each in a
``with`` block of its own, so that all workers can be busy; they share their processes, as all of
joblib's do. Memory mapping of large arrays is off: joblib sends an array that it has sent before
as the name of its file only, with the values of the first time.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

from benchmarks.libraries.base import NotAvailableError, PoolAdapter

if TYPE_CHECKING:
    from collections.abc import Callable

with contextlib.suppress(ImportError):  # `serve` reports it
    import joblib


def open_pool(load: dict[str, Any]) -> PoolAdapter:
    """Open a `Parallel` for each worker. The one that was busy last gets the next call."""
    workers = load["workers"]
    if workers == 1:
        msg = "it runs a single job at a time in its caller's process"
        raise NotAvailableError(msg)
    blocks = contextlib.ExitStack()
    idle = [
        blocks.enter_context(joblib.Parallel(n_jobs=workers, backend="loky", max_nbytes=None))
        for _ in range(workers)
    ]
    first = idle[0]
    slots = asyncio.Semaphore(workers)

    async def call(function: Callable[..., Any], *args: Any) -> Any:
        async with slots:
            parallel = idle.pop()
            try:
                (result,) = await asyncio.to_thread(parallel, [joblib.delayed(function)(*args)])
            finally:
                idle.append(parallel)
        return result

    def executor() -> Any:
        return first._backend._workers  # noqa: SLF001 - no public name has the processes

    def shut_down() -> None:
        shared = executor()
        blocks.close()  # leaves the workers to the next `Parallel`
        shared.shutdown()

    async def stop() -> None:
        await asyncio.to_thread(shut_down)

    def pids() -> list[int]:
        return list(executor()._processes)  # noqa: SLF001

    return PoolAdapter(call, stop, workers, pids)


if __name__ == "__main__":
    from benchmarks.libraries.serve import serve

    serve(open_pool, "joblib")
