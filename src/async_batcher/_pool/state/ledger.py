"""The counts of a pool's workers. Pure."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from async_batcher._pool.processes.exit_status import exit_status_name
from async_batcher.stats import WorkerCounts

if TYPE_CHECKING:
    from async_batcher._pool.state.worker import Worker


class WorkerLedger:
    """The counts of one pool, over all its starts and stops."""

    def __init__(self) -> None:
        self.started = 0
        self._crashed: Counter[str] = Counter()
        self._recycled = 0

    def record_exit(self, worker: Worker) -> None:
        """Count a worker that exited while the pool was not stopping."""
        if worker.stopped:
            self._recycled += 1
        else:
            failure = worker.start_failure
            cause = worker.kill_reason or (failure.cause if failure is not None else "")
            self._crashed[cause or exit_status_name(worker.exit_code)] += 1

    def counts(self) -> WorkerCounts:
        return WorkerCounts(self.started, dict(self._crashed), self._recycled)
