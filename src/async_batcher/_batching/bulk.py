"""Many items with one who waits for all of them: a call of `process_many`, or what a `map` has read at a time.

::

    items --> Slice: as many as lie together --split--> Slice: as many as are in one batch --> BulkFuture: the results
              in the waitlist, or in the queue                                                   |
                                                        process_many: a future, when all are there, or the first failure
                                                        map: the stream, as they come

A share stands where the waiting future of a single item stands, once for each of its items in the queue, and once in a batch.

Rules:

- Nothing is made for a single item: what is done costs something for each share, and next to nothing for each item.
- Each item is answered once: what comes for a bulk that is over is nobody's.
"""

from __future__ import annotations

from asyncio import InvalidStateError
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from async_batcher._serialization.exception_text import is_exception

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Iterable

    from async_batcher._batching.waitlist import WaitlistEntry
    from async_batcher._serialization.caller_exceptions import CallerExceptions

_PENDING: Final = object()  # in the place of an answer that has not come


class BulkFuture:
    """Many items with one who waits for them.

    Args:
        size: The items.
        is_strict: Whether the first failure is that of all the items.

    Attributes:
        is_strict: See above.
        results: One for each item, in order; an exception is that item's own.
        left: Items without an answer that is still wanted.
        queued: The shares of it that are in the queue.
        waitlist_entry: That of the rest in the line, while it waits for room.
    """

    __slots__ = ("__weakref__", "is_strict", "left", "queued", "results", "waitlist_entry")

    def __init__(self, size: int, *, is_strict: bool = False) -> None:
        self.is_strict = is_strict
        self.results: list[Any] = [_PENDING] * size
        self.left = size
        self.queued: set[Slice] = set()
        self.waitlist_entry: WaitlistEntry | None = None

    def done(self) -> bool:
        """Whether nobody waits for an answer any more."""
        return not self.left

    def has_result(self, place: int) -> bool:
        """Whether there is one for that item."""
        return self.results[place] is not _PENDING

    def deliver(self, start: int, answers: list[Any], own: CallerExceptions | None, place: int) -> tuple[int, int]:
        """Take the answers of the items from ``start`` on.

        Args:
            start: The first item.
            answers: One for each item.
            own: Gives the caller its own exceptions; None: there is none among the answers of the batch.
            place: The place of the first item in the batch.

        Returns:
            How many got a result, and how many an error.
        """
        failed = 0
        if own is not None and has_exceptions(answers):
            failed = sum(map(is_exception, answers))
            answers = [own.own(answer, index) if is_exception(answer) else answer for index, answer in enumerate(answers, place)]
        size = len(answers)
        self.results[start : start + size] = answers
        self.left -= size
        self._on_results(range(start, start + size))
        return size - failed, failed

    def fail(self, error: BaseException, own: CallerExceptions, place: int = 0, start: int = 0, size: int | None = None) -> int:
        """Fail the items from ``start`` on, or all, as far as they have no answer.

        Args:
            error: The exception of all of them.
            own: Gives each its own.
            place: The place of the first item in the batch.
            start: The first item.
            size: How many items; None: all that follow.

        Returns:
            How many have failed.
        """
        end = len(self.results) if size is None else start + size
        places = [index for index in range(start, end) if not self.has_result(index)]
        for index in places:
            self.results[index] = own.own(error, place + index - start)
        self.left -= len(places)
        self._on_results(places)
        return len(places)

    def cancel(self) -> int:
        """Nobody waits any more, and nothing is kept; says how many items had no answer."""
        left, self.left = self.left, 0
        self.results = []
        return left

    def retrieve_exception(self) -> None:
        """It has failed because all are cut off: should nobody ask, that is no news."""

    def _on_results(self, places: Iterable[int]) -> None:
        """The answers of these items have come."""
        raise NotImplementedError


