"""What happens to items that failed: `Later`, and the policies of ``on_failure=``.

::

    process_batch raises, or returns an exception for an item
        --> the policies, in order: policy(exception, attempt)
            Later(after)  the items go back into the queue, and run again after that time
            "isolate"     the batch runs again in halves, until the failing items stand alone
            "fail"        the callers get the exception
            None          the next policy decides; after the last one as "fail"

`retry` and `isolate` make such policies. A function of your own is one, too::

    def on_throttling(exception, attempt):
        if isinstance(exception, Throttled) and attempt < 8:
            return Later(exception.retry_after)
        return None
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, TypeAlias

from async_batcher.exceptions import AsyncBatchException

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Later", "isolate", "retry"]

# Of `retry`, in seconds: the default of ``backoff``, and what stands for a ``max_backoff`` of None.
_BACKOFF, _MAX_BACKOFF = 0.02, 5.0

# What to do with the items that failed; see the head of this module.
Decision: TypeAlias = "Later | Literal['isolate', 'fail'] | None"
# Called with the exception, and how often the item has been tried, that time included.
FailurePolicy: TypeAlias = "Callable[[BaseException, int], Decision]"


class Later(Exception):  # noqa: N818 - it is not an error
    """Returned or raised by ``process_batch``: process this later.

    *Returned* for an item, in place of its result: the item goes back to the front of the queue, or
    of its key, when its time has come. *Raised*: all items of the batch without a result do, and
    the batcher dispatches nothing before that time.

    The item keeps its deadline, its place and its key. It holds no slot meanwhile, but counts for
    ``max_queue_size`` and the limits of the queue. It can be cancelled, and `stop` waits for it.

    Without a policy for it, an item may come back any number of times. ``retry(Later, attempts=8)``
    limits that; so does a policy for the type of its cause, or for any type. When the attempts are
    used up, the caller gets the cause (``raise Later(2.0) from error``), or `BatchError` if there
    is none.

    Args:
        after: Seconds until it may run again. None: as the policy says that matches; without one
            0.02, twice as long after each try, 5 at most.

    Attributes:
        after: See above.

    Raises:
        TypeError: ``after`` is not a number.
        ValueError: It is negative, infinite or NaN.
    """

    def __init__(self, after: float | None = None) -> None:
        """Put items off for that many seconds."""
        super().__init__(after)
        self.after = None if after is None else _check_delay("after", after)

    def __str__(self) -> str:
        """When the item may run again."""
        return "without a time" if self.after is None else f"after {self.after} s"


class _Retry:
    """A policy that `retry` makes.

    Attributes:
        budget: The share of items that may be retried; None: any.
    """

    def __init__(
        self,
        types: tuple[type[BaseException], ...],
        *,
        attempts: int,
        backoff: float,
        factor: float,
        max_backoff: float,
        budget: float | None,
    ) -> None:
        self.types = types
        self.attempts = attempts
        self.backoff = backoff
        self.factor = factor
        self.max_backoff = max_backoff
        self.budget = budget

    def __call__(self, exception: BaseException, attempt: int) -> Decision:
        """Decide; see the head of this module."""
        if not self._matches(exception):
            return None
        if attempt >= self.attempts:
            return "fail" if isinstance(exception, Later) else None
        try:
            delay = self.backoff * self.factor ** (attempt - 1)
        except OverflowError:
            delay = self.max_backoff if self.backoff else 0.0
        return Later(min(delay, self.max_backoff))

    def __repr__(self) -> str:
        names = ", ".join([*(kind.__name__ for kind in self.types), f"attempts={self.attempts}"])
        return f"retry({names})"

    def _matches(self, exception: BaseException) -> bool:
        if isinstance(exception, Later) and exception.__cause__ is not None:
            if Later in self.types:
                return True
            exception = exception.__cause__
        if isinstance(exception, AsyncBatchException):
            named = tuple(kind for kind in self.types if issubclass(kind, AsyncBatchException))
            return isinstance(exception, named)
        return isinstance(exception, self.types or Exception)


class _Isolate:
    """A policy that `isolate` makes."""

    def __init__(self, types: tuple[type[BaseException], ...]) -> None:
        self.types = types

    def __call__(self, exception: BaseException, attempt: int) -> Decision:  # noqa: ARG002
        """Decide; see the head of this module."""
        if isinstance(exception, Later):
            return None
        return "isolate" if isinstance(exception, self.types or BaseException) else None

    def __repr__(self) -> str:
        return f"isolate({', '.join(kind.__name__ for kind in self.types)})"


def retry(
    *types: type[BaseException],
    attempts: int = 4,
    backoff: float = 0.02,
    factor: float = 2.0,
    max_backoff: float | None = None,
    budget: float | None = 0.2,
) -> FailurePolicy:
    """Return a policy that runs failed items again, with others and in their order.

    Args:
        *types: Exceptions to retry, raised by a batch or returned for an item. Without any: each
            `Exception`. An error of this package, as after a crash (`WorkerDiedError`) or
            a timeout (`BatchTimeoutError`) of the batch, only if its type, or a base of it from
            this package, is named. A batch that exceeds ``batch_timeout`` in a thread or a standard
            pool runs on, so its items fail.
        attempts: Maximum number of runs of an item, including the first. Then the next policy
            decides, such as `isolate`; without one the callers get the exception. After a `Later`
            no other policy is asked.
        backoff: Seconds before the second try.
        factor: What that time is multiplied by for each further try.
        max_backoff: Upper bound of the delay in seconds. None: 5, or ``backoff`` if that is more.
        budget: Items that are retried at most, as a share of the items that were tried for the
            first time within the last 60 seconds, plus 10: so a service that is down does not get
            several times the load. Beyond it items fail. None: no such limit. A `Later` that
            ``process_batch`` returned or raised does not count.

    Raises:
        TypeError: A value has the wrong type.
        ValueError: A value is out of range, or ``backoff`` is more than ``max_backoff``.
    """
    _check_types("retry", types)
    if isinstance(attempts, bool) or not isinstance(attempts, int):
        msg = f"attempts={attempts!r}: must be an int"
        raise TypeError(msg)
    if attempts < 1:
        msg = f"attempts={attempts!r}: must be at least 1; the first run counts"
        raise ValueError(msg)
    first = _check_delay("backoff", backoff)
    longest = max(_MAX_BACKOFF, first)
    if max_backoff is not None:
        longest = _check_delay("max_backoff", max_backoff)
        if first > longest and first != _BACKOFF:  # the default is no contradiction
            msg = (
                f"backoff={backoff!r} is more than max_backoff={max_backoff!r}: raise max_backoff, "
                "or leave it out"
            )
            raise ValueError(msg)
    return _Retry(
        types,
        attempts=attempts,
        backoff=first,
        factor=_check_delay("factor", factor),
        max_backoff=longest,
        budget=None if budget is None else _check_delay("budget", budget),
    )


def isolate(*types: type[BaseException]) -> FailurePolicy:
    """Return a policy that runs a failed batch again in halves.

    It goes on until the failing items stand alone: they get the error, all others their results. It
    also does so for a batch that crashed its worker or exceeded ``batch_timeout`` (but not in a
    thread or a standard pool, where that batch runs on). An item may run several times.

    Args:
        *types: Exceptions of a batch to isolate. Without any: all, except a `Later`. An exception
            that is returned for an item is that item's in any case.

    Raises:
        TypeError: One of them is not an exception class.
    """
    _check_types("isolate", types)
    return _Isolate(types)


def _check_delay(name: str, value: object) -> float:
    """Return a number; raise TypeError or ValueError unless it is finite, and not negative."""
    if isinstance(value, bool) or not hasattr(type(value), "__float__"):
        msg = f"{name}={value!r}: must be a number, not {type(value).__name__}"
        raise TypeError(msg)
    try:
        number = float(value)  # type: ignore[arg-type]
    except OverflowError:  # of a large int
        number = math.inf
    if not 0 <= number < math.inf:
        msg = f"{name}={value!r}: must be a finite number, and not negative"
        raise ValueError(msg)
    return number


def _check_types(name: str, types: tuple[object, ...]) -> None:
    for kind in types:
        if not (isinstance(kind, type) and issubclass(kind, BaseException)):
            msg = f"{name}({kind!r}): must be classes of exceptions"
            raise TypeError(msg)
