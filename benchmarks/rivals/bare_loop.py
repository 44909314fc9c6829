"""The least that a pool on the event loop costs: a socket for each worker, which the loop watches, a pickle there and one back.

A message that does not come in one piece, a worker that dies, a class of the main module, a timeout: it heeds nothing of it. It
is a limit, not a rival.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import pickle
import socket
from typing import TYPE_CHECKING, Any

from _rival import Pool

if TYPE_CHECKING:
    from collections.abc import Callable

_LARGEST = 65_536  # bytes of a message


def work(channel: socket.socket) -> None:
    """Answer calls until there are no more."""
    while message := channel.recv(_LARGEST):
        function, args = pickle.loads(message)  # noqa: S301 - from our own parent
        channel.sendall(pickle.dumps(function(*args), 5))


class Worker:
    """A process, and the parent's end of its socket."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._channel, theirs = socket.socketpair()
        self._process = multiprocessing.get_context("forkserver").Process(target=work, args=(theirs,))
        self._process.start()
        theirs.close()
        self._answer: asyncio.Future[Any]
        self._loop.add_reader(self._channel, self._on_answer)

    async def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """One call at a time."""
        self._answer = self._loop.create_future()
        self._channel.send(pickle.dumps((function, args), 5))
        return await self._answer

    def stop(self) -> None:
        """End the process."""
        self._loop.remove_reader(self._channel)
        self._channel.close()
        self._process.join()

    def _on_answer(self) -> None:
        self._answer.set_result(pickle.loads(self._channel.recv(_LARGEST)))  # noqa: S301 - from our own worker


def open_pool(load: dict[str, Any]) -> Pool:
    """Workers from a fork server, the one that was busy last first."""
    workers = [Worker() for _ in range(load["workers"])]
    idle = list(workers)
    turns = asyncio.Semaphore(load["workers"])

    async def call(function: Callable[..., Any], *args: Any) -> Any:
        async with turns:
            worker = idle.pop()
            try:
                return await worker.call(function, *args)
            finally:
                idle.append(worker)

    async def stop() -> None:
        for worker in workers:
            await asyncio.to_thread(worker.stop)

    return Pool(call, stop, load["workers"])


if __name__ == "__main__":
    from _protocol import serve

    serve(open_pool)
