"""How busy batches keep the cores, by their length and by the number of workers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from benchmarks.harness.machine import usable_cores
from benchmarks.libraries.names import (
    BARE_LOOP,
    NEAREST_POOLS,
    OTHER_POOLS,
    OUR_POOL,
    OURS,
    THREADS,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benchmarks.harness.interleave import InterleavedRun

ROUND_SECONDS = 0.3  # of pure batch time; a round stops after twice as long
USUAL_MS = (0.1, 0.5, 1.0, 10.0, 100.0)
FULL_MS = (0.2, 2.0, 5.0, 20.0)
GOALS_MS = (0.5, 1.0)  # `metrics` has goals for these, for two workers
ONE_WORKER_MS = (0.1, 1.0)  # measured with one worker in the usual run
WORKERS = [workers for workers in (1, 2, 4, 8, 16, 32) if workers <= max(2, usable_cores())]


class _Case(NamedTuple):
    """The parameters of the test."""

    loop: str
    workers: int
    batch_ms: float
    in_flight: int

    def mode(self) -> str:
        """Return the first mode that measures the case."""
        if self == ("asyncio", 2, 1.0, 2):
            return "quick"
        if self.in_flight > self.workers or self.batch_ms in FULL_MS:
            return "full"
        if self.loop == "uvloop":
            return "usual" if self.workers == 2 and self.batch_ms in GOALS_MS else "full"
        return "usual" if self.workers > 1 or self.batch_ms in ONE_WORKER_MS else "full"


def _cases() -> Iterator[Any]:
    for workers in WORKERS:
        for batch_ms in sorted((*USUAL_MS, *FULL_MS)):
            for in_flight in (workers, 2 * workers):
                for loop in ("asyncio", "uvloop"):
                    case = _Case(loop, workers, batch_ms, in_flight)
                    yield pytest.param(*case, marks=getattr(pytest.mark, case.mode()))


@pytest.mark.parametrize(_Case._fields, [*_cases()], indirect=["loop"])
def test_cores_busy(
    interleaved: InterleavedRun,
    prepare: Any,
    loop: str,
    workers: int,
    batch_ms: float,
    in_flight: int,
) -> None:
    """Batches that spin: their share of the cores' time, where 1.0 is perfect scaling."""
    seconds = interleaved.pick(0.1, 1.0) * ROUND_SECONDS
    load = {
        "batch_ms": batch_ms,
        "in_flight": in_flight,
        "workers": workers,
        "batches": max(1, round(seconds * 1e3 / batch_ms)) * workers,
        "seconds": 2 * seconds,
        "warm_up": min(50, int(50 / batch_ms)),
    }
    names = interleaved.names((BARE_LOOP, *NEAREST_POOLS), (*OTHER_POOLS, THREADS))
    libraries = {name: prepare(name, "cores_busy", load) for name in names}
    libraries[OURS] = prepare(OUR_POOL, "cores_busy", load)
    interleaved.run(
        libraries, measure="seconds_per_batch", scenario="cores_busy", loop=loop, load=load
    )
