"""Artificial measurements of ``async-batcher tune``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from async_batcher.cli.tune.model import BatchCost, Measurement

if TYPE_CHECKING:
    from collections.abc import Iterable

    from async_batcher.cli.tune.model import Mode

SIZES = [1 << power for power in range(11)]


def on_a_line(fixed: float, per_item: float, sizes: Iterable[int] = SIZES) -> list[BatchCost]:
    """Return costs without noise."""
    return [BatchCost(size, fixed + per_item * size) for size in sizes]


def a_point(
    mode: Mode, workers: int, size: int, throughput: float, seconds: float | None = None
) -> Measurement:
    """Return a measurement; by default a batch takes what the throughput implies."""
    seconds = workers * size / throughput if seconds is None else seconds
    return Measurement(mode, workers, size, throughput, seconds, seconds)


INLINE = [a_point("inline", 1, 1, 1000.0), a_point("inline", 1, 16, 2000.0)]
