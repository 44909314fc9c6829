"""From how much work on a process pool beats threads, and a plain call on the loop (pure)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from benchmarks.children import OLD, OURS_IN_THREADS
from benchmarks.figures import Facts, number, ratio, seconds
from benchmarks.questions import JOBS

if TYPE_CHECKING:
    from collections.abc import Sequence

INLINE = "inline"
OTHERS = (OURS_IN_THREADS, OLD, INLINE)


def crossings(found: Sequence[Facts]) -> str:
    """A line for each job, loop and way without processes."""
    lines = []
    for job, loop in dict.fromkeys((facts["load"]["job"], facts["loop"]) for facts in found):
        for name in OTHERS:
            points = ratios(found, job, loop, name)
            if points:
                lines.append(f"- {JOBS[job]}, {loop}, against {name}: {_said(points)}.")
    return "\n".join(lines)


def ratios(found: Sequence[Facts], job: str, loop: str, name: str) -> list[tuple[float, float]]:
    """By the seconds of work of an item: the processes' time as a ratio to that of a rival without them."""
    points = []
    for facts in found:
        if (facts["load"]["job"], facts["loop"]) == (job, loop) and name in facts["rivals"]:
            known = ratio(facts, name)
            if known is not None:
                points.append((facts["load"]["item_us"] / 1e6, known["median"]))
    return sorted(points)


def crossing(points: Sequence[tuple[float, float]]) -> float | None:
    """The work from which on the ratio is below 1 for good, interpolated between two loads on logarithmic scales.

    Args:
        points: Seconds of work and ratio, in the order of the work.

    Returns:
        Seconds; 0 where it is below 1 from the first load on, None where it is not below 1 at the last one.
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


def _said(points: Sequence[tuple[float, float]]) -> str:
    at = crossing(points)
    work, last = points[-1]
    if at is None:
        ahead = ", ".join(seconds(work) for work, ratio in points if ratio < 1)
        where = f"at {ahead} only" if ahead else "nowhere"
        return f"the pool is ahead {where}; at {seconds(work)} an item its time is {number(last)} of theirs"
    start = f"{seconds(at)} of work an item" if at else f"the first load on, {seconds(points[0][0])} an item"
    return f"the pool is ahead from {start}; at {seconds(work)} its time is {number(last)} of theirs"
