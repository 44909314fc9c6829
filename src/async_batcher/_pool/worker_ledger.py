"""How many workers a pool has started, and how they ended."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from async_batcher._pool.exit_status import exit_name
from async_batcher.stats import Workers

if TYPE_CHECKING:
    from async_batcher._pool.worker_handle import Member


class Census:
    """The counts of one pool, over all its starts and stops.

    Attributes:
        starts: See `stats.Workers`.
    """

    def __init__(self) -> None:
        self.starts = 0
        self._deaths: Counter[str] = Counter()
        self._replacements = 0

    def gone(self, member: Member) -> None:
        """A worker's process has ended while its pool went on."""
        if member.is_leaving:
            self._replacements += 1
        else:
            self._deaths[member.killed_because or exit_name(member.exit_code)] += 1

    def record(self) -> Workers:
        """A record of it."""
        return Workers(self.starts, dict(self._deaths), self._replacements)
