"""Which ``max_queue_time`` is worth it (pure).

With few clients a window gains nothing: each call waits for all of it. So one other than 0 is
recommended only if it was better in every round, and calls of the fewest clients are not much
longer.
"""

from __future__ import annotations

import math
from statistics import median
from typing import TYPE_CHECKING

from async_batcher.cli.tune.model import typical

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from async_batcher.cli.tune.model import Config, Measurement
    from async_batcher.cli.tune.trials import TrialRecords

NEAR_THE_BEST = 0.95  # of the best throughput: then the shortest calls decide
WINDOW_ROUNDS = 3  # at least, to compare windows

_WINDOW_SHARES = (0.25, 1.0)  # of what a batch runs
_MIN_WINDOW, _MAX_WINDOW = 0.0005, 0.1
_MOST_DELAY = 2.0  # times the p50 of the fewest clients without a window


def window_seconds(records: TrialRecords, config: Config) -> list[float]:
    """Return the windows to compare with 0."""
    size = min(config.batch_size, records.deciding)
    running = min(config.workers, -(-records.deciding // size))
    seconds = size * running / records.throughput(config)
    wanted = (min(max(share * seconds, _MIN_WINDOW), _MAX_WINDOW) for share in _WINDOW_SHARES)
    return sorted({float(f"{one:.1g}") for one in wanted})


def best_window(
    records: TrialRecords,
    windows: Mapping[Config, Sequence[Measurement]],
    plain: Config,
    fewest: int,
) -> Config:
    """Choose among the windows that were measured in the same rounds, ``plain`` without one."""
    rounds = windows.get(plain, [])
    if len(rounds) < WINDOW_ROUNDS:
        return plain
    gains: dict[Config, float] = {}
    for one, measured in windows.items():
        if one == plain or not records.meets_target(typical(measured)):
            continue
        ratios = [b.throughput / a.throughput for a, b in zip(rounds, measured, strict=True)]
        is_better = min(ratios) > 1 and median(ratios) * NEAR_THE_BEST > 1
        if is_better and _delay(records, one, plain, fewest) <= _MOST_DELAY:
            gains[one] = median(ratios)
    return max(gains, key=lambda one: gains[one], default=plain)


def _delay(records: TrialRecords, config: Config, plain: Config, clients: int) -> float:
    """Return how many times longer calls take with a window; infinity if that is not known."""
    with_window, without = (
        [one.p50 for one in records.of(each, clients)] for each in (config, plain)
    )
    return median(with_window) / median(without) if with_window and without else math.inf
