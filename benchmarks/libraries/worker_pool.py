"""This project's own pool."""

from __future__ import annotations

import asyncio
from typing import Any

from async_batcher import WorkerPool
from benchmarks.libraries.base import PoolAdapter
from benchmarks.scenarios.readiness import call_every_worker


def open_pool(load: dict[str, Any]) -> PoolAdapter:
    """Open a pool that starts its workers from a fork server."""
    pool = WorkerPool(load["workers"], mp_context="forkserver")

    def pids() -> list[int]:
        return [worker.pid for worker in pool.workers() if worker.pid is not None]

    async def recover(pid: int) -> None:
        while pid in pids():  # noqa: ASYNC110 - the pool reports no crash of an idle worker
            await asyncio.sleep(0.0005)
        await call_every_worker(pool.run, load["workers"])

    return PoolAdapter(pool.run, pool.stop, load["workers"], pids, recover)


if __name__ == "__main__":
    from benchmarks.libraries.serve import serve

    serve(open_pool, "async-batcher")
