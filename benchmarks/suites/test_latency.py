"""How long callers wait below the capacity, and how many get a result in time above it."""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING, Any

import pytest

from benchmarks.harness.calibration import steps
from benchmarks.harness.sizes import loads
from benchmarks.libraries.base import NotAvailableError
from benchmarks.libraries.names import (
    BY_HAND,
    OLD,
    OURS,
    OURS_IN_THREADS,
    PROCESSES_BY_HAND,
    UNLIMITED,
)

if TYPE_CHECKING:
    from benchmarks.harness.child_process import LibraryProcesses
    from benchmarks.harness.interleave import InterleavedRun

ITEM_SECONDS = 0.001
MIN_ARRIVALS = 1_000  # in a round, so that ten are above the p99
LIMITS = {"workers": 2, "max_batch_size": 16, "seed": 1}
LIBRARIES = {  # by name in the results: adapter and place
    OLD: (OLD, "thread"),
    PROCESSES_BY_HAND: (BY_HAND, "process"),
    OURS_IN_THREADS: (OURS, "thread"),
    OURS: (OURS, "process"),
}


@pytest.mark.parametrize(
    "of_capacity", loads(quick=[0.8], usual=[0.1, 0.95], full=[0.25, 0.5, 0.65, 0.9])
)
@pytest.mark.parametrize("job", loads(quick=["python"], full=["hash"]))
@pytest.mark.parametrize("loop", loads(quick=["asyncio"], full=["uvloop"]), indirect=True)
def test_latency(
    interleaved: InterleavedRun,
    prepare: Any,
    capacity: Any,
    loop: str,
    job: str,
    of_capacity: float,
) -> None:
    """The same planned arrivals for every library, at a share of the best one's capacity."""
    load = {
        **LIMITS,
        "job": job,
        "steps": steps(job, ITEM_SECONDS),
        "max_queue_time": 0.005,
        "settle": interleaved.pick(0.2, 0.5),
    }
    found = {name: capacity(name, loop, load) for name in LIBRARIES}
    known = {name: most for name, most in found.items() if most is not None}
    per_second = of_capacity * max(known.values())
    load |= {
        "of_capacity": of_capacity,
        "capacities": known,
        "per_second": per_second,
        "seconds": max(interleaved.pick(1, 2, 20), interleaved.pick(0, MIN_ARRIVALS) / per_second),
    }
    libraries = {
        name: prepare(adapter, "latency", {**load, "place": place})
        for name, (adapter, place) in LIBRARIES.items()
    }
    interleaved.run(libraries, measure="p99_seconds", scenario="latency", loop=loop, load=load)


@pytest.mark.parametrize("loop", loads(quick=["asyncio"], full=["uvloop"]), indirect=True)
def test_overload(interleaved: InterleavedRun, prepare: Any, capacity: Any, loop: str) -> None:
    """Arrivals at twice the capacity, with and without deadlines and a limit of the queue."""
    load = {
        **LIMITS,
        "job": "rest",
        "steps": 2_000,
        "payload": 1_000,
        "place": "process",
        "max_queue_time": 0.01,
        "patience": 0.25,
        "times_capacity": 2.0,
        "settle": interleaved.pick(0.3, 1.0),
        "seconds": interleaved.pick(2, 4, 10),
    }
    load["capacity"] = capacity(OURS, loop, load)
    options = {"item_timeout": load["patience"], "max_queue_size": 128}
    libraries = {
        UNLIMITED: prepare(OURS, "overload", load),
        OURS: prepare(OURS, "overload", {**load, "options": options}),
    }
    interleaved.run(
        libraries, measure="seconds_per_good_item", scenario="overload", loop=loop, load=load
    )


@pytest.fixture(scope="session")
def capacity(processes: LibraryProcesses, request: pytest.FixtureRequest) -> Any:
    """Items per second that a library can process on a loop, or None if it cannot run.

    It is measured once for each workload.
    """
    rounds = 1 if request.config.getoption("mode") == "quick" else 3
    known: dict[tuple[str, str, str], float | None] = {}

    def find(name: str, loop: str, load: dict[str, Any]) -> float | None:
        key = (name, loop, load["job"])
        if key not in known:
            adapter, place = LIBRARIES[name]
            here = {**load, "place": place}
            try:
                process = processes.get(adapter, loop)
                found = [process.run_round("capacity", here) for _ in range(rounds)]
                known[key] = median(one["per_second"] for one in found)
            except (NotAvailableError, RuntimeError):
                if adapter == OURS:
                    raise
                known[key] = None  # the interleaved run records the reason
        return known[key]

    return find
