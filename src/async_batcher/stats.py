"""What a batcher has done and is doing, as frozen records.

`AsyncBatcher.stats` returns a `Stats`; ``on_batch`` gets a `BatchRecord` for each batch that has
ended.
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
    """Quantiles of a sample; all are 0 if the sample is empty.

    Attributes:
        p50: The median: half of the values are at most this large.
        p95: The 95th percentile.
        p99: The 99th percentile.
        count: The number of values in the sample.
    """

    p50: float
    p95: float
    p99: float
    count: int


@dataclass(frozen=True, slots=True)
class BatchCounts:
    """Number of batches that have left the queue, by reason.

    Attributes:
        full: Batches with ``max_batch_size`` items, with all the items that a `map` may read ahead,
            or with the last items of its source.
        timeout: Batches that were due because an item had waited for ``max_queue_time``.
        slot_available: Batches that were due while all slots were busy, when a slot became free.
        drain: Batches that left because the batcher was stopping.
        isolation: Parts of failed batches, which ran again.
    """

    full: int
    timeout: int
    slot_available: int
    drain: int
    isolation: int


@dataclass(frozen=True, slots=True)
class WorkerCounts:
    """Worker processes of a `WorkerPool` since its creation, for all batchers that share it.

    With any other executor all counts are 0.

    Attributes:
        started: Processes that were started.
        crashed: Processes that ended unexpectedly, or were ended because of what they ran, by
            cause: ``"SIGKILL"``, ``"exit code 1"``, ``"timeout"`` (of a batch), ``"abandoned"`` (by
            all its callers), ``"batcher stopped"`` (by force, in a set-up), ``"start failed"`` (no
            process), ``"start timeout"``, ``"initializer failed"``, ``"preload failed"``,
            ``"set-up timeout"``, ``"tear-down timeout"``, ``"closed channel"``,
            ``"unreadable channel"``, ``"send failed"``.
        recycled: Processes that were replaced as planned: after ``max_tasks_per_child`` batches,
            when they used more than ``max_memory_per_child`` bytes, or by ``restart_workers``.
    """

    started: int
    crashed: Mapping[str, int]
    recycled: int


@dataclass(frozen=True, slots=True)
class Stats:
    """A batcher at one moment, with all counts since its creation, across stops and restarts.

    Every accepted item is in exactly one of ``queued``, ``running``, ``done``, ``failed``,
    ``cancelled`` and ``timed_out``.

    Attributes:
        queued: Items in the queue, or in a batch that waits for a worker.
        blocked: Items whose callers wait until the queue has capacity.
        running: Items with a waiting caller, in batches that run or are to run again.
        done: Items whose callers got a result.
        failed: Items whose callers got an error other than a timeout of the item.
        cancelled: Items whose callers were cancelled.
        timed_out: Items whose ``timeout`` passed before they had a result.
        rejected: Items that the full queue rejected.
        batches: Batches by the reason for which they left the queue.
        sizes: Items per batch, over the last 1,024 batches.
        queue_waits: Seconds that items waited, in the queue or for a worker; at most 16 items of
            each of the last 1,024 batches that ended.
        run_times: Seconds from when a batch began until it ended, over the last 1,024 batches.
        workers: The worker processes.
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
        size: The number of items in the batch.
        reason: Why the batch left the queue; see `BatchCounts`.
        queue_time: Seconds that the oldest item waited, in the queue or for a worker; 0 if the
            batch runs again.
        run_time: Seconds after that until the batch ended.
        failed: The number of items whose callers got an error when the batch ended.
        error: The qualified name of the exception that the whole batch ended with, such as
            ``"builtins.ValueError"``; None if the batch returned.
    """

    size: int
    reason: Reason
    queue_time: float
    run_time: float
    failed: int
    error: str | None
