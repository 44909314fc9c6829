"""Delivers the outcome of a batch: resolves the futures of its callers. The one place where that is done.

Rules:

- A future that is done is left alone: its ``done()`` is checked first, and a signal's handler may cancel it after that.
- Each caller gets an exception of its own; `exception_copy` says which.
- A share of a bulk (`bulk.py`) stands where the futures of its items would stand.
"""

from __future__ import annotations

from asyncio import InvalidStateError
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from async_batcher._batching.bulk import BulkFuture, Slice, has_exceptions
from async_batcher._serialization.caller_exceptions import CallerExceptions
from async_batcher._serialization.exception_text import is_exception

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import TypeAlias

    from async_batcher._batching.batch import ItemFuture
    from async_batcher._batching.recorder import StatsRecorder
    from async_batcher._worker.results import Outcome

    CallerFuture: TypeAlias = ItemFuture | BulkFuture


class Delivery:
    """Tells those who wait.

    Args:
        recorder: Counts the items that have a result, and those that have failed.
        drop: Called with a bulk that a failure has ended before all its items had an answer.
        function: The name of the batch function, for the notes on exceptions.

    Attributes:
        stopping: Whether all are cut off: then an error that nobody asks for is no news.
    """

    def __init__(self, recorder: StatsRecorder, drop: Callable[[BulkFuture], None], function: str = "process_batch") -> None:
        self._recorder = recorder
        self._drop = drop
        self._function = function
        self.stopping = False

    def deliver_and_count(
        self, futures: Sequence[CallerFuture], outcome: Outcome, *, size: int = 0, has_shares: bool = False
    ) -> int:
        """Deliver, and count as failed the items whose callers get an error.

        Args:
            futures: As for `deliver`, and so are the others.
            outcome: See there.
            size: See there.
            has_shares: See there.

        Returns:
            The number of these items.
        """
        failed = self.deliver(futures, outcome, size=size, has_shares=has_shares)
        self._recorder.failed += failed
        return failed

    def deliver(self, futures: Sequence[CallerFuture], outcome: Outcome, *, size: int = 0, has_shares: bool = False) -> int:
        """Deliver.

        Args:
            futures: Those of the callers, in the order of the items.
            outcome: A result for each item, or the exception for all.
            size: Items of the batch whose outcome it is; 0: an exception that is not of a batch.
            has_shares: Whether some callers have more than one of the items.

        Returns:
            The number of items whose callers get an error.
        """
        if isinstance(outcome, BaseException):
            return self._deliver_error(futures, outcome, size)
        if has_shares:
            return self._deliver_slices(futures, outcome)
        gone = 0
        end = len(futures)
        plain = None  # a type of answers that are not raised: most are of one
        future: Any
        for future, answer in zip(futures, outcome, strict=True):
            if future.done():
                gone += 1
                continue
            try:
                if type(answer) is not plain:
                    if is_exception(answer):
                        end = futures.index(future)
                        break
                    plain = type(answer)
                future.set_result(answer)
            except InvalidStateError:
                gone += 1
        self._recorder.done += end - gone
        return 0 if end == len(futures) else self._deliver_from(end, futures, outcome)

    def _deliver_from(self, first: int, futures: Sequence[CallerFuture], answers: list[Any]) -> int:
        """Deliver the answers from the first exception among them on; says for how many items there is one."""
        own = CallerExceptions.among_results(answers, self._function)
        return sum(self._deliver_one(futures[place], answers[place], own, place) for place in range(first, len(futures)))

    def _deliver_slices(self, futures: Sequence[CallerFuture], answers: list[Any]) -> int:
        """The same where some wait for more than one of the items."""
        failed = place = 0
        own = CallerExceptions.among_results(answers, self._function) if has_exceptions(answers) else None
        for future in futures:
            if not isinstance(future, Slice):
                failed += self._deliver_one(future, answers[place], own, place)
                place += 1
                continue
            if not future.done():
                done, wrong = future.deliver(answers[place : place + future.size], own, place)
                self._recorder.done += done
                failed += wrong
                if wrong and future.done():
                    self._drop(future.bulk)
            place += future.size
        return failed

    def _deliver_one(self, future: Any, answer: Any, own: CallerExceptions | None, place: int) -> int:
        """Resolve the future of one item; says whether with an error."""
        if future.done():
            return 0
        with suppress(InvalidStateError):
            if own is not None and is_exception(answer):
                future.set_exception(own.own(answer, place))
                return 1
            future.set_result(answer)
            self._recorder.done += 1
        return 0

    def _deliver_error(self, futures: Sequence[CallerFuture], error: BaseException, size: int) -> int:
        """The same exception for all; says for how many items."""
        own = CallerExceptions()
        if size:
            callers = sum(_exceptions_of(future) for future in futures if not future.done())
            own = CallerExceptions.of_failed_batch(error, callers, size, self._function)
        failed = place = 0
        for future in futures:
            if not future.done():
                failed += self._reject(future, error, own, place)
            place += future.size if isinstance(future, Slice) else 1
        return failed

    def _reject(self, future: Any, error: BaseException, own: CallerExceptions, place: int) -> int:
        """Fail one caller; says for how many items."""
        if not isinstance(future, Slice | BulkFuture):
            try:
                future.set_exception(own.own(error, place))
            except InvalidStateError:
                return 0
            if self.stopping:
                future.exception()
            return 1
        bulk = future if isinstance(future, BulkFuture) else future.bulk
        if isinstance(future, Slice):
            bulk.queued.discard(future)
        failed = future.fail(error, own, place)
        if bulk.done():
            self._drop(bulk)
        if self.stopping:
            bulk.retrieve_exception()
        return failed


def _exceptions_of(future: CallerFuture) -> int:
    """How many exceptions a caller gets whose items all fail."""
    if isinstance(future, Slice):
        return 1 if future.bulk.is_strict else future.size
    return 1
