"""How much of the cores batches get, by how short they are and how many workers there are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from benchmarks.children import NEAREST_POOLS, OTHER_POOLS, OUR_POOL, OURS, THREADS
from benchmarks.machine import usable_cores

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benchmarks.contest import Contest

LIMITS = ("bare loop",)
SECONDS = 0.3  # of a round in which nothing but the batches takes time; a rival that has not done them in twice that is cut off
USUAL_MS = (0.1, 0.5, 1.0, 10.0, 100.0)
FULL_MS = (0.2, 2.0, 5.0, 20.0)
GOALS_MS = (0.5, 1.0)  # of these, `questions` has goals, for two workers
ALONE_MS = (0.1, 1.0)  # for these it is shown usually what one worker does
WORKERS = [workers for workers in (1, 2, 4, 8, 16, 32) if workers <= max(2, usable_cores())]


class _Kind(NamedTuple):
    """What a benchmark is about: the test's parameters."""

    loop: str
    workers: int
    batch_ms: float
    in_flight: int

    def mode(self) -> str:
        """From which mode on it is measured."""
        if self == ("asyncio", 2, 1.0, 2):
            return "quick"
        if self.in_flight > self.workers or self.batch_ms in FULL_MS:
            return "full"
        if self.loop == "uvloop":
            return "usual" if self.workers == 2 and self.batch_ms in GOALS_MS else "full"
        return "usual" if self.workers > 1 or self.batch_ms in ALONE_MS else "full"


def _kinds() -> Iterator[Any]:
    for workers in WORKERS:
        for batch_ms in sorted((*USUAL_MS, *FULL_MS)):
            for in_flight in (workers, 2 * workers):
                for loop in ("asyncio", "uvloop"):
                    kind = _Kind(loop, workers, batch_ms, in_flight)
                    yield pytest.param(*kind, marks=getattr(pytest.mark, kind.mode()))


@pytest.mark.parametrize(_Kind._fields, [*_kinds()], indirect=["loop"])
def test_cores_busy(contest: Contest, ask: Any, loop: str, workers: int, batch_ms: float, in_flight: int) -> None:
    """Batches that spin: the share of the cores' time that is spent in them, or how near it comes to perfect scaling."""
    seconds = contest.pick(0.1, 1.0) * SECONDS
    load = {
        "batch_ms": batch_ms,
        "in_flight": in_flight,
        "workers": workers,
        "batches": max(1, round(seconds * 1e3 / batch_ms)) * workers,
        "seconds": 2 * seconds,
        "warm_up": min(50, int(50 / batch_ms)),
    }
    names = contest.names((*LIMITS, *NEAREST_POOLS), (*OTHER_POOLS, THREADS))
    rivals = {rival: ask(rival, "cores_busy", load) for rival in names}
    rivals[OURS] = ask(OUR_POOL, "cores_busy", load)
    contest.run(rivals, measure="seconds_per_batch", question="cores_busy", loop=loop, load=load)
