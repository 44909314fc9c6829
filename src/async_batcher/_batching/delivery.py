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

from async_batcher._batching.bulk.slices import BulkFuture, Slice, has_exceptions, split_into_items
from async_batcher._serialization.caller_exceptions import CallerExceptions
from async_batcher._serialization.exception_text import is_exception

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from typing import TypeAlias

    from async_batcher._batching.batch import Batch, EarlyPart, ItemFuture
    from async_batcher._batching.records.recorder import StatsRecorder

    AnyFuture: TypeAlias = ItemFuture | BulkFuture
    TakeBack: TypeAlias = Callable[[int, BaseException], BaseException | None]


class Delivery:
    """Delivers to the callers of one batcher.

    Args:
        recorder: Counts items with a result, and failed ones.
        drop: Called with a bulk call that a failure ended before all its items had a result.
        name: What log lines and notes on exceptions call the batcher.

    Attributes:
        name: See above.
        taking_back: Called with a batch that returned exceptions; returns what is called with the
            index and the exception of each of their items, and returns what its caller gets, or
            None if the item runs again.
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
        self.taking_back: Callable[[Batch[Any, Any]], TakeBack]
        self.taking_back = lambda _batch: lambda _place, error: error

    def deliver(
        self,
        futures: Sequence[ItemFuture],
        results: list[Any],
        *,
        has_slices: bool = False,
        batch: Batch[Any, Any] | None = None,
        leaving: BaseException | None = None,
    ) -> int:
        """Resolve the futures of a batch, or the next ones, with its results.

        Args:
            futures: In the order of the items.
            results: One for each item; an exception is that item's own.
            has_slices: Whether some callers have more than one of the items.
            batch: The batch, if its items may run again; it knows what was delivered before.
            leaving: The exception of items that are left as they are; None: there are none.

        Returns:
            The number of items that failed; they are counted.
        """
        if has_slices:
            if not has_exceptions(results):
                return self._deliver_slices(futures, results)
            futures = split_into_items(futures)
            # Failures of strict calls first: the first one is the result of all items of the call.
            order = sorted(
                range(len(results)),
                key=lambda index: not (is_exception(results[index]) and _is_strict(futures[index])),
            )
            return self._deliver_each(futures, results, order, batch, leaving)
        skipped = 0
        end = len(futures)
        plain = None  # the last type that is not an exception: most results have the same
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
        return self._deliver_each(futures, results, range(end, len(futures)), batch, leaving)

    def fail(
        self,
        futures: Sequence[AnyFuture],
        error: BaseException,
        *,
        batch_size: int = 0,
        places: Sequence[int] | None = None,
    ) -> int:
        """Fail callers, count their items, and return how many there are.

        Args:
            futures: The futures.
            error: What they get.
            batch_size: Items of the batch; 0 if ``error`` is not that of a batch.
            places: The indices of the items there; None: one after the other.
        """
        failed = self.reject(futures, error, batch_size=batch_size, places=places)
        self._recorder.failed += failed
        return failed

    def reject(
        self,
        futures: Sequence[AnyFuture],
        error: BaseException,
        *,
        batch_size: int = 0,
        places: Sequence[int] | None = None,
    ) -> int:
        """Do the same as `fail`, but leave the counting to the caller of this method."""
        exceptions = CallerExceptions()
        if batch_size:
            callers = sum(_exceptions_of(future) for future in futures if not future.done())
            exceptions = CallerExceptions.of_failed_batch(error, callers, batch_size, self.name)
        failed = place = 0
        for index, future in enumerate(futures):
            if places is not None:
                place = places[index]
            if not future.done():
                failed += self._reject_one(future, error, exceptions, place)
            place += future.size if isinstance(future, Slice) else 1
        return failed

    def _deliver_slices(self, futures: Sequence[ItemFuture], results: list[Any]) -> int:
        index = 0
        for future in futures:
            if isinstance(future, Slice):
                end = index + future.size
                if not future.done():
                    done, _ = future.deliver(results[index:end], None, index)
                    self._recorder.done += done
                index = end
            else:
                self._deliver_one(future, results[index], None, index)
                index += 1
        return 0

    def _deliver_each(
        self,
        futures: Sequence[ItemFuture],
        results: list[Any],
        indices: Iterable[int],
        batch: Batch[Any, Any] | None,
        leaving: BaseException | None,
    ) -> int:
        """Deliver the results with these indices, among which are exceptions."""
        early = None if batch is None else batch.early
        first = 0 if early is None else early.size  # of all results of the batch
        take_back = None if batch is None else self.taking_back(batch)
        exceptions: CallerExceptions | None = None
        failed = 0
        for index in indices:
            future, result, place = futures[index], results[index], first + index
            if future.done() or (leaving is not None and result is leaving):
                continue
            if is_exception(result):
                if take_back is not None:
                    result = take_back(place, result)
                    if result is None:
                        continue
                if exceptions is None:
                    exceptions = self._exceptions_among(results, early)
            failed += self._deliver_one(future, result, exceptions, place)
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
        """Resolve one item, and return whether it failed."""
        if future.done():
            return 0
        if isinstance(future, Slice):
            done, failed = future.deliver([result], exceptions, place)
            self._recorder.done += done
            if failed and future.done():
                self._drop(future.bulk)
            return failed
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


def _exceptions_of(future: AnyFuture) -> int:
    """Return how many exceptions a caller gets whose items all fail."""
    if isinstance(future, Slice):
        return 1 if future.bulk.is_strict else future.size
    return 1


def _is_strict(future: ItemFuture) -> bool:
    return isinstance(future, Slice) and future.bulk.is_strict
