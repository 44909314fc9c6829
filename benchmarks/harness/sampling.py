"""Statistics of repeated measurements (pure)."""

from __future__ import annotations

import random
import statistics
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

BOOTSTRAP_RESAMPLES = 10_000  # the ends of a 95 % interval vary by about 1 % of its width


def spread(rounds: Sequence[float]) -> dict[str, float]:
    """Return minimum, quartiles and maximum, with quartiles interpolated between rounds."""
    if len(rounds) == 1:
        q1 = median = q3 = rounds[0]
    else:
        q1, median, q3 = statistics.quantiles(rounds, n=4, method="inclusive")
    return {"min": min(rounds), "q1": q1, "median": median, "q3": q3, "max": max(rounds)}


def bootstrap_interval(
    values: Sequence[float],
    *,
    level: float = 0.95,
    resamples: int = BOOTSTRAP_RESAMPLES,
    seed: int = 1,
) -> tuple[float, float]:
    """Return the percentile bootstrap interval of the median.

    Args:
        values: Independent measurements, at least one.
        level: Probability that the interval covers the median.
        resamples: Number of resamples drawn with replacement.
        seed: Seed of the resampling, so that the same values give the same interval.
    """
    chance = random.Random(seed)  # noqa: S311 - resampling
    medians = sorted(
        statistics.median(chance.choices(values, k=len(values))) for _ in range(resamples)
    )
    cut = (1 - level) / 2
    low, high = round(cut * (resamples - 1)), round((1 - cut) * (resamples - 1))
    return medians[low], medians[high]
