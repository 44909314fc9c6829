"""Where `map` gets its items from, some at a time.

- `SyncSource` reads on the event loop, for a millisecond at a time, so that other tasks run.
- `AsyncSource` reads on the event loop, one item at a time: the next may take long.
- `ThreadSource` reads in a thread of its own, where it may block.

Rules:

- No item is read that was not asked for. What was read before an error comes before the error.
- A source is closed where it was read: there the ``finally`` of a generator runs.
- A generator is closed, and an iterator that was made here. One that was given, such as a file, is
  left to its owner.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, Generator, Iterable
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

# Seconds that other tasks wait for reading, if a single item takes no longer.
_MAX_BLOCKING_READ = 0.001

T = TypeVar("T")


class Source(Protocol):
    """What a stream reads."""

    async def read(self, limit: int) -> list[Any]:
        """Return the next items: at most ``limit``, none at the end.

        Raises:
            BaseException: What the source raised in place of the next item.
        """

    async def close(self) -> None:
        """Read no more, and close a generator."""


def as_list(items: Any) -> list[Any]:
    """Return the items of `AsyncBatcher.process_many`; raise TypeError for others."""
    _refuse_text(items)
    if isinstance(items, AsyncIterable) and not isinstance(items, Iterable):
        msg = "items: process_many() takes an iterable; map() takes an async one"
        raise TypeError(msg)
    return list(items)


def _refuse_text(items: object) -> None:
    """Raise TypeError for one string, whose characters are hardly meant to be the items."""
    if isinstance(items, str | bytes | bytearray):
        kind = type(items).__name__
        msg = f"items: must be an iterable of items, not one {kind}; write [item], or list(item)"
        raise TypeError(msg)


def make_source(items: Iterable[Any] | AsyncIterable[Any], *, in_thread: bool) -> Source:
    """Return the source that reads ``items``.

    Raises:
        TypeError: It is not iterable or is a string, or it is async and is to be read in a thread.
    """
    _refuse_text(items)
    if isinstance(items, AsyncIterable):
        if in_thread:
            msg = (
                "read_in_thread=True is for what blocks; an async iterable does not, and is read "
                "on the event loop"
            )
            raise TypeError(msg)
        awaited = aiter(items)
        return AsyncSource(
            awaited, closes=awaited is not items or isinstance(awaited, AsyncGenerator)
        )
    try:
        iterator = iter(items)
    except TypeError as exc:
        msg = f"items: must be an iterable or an async iterable, not {type(items).__name__}"
        raise TypeError(msg) from exc
    closes = iterator is not items or isinstance(iterator, Generator)
    return (
        ThreadSource(iterator, closes=closes) if in_thread else SyncSource(iterator, closes=closes)
    )


class SyncSource:
    """An iterator that is read on the event loop."""

    def __init__(self, iterator: Iterator[Any], *, closes: bool = True) -> None:
        self._iterator = iterator
        self._closes = closes
        self._error: BaseException | None = None

    async def read(self, limit: int) -> list[Any]:
        if self._error is not None:
            raise self._error
        now = asyncio.get_running_loop().time
        end = now() + _MAX_BLOCKING_READ
        items: list[Any] = []
        try:
            while True:
                # As many again each time, to look at the clock seldom.
                wanted = min(limit, 2 * len(items) + 1)
                # `extend` keeps what came before an error.
                items.extend(islice(self._iterator, wanted - len(items)))
                if len(items) < wanted or wanted == limit or now() > end:
                    break
        except BaseException as exc:
            if not items:
                raise
            self._error = exc
        await asyncio.sleep(0)
        return items

    async def close(self) -> None:
        if self._closes:
            _close(self._iterator)


class AsyncSource:
    """An async iterator."""

    def __init__(self, iterator: AsyncIterator[Any], *, closes: bool = True) -> None:
        self._iterator = iterator
        self._closes = closes

    async def read(self, limit: int) -> list[Any]:  # noqa: ARG002 - one is always allowed
        try:
            return [await anext(self._iterator)]
        except StopAsyncIteration:
            return []

    async def close(self) -> None:
        aclose = getattr(self._iterator, "aclose", None)
        if self._closes and aclose is not None:
            await aclose()


class ThreadSource:
    """An iterator that is read in a thread of its own, as far ahead as was asked for.

    The thread is a daemon, and nothing waits for it while it reads: what blocks forever, a
    terminal for example, keeps neither the stream nor the program from ending.
    """

    # The thread appends to _items, and the loop takes from it. Each other attribute that both use
    # is written by one of them: _read, _is_reading, _is_ended and the errors by the thread,
    # _allowed and _is_closed by the loop. _condition guards _allowed, _is_closed, and the decision
    # of the thread to read, which sets _is_reading, and _notified, so that the loop sees each item
    # or is called again. There is one exception: the thread sets _is_closed, without _condition,
    # when the loop has closed and does so no longer.
    def __init__(self, iterator: Iterator[Any], *, closes: bool = True) -> None:
        self._iterator = iterator
        self._closes = closes
        self._loop: asyncio.AbstractEventLoop | None = None
        self._condition = threading.Condition()
        self._items: deque[Any] = deque()
        self._given = 0  # items that were handed out
        self._allowed = 0  # items that may be read, those included
        self._read = 0
        self._is_reading = self._is_ended = self._is_closed = self._notified = False
        self._error: BaseException | None = None
        self._closing_error: BaseException | None = None
        self._news: asyncio.Future[None] | None = None
        self._thread: threading.Thread | None = None

    async def read(self, limit: int) -> list[Any]:
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
        with self._condition:
            self._allowed = self._given + limit
            self._condition.notify()
        if self._thread is None:
            thread = threading.Thread(target=self._run, name="async_batcher source", daemon=True)
            thread.start()  # raises if the system has none left
            self._thread = thread
        while not self._items:
            if self._is_ended and not self._items:
                if self._error is not None:
                    raise self._error
                return []
            self._news = self._loop.create_future()
            await self._news
        items = [self._items.popleft() for _ in range(min(limit, len(self._items)))]
        self._given += len(items)
        return items

    async def close(self) -> None:
        # A thread that is reading closes the source itself when that returns.
        with self._condition:
            self._is_closed = True
            self._condition.notify()
        if self._thread is None:
            if self._closes:
                _close(self._iterator)
            return
        while self._loop is not None and not self._is_ended and not self._is_reading:
            self._news = self._loop.create_future()
            await self._news
        if self._is_ended:
            self._thread.join()  # it is about to end
            if self._closing_error is not None:
                raise self._closing_error

    def _run(self) -> None:
        try:
            while self._may_read():
                try:
                    item = next(self._iterator)
                except StopIteration:
                    break
                finally:
                    self._is_reading = False
                self._items.append(item)
                self._read += 1
                self._notify()
        except BaseException as exc:  # noqa: BLE001 - raised for the consumer
            self._error = exc
        if self._is_closed and self._closes:
            try:
                _close(self._iterator)
            except BaseException as exc:  # noqa: BLE001 - raised for the consumer
                self._closing_error = exc
        self._is_ended = True
        self._notify()

    def _may_read(self) -> bool:
        """Wait until one more item is wanted, and return whether any is."""
        with self._condition:
            while self._read >= self._allowed and not self._is_closed:
                self._condition.wait()
            self._is_reading = not self._is_closed
            return self._is_reading

    def _notify(self) -> None:
        with self._condition:
            is_notified, self._notified = self._notified, True
        if self._loop is not None and (not is_notified or self._is_ended):
            try:
                self._loop.call_soon_threadsafe(self._on_notify)
            except RuntimeError:  # the loop has closed
                self._is_closed = True

    def _on_notify(self) -> None:
        with self._condition:
            self._notified = False
        if self._news is not None and not self._news.done():
            self._news.set_result(None)


def _close(iterator: Iterator[Any]) -> None:
    close = getattr(iterator, "close", None)
    if close is not None:
        close()
