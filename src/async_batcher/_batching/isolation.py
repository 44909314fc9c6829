"""Isolation: what is run again when a batch has failed, so that the guilty items stand alone. Pure.

::

    a batch fails --> failed() --> one item: it is guilty, and gets the error
                                   several: two halves wait to be run again --take--> ... --> ended(), failed() if it did

Rules:

- Halves of halves: to find k guilty items of n takes at most 2 k (log2(n / k) + 2) reruns. What succeeds is settled at once.
- Reruns go ahead of fresh batches, which get every third turn while any is due.
- What was run when a worker died is suspect, and suspects are run one at a time: when one of them uses up the memory of the
  machine, the system may kill a worker beside it, whose batch has done nothing.
- Workers cost something: after so many deaths and time-outs over one batch, or in one minute, nothing more is run again for it.
- An item whose waiter has gone is not run again.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

E = TypeVar("E")

# Worker deaths and time-outs that are paid for one batch. Four guilty items of 64 cost 24 at most, each of them a death on the
# way down from the whole batch to the item: 4 (log2(64 / 4) + 2).
CRASHES_PER_BATCH = 32
# The same for all batches that run in one place, in a minute: a worker takes about a tenth of a second to replace, so this is a
# tenth of one worker's time, and far more than poison that comes now and then needs.
CRASHES_PER_MINUTE = 64
_MINUTE = 60.0  # seconds

_IN_A_ROW = 2  # reruns before a fresh batch gets its turn


class FailedBatch:
    """A batch that failed, and all that is run again for it.

    Attributes:
        size: Items of the batch.
        crashes: Worker deaths and time-outs that it has cost.
        reruns: Parts of it that have been run again.
        guilty: Items that have failed alone.
        pending: Parts that wait or run.
    """

    __slots__ = ("crashes", "guilty", "pending", "reruns", "size")

    def __init__(self, size: int) -> None:
        self.size = size
        self.crashes = self.reruns = self.guilty = self.pending = 0


class Rerun(Generic[E]):
    """A part of a batch that is run again.

    Attributes:
        entries: What is run; those whose waiters have gone are left out when it is taken.
        case: The batch that it is a part of.
        crash_suspect: Whether a worker died when its entries were run.
    """

    __slots__ = ("case", "crash_suspect", "entries")

    def __init__(self, entries: list[E], case: FailedBatch, *, is_suspect: bool) -> None:
        self.entries = entries
        self.case = case
        self.crash_suspect = is_suspect


class FailureIsolator(Generic[E]):
    """What one batcher runs again.

    Args:
        is_over: Whether nobody waits for an entry any more.
        deaths_per_batch: Worker deaths and time-outs that one batch may cost.
        deaths_per_minute: The same of all batches that run in the same place, in a minute.
        spent: When each of those was; batchers that share a pool share this too. It is kept short.
    """

    def __init__(
        self,
        is_over: Callable[[E], bool],
        *,
        deaths_per_batch: int = CRASHES_PER_BATCH,
        deaths_per_minute: int = CRASHES_PER_MINUTE,
        spent: deque[float] | None = None,
    ) -> None:
        self._is_over = is_over
        self._crashes_per_batch = deaths_per_batch
        self._crashes_per_minute = deaths_per_minute
        self._spent: deque[float] = deque() if spent is None else spent
        self._ready: deque[Rerun[E]] = deque()
        self._crash_suspects: deque[Rerun[E]] = deque()
        self._suspects_running = 0
        self._in_a_row = 0

    @property
    def waiting(self) -> int:
        """Parts that wait to be run again."""
        return len(self._ready) + len(self._crash_suspects)

    @property
    def entries(self) -> int:
        """Entries in them whose waiters are still there."""
        return sum(
            not self._is_over(e) for queue in (self._ready, self._crash_suspects) for rerun in queue for e in rerun.entries
        )

    def split(self, entries: list[E], case: FailedBatch, now: float, *, has_died: bool, is_costly: bool) -> str | None:
        """Entries that were run together have failed: run them again in halves.

        Args:
            entries: One or more.
            case: The batch that they are, or are a part of.
            now: The time.
            has_died: Whether a worker died with them.
            is_costly: Whether that has cost a worker, or the time that a batch may take.

        Returns:
            None if they are run again. Otherwise they get the error: an empty text if it is one, which is guilty; or why nothing
            more is to be run again for this batch.
        """
        if is_costly:
            case.crashes += 1
            self._spent.append(now)
            while self._spent[0] <= now - _MINUTE:
                self._spent.popleft()
        if len(entries) == 1:
            case.guilty += 1
            return ""
        if is_costly:
            if case.crashes >= self._crashes_per_batch:
                return f"{case.crashes} workers or time limits have been spent on this batch"
            if len(self._spent) >= self._crashes_per_minute:
                return f"{len(self._spent)} workers or time limits have been spent within a minute"
        middle = (len(entries) + 1) // 2
        queue = self._crash_suspects if has_died else self._ready
        for part in (entries[:middle], entries[middle:]):
            queue.append(Rerun(part, case, is_suspect=has_died))
        case.pending += 2
        return None

    def next_rerun(self, *, is_fresh_due: bool) -> Rerun[E] | None:
        """What is run again next, now that there is a slot for it.

        Args:
            is_fresh_due: Whether a fresh batch waits for the slot.

        Returns:
            None when it is a fresh batch's turn, or nothing may be run again now. Otherwise call `finished` when it has ended.
        """
        if is_fresh_due and self._in_a_row >= _IN_A_ROW:
            self._in_a_row = 0
            return None
        rerun = self._next(self._ready)
        if rerun is None and not self._suspects_running:
            rerun = self._next(self._crash_suspects)
        if rerun is None:
            self._in_a_row = 0
            return None
        self._in_a_row += 1
        self._suspects_running += rerun.crash_suspect
        rerun.case.reruns += 1
        return rerun

    def finished(self, rerun: Rerun[E]) -> None:
        """A part that was taken has ended, however."""
        self._suspects_running -= rerun.crash_suspect
        rerun.case.pending -= 1

    def abandon(self, case: FailedBatch) -> list[E]:
        """Run nothing more of a batch again.

        Returns:
            What was still to be run.
        """
        rest: list[E] = []
        for queue in (self._ready, self._crash_suspects):
            for rerun in [rerun for rerun in queue if rerun.case is case]:
                queue.remove(rerun)
                case.pending -= 1
                rest.extend(rerun.entries)
        return rest

    def clear(self) -> list[E]:
        """Run nothing again.

        Returns:
            What was still to be run.
        """
        rest = [entry for queue in (self._ready, self._crash_suspects) for rerun in queue for entry in rerun.entries]
        self._ready.clear()
        self._crash_suspects.clear()
        return rest

    def _next(self, queue: deque[Rerun[E]]) -> Rerun[E] | None:
        while queue:
            rerun = queue.popleft()
            rerun.entries = [entry for entry in rerun.entries if not self._is_over(entry)]
            if rerun.entries:
                return rerun
            rerun.case.pending -= 1
        return None
