"""What came of a batch: one answer per item, or one exception for all.

Runs on both sides of the process boundary, so it imports neither asyncio nor anything heavy.

An `Outcome` is a list with one answer per item, in order, or the exception that the whole batch ends with. An answer that
is an exception is raised for its item alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeAlias

from async_batcher.exceptions import BadResultError

if TYPE_CHECKING:
    from collections.abc import Sequence

Outcome: TypeAlias = list[Any] | BaseException


def normalize_results(returned: Any, count: int) -> list[Any]:
    """The answers that ``process_batch`` returned.

    Args:
        returned: A list, tuple, generator, array or other iterable of ``count`` answers; None for as many Nones.
        count: Items in the batch.

    Raises:
        BadResultError: Anything else. What a generator raises passes through.
    """
    if type(returned) is list and len(returned) == count:  # as nearly always
        return returned
    if returned is None:
        return [None] * count
    if type(returned) is list:
        answers = returned
    elif isinstance(returned, str | bytes | bytearray | memoryview | Mapping | AbstractSet):
        msg = f"process_batch returned one {type(returned).__name__} for {count} items; return a list with one result per item"
        raise BadResultError(msg)
    elif hasattr(returned, "__await__"):
        if hasattr(returned, "close"):
            returned.close()  # or Python warns that it was never awaited
        msg = (
            f"process_batch returned a {type(returned).__name__} where results were expected; "
            "declare it with 'async def', so that it is awaited on the event loop"
        )
        raise BadResultError(msg)
    else:
        try:
            iterator = iter(returned)
        except TypeError as exc:
            msg = (
                f"process_batch returned one {type(returned).__name__} for {count} items; "
                "return a list, tuple, generator or array with one result per item, or None"
            )
            raise BadResultError(msg) from exc
        # One more than wanted is enough to refuse what has no length: it may have no end.
        answers = list(iterator if hasattr(returned, "__len__") else islice(iterator, count + 1))
        if len(answers) > count and not hasattr(returned, "__len__"):
            msg = (
                f"process_batch returned at least {len(answers)} results for {count} items; return exactly one per item, in order"
            )
            raise BadResultError(msg)
    if len(answers) != count:
        msg = f"process_batch returned {len(answers)} results for {count} items; return exactly one per item, in order"
        raise BadResultError(msg)
    return answers


def insert_failures(answers: Sequence[Any], failures: dict[int, BaseException]) -> list[Any]:
    """Put the failures back between the answers of the items that were run.

    Args:
        answers: The answers of the items that were run, in order.
        failures: What became of the others, by their place in the batch.
    """
    rest = iter(answers)
    return [failures[i] if i in failures else next(rest) for i in range(len(answers) + len(failures))]