class GatherFuture(BulkFuture):
    """A call of `process_many`.

    Args:
        size: The items.
        future: What the call waits on.
        is_strict: See `BulkFuture`.

    Attributes:
        future: As above; None once it has the results.
    """

    __slots__ = ("future",)

    def __init__(self, size: int, future: asyncio.Future[list[Any]], *, is_strict: bool) -> None:
        super().__init__(size, is_strict=is_strict)
        self.future: asyncio.Future[list[Any]] | None = future

    def deliver(self, start: int, answers: list[Any], own: CallerExceptions | None, place: int) -> tuple[int, int]:
        """See `BulkFuture.deliver`; after a failure no item of a strict call has a result."""
        if self.is_strict and own is not None:
            for index, answer in enumerate(answers, place):
                if is_exception(answer):
                    return 0, self.fail(answer, own, index)
        return super().deliver(start, answers, own, place)

    def fail(self, error: BaseException, own: CallerExceptions, place: int = 0, start: int = 0, size: int | None = None) -> int:
        """See `BulkFuture.fail`; a strict call fails with all its items."""
        if not self.is_strict:
            return super().fail(error, own, place, start, size)
        if self.future is not None and not self.future.done():
            with suppress(InvalidStateError):  # a signal's handler has cancelled it since it was asked
                self.future.set_exception(own.own(error, place))
        return self.cancel()

    def retrieve_exception(self) -> None:
        """See `BulkFuture.retrieve_exception`."""
        if self.future is not None and self.future.done() and not self.future.cancelled():
            self.future.exception()

    def _on_results(self, places: Iterable[int]) -> None:  # noqa: ARG002 - only the last matters
        if self.left or self.future is None:
            return
        future, answers = self.future, self.results
        self.future, self.results = None, []  # they are the caller's now
        if not future.done():
            with suppress(InvalidStateError):  # as above
                future.set_result(answers)


class Slice:
    """Items of a bulk that lie together.

    Args:
        bulk: It.
        start: The place of the first one in it.
        size: How many.

    Attributes:
        ticket: That of the first one, while they are in the queue.
    """

    __slots__ = ("bulk", "size", "start", "ticket")

    def __init__(self, bulk: BulkFuture, start: int, size: int) -> None:
        self.bulk = bulk
        self.start = start
        self.size = size
        self.ticket = 0

    def split(self, count: int) -> Slice:
        """Take the first ``count`` items out of it, or all that there are."""
        first = Slice(self.bulk, self.start, min(count, self.size))
        self.start += first.size
        self.ticket += first.size
        self.size -= first.size
        if not self.size:
            self.bulk.queued.discard(self)
        return first

    def split_all(self) -> list[Slice]:
        """A share for each of its items."""
        return [Slice(self.bulk, place, 1) for place in range(self.start, self.start + self.size)]

    def done(self) -> bool:
        """Whether nobody waits for it any more."""
        return not self.bulk.left

    def deliver(self, answers: list[Any], own: CallerExceptions | None, place: int) -> tuple[int, int]:
        """See `BulkFuture.deliver`."""
        return self.bulk.deliver(self.start, answers, own, place)

    def fail(self, error: BaseException, own: CallerExceptions, place: int) -> int:
        """See `BulkFuture.fail`."""
        return self.bulk.fail(error, own, place, self.start, self.size)


def has_exceptions(answers: list[Any]) -> bool:
    """Whether an answer is to be raised."""
    plain = None  # a type of answers that are not: most are of one
    for answer in answers:
        if type(answer) is not plain:
            if is_exception(answer):
                return True
            plain = type(answer)
    return False


def merge_into_slices(waiters: list[Any]) -> list[Any]:
    """Those who wait for the items of a batch, each of whom stands there once for each item, with a share of the batch each."""
    each: list[Any] = []
    place = 0
    while place < len(waiters):
        waiter = waiters[place]
        if type(waiter) is Slice:
            waiter = waiter.split(len(waiters) - place)
            place += waiter.size
        else:
            place += 1
        each.append(waiter)
    return each
