"""This project's own pool."""

from __future__ import annotations

import asyncio
from typing import Any

from _ready import answers_of_all
from _rival import Pool

from async_batcher import WorkerPool


def open_pool(load: dict[str, Any]) -> Pool:
    """A pool that starts its workers from a fork server."""
    pool = WorkerPool(load["workers"], mp_context="forkserver")

    def pids() -> list[int]:
        return [worker.pid for worker in pool.workers() if worker.pid is not None]

    async def recover(pid: int) -> None:
        while pid in pids():  # noqa: ASYNC110 - the pool tells nobody of a death that hurt no batch
            await asyncio.sleep(0.0005)
        await answers_of_all(pool.run, load["workers"])

    return Pool(pool.run, pool.stop, load["workers"], pids, recover)


if __name__ == "__main__":
    from _protocol import serve

    serve(open_pool, "async-batcher")
