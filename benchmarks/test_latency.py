"""What callers wait for, and what becomes of them when more come than can be served."""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING, Any

import pytest

from benchmarks.calibration import steps
from benchmarks.children import BY_HAND, OLD, OURS, OURS_IN_THREADS
from benchmarks.environments import NotAvailableError
from benchmarks.modes import loads

if TYPE_CHECKING:
    from benchmarks.contest import Contest

WORK = 0.001  # seconds of an item
ARRIVALS = 1_000  # at least in a round, or a p99 would rest on a handful of them
LIMITS = {"workers": 2, "max_batch_size": 16, "seed": 1}
PLACES = {
    OLD: (OLD, "thread"),
    "ProcessPoolExecutor by hand": (BY_HAND, "process"),
    OURS_IN_THREADS: (OURS, "thread"),
    OURS: (OURS, "process"),
}


@pytest.mark.parametrize("of_capacity", loads(quick=[0.8], usual=[0.1, 0.95], full=[0.25, 0.5, 0.65, 0.9]))
@pytest.mark.parametrize("job", loads(quick=["python"], full=["hash"]))
@pytest.mark.parametrize("loop", loads(quick=["asyncio"], full=["uvloop"]), indirect=True)
def test_latency(contest: Contest, ask: Any, capacity: Any, loop: str, job: str, of_capacity: float) -> None:
    """Planned arrivals, the same for every rival: so many as are this share of what the best of them can do at most."""
    load = {**LIMITS, "job": job, "steps": steps(job, WORK), "max_queue_time": 0.005, "settle": contest.pick(0.2, 0.5)}
    known = {name: most for name in PLACES if (most := capacity(name, loop, load)) is not None}
    per_second = of_capacity * max(known.values())
    load |= {
        "of_capacity": of_capacity,
        "capacities": known,
        "per_second": per_second,
        "seconds": max(contest.pick(1, 2, 20), contest.pick(0, ARRIVALS) / per_second),
    }
    rivals = {name: ask(rival, "latency", {**load, "place": place}) for name, (rival, place) in PLACES.items()}
    contest.run(rivals, measure="p99_seconds", question="latency", loop=loop, load=load)


@pytest.mark.parametrize("loop", loads(quick=["asyncio"], full=["uvloop"]), indirect=True)
def test_overload(contest: Contest, ask: Any, capacity: Any, loop: str) -> None:
    """Arrivals at twice the capacity, with deadlines and a limit on the queue, and without."""
    load = {
        **LIMITS,
        "job": "rest",
        "steps": 2_000,
        "payload": 1_000,
        "place": "process",
        "max_queue_time": 0.01,
        "patience": 0.25,
        "times_capacity": 2.0,
        "settle": contest.pick(0.3, 1.0),
        "seconds": contest.pick(2, 4, 10),
    }
    load["capacity"] = capacity(OURS, loop, load)
    options = {"item_timeout": load["patience"], "max_queue_size": 128}
    rivals = {
        "without deadlines and limits": ask(OURS, "overload", load),
        OURS: ask(OURS, "overload", {**load, "options": options}),
    }
    contest.run(rivals, measure="seconds_per_good_item", question="overload", loop=loop, load=load)


@pytest.fixture(scope="session")
def capacity(children: Any, request: pytest.FixtureRequest) -> Any:
    """How many items a second a rival can do at most on a loop, None where it cannot be had; measured once for each job."""
    times = 1 if request.config.getoption("mode") == "quick" else 3
    known: dict[tuple[str, str, str], float | None] = {}

    def find(name: str, loop: str, load: dict[str, Any]) -> float | None:
        key = (name, loop, load["job"])
        if key not in known:
            rival, place = PLACES[name]
            try:
                child = children.get(rival, loop)
                known[key] = median(child.ask("capacity", {**load, "place": place})["per_second"] for _ in range(times))
            except (NotAvailableError, RuntimeError):
                if rival == OURS:
                    raise
                known[key] = None  # the contest will say why
        return known[key]

    return find
