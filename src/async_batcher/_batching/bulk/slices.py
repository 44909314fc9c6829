"""Many items of one caller: a call of `process_many`, or what `map` has read at a time.

::

    items --> Slice: adjacent items --> Slice: those of one batch --> BulkFuture: results
              waitlist, or queue                                       |
                            process_many: a future, resolved with all, or the first failure
                            map: the stream, as they arrive

The queue cuts: a batch may take a part of the adjacent items, and `split` follows it.

A slice takes the place of the future of a single item: once for each of its items in the queue,
once in a batch.

Rules:

- Overhead is per slice, not per item.
- Each item gets one result; results for a bulk call that is over are dropped.
"""

from __future__ import annotations

from asyncio import CancelledError, InvalidStateError
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from async_batcher._batching.bulk.sources import as_list
from async_batcher._serialization.exception_text import is_exception

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Iterable

    from async_batcher._batching.queue.waitlist import WaitlistEntry
    from async_batcher._batching.scheduler import Scheduler
    from async_batcher._serialization.caller_exceptions import CallerExceptions

_PENDING: Final = object()  # no result yet


async def gather(
    scheduler: Scheduler,
    source: Iterable[Any],
    timeout: float | None,  # noqa: ASYNC109 - see `AsyncBatcher.process_many`
    *,
    return_exceptions: bool,
) -> list[Any]:
    """Return the results of many items; see `AsyncBatcher.process_many`."""
    items = as_list(source)
    del source  # as of the items below
    if not items:
        return []
    future = scheduler.new_future()
    bulk = GatherFuture(len(items), future, is_strict=not return_exceptions)
    scheduler.callers.enqueue_many(items, bulk, timeout)
    try:
        results: list[Any] = await future
    except (CancelledError, GeneratorExit):
        scheduler.callers.discard_many([bulk])
        raise
    finally:
        del bulk, items, future  # the traceback of an exception holds this frame
    return results


class BulkFuture:
    """Many items with one caller.

    Args:
        size: The number of items.
        is_strict: Whether the first failure is that of all items.

    Attributes:
        of_stream: Whether more items follow when results of these have been consumed.
        results: One for each item, in order; an exception is that item's own.
        left: Items without a result that a caller still wants.
        queued: Its slices in the queue.
        waitlist_entry: Of the items that wait for capacity.
    """

    __slots__ = ("__weakref__", "is_strict", "left", "queued", "results", "waitlist_entry")
    of_stream = False

    def __init__(self, size: int, *, is_strict: bool = False) -> None:
        self.is_strict = is_strict
        self.results: list[Any] = [_PENDING] * size
        self.left = size
        self.queued: set[Slice] = set()
        self.waitlist_entry: WaitlistEntry | None = None

    def done(self) -> bool:
        return not self.left

    def has_result(self, index: int) -> bool:
        return self.results[index] is not _PENDING

    def deliver(
        self, start: int, results: list[Any], exceptions: CallerExceptions | None, place: int
    ) -> tuple[int, int]:
        """Take the results of the items from ``start`` on.

        Args:
            start: Index of the first item.
            results: One for each item.
            exceptions: Gives the caller exceptions of its own; None if the batch returned none.
            place: Index of the first item in the batch.

        Returns:
            The numbers of items with a result, and with an error.
        """
        failed = 0
        if exceptions is not None and has_exceptions(results):
            failed = sum(map(is_exception, results))
            results = [
                exceptions.own(result, index) if is_exception(result) else result
                for index, result in enumerate(results, place)
            ]
        size = len(results)
        self.results[start : start + size] = results
        self.left -= size
        self._on_results(range(start, start + size))
        return size - failed, failed

    def fail(
        self,
        error: BaseException,
        exceptions: CallerExceptions,
        place: int = 0,
        start: int = 0,
        size: int | None = None,
    ) -> int:
        """Fail ``size`` items (None: all) that have no result, and return how many there are."""
        end = len(self.results) if size is None else start + size
        indices = [index for index in range(start, end) if not self.has_result(index)]
        for index in indices:
            self.results[index] = exceptions.own(error, place + index - start)
        self.left -= len(indices)
        self._on_results(indices)
        return len(indices)

    def cancel(self) -> int:
        """Drop all results, and return how many items had none."""
        left, self.left = self.left, 0
        self.results = []
        return left

    def retrieve_exception(self) -> None:
        """Keep asyncio from logging an exception that was not retrieved."""

    def _on_results(self, indices: Iterable[int]) -> None:
        raise NotImplementedError


