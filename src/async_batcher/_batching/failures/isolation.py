"""Failure isolation: a failed batch runs again in halves until the failing items stand alone. Pure.

::

    a batch fails --> split() --> one item: it gets the error
                                  several: two halves wait --next_rerun--> finished()
                                                                       `--> split() if it failed

Rules:

- To find k failing items of n takes at most 2 k (log2(n / k) + 2) reruns. What succeeds is
  delivered at once.
- Reruns go ahead of new batches, which get every third slot while one is due.
- What ran when a worker crashed is suspect, and suspects run one at a time: if one of them uses up
  the machine's memory, the system may kill the worker of another batch.
- Workers cost something: after a number of crashes and timeouts for one batch, or in one minute, it
  is not split further.
- An item whose caller is gone is not run again.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Generic, TypeVar

from async_batcher.exceptions import (
    BatcherStoppedError,
    BatchTimeoutError,
    PoolBrokenError,
    SerializationError,
    WorkerDiedError,
)

if TYPE_CHECKING:
    from collections.abc import Callable

E = TypeVar("E")

# Four failing items of 64 cost at most 24 crashes, one for each step from the batch to the item: 4
# (log2(64 / 4) + 2).
CRASHES_PER_BATCH = 32
# A worker takes about a tenth of a second to replace, so this is a tenth of one worker's time.
CRASHES_PER_MINUTE = 64
_MINUTE = 60.0  # seconds

_RERUNS_IN_A_ROW = 2  # before a new batch gets a slot

# No item causes these; an item that cannot be pickled has failed alone before.
_NOT_RETRYABLE = (BatcherStoppedError, PoolBrokenError, SerializationError)
# On the loop's own thread these end the program, or cancel the batch.
_CONTROL_FLOW = (asyncio.CancelledError, KeyboardInterrupt, SystemExit)


def is_retryable(error: BaseException, *, on_loop: bool) -> bool:
    """Tell whether parts of a batch that failed with ``error`` may succeed.

    Args:
        error: The exception of the batch.
        on_loop: Whether it ran on the event loop's thread.
    """
    if isinstance(error, WorkerDiedError):
        return error.may_have_run
    if on_loop and isinstance(error, _CONTROL_FLOW):
        return False
    return not isinstance(error, _NOT_RETRYABLE)


def _consumes_budget(error: BaseException) -> bool:
    """Tell whether the failure cost a worker, or all the time that a batch may take."""
    return isinstance(error, WorkerDiedError | BatchTimeoutError)


def budget_exhausted_error(error: BaseException, why: str) -> BaseException:
    """Return the error of items that are not run again, since that has cost too much."""
    text = (
        f"the item's batch failed, and the item was not run again alone, since {why}; "
        f"so it may be innocent. The batch's error: {error}"
    )
    instead: BaseException
    if isinstance(error, WorkerDiedError):
        instead = WorkerDiedError(text, pid=error.pid, exit_code=error.exit_code)
    else:
        instead = BatchTimeoutError(text)
    instead.__cause__ = error
    return instead


class FailedBatch:
    """A batch that failed, and its reruns.

    Attributes:
        size: Items of the batch.
        crashes: Crashes and timeouts that it has cost.
        reruns: Parts that have run again.
        failed_items: Items that failed alone.
        pending: Parts that wait or run.
    """

    __slots__ = ("crashes", "failed_items", "pending", "reruns", "size")

    def __init__(self, size: int) -> None:
        self.size = size
        self.crashes = self.reruns = self.failed_items = self.pending = 0


class Rerun(Generic[E]):
    """A part of a failed batch that runs again.

    Attributes:
        entries: Its items; those whose callers are gone are removed when it starts.
        crash_suspect: Whether a worker crashed when they ran.
    """

    __slots__ = ("crash_suspect", "entries", "failed_batch")

    def __init__(self, entries: list[E], failed_batch: FailedBatch, *, crash_suspect: bool) -> None:
        self.entries = entries
        self.failed_batch = failed_batch
        self.crash_suspect = crash_suspect


class FailureIsolator(Generic[E]):
    """The reruns of one batcher.

    Args:
        is_done: Whether the caller of an entry is gone.
        crashes_per_batch: Crashes and timeouts that one batch may cost.
        crashes_per_minute: The same for all batches of a pool, in a minute.
        crash_times: When they were; batchers that share a pool share this.
        in_order: Whether the parts of a batch run in the order of their items. Otherwise the large
            ones run first, so that innocent items get their results soon.
        on_waiting: Called with the entries of a rerun and 1 when it begins to wait, -1 when it no
            longer does.
    """

    def __init__(
        self,
        is_done: Callable[[E], bool],
        *,
        crashes_per_batch: int = CRASHES_PER_BATCH,
        crashes_per_minute: int = CRASHES_PER_MINUTE,
        crash_times: deque[float] | None = None,
        in_order: bool = False,
        on_waiting: Callable[[list[E], int], object] = lambda _entries, _change: None,
    ) -> None:
        self._is_done = is_done
        self._in_order = in_order
        self._on_waiting = on_waiting
        self._crashes_per_batch = crashes_per_batch
        self._crashes_per_minute = crashes_per_minute
        self._crash_times: deque[float] = deque() if crash_times is None else crash_times
        self._ready: deque[Rerun[E]] = deque()
        self._suspects: deque[Rerun[E]] = deque()
        self._suspects_running = 0
        self._in_a_row = 0

    def __bool__(self) -> bool:
        """Tell whether a rerun waits."""
        return bool(self._ready or self._suspects)

    @property
    def pending_items(self) -> int:
        """Items that wait to run again and have a caller."""
        return sum(not self._is_done(entry) for entry in self.entries())

    def split(
        self, entries: list[E], failed_batch: FailedBatch, now: float, error: BaseException
    ) -> str | None:
        """Run the entries of a failed run again in halves.

        Args:
            entries: One or more.
            failed_batch: The batch that they are a part of.
            now: The time.
            error: What they failed with.

        Returns:
            None if they run again. Otherwise they get the error: "" if there is only one, or the
            reason why the batch is not split further.
        """
        consumes_budget = _consumes_budget(error)
        if consumes_budget:
            failed_batch.crashes += 1
            self._crash_times.append(now)
            while self._crash_times[0] <= now - _MINUTE:
                self._crash_times.popleft()
        if len(entries) == 1:
            failed_batch.failed_items += 1
            return ""
        if consumes_budget:
            spent, of_all = failed_batch.crashes, len(self._crash_times)
            if spent >= self._crashes_per_batch:
                return f"{spent} workers or time limits have been spent on this batch"
            if of_all >= self._crashes_per_minute:
                return f"{of_all} workers or time limits have been spent within a minute"
        middle = (len(entries) + 1) // 2
        crash_suspect = isinstance(error, WorkerDiedError)
        queue = self._suspects if crash_suspect else self._ready
        first, second = (
            Rerun(part, failed_batch, crash_suspect=crash_suspect)
            for part in (entries[:middle], entries[middle:])
        )
        if self._in_order:
            queue.extendleft((second, first))
        else:
            queue.extend((first, second))
        for part in (first, second):
            self._on_waiting(part.entries, 1)
        failed_batch.pending += 2
        return None

    def next_rerun(
        self, *, new_batch_is_due: bool, may_run: Callable[[list[E]], bool] = lambda _entries: True
    ) -> Rerun[E] | None:
        """Return the next rerun for a free slot; call `finished` when it has run.

        Args:
            new_batch_is_due: Whether a new batch could have the slot, too.
            may_run: Whether these entries may run now.

        Returns:
            None if it is a new batch's turn, or nothing may run now.
        """
        if new_batch_is_due and self._in_a_row >= _RERUNS_IN_A_ROW:
            self._in_a_row = 0
            return None
        rerun = self._pop(self._ready, may_run)
        if rerun is None and not self._suspects_running:
            rerun = self._pop(self._suspects, may_run)
        if rerun is None:
            self._in_a_row = 0
            return None
        self._in_a_row += 1
        self._suspects_running += rerun.crash_suspect
        rerun.failed_batch.reruns += 1
        return rerun

    def finished(self, rerun: Rerun[E]) -> None:
        """Count a rerun that has ended, with or without success."""
        self._suspects_running -= rerun.crash_suspect
        rerun.failed_batch.pending -= 1

    def abandon(self, failed_batch: FailedBatch) -> list[E]:
        """Remove and return all entries of a batch that still wait."""
        reruns = [*self._ready, *self._suspects]
        return self._remove([rerun for rerun in reruns if rerun.failed_batch is failed_batch])

    def entries(self) -> list[E]:
        """Return all entries that wait; callable in any thread."""
        return [entry for rerun in (*self._ready, *self._suspects) for entry in rerun.entries]

    def clear(self) -> list[E]:
        """Remove and return all entries."""
        return self._remove([*self._ready, *self._suspects])

    def _remove(self, reruns: list[Rerun[E]]) -> list[E]:
        for rerun in reruns:
            (self._suspects if rerun.crash_suspect else self._ready).remove(rerun)
            self._on_waiting(rerun.entries, -1)
            rerun.failed_batch.pending -= 1
        return [entry for rerun in reruns for entry in rerun.entries]

    def _pop(self, queue: deque[Rerun[E]], may_run: Callable[[list[E]], bool]) -> Rerun[E] | None:
        for rerun in list(queue):
            entries = [entry for entry in rerun.entries if not self._is_done(entry)]
            if entries and not may_run(entries):
                continue
            queue.remove(rerun)
            self._on_waiting(rerun.entries, -1)
            rerun.entries = entries
            if entries:
                return rerun
            rerun.failed_batch.pending -= 1
        return None
