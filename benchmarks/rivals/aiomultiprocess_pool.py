"""aiomultiprocess: processes that each have an event loop and run coroutines; here from a fork server."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import _work
from _rival import Pool

if TYPE_CHECKING:
    from collections.abc import Callable

with contextlib.suppress(ImportError):  # `serve` says so
    import aiomultiprocess


def open_pool(load: dict[str, Any]) -> Pool:
    """A pool whose processes run one coroutine at a time: a function that computes lets no other run beside it."""
    aiomultiprocess.set_start_method("forkserver")
    pool = aiomultiprocess.Pool(load["workers"], childconcurrency=1)

    async def call(function: Callable[..., Any], *args: Any) -> Any:
        return await pool.apply(_work.as_coroutine, (function, *args))

    async def stop() -> None:
        pool.close()
        await pool.join()

    async def discard() -> None:
        pool.terminate()
        await pool.join()

    def pids() -> list[int]:
        return [process.pid for process in pool.processes]

    return Pool(call, stop, load["workers"], pids, discard=discard)


if __name__ == "__main__":
    from _protocol import serve

    serve(open_pool, "aiomultiprocess")
