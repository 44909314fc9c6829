"""Delivers outcomes: the one place where the futures of callers are resolved.

Rules:

- Resolve a future at most once: check ``done()`` first, and tolerate a signal handler that cancels
  it in between.
- Each caller gets an exception of its own; `caller_exceptions` says which.
- A slice of a bulk call (`bulk/slices.py`) takes the place of the futures of its items.
"""

from __future__ import annotations

from asyncio import InvalidStateError
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from async_batcher._batching.bulk.slices import BulkFuture, Slice, has_exceptions
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
    """Delivers to the callers of one batcher.

    Args:
        recorder: Counts items with a result, and failed ones.
        drop: Called with a bulk call that a failure ended before all its items had a result.
        function: The name of the batch function, for the notes on exceptions.

    Attributes:
        function: See above.
        stopping: Whether the batcher is stopped by force; then errors need not be retrieved.
    """

    def __init__(
        self,
        recorder: StatsRecorder,
        drop: Callable[[BulkFuture], None],
        function: str = "process_batch",
    ) -> None:
        self._recorder = recorder
        self._drop = drop
        self.function = function
        self.stopping = False

    def deliver_and_count(
        self,
        futures: Sequence[CallerFuture],
        outcome: Outcome,
        *,
        size: int = 0,
        has_slices: bool = False,
    ) -> int:
        """Deliver, and count the items with an error as failed; see `deliver`."""
        failed = self.deliver(futures, outcome, size=size, has_slices=has_slices)
        self._recorder.failed += failed
        return failed

    def deliver(
        self,
        futures: Sequence[CallerFuture],
        outcome: Outcome,
        *,
        size: int = 0,
        has_slices: bool = False,
    ) -> int:
        """Resolve futures.

        Args:
            futures: In the order of the items.
            outcome: A result for each item, or the exception for all.
            size: The size of the batch; 0 if the exception is not that of a batch.
            has_slices: Whether some callers have more than one of the items.

        Returns:
            The number of items whose callers get an error.
        """
        if isinstance(outcome, BaseException):
            return self._deliver_error(futures, outcome, size)
        if has_slices:
            return self._deliver_slices(futures, outcome)
        skipped = 0
        end = len(futures)
        plain = None  # the last type that is no exception: most results have the same
        future: Any
        for future, result in zip(futures, outcome, strict=True):
            if future.done():
                skipped += 1
                continue
            try:
                if type(result) is not plain:
                    if is_exception(result):
                        end = futures.index(future)
                        break
                    plain = type(result)
                future.set_result(result)
            except InvalidStateError:
                skipped += 1
        self._recorder.done += end - skipped
        if end == len(futures):
            return 0
        exceptions = CallerExceptions.among_results(outcome, self.function)
        return sum(
            self._deliver_one(futures[index], outcome[index], exceptions, index)
            for index in range(end, len(futures))
        )

    def _deliver_slices(self, futures: Sequence[CallerFuture], results: list[Any]) -> int:
        failed = place = 0
        exceptions = None
        if has_exceptions(results):
            exceptions = CallerExceptions.among_results(results, self.function)
        for future in futures:
            if not isinstance(future, Slice):
                failed += self._deliver_one(future, results[place], exceptions, place)
                place += 1
                continue
            if not future.done():
                of_slice = results[place : place + future.size]
                done, with_error = future.deliver(of_slice, exceptions, place)
                self._recorder.done += done
                failed += with_error
                if with_error and future.done():
                    self._drop(future.bulk)
            place += future.size
        return failed

    def _deliver_one(
        self, future: Any, result: Any, exceptions: CallerExceptions | None, place: int
    ) -> int:
        if future.done():
            return 0
        with suppress(InvalidStateError):
            if exceptions is not None and is_exception(result):
                future.set_exception(exceptions.own(result, place))
                return 1
            future.set_result(result)
            self._recorder.done += 1
        return 0

    def _deliver_error(
        self, futures: Sequence[CallerFuture], error: BaseException, size: int
    ) -> int:
        exceptions = CallerExceptions()
        if size:
            callers = sum(_exceptions_of(future) for future in futures if not future.done())
            exceptions = CallerExceptions.of_failed_batch(error, callers, size, self.function)
        failed = place = 0
        for future in futures:
            if not future.done():
                failed += self._reject(future, error, exceptions, place)
            place += future.size if isinstance(future, Slice) else 1
        return failed

    def _reject(
        self, future: Any, error: BaseException, exceptions: CallerExceptions, place: int
    ) -> int:
        """Fail one caller, and return the number of its items that failed."""
        if not isinstance(future, Slice | BulkFuture):
            try:
                future.set_exception(exceptions.own(error, place))
            except InvalidStateError:
                return 0
            if self.stopping:
                future.exception()
            return 1
        bulk = future if isinstance(future, BulkFuture) else future.bulk
        if isinstance(future, Slice):
            bulk.queued.discard(future)
        failed = future.fail(error, exceptions, place)
        if bulk.done():
            self._drop(bulk)
        if self.stopping:
            bulk.retrieve_exception()
        return failed


def _exceptions_of(future: CallerFuture) -> int:
    """Return how many exceptions a caller gets whose items all fail."""
    if isinstance(future, Slice):
        return 1 if future.bulk.is_strict else future.size
    return 1
