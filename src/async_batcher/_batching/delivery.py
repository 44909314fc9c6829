"""Delivers outcomes to single callers, and to bulk calls, which resolve their own.

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

    from async_batcher._batching.batch import EarlyPart, ItemFuture
    from async_batcher._batching.records.recorder import StatsRecorder

    CallerFuture: TypeAlias = ItemFuture | BulkFuture


class Delivery:
    """Delivers to the callers of one batcher.

    Args:
        recorder: Counts items with a result, and failed ones.
        drop: Called with a bulk call that a failure ended before all its items had a result.
        name: What log lines and notes on exceptions call the batcher.

    Attributes:
        name: See above.
        stopping: Whether the batcher is stopped by force; then errors need not be retrieved.
    """

    def __init__(
        self,
        recorder: StatsRecorder,
        drop: Callable[[BulkFuture], None],
        name: str = "process_batch",
    ) -> None:
        self._recorder = recorder
        self._drop = drop
        self.name = name
        self.stopping = False

    def deliver(
        self,
        futures: Sequence[ItemFuture],
        results: list[Any],
        *,
        has_slices: bool = False,
        early: EarlyPart | None = None,
    ) -> int:
        """Resolve the futures of a batch, or the next ones, with its results.

        Args:
            futures: In the order of the items.
            results: One for each item; an exception is that item's own.
            has_slices: Whether some callers have more than one of the items.
            early: What was delivered of the batch before.

        Returns:
            The number of items that failed; they are counted.
        """
        if has_slices:
            return self._deliver_slices(futures, results, early)
        skipped = 0
        end = len(futures)
        plain = None  # the last type that is no exception: most results have the same
        future: Any
        for future, result in zip(futures, results, strict=True):
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
        exceptions = self._exceptions_among(results, early)
        first = 0 if early is None else early.size
        failed = sum(
            self._deliver_one(futures[index], results[index], exceptions, first + index)
            for index in range(end, len(futures))
        )
        self._recorder.failed += failed
        return failed

    def fail(
        self, futures: Sequence[CallerFuture], error: BaseException, *, batch_size: int = 0
    ) -> int:
        """Fail callers, count their items, and return how many there are.

        ``batch_size`` is 0 if ``error`` is not that of a batch.
        """
        failed = self.reject(futures, error, batch_size=batch_size)
        self._recorder.failed += failed
        return failed

    def reject(
        self, futures: Sequence[CallerFuture], error: BaseException, *, batch_size: int = 0
    ) -> int:
        """Do the same as `fail`, but leave the counting to the caller of this method."""
        exceptions = CallerExceptions()
        if batch_size:
            callers = sum(_exceptions_of(future) for future in futures if not future.done())
            exceptions = CallerExceptions.of_failed_batch(error, callers, batch_size, self.name)
        failed = place = 0
        for future in futures:
            if not future.done():
                failed += self._reject_one(future, error, exceptions, place)
            place += future.size if isinstance(future, Slice) else 1
        return failed

    def _deliver_slices(
        self, futures: Sequence[ItemFuture], results: list[Any], early: EarlyPart | None
    ) -> int:
        failed = index = 0
        first = 0 if early is None else early.size
        exceptions = None
        if has_exceptions(results):
            exceptions = self._exceptions_among(results, early)
        for future in futures:
            if not isinstance(future, Slice):
                failed += self._deliver_one(future, results[index], exceptions, first + index)
                index += 1
                continue
            if not future.done():
                of_slice = results[index : index + future.size]
                done, with_error = future.deliver(of_slice, exceptions, first + index)
                self._recorder.done += done
                failed += with_error
                if with_error and future.done():
                    self._drop(future.bulk)
            index += future.size
        self._recorder.failed += failed
        return failed

    def _exceptions_among(self, results: list[Any], early: EarlyPart | None) -> CallerExceptions:
        if early is None:
            return CallerExceptions.among_results(results, self.name)
        early.exceptions.add(results)
        return early.exceptions

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

    def _reject_one(
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
