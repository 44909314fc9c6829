"""Counts what a batcher does; `stats` makes records of the counts when they are asked for."""

from __future__ import annotations

import logging
import threading
from collections import deque
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from async_batcher._batching.batch import Batch
    from async_batcher._batching.scheduler import Scheduler
    from async_batcher.stats import BatchRecord, Quantiles, Reason, Stats, WorkerCounts

logger = logging.getLogger("async_batcher")

_MAX_BATCHES = 1024  # kept for the quantiles
_MAX_WAITS = 16  # kept for each batch: enough to see how long a full one took to fill


class StatsObserver(Protocol):
    """What exports metrics as a batcher and batches go on; it raises nothing."""

    def session_started(self, session: Scheduler) -> None: ...

    def batch_started(self) -> None: ...

    def batch_finished(self, size: int, waits: list[float], run_time: float | None) -> None:
        """Observe the end of a batch.

        Args:
            size: The number of its items.
            waits: Seconds that some of its items were queued; empty for a rerun.
            run_time: Seconds that it ran; None if it was taken back before it began.
        """


class StatsRecorder:
    """The counts of one batcher, since it was made.

    Args:
        on_batch: Called with a record of each batch that has finished.

    Attributes:
        name: What the log calls the batcher.
        observer: Called as the batcher and batches go on; None if nothing observes them.
        done: See `stats.Stats`, also for the others.
    """

    __slots__ = (
        "_callback_error_logged", "_lock", "_on_batch", "_run_times", "_sizes", "_waits",
        "cancelled", "done", "failed", "name", "observer", "reasons", "rejected", "timed_out",
    )  # fmt: skip

    def __init__(self, on_batch: Callable[[BatchRecord], object] | None = None) -> None:
        self.done = self.failed = self.cancelled = self.timed_out = self.rejected = 0
        self.reasons: dict[Reason, int] = {
            "full": 0, "timeout": 0, "slot_available": 0, "drain": 0, "isolation": 0,
        }  # fmt: skip
        self._lock = threading.RLock()  # for the samples: any thread may ask for statistics
        self._sizes: deque[int] = deque(maxlen=_MAX_BATCHES)
        # For each batch, when it started and when some of its items came.
        self._waits: deque[tuple[float, ...]] = deque(maxlen=_MAX_BATCHES)
        self._run_times: deque[float] = deque(maxlen=_MAX_BATCHES)
        self._on_batch = on_batch
        self.name = "process_batch"
        self.observer: StatsObserver | None = None
        self._callback_error_logged = False

    def batch_started(self, batch: Batch[Any, Any]) -> None:
        self.reasons[batch.reason] += 1
        with self._lock:
            self._sizes.append(batch.size)
        if self.observer is not None:
            self.observer.batch_started()

    def batch_finished(
        self,
        batch: Batch[Any, Any],
        failed: int,
        error: BaseException | None,
        now: float,
        *,
        has_run: bool = True,
    ) -> None:
        run_time = now - batch.started_at
        sample: list[float] = []
        if batch.enqueued_at:
            step = -(-batch.size // _MAX_WAITS)
            sample = batch.enqueued_at[::step]
        with self._lock:
            if has_run:
                self._run_times.append(run_time)
            if sample:
                self._waits.append((batch.started_at, *sample))
        if self.observer is not None:
            waits = [batch.started_at - enqueued_at for enqueued_at in sample]
            self.observer.batch_finished(batch.size, waits, run_time if has_run else None)
        if self._on_batch is None:
            return
        from async_batcher._serialization.exception_text import qualified_name
        from async_batcher.stats import BatchRecord

        name = None if error is None else qualified_name(error)
        queue_time = batch.queue_time
        try:
            self._on_batch(
                BatchRecord(batch.size, batch.reason, queue_time, run_time, failed, name)
            )
        except Exception:
            if not self._callback_error_logged:
                self._callback_error_logged = True
                msg = "%s: on_batch raised; further exceptions of it are not logged"
                logger.exception(msg, self.name)

    def stats(
        self, *, queued: int, blocked: int, running: int, workers: WorkerCounts | None
    ) -> Stats:
        """Make a record."""
        from async_batcher.stats import BatchCounts, Stats, WorkerCounts

        with self._lock:
            sizes, run_times = list(self._sizes), list(self._run_times)
            waits = list(self._waits)
        return Stats(
            queued=queued,
            blocked=blocked,
            running=running,
            done=self.done,
            failed=self.failed,
            cancelled=self.cancelled,
            timed_out=self.timed_out,
            rejected=self.rejected,
            batches=BatchCounts(**self.reasons),
            sizes=_quantiles(sizes),
            queue_waits=_quantiles(
                started_at - enqueued_at for started_at, *sample in waits for enqueued_at in sample
            ),
            run_times=_quantiles(run_times),
            workers=workers or WorkerCounts(0, {}, 0),
        )


def _quantiles(values: Iterable[Any]) -> Quantiles:
    """Return quantiles by nearest rank: each is a value of the sample."""
    from async_batcher.stats import Quantiles

    ranked = sorted(values)
    count = len(ranked)
    if not count:
        return Quantiles(0.0, 0.0, 0.0, 0)
    p50, p95, p99 = (float(ranked[-(-count * percent // 100) - 1]) for percent in (50, 95, 99))
    return Quantiles(p50, p95, p99, count)
