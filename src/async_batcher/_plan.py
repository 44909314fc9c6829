"""How the time of `tune` is shared out among its trials (pure)."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from async_batcher._tuning import fit, sizes_to_try

if TYPE_CHECKING:
    from collections.abc import Sequence

    from async_batcher._tuning import Cost, Mode

COSTS_SHARE = 0.2  # of the time, for the function alone
BATCHES_PER_WORKER = 2  # in flight: one runs, one waits for its turn

# A trial lasts until all of those have ended, so it is worth its time if all workers are busy for as long as a batch runs.
_LEAST_BATCHES = BATCHES_PER_WORKER + 1

_LEAST_BUSY = 0.02  # seconds: with less, a trial says more of how it began

_MOST_ROUNDS = 3  # so that one or two of them may be disturbed by what else the machine does
_ROUND_SECONDS = 0.1  # for each size: with less, a round more says less than a longer one


class Plan(NamedTuple):
    """What to try with some number of workers.

    Attributes:
        mode: Where batches run.
        workers: Threads, or processes.
        sizes: Of batches; for how many seconds all workers are to be kept busy with each.
        seconds: That it all takes.
    """

    mode: Mode
    workers: int
    sizes: dict[int, float]
    seconds: float


def ways_to_try(most_workers: int) -> list[tuple[Mode, int]]:
    """Where batches are to run, and with how many workers: 1, 2, 4, ... and ``most_workers``."""
    counts = []
    count = 1
    while count < most_workers:
        counts.append(count)
        count *= 2
    counts.append(most_workers)
    return [("inline", 1), *(("threads", count) for count in counts), *(("processes", count) for count in counts)]


def share_out(
    costs: Sequence[Cost], target_latency: float | None, ways: Sequence[tuple[Mode, int]], start_seconds: float, seconds: float
) -> tuple[int, list[int]]:
    """How often to try everything, one way after the other, so that each meets the same conditions; and which sizes.

    All ways are tried with the same sizes. Batches too long for the time are left out, but for those of one item; for rounds
    after the first none is.

    Args:
        costs: Of the function.
        target_latency: See `sizes_to_try`.
        ways: What is to be tried.
        start_seconds: What workers take to start.
        seconds: For all of it.
    """
    wanted = sizes_to_try(costs, max(workers for _, workers in ways), target_latency)
    takes = _takes(costs, wanted)

    def those_that_fit(rounds: int) -> list[int]:
        there_is = seconds / (len(ways) * rounds) - start_seconds
        sizes = wanted
        while len(sizes) > 1 and _LEAST_BATCHES * max(takes[size] for size in sizes) > there_is / len(sizes):
            sizes = sizes[:-1]
        return sizes if rounds == 1 or there_is >= len(sizes) * _ROUND_SECONDS else []

    sizes = those_that_fit(1)
    return max(rounds for rounds in range(1, _MOST_ROUNDS + 1) if those_that_fit(rounds) == sizes), sizes


def make_plan(mode: Mode, workers: int, sizes: Sequence[int], costs: Sequence[Cost], seconds: float) -> Plan:
    """Share ``seconds`` out among the sizes."""
    takes = _takes(costs, sizes)
    busy = {size: max(seconds / len(sizes) - BATCHES_PER_WORKER * takes[size], takes[size], _LEAST_BUSY) for size in sizes}
    return Plan(mode, workers, busy, sum(busy[size] + BATCHES_PER_WORKER * takes[size] for size in sizes))


def _takes(costs: Sequence[Cost], sizes: Sequence[int]) -> dict[int, float]:
    """Seconds for a batch of each size; where threads have to take turns it is more, but then two of them end the search."""
    known = {cost.batch_size: cost.seconds for cost in costs}
    line = fit(costs)
    return {size: known[size] if size in known else line.seconds(size) for size in sizes}


def least_seconds(item_seconds: float, start_seconds: float, ways: Sequence[tuple[Mode, int]]) -> float:
    """What the trials take at least, with batches of one item.

    Threads end with two if they have to take turns, each of which then counts for two.

    Args:
        item_seconds: What an item costs alone.
        start_seconds: What worker processes take to start.
        ways: What is to be tried.
    """
    processes = sum(mode == "processes" for mode, _ in ways)
    threads = sum(workers for mode, workers in ways if mode == "threads" and workers <= 2)
    return _LEAST_BATCHES * item_seconds * (1 + threads + processes) + start_seconds * processes
