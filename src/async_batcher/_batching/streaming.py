"""A stream: items are read from a source as fast as batches take them, and answers handed out as fast as they are wanted.

::

    source --read--> `StreamChunk` --> Scheduler.add_many --> queue, batches --> results ------get---> the consumer
               ^                                                                              |
               `------------- at most ``window`` items from here ---------------- to there <--'

Rules:

- One task reads, the feeder, from the first `get` on; it alone touches the source, and closes it.
- The feeder reads on when a batch's worth of the window is free, so that a slow consumer makes few batches, not small ones.
- When the window is full, or the source has come to its end, nothing that waits need wait for more.
- Whatever ends a stream, when it is left nothing of it is queued.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Any

from async_batcher._batching.bulk import BulkFuture

if TYPE_CHECKING:
    from collections.abc import Iterable
    from types import TracebackType
    from typing import Self, TypeAlias

    from async_batcher._batching.scheduler import Scheduler
    from async_batcher._batching.sources import Source

    IndexedResult: TypeAlias = tuple[int, Any]  # the place of its item in the source, and what came of it


class StreamChunk(BulkFuture):
    """Items that were read together.

    Args:
        stream: Theirs.
        base: The place of the first one in the source.
        size: How many.

    Attributes:
        base: As above.
        taken: How many of their answers have been taken; counted where they are taken in order.
    """

    __slots__ = ("base", "stream", "taken")

    def __init__(self, stream: ResultStream, base: int, size: int) -> None:
        super().__init__(size)
        self.stream = stream
        self.base = base
        self.taken = 0

    def get(self) -> list[IndexedResult]:
        """Take the next answers in order, as far as they have come."""
        end = first = self.taken
        if not self.left:
            end = len(self.results)
        else:
            while self.has_result(end):  # at the latest that of another item has not come
                end += 1
        answers = list(enumerate(self.results[first:end], self.base + first))
        self.results[first:end] = [None] * (end - first)  # they are the consumer's now
        self.taken = end
        return answers

    def _on_results(self, places: Iterable[int]) -> None:
        self.stream.on_results(self, places)


class ResultStream:
    """Items on their way through a batcher; enter it, then `get` until there is nothing more.

    Args:
        session: The batcher's.
        source: Where items come from.
        ordered: Whether answers are taken in the order of their items; otherwise as they come.
        window: Items at most that have been read and whose answers have not been taken.
        batch: Items that make a batch.
    """

    def __init__(self, session: Scheduler, source: Source, *, ordered: bool, window: int, batch: int) -> None:
        self._session = session
        self._source = source
        self._ordered = ordered
        self._window = window
        self._enough = max(1, min(batch, window // 4))  # of the window, for the feeder to read on
        self._chunks: deque[StreamChunk] = deque()  # in order, as far as they have not been taken
        self._unordered: list[IndexedResult] = []  # what has come, in the order of its coming
        self._running: set[StreamChunk] = set()
        self._read = self._taken = 0
        self._is_read = self._is_left = False
        self._error: BaseException | None = None
        self._feeder: asyncio.Task[None] | None = None
        self._news: asyncio.Future[None] | None = None  # what the consumer waits for
        self._room: asyncio.Future[None] | None = None  # what the feeder waits for

    async def __aenter__(self) -> Self:
        """Nothing is read before the first `get`."""
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the source, and drop what has not been taken.

        Raises:
            BaseException: What the source raised when it was closed.
        """
        loop = self._session.loop
        if loop is not asyncio.get_running_loop():  # there it can be ended, but from here not waited for
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._leave)
            return
        self._leave()
        if self._feeder is None:
            await self._source.close()
            return
        cancelled: BaseException | None = None
        while not self._feeder.done():
            try:
                await asyncio.wait([self._feeder])
            except asyncio.CancelledError as exc:  # it is the source's, which is closing
                cancelled = exc
                self._feeder.cancel()
        error = None if self._feeder.cancelled() else self._feeder.exception()
        if (cancelled or error) is not None:
            raise cancelled or error  # type: ignore[misc]  # it is one of them

    async def get(self) -> list[IndexedResult]:
        """Wait until there is an answer, and take all that there are; see `wait_ready`."""
        answers = await self.wait_ready()
        self.release(len(answers))
        return answers

    async def wait_ready(self) -> list[IndexedResult]:
        """Wait until there is an answer, and say all that there are, once; count what is made of them: `release`.

        Returns:
            Each with the place of its item in the source, from 0. What is an exception stands for an item that has failed. None
            at all: there are no more.

        Raises:
            BaseException: What the source raised, or why the batcher takes no more; after all answers before it.
        """
        loop = self._session.loop
        if loop is not asyncio.get_running_loop():
            msg = "this stream was begun on another event loop; go on there, or begin another one here"
            raise RuntimeError(msg)
        if self._feeder is None:
            self._feeder = loop.create_task(self._read_ahead())
        while not (answers := self._next()):
            if self._is_read and self._read == self._taken:
                if self._error is not None:
                    error, self._error = self._error, None
                    raise error
                return []
            self._news = loop.create_future()
            await self._news
        return answers

    def release(self, count: int = 1) -> None:
        """So many answers are the consumer's: as many items more may be read."""
        self._taken += count
        if self._room is not None and self._free >= self._enough and not self._room.done():
            self._room.set_result(None)

    def on_results(self, chunk: StreamChunk, places: Iterable[int]) -> None:
        """Answers of a chunk have come."""
        if chunk.done():
            self._running.discard(chunk)
        if not self._ordered:
            for place in places:
                self._unordered.append((chunk.base + place, chunk.results[place]))
                chunk.results[place] = None  # it is the consumer's now
        elif chunk is not self._chunks[0]:
            return
        self._notify()

    def _leave(self) -> None:
        """Nobody consumes any more."""
        self._is_left = True
        if self._feeder is not None and not self._is_read:  # else it is closing the source
            self._feeder.cancel()
        running, self._running = self._running, set()
        self._session.discard_many(running)

    @property
    def _free(self) -> int:
        """Items that may be read."""
        return self._window - (self._read - self._taken)

    def _next(self) -> list[IndexedResult]:
        answers: list[IndexedResult] = []
        if not self._ordered:
            answers, self._unordered = self._unordered, answers
            return answers
        while self._chunks:
            chunk = self._chunks[0]
            answers += chunk.get()
            if chunk.left:
                break
            self._chunks.popleft()
        return answers

    def _notify(self) -> None:
        if self._news is not None and not self._news.done():
            self._news.set_result(None)

    async def _read_ahead(self) -> None:
        """Read, as long as there is something to read and somebody to take it."""
        try:
            while not self._is_left and (items := await self._source.read(await self._wait_for_room())):
                self._add(items)
        except asyncio.CancelledError as exc:
            if not self._is_left:
                msg = "what the items come from was cancelled"
                self._error = RuntimeError(msg)
                self._error.__cause__ = exc
            if task_is_cancelled():
                raise
        except BaseException as exc:
            self._error = exc
            if not isinstance(exc, Exception):
                raise
        finally:
            self._is_read = True
            self._session.flush()
            self._notify()
            await self._source.close()

    async def _wait_for_room(self) -> int:
        """Wait until something may be read; says how much."""
        if self._free < 1:
            self._session.flush()
            self._room = asyncio.get_running_loop().create_future()
            await self._room
        return self._free

    def _add(self, items: list[Any]) -> None:
        if self._is_left:
            return
        chunk = StreamChunk(self, self._read, len(items))
        self._read += len(items)
        self._running.add(chunk)
        if self._ordered:
            self._chunks.append(chunk)
        try:
            self._session.add_many(items, chunk, may_wait=True)
        except BaseException:  # it takes no more: these have not been read, as far as the consumer can tell
            self._read -= len(items)
            self._running.discard(chunk)
            if self._ordered:
                self._chunks.pop()
            raise


def task_is_cancelled() -> bool:
    """Whether somebody has cancelled the task that runs."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
