"""What a batcher has done and is doing: frozen records, which only watch.

`AsyncBatcher.stats` gives a `Stats`; ``on_batch=`` gets a `BatchRecord` for each batch that has ended.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["BatchCounts", "BatchRecord", "Quantiles", "Stats", "WorkerCounts"]

# Why a batch left the queue.
Reason: TypeAlias = Literal["full", "timeout", "slot_available", "drain", "isolation"]


@dataclass(frozen=True, slots=True)
class Quantiles:
    """Quantiles of a sample; all 0 while it is empty.

    Attributes:
        p50: Half of the values are at most this: the median.
        p95: 95 % of the values are at most this.
        p99: 99 % of the values are at most this.
        count: Values in the sample.
    """

    p50: float
    p95: float
    p99: float
    count: int


@dataclass(frozen=True, slots=True)
class BatchCounts:
    """Batches that have left the queue, by the reason for which they did.

    Attributes:
        full: They held ``max_batch_size`` items, or all that could come: what a `map` had read as far as it may.
        timeout: Their oldest item had waited for ``max_queue_time``.
        slot_available: They had been full or old enough for a while, and a slot came free.
        drain: The batcher was stopping.
        isolation: They were parts of batches that had failed, and were run again.
    """

    full: int
    timeout: int
    slot_available: int
    drain: int
    isolation: int


@dataclass(frozen=True, slots=True)
class WorkerCounts:
    """Worker processes of a `WorkerPool`: since it was made, for all batchers that share it. Elsewhere there are none to see.

    Attributes:
        started: Processes that were started.
        crashed: Processes that ended unasked, or were ended for what they ran, by cause: ``"SIGKILL"``, ``"exit code 1"``,
            ``"timeout"`` (of a batch), ``"abandoned"`` (by all its callers), ``"start timeout"``, ``"set-up timeout"``.
        recycled: Processes that were replaced as planned: after ``max_tasks_per_child`` batches, or past
            ``max_memory_per_child`` bytes.
    """

    started: int
    crashed: Mapping[str, int]
    recycled: int


@dataclass(frozen=True, slots=True)
class Stats:
    """A batcher at one moment, and all that it has done since it was made; stops and restarts included.

    Every item that was taken is in just one of ``queued``, ``running``, ``done``, ``failed``, ``cancelled`` and ``timed_out``.

    Attributes:
        queued: Items in the queue.
        blocked: Items whose callers wait until the queue has room.
        running: Items in batches that run, or are to be run again, and whose callers still wait.
        done: Items whose callers got a result.
        failed: Items whose callers got an error, but for those that are counted as expired.
        cancelled: Items whose callers left first.
        timed_out: Items whose ``timeout`` was over first.
        rejected: Items that found the queue full, and were not taken.
        batches: Batches by the reason for which they left.
        sizes: Items in a batch, of the last 1,024 batches.
        queue_waits: Seconds that items waited in the queue; up to 16 items of each of the last 1,024 batches.
        run_times: Seconds from when a batch left the queue until it had ended, of the last 1,024 batches.
        workers: Its worker processes.
    """

    queued: int
    blocked: int
    running: int
    done: int
    failed: int
    cancelled: int
    timed_out: int
    rejected: int
    batches: BatchCounts
    sizes: Quantiles
    queue_waits: Quantiles
    run_times: Quantiles
    workers: WorkerCounts


@dataclass(frozen=True, slots=True)
class BatchRecord:
    """A batch that has ended.

    Attributes:
        size: Its items.
        reason: Why it left the queue; see `BatchCounts`.
        queue_time: Seconds that its oldest item had waited in the queue; 0 for what is run again.
        run_time: Seconds from when it left the queue until it had ended.
        failed: Its items whose callers got an error by its end.
        error: The name of the exception that the whole batch ended with, ``"builtins.ValueError"`` for example; None: it
            returned.
    """

    size: int
    reason: Reason
    queue_time: float
    run_time: float
    failed: int
    error: str | None
