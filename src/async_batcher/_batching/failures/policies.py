"""What the policies of ``on_failure=`` say about an item. Pure: `now` is an argument."""

from __future__ import annotations

import logging
from collections import deque
from typing import TYPE_CHECKING, Literal, TypeAlias

from async_batcher._serialization.exception_copy import RemoteTraceback, add_note
from async_batcher._serialization.exception_text import one_line, qualified_name
from async_batcher.exceptions import BatchError
from async_batcher.failures import Later

if TYPE_CHECKING:
    from collections.abc import Sequence

    from async_batcher.failures import FailurePolicy

    # Seconds until the item runs again, "isolate", or None: it fails.
    Verdict: TypeAlias = float | Literal["isolate"] | None

logger = logging.getLogger("async_batcher")

# Of a `Later` without a time: seconds before the second try, twice as long before each other one.
_FIRST_DELAY, _MAX_DELAY = 0.02, 5.0

_SPAN = 60.0  # seconds for which a retry budget counts
_FREE_RETRIES = 10  # beyond the share of the budget, so that few items can be retried, too


class FailurePolicies:
    """The policies of one batcher.

    Args:
        policies: In order.
        name: What the log calls the batcher.

    Attributes:
        have_budget: Whether one of them limits how many items are retried.
    """

    __slots__ = ("_error_logged", "_name", "_policies", "_retries", "_tries", "have_budget")

    def __init__(self, policies: Sequence[FailurePolicy], name: str) -> None:
        self._policies = policies
        self._name = name
        self.have_budget = any(_budget_of(policy) is not None for policy in policies)
        self._tries = RecentCount()
        self._retries = RecentCount()
        self._error_logged = False

    def __bool__(self) -> bool:
        return bool(self._policies)

    def count_tries(self, now: float, count: int) -> None:
        """Count items that are tried for the first time."""
        self._tries.add(now, count)

    def decide(self, error: BaseException, attempt: int, now: float) -> Verdict:
        """Decide about one item.

        Args:
            error: What its batch raised, or what was returned for it.
            attempt: How often it has been tried.
            now: The time.
        """
        after = None
        if isinstance(error, Later):
            after = error.after
            if type(error.__cause__) is RemoteTraceback:  # only where a worker raised it
                error.__cause__ = None
        for policy in self._policies:
            try:
                decision = policy(error, attempt)
                if isinstance(decision, Later) and decision.after is not None:
                    after = decision.after if after is None else after
            except Exception as exc:  # noqa: BLE001 - the item has an error already
                self._log(policy, exc)
                return None
            if isinstance(decision, Later):
                budget = None if isinstance(error, Later) else _budget_of(policy)
                if budget is not None and not self._spend(budget, now):
                    note = f"not retried: the budget of {policy!r} is used up"
                    if note not in getattr(error, "__notes__", ()):
                        add_note(error, note)
                    return None
                return _default_delay(attempt) if after is None else after
            if isinstance(decision, str) and decision in ("isolate", "fail"):
                return "isolate" if decision == "isolate" else None
            if decision is not None:
                msg = f"it returned {decision!r:.100}, not a Later, 'isolate', 'fail' or None"
                self._log(policy, TypeError(msg))
                return None
        if not isinstance(error, Later):
            return None
        return _default_delay(attempt) if after is None else after

    def _spend(self, budget: float, now: float) -> bool:
        """Count a retry, if there may be one more."""
        if self._retries.total(now) >= budget * self._tries.total(now) + _FREE_RETRIES:
            return False
        self._retries.add(now, 1)
        return True

    def _log(self, policy: FailurePolicy, error: Exception) -> None:
        if not self._error_logged:
            self._error_logged = True
            msg = "%s: a policy of on_failure failed, so the items get their error: %r: %s"
            logger.error(msg, self._name, policy, one_line(error), exc_info=error)


class RecentCount:
    """A count over the last minute, in steps of a second."""

    __slots__ = ("_steps", "_total")

    def __init__(self) -> None:
        self._steps: deque[list[int]] = deque()  # the second, and what was counted in it
        self._total = 0

    def add(self, now: float, count: int) -> None:
        second = int(now)
        if not self._steps or self._steps[-1][0] != second:
            self.total(now)  # so that steps that no longer count do not pile up
            self._steps.append([second, 0])
        self._steps[-1][1] += count
        self._total += count

    def total(self, now: float) -> int:
        while self._steps and self._steps[0][0] <= now - _SPAN:
            self._total -= self._steps.popleft()[1]
        return self._total


def spent_error(later: Later, attempt: int) -> BaseException:
    """Return what the caller of an item gets that a policy does not let come back."""
    if later.__cause__ is not None:
        return later.__cause__
    msg = (
        f"process_batch returned or raised Later for the item in attempt {attempt}, and on_failure "
        "allows no more"
    )
    return BatchError(msg, original_type=qualified_name(later))


def _default_delay(attempt: int) -> float:
    return min(_FIRST_DELAY * 2.0 ** min(attempt - 1, 16), _MAX_DELAY)


def _budget_of(policy: FailurePolicy) -> float | None:
    budget = getattr(policy, "budget", None)
    return budget if isinstance(budget, float) else None  # a mock has any attribute