class GatherFuture(BulkFuture):
    """A call of `process_many`; it awaits ``future``, which is None once it has results."""

    __slots__ = ("future",)

    def __init__(self, size: int, future: asyncio.Future[list[Any]], *, is_strict: bool) -> None:
        super().__init__(size, is_strict=is_strict)
        self.future: asyncio.Future[list[Any]] | None = future

    def deliver(
        self, start: int, results: list[Any], exceptions: CallerExceptions | None, place: int
    ) -> tuple[int, int]:
        """A strict call fails with the first exception."""
        if self.is_strict and exceptions is not None:
            for index, result in enumerate(results, place):
                if is_exception(result):
                    return 0, self.fail(result, exceptions, index)
        return super().deliver(start, results, exceptions, place)

    def fail(
        self,
        error: BaseException,
        exceptions: CallerExceptions,
        place: int = 0,
        start: int = 0,
        size: int | None = None,
    ) -> int:
        """A strict call fails with all its items."""
        if not self.is_strict:
            return super().fail(error, exceptions, place, start, size)
        if self.future is not None and not self.future.done():
            with suppress(InvalidStateError):  # a signal handler cancelled it after the check
                self.future.set_exception(exceptions.own(error, place))
        return self.cancel()

    def retrieve_exception(self) -> None:
        if self.future is not None and self.future.done() and not self.future.cancelled():
            self.future.exception()

    def _on_results(self, indices: Iterable[int]) -> None:  # noqa: ARG002 - only the last matter
        if self.left or self.future is None:
            return
        future, results = self.future, self.results
        self.future, self.results = None, []  # the caller owns them now
        if not future.done():
            with suppress(InvalidStateError):  # a signal handler cancelled it after the check
                future.set_result(results)


class Slice:
    """Adjacent items of a bulk call.

    Attributes:
        start: Index of the first one in the bulk call.
        ticket: Of the first one, while they are in the queue.
    """

    __slots__ = ("bulk", "size", "start", "ticket")

    def __init__(self, bulk: BulkFuture, start: int, size: int) -> None:
        self.bulk = bulk
        self.start = start
        self.size = size
        self.ticket = 0

    def split(self, count: int) -> Slice:
        """Remove the first ``count`` items, or all that there are, and return them."""
        first = Slice(self.bulk, self.start, min(count, self.size))
        self.start += first.size
        self.ticket += first.size
        self.size -= first.size
        if not self.size:
            self.bulk.queued.discard(self)
        return first

    def split_all(self) -> list[Slice]:
        """Return a slice for each item."""
        return [Slice(self.bulk, index, 1) for index in range(self.start, self.start + self.size)]

    def take_item(self, ticket: int) -> Slice:
        """Return the item with that ticket as a slice of its own, which is queued in its place."""
        item = Slice(self.bulk, self.start + ticket - self.ticket, 1)
        item.ticket = ticket
        self.bulk.queued.discard(self)
        self.bulk.queued.add(item)
        return item

    def done(self) -> bool:
        return not self.bulk.left

    def deliver(
        self, results: list[Any], exceptions: CallerExceptions | None, place: int
    ) -> tuple[int, int]:
        return self.bulk.deliver(self.start, results, exceptions, place)

    def fail(self, error: BaseException, exceptions: CallerExceptions, place: int) -> int:
        return self.bulk.fail(error, exceptions, place, self.start, self.size)


def has_exceptions(results: list[Any]) -> bool:
    """Tell whether a result is an exception, which is to be raised."""
    plain = None  # the last type that is not an exception: most results have the same
    for result in results:
        if type(result) is not plain:
            if is_exception(result):
                return True
            plain = type(result)
    return False


def split_into_items(futures: Iterable[Any]) -> list[Any]:
    """Return a future, or a slice, for each item of a batch."""
    split: list[Any] = []
    for future in futures:
        split += future.split_all() if type(future) is Slice else [future]
    return split


def merge_into_slices(futures: list[Any]) -> list[Any]:
    """Return the futures of a batch with one slice for adjacent items of a bulk call.

    Args:
        futures: One for each item; the slice of a bulk call is there once for each of its items.
    """
    merged: list[Any] = []
    index = 0
    while index < len(futures):
        future = futures[index]
        if type(future) is Slice:
            future = future.split(len(futures) - index)
            index += future.size
        else:
            index += 1
        merged.append(future)
    return merged
