"""joblib over loky. It blocks its caller and takes a list of jobs, so that a call is a list of one, in a thread.

A `Parallel` runs one list at a time. There are as many of them as workers, each in a ``with`` block of its own, which keeps the
workers; they share these, as all of joblib's do. So all workers can be busy, which with one `Parallel` and lists of one they
could not. Its memory mapping of large arrays is off: it sends an array that it has sent before by its file's name alone, with
what was in it then.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

from _rival import NotAvailableError, Pool

if TYPE_CHECKING:
    from collections.abc import Callable

with contextlib.suppress(ImportError):  # `serve` says so
    import joblib


def open_pool(load: dict[str, Any]) -> Pool:
    """A `Parallel` for each worker, the one that was busy last first."""
    workers = load["workers"]
    if workers == 1:
        msg = "runs a single job at a time in its caller's process"
        raise NotAvailableError(msg)
    blocks = contextlib.ExitStack()
    parallels = [blocks.enter_context(joblib.Parallel(n_jobs=workers, backend="loky", max_nbytes=None)) for _ in range(workers)]
    idle, turns = list(parallels), asyncio.Semaphore(workers)

    async def call(function: Callable[..., Any], *args: Any) -> Any:
        async with turns:
            parallel = idle.pop()
            try:
                (answer,) = await asyncio.to_thread(parallel, [joblib.delayed(function)(*args)])
            finally:
                idle.append(parallel)
        return answer

    def executor() -> Any:
        return parallels[0]._backend._workers  # noqa: SLF001 - there is no other way to its processes

    def end() -> None:
        shared = executor()
        blocks.close()  # leaves the workers to the next `Parallel`
        shared.shutdown()

    async def stop() -> None:
        await asyncio.to_thread(end)

    def pids() -> list[int]:
        return list(executor()._processes)  # noqa: SLF001

    return Pool(call, stop, workers, pids)


if __name__ == "__main__":
    from _protocol import serve

    serve(open_pool, "joblib")
