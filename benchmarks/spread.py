"""What is kept of a row of rounds."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def spread(rounds: Sequence[float]) -> dict[str, float]:
    """Minimum, quartiles and maximum; quartiles are interpolated between rounds, as in `statistics.quantiles`."""
    if len(rounds) == 1:
        q1 = median = q3 = rounds[0]
    else:
        q1, median, q3 = statistics.quantiles(rounds, n=4, method="inclusive")
    return {"min": min(rounds), "q1": q1, "median": median, "q3": q3, "max": max(rounds)}
