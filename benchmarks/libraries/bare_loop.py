"""The lower limit for a pool on an event loop: one socket per worker, one pickle each way.

It handles neither messages in several pieces nor crashes, classes of the main module or timeouts.
It is a limit, not a library.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import pickle
import socket
from typing import TYPE_CHECKING, Any

from benchmarks.libraries.base import PoolAdapter

if TYPE_CHECKING:
    from collections.abc import Callable

MESSAGE_BYTES = 65_536  # the largest message


def work(channel: socket.socket) -> None:
    """Run calls until the socket closes."""
    while message := channel.recv(MESSAGE_BYTES):
        function, args = pickle.loads(message)  # noqa: S301 - from our own parent
        channel.sendall(pickle.dumps(function(*args), 5))


class Worker:
    """A worker process and the parent's end of its socket."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._channel, theirs = socket.socketpair()
        context = multiprocessing.get_context("forkserver")
        self._process = context.Process(target=work, args=(theirs,))
        self._process.start()
        theirs.close()
        self._future: asyncio.Future[Any]
        self._loop.add_reader(self._channel, self._on_result)

    async def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Run one call at a time."""
        self._future = self._loop.create_future()
        self._channel.send(pickle.dumps((function, args), 5))
        return await self._future

    def stop(self) -> None:
        """Close the socket and wait for the process to exit."""
        self._loop.remove_reader(self._channel)
        self._channel.close()
        self._process.join()

    def _on_result(self) -> None:
        message = self._channel.recv(MESSAGE_BYTES)
        self._future.set_result(pickle.loads(message))  # noqa: S301 - from our own worker


def open_pool(load: dict[str, Any]) -> PoolAdapter:
    """Start workers from a fork server. The worker that was busy last gets the next call."""
    workers = [Worker() for _ in range(load["workers"])]
    idle = list(workers)
    slots = asyncio.Semaphore(load["workers"])

    async def call(function: Callable[..., Any], *args: Any) -> Any:
        async with slots:
            worker = idle.pop()
            try:
                return await worker.call(function, *args)
            finally:
                idle.append(worker)

    async def stop() -> None:
        for worker in workers:
            await asyncio.to_thread(worker.stop)

    return PoolAdapter(call, stop, load["workers"])


if __name__ == "__main__":
    from benchmarks.libraries.serve import serve

    serve(open_pool)
