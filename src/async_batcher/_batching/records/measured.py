"""What the last batches of a batcher show (pure).

::

    EndedBatch, ... , OptionsInEffect --> measure --> Measured, with a CostModel
"""

from __future__ import annotations

import math
from collections import defaultdict
from statistics import fmean, median, median_low
from typing import TYPE_CHECKING, Literal, NamedTuple

from async_batcher._batching.records.batch_cost import BatchCost, fit_cost_model

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import TypeAlias

    from async_batcher._batching.records.batch_cost import CostModel
    from async_batcher.stats import Reason

    RunsIn: TypeAlias = Literal["processes", "threads", "coroutines"]
    # When it started; seconds that it ran, None if it was taken back before; its number of items;
    # why it left; when some of its items came.
    EndedBatch: TypeAlias = tuple[float, float | None, int, Reason, Sequence[float]]

_SIZE_RATIO_MIN = 1.5  # between the sizes that a line is fitted to
_BATCHES_PER_SIZE_MIN = 3
_SECONDS_MIN = 1e-9  # of all batches; less than that is not measured


class OptionsInEffect(NamedTuple):
    """The options that the measured batches ran with; None means no limit.

    Attributes:
        max_batch_size: Items of a batch at most.
        max_queue_time: Seconds.
        max_queue_size: Items that are queued at most.
        concurrency: Batches that run at a time, by that option.
        workers: Those by the size of the executor; None if that is unknown.
        runs_in: Where batches run.
        cores: That the program may use.
        limits_keys: Whether there is a ``key_concurrency``.
        limits_cost: Whether a `Limit` has a ``per_batch``.
    """

    max_batch_size: int | None = None
    max_queue_time: float = 0.0
    max_queue_size: int | None = None
    concurrency: int | None = None
    workers: int | None = None
    runs_in: RunsIn = "processes"
    cores: int = 1
    limits_cost: bool = False
    limits_keys: bool = False

    @property
    def slots(self) -> int | None:
        """Batches that run at a time."""
        return _least(self.concurrency, self.workers)

    @property
    def slots_option(self) -> Literal["concurrency", "max_workers"]:
        """The option that limits them."""
        is_limited = self.concurrency is not None and self.concurrency < (self.workers or math.inf)
        return "concurrency" if is_limited or self.workers is None else "max_workers"

    @property
    def largest_batch(self) -> int | None:
        return _least(self.max_batch_size, self.max_queue_size)

    @property
    def size_option(self) -> Literal["max_batch_size", "max_queue_size"]:
        """The option that limits the size of batches."""
        is_queue = self.largest_batch != self.max_batch_size
        return "max_queue_size" if is_queue else "max_batch_size"


class Measured(NamedTuple):
    """What the batches show; see `stats.Explanation`."""

    batches: int = 0
    items: int = 0
    mean_size: float = 0.0
    mean_wait: float = 0.0
    slot_wait: float = 0.0  # the part of it for which no slot was free
    mean_run_time: float = 0.0
    seconds: float = 0.0  # from the first start to the last end
    busy_share: float | None = None
    items_per_second: float = 0.0
    timed_out: float = 0.0  # the share that left for reason "timeout"
    found_no_slot: float = 0.0  # and for reason "slot_available"
    rate_limited: float = 0.0  # and for reason "rate"
    cost_filled: float = 0.0  # the share that was full with fewer items than a batch may have
    queue_filled: float = 0.0  # the share that had all items that may be queued
    model: CostModel | None = None  # of a batch, if their sizes tell

    @property
    def demand(self) -> float:
        """The items that run or wait for a slot, as a multiple of those that run."""
        if self.mean_run_time <= 0:
            return math.inf if self.slot_wait > 0 else 1.0
        return 1 + self.slot_wait / self.mean_run_time


def measure(batches: Sequence[EndedBatch], options: OptionsInEffect) -> Measured:
    """Average what the batches show."""
    ran = [
        (started_at, run_time, size, reason, enqueued_at)
        for started_at, run_time, size, reason, enqueued_at in batches
        if run_time is not None
    ]
    own = [batch for batch in ran if batch[3] not in ("isolation", "drain")]
    if not own:
        return Measured()
    seconds = max(batch[0] + batch[1] for batch in ran) - min(batch[0] for batch in ran)
    seconds = seconds if seconds > _SECONDS_MIN else 0.0
    items = sum(size for _, _, size, _, _ in own)
    waits = [(batch[2], *_waits(batch, options)) for batch in own if batch[4]]
    waited = sum(size for size, _, _ in waits) or 1
    busy = None
    if options.slots is not None:
        busy = sum(batch[1] for batch in ran) / (options.slots * seconds) if seconds > 0 else 0.0
        busy = min(1.0, max(0.0, busy))
    reasons = [reason for _, _, _, reason, _ in own]
    queue_size = options.max_queue_size or math.inf
    batch_size = options.max_batch_size or math.inf
    return Measured(
        batches=len(own),
        items=items,
        mean_size=items / len(own),
        mean_wait=sum(size * wait for size, wait, _ in waits) / waited,
        slot_wait=sum(size * wait for size, _, wait in waits) / waited,
        mean_run_time=fmean(batch[1] for batch in own),
        seconds=seconds,
        busy_share=busy,
        items_per_second=items / seconds if seconds > 0 else 0.0,
        timed_out=reasons.count("timeout") / len(own),
        found_no_slot=reasons.count("slot_available") / len(own),
        rate_limited=reasons.count("rate") / len(own),
        cost_filled=sum(batch[3] == "full" and batch[2] < batch_size for batch in own) / len(own),
        queue_filled=sum(batch[2] >= queue_size for batch in own) / len(own),
        model=_fit([(batch[2], batch[1]) for batch in own]),
    )


def _waits(batch: EndedBatch, options: OptionsInEffect) -> tuple[float, float]:
    """Return the mean wait of a batch's items, and that from when the batch was due."""
    started_at, _, size, _, enqueued_at = batch
    waits = [max(0.0, started_at - came_at) for came_at in enqueued_at]
    due = waits[0] - options.max_queue_time
    if size >= (options.largest_batch or math.inf):
        due = max(due, waits[-1])
    return fmean(waits), fmean(max(0.0, min(wait, due)) for wait in waits)


def _fit(batches: Sequence[tuple[int, float]]) -> CostModel | None:
    """Fit a line to the run times; None if the sizes vary too little or it does not fit.

    Each size, within a factor of 1.4, counts once, with its median: neither many batches of one
    size nor a few slow ones decide.
    """
    by_size: defaultdict[int, list[tuple[int, float]]] = defaultdict(list)
    for size, seconds in batches:
        by_size[round(2 * math.log2(size))].append((size, seconds))
    costs = [
        BatchCost(median_low(sizes), median(times))
        for sizes, times in (zip(*some, strict=True) for some in by_size.values())
        if len(sizes) >= _BATCHES_PER_SIZE_MIN and median(times) > _SECONDS_MIN
    ]
    sizes = [cost.batch_size for cost in costs]
    if not sizes or max(sizes) < _SIZE_RATIO_MIN * min(sizes):
        return None
    model = fit_cost_model(costs)
    return model if model.holds else None


def _least(*limits: int | None) -> int | None:
    return min((limit for limit in limits if limit is not None), default=None)
