"""The stream behind `map`: it reads as fast as batches are taken and results consumed.

::

    source --read--> StreamChunk --> Callers.enqueue_many --> results --get--> the consumer
               ^                                                           |
               `-------- at most ``window`` items from here --- to there <-'

Rules:

- One task reads: it starts with the first `wait_ready`, and only it uses and closes the source.
- Once the window is full, it reads on when a batch's worth is free, or a quarter of the window if
  that is less, so that a slow consumer makes few batches, not small ones.
- When the window is full, or the source is exhausted, what is queued is due.
- However a stream ends, nothing of it is left in the queue.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Any

from async_batcher._batching.bulk.slices import BulkFuture
from async_batcher._serialization.exception_text import is_exception

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterable
    from types import TracebackType
    from typing import Self, TypeAlias

    from async_batcher._batching.bulk.sources import Source
    from async_batcher._batching.lifecycle import BatcherLifecycle
    from async_batcher._batching.scheduler import Scheduler
    from async_batcher.batcher import AsyncBatcher

    Pair: TypeAlias = tuple[Any, Any]  # an item, or None if they are not kept, and its result


_DEFAULT_BATCH_SIZE = 64  # without max_batch_size
_BATCHES_AHEAD = 3  # per worker: one runs, one waits, the results of one are consumed


async def stream_results(
    lifecycle: BatcherLifecycle,
    batcher: AsyncBatcher[Any, Any],
    source: Source,
    *,
    ordered: bool,
    window: int | None,
    return_exceptions: bool,
    pairs: bool,
) -> AsyncGenerator[Any, None]:
    """Yield the results of what a source has; see `AsyncBatcher.map`."""
    scheduler = await lifecycle.ready(batcher)
    batch_size = lifecycle.options.max_batch_size
    if batch_size is None or batch_size == -1:
        batch_size = _DEFAULT_BATCH_SIZE
    async with ResultStream(
        scheduler,
        source,
        ordered=ordered,
        window=window or _BATCHES_AHEAD * lifecycle.workers * batch_size,
        batch_size=batch_size,
        keep_items=pairs,
    ) as stream:
        while results := await stream.wait_ready():
            results.reverse()
            while results:
                stream.release()
                if not return_exceptions and is_exception(results[-1][1]):
                    try:
                        raise results.pop()[1]
                    finally:
                        del results  # the exception's traceback holds this frame
                # Without a name here: it would be kept until the next one is wanted.
                yield results.pop() if pairs else results.pop()[1]


class StreamChunk(BulkFuture):
    """Items that were read together.

    Attributes:
        items: The items, if they are kept until their results are consumed.
        consumed: Results that were taken, if they are taken in order.
    """

    __slots__ = ("consumed", "items", "stream")
    of_stream = True

    def __init__(self, stream: ResultStream, items: list[Any] | None, size: int) -> None:
        super().__init__(size)
        self.stream = stream
        self.items = items
        self.consumed = 0

    def get(self) -> list[Pair]:
        """Take the next results in order, as far as they are there."""
        end = first = self.consumed
        if not self.left:
            end = len(self.results)
        else:
            while self.has_result(end):  # ends, since one result is missing
                end += 1
        consumed = [None] * (end - first)
        items = consumed if self.items is None else self.items[first:end]
        results = list(zip(items, self.results[first:end], strict=True))
        self.results[first:end] = consumed  # the consumer owns them now
        if self.items is not None:
            self.items[first:end] = consumed
        self.consumed = end
        return results

    def _on_results(self, indices: Iterable[int]) -> None:
        self.stream.on_results(self, indices)


class ResultStream:
    """Items on their way through a batcher: enter it, then `wait_ready` until it returns nothing.

    Args:
        scheduler: The batcher's.
        source: Where items come from.
        ordered: Whether results come in the order of their items; otherwise as they arrive.
        window: Items at most that have been read and whose results have not been consumed.
        batch_size: Items that make a batch.
        keep_items: Whether results come with their items.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        source: Source,
        *,
        ordered: bool,
        window: int,
        batch_size: int,
        keep_items: bool = False,
    ) -> None:
        self._scheduler = scheduler
        self._source = source
        self._ordered = ordered
        self._keep_items = keep_items
        self._window = window
        self._min_read = max(1, min(batch_size, window // 4))
        self._chunks: deque[StreamChunk] = deque()  # in order, not yet consumed
        self._unordered: list[Pair] = []  # in the order of arrival
        self._running: set[StreamChunk] = set()
        self._in_window = 0  # items that were read and whose results are not consumed
        self._exhausted = self._closed = False
        self._error: BaseException | None = None
        self._reader: asyncio.Task[None] | None = None
        self._results_arrived: asyncio.Future[None] | None = None  # awaited by the consumer
        self._window_free: asyncio.Future[None] | None = None  # awaited by the reader

    async def __aenter__(self) -> Self:
        """Nothing is read before the first `wait_ready`."""
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the source, and drop what has not been consumed.

        Raises:
            BaseException: What the source raised when it was closed.
        """
        loop = self._scheduler.loop
        if loop is not asyncio.get_running_loop():  # it can end there, but not be awaited here
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._close)
            return
        self._close()
        if self._reader is None:
            await self._source.close()
            return
        cancelled: BaseException | None = None
        while not self._reader.done():
            try:
                await asyncio.wait([self._reader])
            except asyncio.CancelledError as exc:  # it is meant for the source, which is closing
                cancelled = exc
                self._reader.cancel()
        error = None if self._reader.cancelled() else self._reader.exception()
        if (cancelled or error) is not None:
            raise cancelled or error  # type: ignore[misc]  # it is one of them

    async def wait_ready(self) -> list[Pair]:
        """Wait for results, and return all that are there; call `release` as they are consumed.

        Returns:
            Each with its item, or None. An exception stands for an item that failed. An empty
            list: the stream is over.

        Raises:
            BaseException: What the source raised, or why the batcher accepts no more; after all
                results before it.
        """
        loop = self._scheduler.loop
        if loop is not asyncio.get_running_loop():
            msg = (
                "this stream was started on another event loop; continue there, or start another "
                "one here"
            )
            raise RuntimeError(msg)
        if self._reader is None:
            self._reader = loop.create_task(self._read_ahead())
        while not (results := self._next()):
            if self._exhausted and not self._in_window:
                if self._error is not None:
                    error, self._error = self._error, None
                    raise error
                return []
            self._results_arrived = loop.create_future()
            await self._results_arrived
        return results

    def release(self, count: int = 1) -> None:
        """Count consumed results: as many items more may be read."""
        self._in_window -= count
        if (
            self._window_free is not None
            and self._free >= self._min_read
            and not self._window_free.done()
        ):
            self._window_free.set_result(None)

    def on_results(self, chunk: StreamChunk, indices: Iterable[int]) -> None:
        """Take notice of results of a chunk."""
        if chunk.done():
            self._running.discard(chunk)
        if not self._ordered:
            for index in indices:
                item = None
                if chunk.items is not None:
                    item, chunk.items[index] = chunk.items[index], None
                self._unordered.append((item, chunk.results[index]))
                chunk.results[index] = None  # the consumer owns it now
        elif chunk is not self._chunks[0]:
            return
        self._notify()

    def _close(self) -> None:
        self._closed = True
        if self._reader is not None and not self._exhausted:  # otherwise it is closing the source
            self._reader.cancel()
        running, self._running = self._running, set()
        self._scheduler.callers.discard_many(running)

    @property
    def _free(self) -> int:
        """Items that may be read."""
        return self._window - self._in_window

    def _next(self) -> list[Pair]:
        results: list[Pair] = []
        if not self._ordered:
            results, self._unordered = self._unordered, results
            return results
        while self._chunks:
            chunk = self._chunks[0]
            results += chunk.get()
            if chunk.left:
                break
            self._chunks.popleft()
        return results

    def _notify(self) -> None:
        if self._results_arrived is not None and not self._results_arrived.done():
            self._results_arrived.set_result(None)

    async def _read_ahead(self) -> None:
        try:
            while not self._closed:
                items = await self._source.read(await self._wait_for_window())
                if not items:
                    break
                self._enqueue(items)
        except asyncio.CancelledError as exc:
            if not self._closed:
                msg = "the source of the items was cancelled"
                self._error = RuntimeError(msg)
                self._error.__cause__ = exc
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
        except BaseException as exc:
            self._error = exc
            if not isinstance(exc, Exception):
                raise
        finally:
            self._exhausted = True
            self._scheduler.callers.flush()
            self._notify()
            await self._source.close()

    async def _wait_for_window(self) -> int:
        """Wait until items may be read, and return how many."""
        if self._free < 1:
            self._scheduler.callers.flush()
            self._window_free = asyncio.get_running_loop().create_future()
            await self._window_free
        return self._free

    def _enqueue(self, items: list[Any]) -> None:
        if self._closed:
            return
        chunk = StreamChunk(self, items.copy() if self._keep_items else None, len(items))
        self._in_window += len(items)
        self._running.add(chunk)
        if self._ordered:
            self._chunks.append(chunk)
        try:
            self._scheduler.callers.enqueue_many(items, chunk, waits_when_full=True)
        except BaseException:  # the batcher accepts no more: to the consumer these were not read
            self._in_window -= len(items)
            self._running.discard(chunk)
            if self._ordered:
                self._chunks.pop()
            raise
