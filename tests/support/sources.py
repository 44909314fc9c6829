"""Sources of streams, and a consumer."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator


class Source:
    """Numbers from 0 on; records how far it was read, and where it was closed.

    Args:
        count: The number of items. None: no end.
        error: Raised after the last item.
    """

    def __init__(self, count: int | None = None, error: BaseException | None = None) -> None:
        self.count = count
        self.error = error
        self.read = 0
        self.closed_in: int | None = None  # the thread
        self.fails_at_close = False

    def __iter__(self) -> Iterator[int]:
        """Yield the numbers."""
        try:
            while self.count is None or self.read < self.count:
                self.read += 1
                yield self.read - 1
            if self.error is not None:
                raise self.error
        finally:
            self.closed_in = threading.get_ident()
            if self.fails_at_close:
                msg = "cannot be closed"
                raise OSError(msg)

    async def __aiter__(self) -> AsyncIterator[int]:
        """Yield the numbers, each in an iteration of the loop."""
        try:
            for item in iter(self):
                yield item
                await asyncio.sleep(0)
        finally:
            self.closed_in = threading.get_ident()


class SyncSource:
    """A source without async iteration."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def __iter__(self) -> Iterator[int]:
        """Iterate over the source."""
        return iter(self.source)


ITERATIONS = ["sync", "async"]


def readable(source: Source, way: str) -> Any:
    """Return the source for sync or async iteration."""
    return SyncSource(source) if way == "sync" else source


class Consumer:
    """A task that consumes results as the test allows.

    Args:
        results: The stream.
        allowed: The number of results that it takes at first. None: all.
    """

    def __init__(self, results: Any, allowed: int | None = None) -> None:
        self.taken: list[Any] = []
        self._results = results
        self._allowed = asyncio.Semaphore(10**9 if allowed is None else allowed)
        self.task = asyncio.create_task(self._run())

    def allow(self, count: int) -> None:
        """Allow more results."""
        for _ in range(count):
            self._allowed.release()

    async def _run(self) -> None:
        await self._allowed.acquire()
        async with contextlib.aclosing(self._results):
            async for result in self._results:
                self.taken.append(result)
                await self._allowed.acquire()
