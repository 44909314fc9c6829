"""From how much work per item processes are faster than threads and than a plain call (pure)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from benchmarks.libraries.names import INLINE, OURS_IN_THREADS
from benchmarks.report.metrics import WORK_NAMES
from benchmarks.report.text import seconds

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.report.results import Record

WITHOUT_PROCESSES = {OURS_IN_THREADS: "threads", INLINE: "a direct call on the event loop"}


def break_evens(records: Sequence[Record]) -> str:
    """Write a line for each kind of work and loop, against threads and a direct call."""
    lines = []
    for job, loop in dict.fromkeys((one.load["job"], one.loop) for one in records):
        cases = [one for one in records if (one.load["job"], one.loop) == (job, loop)]
        known = {name: ratios_to(name, cases) for name in WITHOUT_PROCESSES}
        parts = [
            f"than {WITHOUT_PROCESSES[name]} {_since(points)}"
            for name, points in known.items()
            if points
        ]
        where = "" if loop == "asyncio" else f" ({loop})"
        lines.append(
            f"- For {WORK_NAMES[job]}{where}, processes are faster {', and '.join(parts)}."
        )
    return "\n".join(lines)


def ratios_to(name: str, records: Sequence[Record]) -> list[tuple[float, float]]:
    """Return seconds of work per item, each with the ratio of our time to a library's."""
    known = [(record.load["item_us"] / 1e6, record.ratio(name)) for record in records]
    return sorted((work, ratio["median"]) for work, ratio in known if ratio is not None)


def break_even(points: Sequence[tuple[float, float]]) -> float | None:
    """Return the seconds of work from which the ratio stays below 1.

    Args:
        points: Seconds of work and ratio, in ascending order of the work. The break-even is
            interpolated between two points on logarithmic scales.

    Returns:
        0 if all ratios are below 1, None if the last one is not.
    """
    if points[-1][1] >= 1:
        return None
    below = len(points) - 1
    while below > 0 and points[below - 1][1] < 1:
        below -= 1
    if below == 0:
        return 0.0
    (work, above), (more_work, less) = points[below - 1], points[below]
    part = math.log(above) / (math.log(above) - math.log(less))
    return math.exp(math.log(work) + part * math.log(more_work / work))


def _since(points: Sequence[tuple[float, float]]) -> str:
    at = break_even(points)
    if at is None:
        faster = ", ".join(seconds(work) for work, ratio in points if ratio < 1)
        return f"only at {faster}" if faster else "at no load that was measured"
    least = " (the smallest load)" if at == 0 else ""
    return f"from {seconds(at or points[0][0])} of work per item{least}"
