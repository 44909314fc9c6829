"""What is tried and measured, what a batch costs, and predictions from it (pure).

::

    BatchCost: the function alone --> fit_cost_model --> CostModel: a + b n
        |
        '--> predict_throughput: of a Config with some number of clients --> search

Rules:

- Only what was measured is recommended. Predictions choose what is measured.
- Clients are a closed loop: each calls the batcher with one item, awaits the result, and calls
  again at once.
"""

from __future__ import annotations

import math
from itertools import pairwise
from statistics import median
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

from async_batcher._batching.records.batch_cost import fit_cost_model

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from async_batcher._batching.records.batch_cost import BatchCost

Mode: TypeAlias = Literal["threads", "processes"]

MAX_BATCH_SIZE = 1024  # a batch's own share of a trip, some 0.2 ms, is then below that of its items

# Seconds from the event loop to the function and back. Predictions only rank what is tried first,
# so the order of magnitude is enough.
_TRIP_SECONDS: dict[Mode, float] = {"threads": 1e-4, "processes": 3e-4}
_LOOP_ITEM_SECONDS = 5e-6  # of the event loop, for each item of a client
_LOOP_BATCH_SECONDS = 1e-4  # and for each batch


class Config(NamedTuple):
    """The options of a batcher that are compared."""

    mode: Mode
    workers: int
    batch_size: int
    queue_time: float = 0.0

    @property
    def pool(self) -> tuple[Mode, int]:
        return self.mode, self.workers

    @property
    def executor(self) -> Literal["thread", "process"] | None:
        """The option. None: the event loop's own threads, of which one runs batches."""
        if self.mode == "processes":
            return "process"
        return "thread" if self.workers > 1 else None


class Trial(NamedTuple):
    """What is measured next: a batcher that so many clients call for so many seconds."""

    config: Config
    clients: int
    seconds: float


class Measurement(NamedTuple):
    """What the clients of a trial got: items per second, and the seconds that a call took."""

    throughput: float
    p50: float
    p99: float


class BatchSample(NamedTuple):
    """A batch of a trial: when it ended, on any clock, its items, and the seconds that it ran."""

    at: float
    size: int
    seconds: float


class Choice(NamedTuple):
    """What is recommended, and what was measured of it."""

    config: Config
    clients: int  # the number that decided
    meets_target: bool
    loads: dict[int, Measurement]  # by number of clients
    spread: float  # see `spread`


def batch_seconds(costs: Sequence[BatchCost], size: int) -> float:
    """Return what a batch costs: between two measured sizes by interpolation."""
    known = {cost.batch_size: cost.seconds for cost in costs}
    if size in known:
        return known[size]
    below = max((n for n in known if n < size), default=None)
    above = min((n for n in known if n > size), default=None)
    if below is None or above is None:
        return fit_cost_model(costs).seconds(size)
    share = (size - below) / (above - below)
    return known[below] + share * (known[above] - known[below])


def predict_throughput(costs: Sequence[BatchCost], config: Config, clients: int) -> float:
    """Predict items per second, as if workers did not share the GIL, or cores with the loop.

    Clients whose items ran in one batch call again together. So there are ``clients / batch_size``
    groups, each of which is one batch after the other, and keeps one worker busy.
    """
    size = min(config.batch_size, clients)
    seconds = batch_seconds(costs, size) + _TRIP_SECONDS[config.mode]
    loop_seconds = _LOOP_ITEM_SECONDS + _LOOP_BATCH_SECONDS / size
    return min(min(clients, config.workers * size) / seconds, 1 / loop_seconds)


def quantile(ranked: Sequence[float], percent: int) -> float:
    """Return a quantile of sorted values by nearest rank."""
    return ranked[-(-len(ranked) * percent // 100) - 1]


def evaluate_trial(
    began: float, until: float, batches: Sequence[BatchSample], waits: Iterable[float]
) -> Measurement:
    """Evaluate a trial whose clients called from ``began`` on, and for the last time at ``until``.

    What a batch that ended later had done by then counts in proportion to its time, so that long
    batches need no longer trial. ``waits`` are the seconds that each call took.
    """
    until = max(until, min(batch.at for batch in batches))
    done = sum(batch.size * _share_before(batch, until) for batch in batches)
    ranked = sorted(waits)
    return Measurement(done / (until - began), quantile(ranked, 50), quantile(ranked, 99))


def _share_before(batch: BatchSample, until: float) -> float:
    if batch.at <= until:
        return 1.0
    return max(0.0, 1 - (batch.at - until) / batch.seconds) if batch.seconds > 0 else 0.0


def typical(trials: Sequence[Measurement]) -> Measurement:
    """Return the median of each figure."""
    return Measurement(*(median(column) for column in zip(*trials, strict=True)))


def spread(values: Sequence[float]) -> float:
    """Tell by how much two successive trials of the same typically differ, relatively."""
    if len(values) < 2:
        return 0.0
    pairs = pairwise(values)
    return median(abs(math.log(later / earlier)) for earlier, later in pairs)


def pool_label(mode: Mode, workers: int) -> str:
    singular = {"threads": "thread", "processes": "process"}[mode]
    return f"{workers:,} {mode if workers != 1 else singular}"
