"""What came of a batch: a list with one result per item, or one exception for all of them.

Runs on both sides of the process boundary, so it imports neither asyncio nor anything heavy. A
result that is an exception is raised for its item alone.

::

    list, array, iterator  --normalize_results-->  results
    generator              --pass_on------------>  on_result, for each; then an outcome of the rest
    async generator        --pass_on_async------>  the same

A generator that fails half way fails for the items only whose results it has not yielded.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from collections.abc import Set as AbstractSet
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeAlias

from async_batcher._serialization.exception_text import counted
from async_batcher._worker.signals import interruptible
from async_batcher.exceptions import BadResultError, BatchError

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, Callable, Sequence

    # Takes the next result, and returns whether an item without one has a caller.
    OnResult: TypeAlias = Callable[[Any], bool]

Outcome: TypeAlias = list[Any] | BaseException


class PartialOutcome(list[Any]):
    """The results where a batch raised, of which some items have one of their own.

    They could not be sent, or a generator had yielded it.

    Attributes:
        error: What it raised, the result of all other items.
    """

    def __init__(self, error: BaseException, results: list[Any]) -> None:
        super().__init__(results)
        self.error = error


class BatchNotStartedError(BatchError):
    """All callers of a batch were cancelled before it started."""

    def __init__(
        self, message: str = "all callers of the batch were cancelled before it started"
    ) -> None:
        super().__init__(message)


class BatchRecalledError(BatchError):
    """A batch was taken back before it started; its items are queued again."""


@interruptible
def normalize_results(returned: Any, count: int, on_result: OnResult | None = None) -> list[Any]:
    """Return the results that ``process_batch`` returned for ``count`` items, as a list.

    Args:
        returned: A list, tuple, generator, array or other iterable; None for as many Nones.
        count: The number of items.
        on_result: What gets the results of a generator instead; see `pass_on`.

    Raises:
        BadResultError: Anything else. What a generator raises passes through.
    """
    if type(returned) is list and len(returned) == count:  # nearly always
        return returned
    if returned is None:
        return [None] * count
    if type(returned) is list:
        results = returned
    elif isinstance(returned, str | bytes | bytearray | memoryview | Mapping | AbstractSet):
        msg = (
            f"process_batch returned one {type(returned).__name__} for {counted(count, 'item')}; "
            "return a list with one result per item"
        )
        raise BadResultError(msg)
    elif hasattr(returned, "__await__"):
        if hasattr(returned, "close"):
            returned.close()  # or Python warns that it was never awaited
        msg = (
            f"process_batch returned a {type(returned).__name__} where results were expected; "
            "declare it with 'async def', so that it is awaited on the event loop"
        )
        raise BadResultError(msg)
    elif on_result is not None and isinstance(returned, Generator):
        return pass_on(returned, count, on_result)
    else:
        try:
            iterator = iter(returned)
        except TypeError as exc:
            msg = (
                f"process_batch returned one {type(returned).__name__} for "
                f"{counted(count, 'item')}; return a list, tuple, generator or array with one "
                "result per item, or None"
            )
            raise BadResultError(msg) from exc
        # One more than wanted is enough to refuse an iterable without a length: it may be endless.
        results = list(iterator if hasattr(returned, "__len__") else islice(iterator, count + 1))
        if len(results) > count and not hasattr(returned, "__len__"):
            raise BadResultError(_wrong_count(len(results), count, "at least "))
    if len(results) != count:
        raise BadResultError(_wrong_count(len(results), count))
    return results


@interruptible
def pass_on(generator: Generator[Any, Any, Any], count: int, on_result: OnResult) -> list[Any]:
    """Pass on each result that a generator yields for ``count`` items, when it is yielded.

    The generator is closed when it has yielded too many, and when no caller is left.

    Returns:
        The results of the items that are left: none, or None for each if no caller is left.

    Raises:
        BadResultError: There are too few results. What the generator raises passes through.
    """
    received = 0
    for received, result in enumerate(generator, 1):
        if not _is_next_wanted(result, received, count, on_result, generator):
            generator.close()
            return [None] * (count - received)
    return _check_ended(received, count)


async def pass_on_async(results: AsyncIterable[Any], count: int, on_result: OnResult) -> list[Any]:
    """Do the same as `pass_on` for an async generator, or another async iterable."""
    received = 0
    iterator = aiter(results)
    async for result in iterator:
        received += 1
        if not _is_next_wanted(result, received, count, on_result, iterator):
            if hasattr(iterator, "aclose"):
                await iterator.aclose()
            return [None] * (count - received)
    return _check_ended(received, count)


def _is_next_wanted(
    result: Any, received: int, count: int, on_result: OnResult, generator: Any
) -> bool:
    if received > count:
        import logging

        name = getattr(generator, "__qualname__", type(generator).__name__)
        msg = "%s yielded more results than there were items (%d); yield exactly one per item"
        logging.getLogger("async_batcher").error(msg, name, count)
        return False
    # What follows the last yield runs too, also if all callers have their results.
    return on_result(result) or received == count


def _check_ended(received: int, count: int) -> list[Any]:
    if received < count:
        msg = (
            f"process_batch yielded {counted(received, 'result')} for {counted(count, 'item')}; "
            "yield exactly one per item, in order"
        )
        raise BadResultError(msg)
    return []


def _wrong_count(found: int, count: int, at_least: str = "") -> str:
    return (
        f"process_batch returned {at_least}{counted(found, 'result')} for "
        f"{counted(count, 'item')}; its argument is the list of items, and it must return one "
        "result for each, in order"
    )


def insert_failures(results: Sequence[Any], failures: dict[int, BaseException]) -> list[Any]:
    """Put failures, by their indices in the batch, between the results of the other items."""
    rest = iter(results)
    count = len(results) + len(failures)
    return [failures[i] if i in failures else next(rest) for i in range(count)]
