"""How many workers a pool has started, and how they ended."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from async_batcher._pool.exit_status import exit_status_name
from async_batcher.stats import WorkerCounts

if TYPE_CHECKING:
    from async_batcher._pool.worker_handle import WorkerHandle


class WorkerLedger:
    """The counts of one pool, over all its starts and stops.

    Attributes:
        starts: See `stats.WorkerCounts`.
    """

    def __init__(self) -> None:
        self.starts = 0
        self._deaths: Counter[str] = Counter()
        self._replacements = 0

    def gone(self, member: WorkerHandle) -> None:
        """A worker's process has ended while its pool went on."""
        if member.is_leaving:
            self._replacements += 1
        else:
            self._deaths[member.killed_because or exit_status_name(member.exit_code)] += 1

    def record(self) -> WorkerCounts:
        """A record of it."""
        return WorkerCounts(self.starts, dict(self._deaths), self._replacements)
