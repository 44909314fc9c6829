"""Calls that wait until all items have ended that were accepted before them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from async_batcher._eventloop.future import resolve

if TYPE_CHECKING:
    import asyncio


class Flushes:
    """The flushes of one scheduler; true while one waits.

    Args:
        loop: The event loop.
    """

    __slots__ = ("_loop", "_waiting")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        # The futures of items that have not ended, and that of the call.
        self._waiting: list[tuple[list[Any], asyncio.Future[None]]] = []

    def __bool__(self) -> bool:
        """Tell whether a call waits."""
        return bool(self._waiting)

    async def wait(self, pending: list[Any]) -> None:
        """Wait until all these futures are done."""
        future = self._loop.create_future()
        self._waiting.append((pending, future))
        self.check()
        try:
            await future
        finally:
            self._waiting = [entry for entry in self._waiting if entry[1] is not future]

    def check(self) -> None:
        """Resolve the calls whose items have all ended; each future is looked at once."""
        for pending, future in self._waiting:
            while pending and pending[-1].done():
                pending.pop()
            if not pending:
                resolve(future, None)
