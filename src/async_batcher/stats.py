"""What a batcher has done and is doing, as frozen records.

`AsyncBatcher.stats` returns a `Stats`, `AsyncBatcher.explain` an `Explanation`. What observes
batches (``on_batch``) gets a `BatchStart` of each batch before it runs, and a `BatchRecord` when it
has ended.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping

__all__ = [
    "BatchCounts",
    "BatchRecord",
    "BatchStart",
    "Explanation",
    "Quantiles",
    "Stats",
    "WorkerCounts",
]

# Why a batch left the queue.
Reason: TypeAlias = Literal["full", "timeout", "slot_available", "rate", "drain", "isolation"]

# What limits throughput; see `Explanation`.
Bottleneck: TypeAlias = Literal[
    "window", "size", "limit", "slots", "workers", "rate", "callers", "unknown"
]


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
        full: Batches with ``max_batch_size`` items, or as many as a `Limit` allows; with all the
            items that a `map` may read ahead, or with the last items of its source; and those that
            left by `flush`.
        timeout: Batches that were due because an item had waited for ``max_queue_time``.
        slot_available: Batches that were due while all slots were busy, when a slot became free.
        rate: Batches that were due while a ``rate`` held them back.
        drain: Batches that left because the batcher was stopping.
        isolation: Parts of failed batches, which ran again.
    """

    full: int
    timeout: int
    slot_available: int
    rate: int
    drain: int
    isolation: int


@dataclass(frozen=True, slots=True)
class WorkerCounts:
    """Worker processes of a `WorkerPool` since its creation, for all its batchers.

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
    """A batcher at one moment, with all counts since its creation, across restarts.

    Every accepted item is in exactly one of ``queued``, ``running``, ``done``, ``failed``,
    ``cancelled`` and ``timed_out``.

    Attributes:
        queued: Items in the queue, among them those that come back later, or in a batch that waits
            for a worker.
        blocked: Items whose callers wait until the queue has capacity.
        running: Items with a waiting caller, in batches that run or are to run again.
        done: Items whose callers got a result.
        failed: Items whose callers got an error other than a timeout of the item.
        cancelled: Items whose callers were cancelled.
        timed_out: Items whose ``timeout`` passed before they had a result.
        rejected: Items that the full queue rejected.
        retried: How often items went back into the queue, by a `Later` or by ``on_failure``. Parts
            of failed batches (`isolate`) do not.
        rate_limited: Items in batches that a ``rate`` has held back in the queue.
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
    retried: int
    rate_limited: int
    batches: BatchCounts
    sizes: Quantiles
    queue_waits: Quantiles
    run_times: Quantiles
    workers: WorkerCounts


@dataclass(frozen=True, slots=True)
class BatchStart:
    """A batch that is about to run; its `BatchRecord` has the same ``batcher`` and ``number``.

    Attributes:
        batcher: The name of the batcher.
        number: Counts the batches of the batcher, from 1.
        size: The number of items in the batch.
        reason: Why the batch left the queue; see `BatchCounts`.
        queue_time: Seconds that the oldest item was queued; 0 if the batch runs again.
        key: The key of its items; None without the option ``key``.
        attempt: How often an item of it has been tried, this time included: the largest number.
        captured: What ``enqueued()`` of the observer returned for the callers of the batch, except
            None; one value for each call, in order.
    """

    batcher: str
    number: int
    size: int
    reason: Reason
    queue_time: float
    key: Hashable = None
    attempt: int = 1
    captured: list[Any] = field(default_factory=list, hash=False)


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
            ``"builtins.ValueError"``; None if the batch returned. One that was taken back before it
            started, since another raised `Later`, ended with a ``BatchRecalledError``; its items
            are in later batches.
        batcher: The name of the batcher. Batchers of one class have the same, unless they are
            given ``name``.
        number: Counts the batches of the batcher, from 1.
        key: The key of its items; None without the option ``key``.
        attempt: How often an item of it has been tried, this time included: the largest number.
        exception: The exception itself, or None. Its traceback may keep the items in memory.
    """

    size: int
    reason: Reason
    queue_time: float
    run_time: float
    failed: int
    error: str | None
    batcher: str = ""
    number: int = 0
    key: Hashable = None
    attempt: int = 1
    exception: BaseException | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class Explanation:
    """What limits the throughput of a batcher; ``str`` returns it as a paragraph.

    It is about the last batches that have run with the present options, at most 1,024; batches that
    left because the batcher was stopping, and parts of failed batches, count for ``busy_share``
    alone.

    Attributes:
        bottleneck: What limits throughput. ``"window"``: items wait for ``max_queue_time`` while
            slots are free. ``"size"``: batches are full, and larger ones would cost less per item.
            ``"limit"``: ``max_queue_size`` or a `Limit` keeps batches small, or ``key_concurrency``
            or a `Later` lets items wait. ``"slots"``: items
            wait because ``concurrency`` batches run. ``"workers"``: items wait because all workers
            are busy. ``"rate"``: items wait for the ``rate`` of a `Limit`. ``"callers"``: items
            hardly wait, so there are too few. ``"unknown"``: too few batches have run.
        batches: The number of batches that were measured.
        mean_size: Items per batch.
        mean_fill: ``mean_size`` as a share of ``max_batch_size``; None without that.
        mean_wait: Seconds that an item waited, in the queue or for a worker; from at most 16 items
            of each batch.
        mean_run_time: Seconds from when a batch began until it ended.
        busy_share: The share of the slots that were busy, from the start of the first measured
            batch to the end of the last; None if their number has no limit.
        items_per_second: The throughput in that time.
        option: The name of the option to change; None if no option is known to help.
        expected_gain: By which factor the change should raise throughput, or with ``"window"``
            shorten the time of a call: an estimate; None if there is none.
        suggestion: What to change, and what that should do; None if there is nothing.
        text: The paragraph.
    """

    bottleneck: Bottleneck
    batches: int
    mean_size: float
    mean_fill: float | None
    mean_wait: float
    mean_run_time: float
    busy_share: float | None
    items_per_second: float
    option: str | None
    expected_gain: float | None
    suggestion: str | None
    text: str = field(repr=False)

    def __str__(self) -> str:
        """The paragraph."""
        return self.text
