"""pebble's process pool, from a fork server."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
from typing import TYPE_CHECKING, Any

import _work
from _rival import Pool

if TYPE_CHECKING:
    from collections.abc import Callable

with contextlib.suppress(ImportError):  # `serve` says so
    import pebble


def open_pool(load: dict[str, Any]) -> Pool:
    """A pool whose futures are awaited; where it has not started a dead worker's successor itself, it is made anew."""
    workers = load["workers"]
    context = multiprocessing.get_context("forkserver")
    loop = asyncio.get_running_loop()
    ended: list[asyncio.Future[None]] = []

    def make() -> Any:
        return pebble.ProcessPool(max_workers=workers, context=context)

    pool = make()

    async def call(function: Callable[..., Any], *args: Any) -> Any:
        nonlocal pool
        used = pool
        try:
            return await asyncio.wrap_future(used.schedule(function, args=args))
        except Exception:
            if used is pool and not used.active:  # the first caller to see it makes it anew, for all
                pool = make()
                ended.append(loop.run_in_executor(None, used.join))
            raise

    async def stop() -> None:
        pool.close()
        await asyncio.to_thread(pool.join)
        await asyncio.gather(*ended)

    async def discard() -> None:
        pool.stop()
        await asyncio.to_thread(pool.join)
        await asyncio.gather(*ended)

    def pids() -> list[int]:
        return list(pool._pool_manager.worker_manager.workers)  # noqa: SLF001 - there is no other way to learn whom to kill

    async def recover(pid: int) -> None:
        while pid in pids():  # noqa: ASYNC110 - the pool tells nobody of a death that hurt no call
            await asyncio.sleep(0.0005)
        seen: set[int] = set()
        while len(seen) < workers:
            answers = await asyncio.gather(*[call(_work.hold, 0.005) for _ in range(workers)], return_exceptions=True)
            if any(isinstance(answer, BaseException) for answer in answers):
                seen.clear()  # without any call to do, the death of one worker is the end of the pool
            else:
                seen.update(answers)

    return Pool(call, stop, workers, pids, recover, discard)


if __name__ == "__main__":
    from _protocol import serve

    serve(open_pool, "pebble")
