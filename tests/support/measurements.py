"""Artificial measurements of ``async-batcher tune``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from async_batcher._batching.records.batch_cost import BatchCost
from async_batcher.cli.tune.model import Config, Measurement

if TYPE_CHECKING:
    from collections.abc import Iterable

    from async_batcher.cli.tune.model import Mode

SIZES = [1 << power for power in range(11)]


def on_a_line(fixed: float, per_item: float, sizes: Iterable[int] = SIZES) -> list[BatchCost]:
    """Return costs without noise."""
    return [BatchCost(size, fixed + per_item * size) for size in sizes]


def a_point(mode: Mode, workers: int, size: int, throughput: float) -> tuple[Config, Measurement]:
    """Return what 256 clients get, whose calls all take the same time."""
    latency = 256 / throughput
    return Config(mode, workers, size), Measurement(throughput, latency, latency)
