"""The lower limit for a call in another process: one worker, one pipe, a caller that blocks.

The event loop stands still meanwhile, calls run one at a time, and a crash is a hang or an error.
It is a limit, not a library.
"""

from __future__ import annotations

import asyncio
import multiprocessing
from typing import TYPE_CHECKING, Any

from benchmarks.libraries.base import PoolAdapter

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection


def work(pipe: Connection[Any, Any]) -> None:
    """Run calls until the pipe closes."""
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            return
        pipe.send(function(*args))


def open_pool(load: dict[str, Any]) -> PoolAdapter:  # noqa: ARG001 - the contract of adapters
    """Start one worker from a fork server."""
    context = multiprocessing.get_context("forkserver")
    pipe, theirs = context.Pipe()
    process = context.Process(target=work, args=(theirs,))
    process.start()
    theirs.close()

    async def call(function: Callable[..., Any], *args: Any) -> Any:
        pipe.send((function, args))
        return pipe.recv()

    async def stop() -> None:
        pipe.close()
        await asyncio.to_thread(process.join)

    return PoolAdapter(call, stop, workers=1)


if __name__ == "__main__":
    from benchmarks.libraries.serve import serve

    serve(open_pool)
