"""How the time of ``tune`` is divided among its trials (pure)."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from async_batcher.cli.tune.model import fit_cost_model, sizes_to_try

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
