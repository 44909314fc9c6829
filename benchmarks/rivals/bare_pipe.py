"""The least that a call in another process costs: one worker, a pipe, and a caller that blocks until the answer is there.

No loop is served meanwhile, one call runs at a time, and a worker that dies is a hang or an error; it is the floor, not a rival.
"""

from __future__ import annotations

import asyncio
import multiprocessing
from typing import TYPE_CHECKING, Any

from _rival import Pool

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection


def work(pipe: Connection[Any, Any]) -> None:
    """Answer calls until there are no more."""
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            return
        pipe.send(function(*args))


def open_pool(load: dict[str, Any]) -> Pool:  # noqa: ARG001 - every rival gets it
    """A worker from a fork server."""
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

    return Pool(call, stop, workers=1)


if __name__ == "__main__":
    from _protocol import serve

    serve(open_pool)
