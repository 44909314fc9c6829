"""What a trip to a worker process costs, how busy the cores are kept, what the loop suffers from it, and what a death costs."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import pytest

from benchmarks.children import OUR_POOL, OURS, STANDARD_POOL

if TYPE_CHECKING:
    from benchmarks.contest import Contest

WORKERS = 2
# Calls in a round, so that the standard pool's take about a second.
TRIPS = {"64 small ints": 1000, "1 MB array": 100, "10 MB array": 16, "64 x 100 kB of bytes": 32}


@pytest.fixture
def put(contest: Contest, ask: Any, loop: str) -> Any:
    """How to put a question to our pool and to others: ``put(question, load, *others, measure=, rounds=)``."""

    def run(question: str, load: dict[str, Any], *others: str, measure: str, rounds: int) -> None:
        rivals = {rival: ask(rival, question, load) for rival in others}
        rivals[OURS] = ask(OUR_POOL, question, load)
        is_race = rounds > 1 and not contest.quick  # a pool is new in each round: the first one warms up the process around it
        rounds = 1 if contest.quick else rounds
        contest.run(rivals, measure=measure, rounds=rounds, warm_up=is_race, question=question, loop=loop, load=load)

    return run


@pytest.mark.parametrize("payload", TRIPS)
def test_round_trip(contest: Contest, put: Any, payload: str) -> None:
    """A call that returns what it is given, one at a time."""
    trips = max(2, TRIPS[payload] // 50) if contest.quick else TRIPS[payload]
    load = {"payload": payload, "workers": WORKERS, "trips": trips, "warm_up": max(4, TRIPS[payload] // 10)}
    put("round_trip", load, STANDARD_POOL, "loky", "bare pipe", measure="seconds", rounds=9)


@pytest.mark.parametrize("in_flight", [WORKERS, 2 * WORKERS])
@pytest.mark.parametrize("batch_ms", [1.0, 0.5])
def test_cores_busy(contest: Contest, put: Any, batch_ms: float, in_flight: int) -> None:
    """Batches that spin: the share of the cores' time that is spent in them."""
    batches = int((100 if contest.quick else 1000) / batch_ms)
    load = {"batch_ms": batch_ms, "in_flight": in_flight, "workers": WORKERS, "batches": batches, "warm_up": 50}
    put("cores_busy", load, STANDARD_POOL, "bare loop", measure="seconds_per_batch", rounds=9)


def test_hold_up(contest: Contest, put: Any) -> None:
    """One large array out and back: for how long the event loop serves nobody else."""
    load = {"megabytes": 100, "workers": WORKERS, "trips": 1 if contest.quick else 3}
    put("hold_up", load, STANDARD_POOL, measure="hold_up_seconds", rounds=7)


def test_successor(contest: Contest, put: Any) -> None:
    """A worker is killed: until the pool is whole again."""
    load = {"workers": WORKERS, "kills": 2 if contest.quick else 5}
    put("successor", load, STANDARD_POOL, "loky", measure="seconds", rounds=9)


@pytest.mark.skipif(sys.platform != "linux", reason="descriptors and processes are counted in /proc")
def test_kills(contest: Contest, put: Any) -> None:
    """Workers killed one after the other, idle and busy ones: no descriptor, thread or process is left over."""
    load = {"workers": WORKERS, "kills": 30 if contest.quick else 1000}
    put("kills", load, measure="seconds", rounds=1)
