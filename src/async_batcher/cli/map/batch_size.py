"""How many items a batch of ``--each`` has: few at first, more if they take little time."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from async_batcher.stats import BatchRecord

# An interrupted run loses what its batches have done, and progress is shown when a batch ends. The
# trip to a worker takes less than 1 ms, so a batch that runs this long is large enough.
_BATCH_SECONDS = 0.25


class BatchSize:
    """A size that follows what items take, from 1 up to ``limit``."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.value = 1

    def update(self, record: BatchRecord) -> None:
        """Count a batch that has ended. The size doubles at most."""
        doubled = min(2 * self.value, self._limit)
        if record.run_time * doubled > _BATCH_SECONDS * record.size:
            doubled = int(_BATCH_SECONDS * record.size / record.run_time)
        self.value = max(1, doubled)
