"""Counts what a batcher does; `stats` makes records of the counts when they are asked for."""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterable

    from async_batcher._batching.batch import Batch
    from async_batcher._batching.records.measured import EndedBatch
    from async_batcher._batching.records.observers import ObserverOption, Observers
    from async_batcher._batching.scheduler import Scheduler
    from async_batcher.stats import Quantiles, Reason, Stats, WorkerCounts

_MAX_BATCHES = 1024  # kept for the quantiles and for `explain`
_MAX_WAITS = 16  # kept for each batch: enough to see how long a full one took to fill


class StatsExporter(Protocol):
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
        on_batch: The option: what observes the batches.

    Attributes:
        name: What the log calls the batcher.
        exporter: Exports metrics; None if nothing does.
        observers: Those of ``on_batch``; None if there are none.
        done: See `stats.Stats`, also for the others.
    """

    __slots__ = (
        "_batches", "_ended", "_last_outdated", "_lock", "_sizes", "cancelled", "done", "exporter",
        "failed", "name", "observers", "rate_limited", "reasons", "rejected", "retried",
        "timed_out",
    )  # fmt: skip

    def __init__(self, on_batch: ObserverOption = None) -> None:
        self.done = self.failed = self.cancelled = self.timed_out = self.rejected = 0
        self.retried = self.rate_limited = 0
        self.reasons: dict[Reason, int] = {
            "full": 0, "timeout": 0, "slot_available": 0, "rate": 0, "drain": 0, "isolation": 0,
        }  # fmt: skip
        self._lock = threading.RLock()  # for the samples: any thread may ask for statistics
        self._sizes: deque[int] = deque(maxlen=_MAX_BATCHES)
        self._ended: deque[EndedBatch] = deque(maxlen=_MAX_BATCHES)
        self._last_outdated: EndedBatch | None = None  # of other options
        self._batches = 0
        self.name = "process_batch"
        self.exporter: StatsExporter | None = None
        self.observers: Observers | None = None
        if on_batch is not None:
            from async_batcher._batching.records.observers import make_observers

            self.observers = make_observers(on_batch)

    def batch_started(self, batch: Batch[Any, Any]) -> None:
        """Count a batch, and number it."""
        self._batches += 1
        batch.number = self._batches
        self.reasons[batch.reason] += 1
        with self._lock:
            self._sizes.append(batch.size)
        if self.exporter is not None:
            self.exporter.batch_started()

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
            self._ended.append(
                (batch.started_at, run_time if has_run else None, batch.size, batch.reason, sample)
            )
        if self.exporter is not None:
            waits = [batch.started_at - enqueued_at for enqueued_at in sample]
            self.exporter.batch_finished(batch.size, waits, run_time if has_run else None)
        if self.observers is not None:
            self.observers.finished(batch, run_time, failed, error)

    def options_changed(self) -> None:
        """Leave the batches that ended before out of `ended_batches`."""
        with self._lock:
            self._last_outdated = self._ended[-1] if self._ended else None

    def ended_batches(self) -> list[EndedBatch]:
        """The last batches that ended with the present options, in that order."""
        with self._lock:
            ended = list(self._ended)
        outdated = (n for n, batch in enumerate(ended, 1) if batch is self._last_outdated)
        return ended[next(outdated, 0) :]

    def stats(
        self, *, queued: int, blocked: int, running: int, workers: WorkerCounts | None
    ) -> Stats:
        """Make a record."""
        from async_batcher.stats import BatchCounts, Stats, WorkerCounts

        with self._lock:
            sizes, ended = list(self._sizes), list(self._ended)
        return Stats(
            queued=queued,
            blocked=blocked,
            running=running,
            done=self.done,
            failed=self.failed,
            cancelled=self.cancelled,
            timed_out=self.timed_out,
            rejected=self.rejected,
            retried=self.retried,
            rate_limited=self.rate_limited,
            batches=BatchCounts(**self.reasons),
            sizes=_quantiles(sizes),
            queue_waits=_quantiles(
                started_at - enqueued_at
                for started_at, _, _, _, sample in ended
                for enqueued_at in sample
            ),
            run_times=_quantiles(run_time for _, run_time, *_ in ended if run_time is not None),
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
