"""What ``tune`` measures: sizes of batches, numbers of workers and of clients (pure)."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from async_batcher.cli.tune.model import MAX_BATCH_SIZE, Config, batch_seconds, predict_throughput

if TYPE_CHECKING:
    from collections.abc import Sequence

    from async_batcher._batching.records.batch_cost import BatchCost
    from async_batcher.cli.tune.model import Mode

COSTS_SHARE = 0.15  # of the time, for the function alone
CYCLES_PER_TRIAL = 2.2  # calls of each client that fit into a trial at least

# Of the time that is left. A mode whose workers take longer to start is not tried.
_START_SHARE = 0.4
_CHEAP_START_SHARE = 0.05  # a start that takes less may be repeated for other numbers of workers
_TRIALS_AT_LEAST = 14  # a first look at four pools, two more sizes, and rounds of the best ones

_STILL_FALLS = 0.97  # cost per item after two doublings: above this it no longer falls
_LONG_BATCH = 0.005  # seconds; a trip is some percent of such a batch
_ALIKE = 1.2  # of two sizes closer than this, one is enough


class Plan(NamedTuple):
    """Which pools are measured, and the number of clients that decides."""

    pools: list[tuple[Mode, int]]
    clients: int
    may_start_more: bool  # whether pools of other sizes are started during the search
    skips_processes: bool  # since their start would take too much of the time


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


def sizes_to_try(workers: int, clients: int) -> list[int]:
    """List batch sizes: 1, 2, 4, ... ``clients``, and the equal share of each worker.

    The share takes the place of a power of two that is near it: with one item less for each worker
    there is one batch too many.
    """
    share = -(-clients // workers)
    powers = [1 << n for n in range(clients.bit_length()) if 1 << n < clients]
    sizes = [size for size in powers if size == 1 or not 1 / _ALIKE < size / share < _ALIKE]
    return sorted({*sizes, share, clients})


def first_config(costs: Sequence[BatchCost], mode: Mode, workers: int, clients: int) -> Config:
    """Choose the batch size of the best prediction; the smallest one that is near it."""
    configs = [Config(mode, workers, size) for size in sizes_to_try(workers, clients)]
    predicted = {config: predict_throughput(costs, config, clients) for config in configs}
    best = max(predicted.values())
    return next(config for config in configs if predicted[config] >= 0.99 * best)


def make_plan(
    costs: Sequence[BatchCost],
    max_workers: int,
    clients: Sequence[int],
    start_seconds: float,
    seconds: float,
    target_latency: float | None = None,
) -> Plan:
    """Choose what to measure in ``seconds``.

    The largest number of clients decides for which there is time, and with a target the largest
    that is predicted to stay within it.
    """
    skips_processes = start_seconds > _START_SHARE * seconds
    modes: tuple[Mode, ...] = ("threads",) if skips_processes else ("threads", "processes")
    if not skips_processes:
        seconds -= start_seconds
    pools = [(mode, count) for mode in modes for count in sorted({1, max_workers})]
    if start_seconds > _CHEAP_START_SHARE * seconds and max_workers > 1:
        pools = [pool for pool in pools if pool != ("processes", 1)]

    def is_possible(count: int) -> bool:
        best = _best_latency(costs, max_workers, count)
        in_time = _TRIALS_AT_LEAST * (CYCLES_PER_TRIAL + 1) * best <= seconds
        return in_time and (target_latency is None or best <= target_latency)

    possible = [count for count in clients if is_possible(count)]
    return Plan(
        pools,
        max(possible, default=min(clients)),
        may_start_more=start_seconds <= _CHEAP_START_SHARE * seconds,
        skips_processes=skips_processes,
    )


def _best_latency(costs: Sequence[BatchCost], max_workers: int, clients: int) -> float:
    config = first_config(costs, "threads", max_workers, clients)
    return clients / predict_throughput(costs, config, clients)


def minimum_time(costs: Sequence[BatchCost]) -> float:
    """Return the least seconds for trials with one client."""
    return _TRIALS_AT_LEAST * (CYCLES_PER_TRIAL + 1) / 2 * batch_seconds(costs, 1)
