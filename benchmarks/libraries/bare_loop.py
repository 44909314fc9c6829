"""The lower limit for a pool on an event loop: one socket per worker, one pickle each way.

With ``per_worker`` of the load, so many calls are in flight at each worker, so that the next one
is there when a worker has returned a result. It handles neither messages in several pieces nor
crashes, classes of the main module or timeouts. It is a limit, not a library.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import pickle
import socket
import sys
from collections import deque
from typing import TYPE_CHECKING, Any

from benchmarks.libraries.base import NotAvailableError, PoolAdapter

if TYPE_CHECKING:
    from collections.abc import Callable

MESSAGE_BYTES = 65_536  # the largest message
# Keeps messages apart when two are in flight. Not every platform has it for local sockets.
KIND = socket.SOCK_SEQPACKET if sys.platform == "linux" else socket.SOCK_STREAM


def work(channel: socket.socket) -> None:
    """Run calls until the socket closes."""
    while message := channel.recv(MESSAGE_BYTES):
        function, args = pickle.loads(message)  # noqa: S301 - from our own parent
        channel.sendall(pickle.dumps(function(*args), 5))


class Worker:
    """A worker process and the parent's end of its socket."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._channel, theirs = socket.socketpair(type=KIND)
        context = multiprocessing.get_context("forkserver")
        self._process = context.Process(target=work, args=(theirs,))
        self._process.start()
        theirs.close()
        self._futures: deque[asyncio.Future[Any]] = deque()
        self._loop.add_reader(self._channel, self._on_result)

    async def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Send a call, which runs after those that were sent before."""
        future = self._loop.create_future()
        self._futures.append(future)
        self._channel.send(pickle.dumps((function, args), 5))
        return await future

    def stop(self) -> None:
        """Close the socket and wait for the process to exit."""
        self._loop.remove_reader(self._channel)
        self._channel.close()
        self._process.join()

    def _on_result(self) -> None:
        message = self._channel.recv(MESSAGE_BYTES)
        self._futures.popleft().set_result(pickle.loads(message))  # noqa: S301 - from our worker


def open_pool(load: dict[str, Any]) -> PoolAdapter:
    """Start workers from a fork server. The worker that was busy last gets the next call."""
    per_worker = load.get("per_worker", 1)
    if per_worker > 1 and KIND is socket.SOCK_STREAM:
        msg = "this platform has no local sockets that keep messages apart"
        raise NotAvailableError(msg)
    workers = [Worker() for _ in range(load["workers"])]
    idle = workers * per_worker
    slots = asyncio.Semaphore(len(idle))

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
