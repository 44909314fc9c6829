"""Calls that wait until all items have ended that were accepted before them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from async_batcher._eventloop.future import resolve

if TYPE_CHECKING:
    import asyncio


class Flushes:
    """The flushes of one scheduler.

    Args:
        loop: The event loop.

    Attributes:
        waiting: For each call that waits, the futures of items that have not ended, and its own.
    """

    __slots__ = ("_loop", "waiting")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.waiting: list[tuple[list[Any], asyncio.Future[None]]] = []

    async def wait(self, pending: list[Any]) -> None:
        """Wait until all these futures are done."""
        future = self._loop.create_future()
        self.waiting.append((pending, future))
        self.check()
        try:
            await future
        finally:
            self.waiting = [entry for entry in self.waiting if entry[1] is not future]

    def check(self) -> None:
        """Resolve the calls whose items have all ended; each future is looked at once."""
        for pending, future in self.waiting:
            while pending and pending[-1].done():
                pending.pop()
            if not pending:
                resolve(future, None)
