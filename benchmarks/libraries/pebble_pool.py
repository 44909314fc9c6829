"""pebble's process pool, from a fork server."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
from typing import TYPE_CHECKING, Any

from benchmarks.libraries.base import PoolAdapter
from benchmarks.scenarios import worker_functions

if TYPE_CHECKING:
    from collections.abc import Callable

with contextlib.suppress(ImportError):  # `serve` reports it
    import pebble


def open_pool(load: dict[str, Any]) -> PoolAdapter:
    """Open a pool, and open another one if a crash has stopped it."""
    workers = load["workers"]
    context = multiprocessing.get_context("forkserver")
    loop = asyncio.get_running_loop()
    stopping: list[asyncio.Future[None]] = []

    def make() -> Any:
        return pebble.ProcessPool(max_workers=workers, context=context)

    pool = make()

    async def call(function: Callable[..., Any], *args: Any) -> Any:
        nonlocal pool
        used = pool
        try:
            return await asyncio.wrap_future(used.schedule(function, args=args))
        except Exception:
            if used is pool and not used.active:  # the first caller replaces it
                pool = make()
                stopping.append(loop.run_in_executor(None, used.join))
            raise

    async def stop() -> None:
        pool.close()
        await asyncio.to_thread(pool.join)
        await asyncio.gather(*stopping)

    async def discard() -> None:
        pool.stop()
        await asyncio.to_thread(pool.join)
        await asyncio.gather(*stopping)

    def pids() -> list[int]:
        manager = pool._pool_manager  # noqa: SLF001 - no public name has the process ids
        return list(manager.worker_manager.workers)

    async def recover(pid: int) -> None:
        while pid in pids():  # noqa: ASYNC110 - the pool reports no crash of an idle worker
            await asyncio.sleep(0.0005)
        seen: set[Any] = set()
        while len(seen) < workers:
            calls = [call(worker_functions.hold, 0.005) for _ in range(workers)]
            results = await asyncio.gather(*calls, return_exceptions=True)
            if any(isinstance(result, BaseException) for result in results):
                seen.clear()  # the crash of an idle worker stops the pool
            else:
                seen.update(results)

    return PoolAdapter(call, stop, workers, pids, recover, discard)


if __name__ == "__main__":
    from benchmarks.libraries.serve import serve

    serve(open_pool, "pebble")
