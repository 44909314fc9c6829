"""Settling: those who wait for a batch are told what came of it. The one place where that is done.

Rules:

- Who has been told is told nothing more: it asks ``done()`` first, and a signal's handler may cancel him after that.
- Each gets an exception of its own.
- A share of a bulk (`_many.py`) stands where the futures of its items would stand.
"""

from __future__ import annotations

from asyncio import InvalidStateError
from typing import TYPE_CHECKING, Any

from async_batcher._many import Bulk, Share
from async_batcher._outcome import is_exception, own_copy

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import TypeAlias

    from async_batcher._outcome import Outcome
    from async_batcher._run import InBatch
    from async_batcher._tally import Tally

    Waiting: TypeAlias = InBatch | Bulk


class Settling:
    """Tells those who wait.

    Args:
        tally: Counts the items that have a result, and those that have failed.
        drop: Called with a bulk that a failure has ended before all its items had an answer.

    Attributes:
        is_forced: Whether all are cut off: then an error that nobody asks for is no news.
    """

    def __init__(self, tally: Tally, drop: Callable[[Bulk], None]) -> None:
        self._tally = tally
        self._drop = drop
        self.is_forced = False

    def fail(self, futures: Sequence[Waiting], outcome: Outcome, *, has_shares: bool = False) -> int:
        """Settle, and count as failed the items whose callers get an error; says how many."""
        failed = self.settle(futures, outcome, has_shares=has_shares)
        self._tally.failed += failed
        return failed

    def settle(self, futures: Sequence[Waiting], outcome: Outcome, *, has_shares: bool = False) -> int:
        """Settle; says for how many items there is an error.

        Args:
            futures: Who waits.
            outcome: An answer for each item, or what they all fail with.
            has_shares: Whether some wait for more than one of the items.
        """
        if isinstance(outcome, BaseException):
            return sum(self._tell(future, outcome) for future in futures if not future.done())
        if has_shares:
            return self._settle_shares(futures, outcome)
        failed = gone = 0
        plain = None  # a type of answers that are not raised: most are of one
        future: Any
        for future, answer in zip(futures, outcome, strict=True):
            if future.done():
                gone += 1
                continue
            try:
                if type(answer) is not plain:
                    if is_exception(answer):
                        future.set_exception(own_copy(answer))
                        failed += 1
                        continue
                    plain = type(answer)
                future.set_result(answer)
            except InvalidStateError:
                gone += 1
        self._tally.done += len(futures) - gone - failed
        return failed

    def _settle_shares(self, futures: Sequence[Waiting], answers: list[Any]) -> int:
        """The same where some wait for more than one of the items."""
        failed = place = 0
        for future in futures:
            if not isinstance(future, Share):
                failed += self.settle([future], answers[place : place + 1])
                place += 1
                continue
            if not future.done():
                done, wrong = future.answer(answers[place : place + future.size])
                self._tally.done += done
                failed += wrong
                if wrong and future.done():
                    self._drop(future.bulk)
            place += future.size
        return failed

    def _tell(self, future: Any, error: BaseException) -> int:
        """Tell one who waits that there is no result; says for how many items."""
        if not isinstance(future, Share | Bulk):
            try:
                future.set_exception(own_copy(error))
            except InvalidStateError:
                return 0
            if self.is_forced:
                future.exception()
            return 1
        bulk = future if isinstance(future, Bulk) else future.bulk
        if isinstance(future, Share):
            bulk.queued.discard(future)
        failed = future.fail(error)
        if bulk.done():
            self._drop(bulk)
        if self.is_forced:
            bulk.mute()
        return failed
