"""What ``tune`` measures: batch sizes, numbers of workers, and the time for each (pure)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from async_batcher.cli.tune.model import MAX_BATCH_SIZE, fit_cost_model

if TYPE_CHECKING:
    from collections.abc import Sequence

    from async_batcher.cli.tune.model import BatchCost, Mode

COSTS_SHARE = 0.2  # of the time, for the function alone
BATCHES_PER_WORKER = 2  # in flight: one runs, one is queued

# A trial lasts until all of those have ended, so it is worth its time if all workers are busy for
# as long as a batch runs.
_MIN_BATCHES = BATCHES_PER_WORKER + 1

_MIN_BUSY = 0.02  # seconds: a shorter trial says more of how it began
_MAX_ROUNDS = 3  # so that one or two of them may be disturbed by other programs
_ROUND_SECONDS = 0.1  # for each size: below that, one longer round says more than several

_STILL_FALLS = 0.97  # cost per item after two doublings: above this it no longer falls
_LONG_BATCH = 0.005  # seconds; a trip is some percent of such a batch
_MAX_SIZES = 6  # with each number of workers: more would leave too little time for each
_MARGIN = 0.85  # of a target latency, for what the model lacks: the trip, unequal batches
_ALIKE = 1.2  # of two sizes closer than this, one is enough


class TrialPlan(NamedTuple):
    """What to try with some number of workers, and the seconds that all of it takes.

    ``sizes`` says for each batch size how many seconds all workers are kept busy.
    """

    mode: Mode
    workers: int
    sizes: dict[int, float]
    seconds: float


def configurations(max_workers: int) -> list[tuple[Mode, int]]:
    """List modes, each with 1, 2, 4, ... and ``max_workers`` workers."""
    counts = [1 << n for n in range(max_workers.bit_length()) if 1 << n < max_workers]
    modes: tuple[Mode, ...] = ("threads", "processes")
    return [(mode, count) for mode in modes for count in (*counts, max_workers)]


def next_size(costs: Sequence[BatchCost], max_seconds: float) -> int | None:
    """Choose the batch size to measure after those of ``costs``: 1, 2, 4, ... None: no more.

    It is enough when batches take more than ``max_seconds``, or when an item has not become cheaper
    by two doublings, and a trip to a worker no longer counts.
    """
    last = costs[-1]
    size = 2 * last.batch_size
    if size > MAX_BATCH_SIZE or 2 * last.seconds > max_seconds:
        return None
    is_long = last.seconds >= _LONG_BATCH and len(costs) > 2
    if is_long and last.per_item >= _STILL_FALLS * costs[-3].per_item:
        return None
    return size


def sizes_to_try(
    costs: Sequence[BatchCost], workers: int, target_latency: float | None
) -> list[int]:
    """Choose batch sizes for trials: few, spread over those whose cost is known.

    With a target also the largest that ought to stay within it, by the model.
    """
    # Workers fill a batch together, in a part of the time that one of them takes to run it:
    # latency = cost * (1 + 1 / workers).
    seconds = math.inf if target_latency is None else target_latency / (1 + 1 / workers)
    known = [cost.batch_size for cost in costs if cost.seconds <= seconds or cost is costs[0]]
    few = min(_MAX_SIZES, len(known))
    sizes = {known[round(step * (len(known) - 1) / max(1, few - 1))] for step in range(few)}
    model = fit_cost_model(costs)
    if target_latency is not None and model.holds and model.per_item > 0:
        size = min(int((_MARGIN * seconds - model.fixed) / model.per_item), MAX_BATCH_SIZE)
        if size >= 1 and not any(1 / _ALIKE < size / other < _ALIKE for other in sizes):
            sizes.add(size)
    return sorted(sizes)


def allocate_rounds(
    costs: Sequence[BatchCost],
    target_latency: float | None,
    configs: Sequence[tuple[Mode, int]],
    start_seconds: float,
    seconds: float,
) -> tuple[int, list[int]]:
    """Choose how often to try everything, in turn, and which batch sizes.

    All configurations are tried with the same sizes. Batches that are too long for the time are
    left out, except those of one item; none is left out for another round.
    """
    sizes = sizes_to_try(costs, max(workers for _, workers in configs), target_latency)
    predicted = _predicted_seconds(costs, sizes)

    def rounds(least: float) -> float:
        trial = max(least, _MIN_BATCHES * max(predicted[size] for size in sizes))
        return seconds / (len(configs) * (start_seconds + len(sizes) * trial))

    while len(sizes) > 1 and rounds(least=0.0) < 1:
        sizes = sizes[:-1]
    return max(1, min(int(rounds(least=_ROUND_SECONDS)), _MAX_ROUNDS)), sizes


def allocate_time(
    mode: Mode, workers: int, sizes: Sequence[int], costs: Sequence[BatchCost], seconds: float
) -> TrialPlan:
    """Divide ``seconds`` among the sizes."""
    predicted = _predicted_seconds(costs, sizes)
    rest = {size: BATCHES_PER_WORKER * predicted[size] for size in sizes}
    busy = {
        size: max(seconds / len(sizes) - rest[size], predicted[size], _MIN_BUSY) for size in sizes
    }
    return TrialPlan(mode, workers, busy, sum(busy.values()) + sum(rest.values()))


def _predicted_seconds(costs: Sequence[BatchCost], sizes: Sequence[int]) -> dict[int, float]:
    """Predict a batch of each size. Threads that share the GIL take longer, but are given up."""
    known = {cost.batch_size: cost.seconds for cost in costs}
    model = fit_cost_model(costs)
    return {size: known.get(size, model.seconds(size)) for size in sizes}


def minimum_time(
    item_seconds: float, start_seconds: float, configs: Sequence[tuple[Mode, int]]
) -> float:
    """Return the least time for all trials, with batches of one item.

    Threads end with two if they share the GIL, each of which then counts for two.
    """
    processes = sum(mode == "processes" for mode, _ in configs)
    threads = sum(workers for mode, workers in configs if mode == "threads" and workers <= 2)
    trials = threads + processes
    return _MIN_BATCHES * item_seconds * trials + start_seconds * processes
