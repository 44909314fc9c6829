"""What is counted while a batcher works; records are made of it when somebody asks (`stats.py`)."""

from __future__ import annotations

import logging
from collections import deque
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from async_batcher.stats import BatchRecord, Quantiles, Reason, Stats, WorkerCounts

logger = logging.getLogger("async_batcher")

_KEPT = 1024  # batches
_WAITS = 16  # items of a batch whose waits are kept: enough to see how long a full one took to fill


class StatsRecorder:
    """The counts of one batcher, over all its sessions.

    Args:
        on_batch: Called with a record of each batch that has ended.

    Attributes:
        done: See `stats.Stats`, and so the others.
    """

    __slots__ = (
        "_callback_error_logged", "_on_batch", "_run_times", "_sizes", "_waits", "cancelled",
        "done", "failed", "reasons", "rejected", "timed_out",
    )  # fmt: skip

    def __init__(self, on_batch: Callable[[BatchRecord], object] | None = None) -> None:
        self.done = self.failed = self.cancelled = self.timed_out = self.rejected = 0
        self.reasons: dict[Reason, int] = dict.fromkeys(("full", "timeout", "slot_available", "drain", "isolation"), 0)
        self._sizes: deque[int] = deque(maxlen=_KEPT)
        self._waits: deque[tuple[float, ...]] = deque(maxlen=_KEPT)  # when it left, when items of it had come
        self._run_times: deque[float] = deque(maxlen=_KEPT)
        self._on_batch = on_batch
        self._callback_error_logged = False

    def batch_started(self, reason: Reason, size: int, arrivals: Sequence[float], now: float) -> None:
        """A batch leaves the queue.

        Args:
            reason: Why.
            size: Its items.
            arrivals: When they came, the oldest first; empty for what is run again.
            now: The time.
        """
        self.reasons[reason] += 1
        self._sizes.append(size)
        if arrivals:
            self._waits.append((now, *arrivals[:: -(-size // _WAITS)]))

    def batch_finished(
        self, reason: Reason, size: int, queue_time: float, run_time: float, failed: int, error: BaseException | None
    ) -> None:
        """A batch has ended; see `stats.BatchRecord`."""
        self._run_times.append(run_time)
        if self._on_batch is None:
            return
        from async_batcher._serialization.exception_text import qualified_name
        from async_batcher.stats import BatchRecord

        name = None if error is None else qualified_name(error)
        try:
            self._on_batch(BatchRecord(size, reason, queue_time, run_time, failed, name))
        except Exception:
            if not self._callback_error_logged:
                self._callback_error_logged = True
                logger.exception("on_batch raised; whatever else it raises is not logged")

    def stats(self, *, queued: int, blocked: int, running: int, workers: WorkerCounts | None) -> Stats:
        """A record of it."""
        from async_batcher.stats import BatchCounts, Stats, WorkerCounts

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
            sizes=_quantiles(self._sizes),
            queue_waits=_quantiles(left - arrival for left, *sample in self._waits for arrival in sample),
            run_times=_quantiles(self._run_times),
            workers=workers or WorkerCounts(0, {}, 0),
        )


def _quantiles(values: Iterable[Any]) -> Quantiles:
    """By the nearest rank: each is a value of the sample."""
    from async_batcher.stats import Quantiles

    ranked = sorted(values)
    count = len(ranked)
    if not count:
        return Quantiles(0.0, 0.0, 0.0, 0)
    p50, p95, p99 = (float(ranked[-(-count * percent // 100) - 1]) for percent in (50, 95, 99))
    return Quantiles(p50, p95, p99, count)
