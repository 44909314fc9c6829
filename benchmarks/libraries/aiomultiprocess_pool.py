"""aiomultiprocess: worker processes that each run coroutines on an event loop of their own."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from benchmarks.libraries.base import PoolAdapter
from benchmarks.scenarios import worker_functions

if TYPE_CHECKING:
    from collections.abc import Callable

with contextlib.suppress(ImportError):  # `serve` reports it
    import aiomultiprocess


def open_pool(load: dict[str, Any]) -> PoolAdapter:
    """Open a pool from a fork server whose workers run one coroutine at a time."""
    aiomultiprocess.set_start_method("forkserver")
    pool = aiomultiprocess.Pool(load["workers"], childconcurrency=1)

    async def call(function: Callable[..., Any], *args: Any) -> Any:
        return await pool.apply(worker_functions.as_coroutine, (function, *args))

    async def stop() -> None:
        pool.close()
        await pool.join()

    async def discard() -> None:
        pool.terminate()
        await pool.join()

    def pids() -> list[int]:
        return [process.pid for process in pool.processes]

    return PoolAdapter(call, stop, load["workers"], pids, discard=discard)


if __name__ == "__main__":
    from benchmarks.libraries.serve import serve

    serve(open_pool, "aiomultiprocess")
