"""What a trip to a worker process costs, by what is sent, and what the event loop suffers from it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from benchmarks.children import NEAREST_POOLS, OTHER_POOLS, OUR_POOL, OURS, STANDARD_POOL, THREADS
from benchmarks.modes import loads

if TYPE_CHECKING:
    from benchmarks.contest import Contest

LIMITS = ("bare pipe", "memory copy")
WORKERS = 2
# Calls in a round, so that those of the slowest of the nearest rivals take some tenths of a second.
TRIPS = {
    "64 small ints": 500,
    "1 MB array": 25,
    "10 MB array": 2,
    "10 MB array, a new one back": 2,
    "64 x 100 kB of bytes": 8,
    "1,000 objects": 20,
    "100 MB array": 1,
    "64 kB of bytes": 500,
    "1 MB of bytes": 40,
    "1 MB of nested dicts": 6,
}
QUICK = ("64 small ints", "1 MB array")
USUAL = ("10 MB array", "10 MB array, a new one back", "64 x 100 kB of bytes", "1,000 objects", "100 MB array")
FULL = ("64 kB of bytes", "1 MB of bytes", "1 MB of nested dicts")
ON_UVLOOP = ("64 small ints", "1 MB array")  # where the loop matters most; all of them in a full run
CASES = loads(
    quick=[("asyncio", payload) for payload in QUICK],
    usual=[("asyncio", payload) for payload in USUAL] + [("uvloop", payload) for payload in ON_UVLOOP],
    full=[
        *(("asyncio", payload) for payload in FULL),
        *(("uvloop", payload) for payload in TRIPS if payload not in ON_UVLOOP),
    ],
)


@pytest.mark.parametrize(("loop", "payload"), CASES, indirect=["loop"])
def test_round_trip(contest: Contest, ask: Any, loop: str, payload: str) -> None:
    """A call that returns what it is given, or a copy of it, one at a time."""
    trips = max(1, TRIPS[payload] // contest.pick(25, 1))
    load = {"payload": payload, "workers": WORKERS, "trips": trips, "warm_up": 1 + trips // 10}
    names = contest.names((*LIMITS, *NEAREST_POOLS), (*OTHER_POOLS, THREADS))
    rivals = {rival: ask(rival, "round_trip", load) for rival in names}
    rivals[OURS] = ask(OUR_POOL, "round_trip", load)
    contest.run(rivals, measure="seconds", question="round_trip", loop=loop, load=load)


@pytest.mark.parametrize("loop", loads(quick=["asyncio"], full=["uvloop"]), indirect=True)
def test_hold_up(contest: Contest, ask: Any, loop: str) -> None:
    """One large array out and back: for how long the event loop serves nobody else."""
    load = {"megabytes": 100, "workers": WORKERS, "trips": contest.pick(1, 2, 3)}
    rivals = {STANDARD_POOL: ask(STANDARD_POOL, "hold_up", load), OURS: ask(OUR_POOL, "hold_up", load)}
    contest.run(rivals, measure="hold_up_seconds", question="hold_up", loop=loop, load=load)
