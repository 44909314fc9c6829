"""What a round trip to a worker costs, by payload, and for how long it blocks the event loop."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from benchmarks.harness.sizes import loads
from benchmarks.libraries.names import (
    BARE_PIPE,
    MEMORY_COPY,
    NEAREST_POOLS,
    OTHER_POOLS,
    OUR_POOL,
    OURS,
    STANDARD_POOL,
    THREADS,
)

if TYPE_CHECKING:
    from benchmarks.harness.interleave import InterleavedRun

LIMITS = (BARE_PIPE, MEMORY_COPY)
WORKERS = 2
# Calls in a round: some tenths of a second for the slowest of the nearest libraries.
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
FULL = ("64 kB of bytes", "1 MB of bytes", "1 MB of nested dicts")
USUAL = tuple(payload for payload in TRIPS if payload not in (*QUICK, *FULL))
USUAL_ON_UVLOOP = QUICK  # where the loop matters most
CASES = loads(
    quick=[("asyncio", payload) for payload in QUICK],
    usual=[
        *(("asyncio", payload) for payload in USUAL),
        *(("uvloop", payload) for payload in USUAL_ON_UVLOOP),
    ],
    full=[
        *(("asyncio", payload) for payload in FULL),
        *(("uvloop", payload) for payload in TRIPS if payload not in USUAL_ON_UVLOOP),
    ],
)


@pytest.mark.parametrize(("loop", "payload"), CASES, indirect=["loop"])
def test_round_trip(interleaved: InterleavedRun, prepare: Any, loop: str, payload: str) -> None:
    """Calls, one at a time, that return their argument or a copy of it."""
    trips = max(1, TRIPS[payload] // interleaved.pick(25, 1))
    load = {"payload": payload, "workers": WORKERS, "trips": trips, "warm_up": 1 + trips // 10}
    names = interleaved.names((*LIMITS, *NEAREST_POOLS), (*OTHER_POOLS, THREADS))
    libraries = {name: prepare(name, "round_trip", load) for name in names}
    libraries[OURS] = prepare(OUR_POOL, "round_trip", load)
    interleaved.run(libraries, measure="seconds", scenario="round_trip", loop=loop, load=load)


@pytest.mark.parametrize("loop", loads(quick=["asyncio"], full=["uvloop"]), indirect=True)
def test_hold_up(interleaved: InterleavedRun, prepare: Any, loop: str) -> None:
    """One large array out and back: the longest time for which the event loop is blocked."""
    load = {"megabytes": 100, "workers": WORKERS, "trips": interleaved.pick(1, 2, 3)}
    libraries = {
        STANDARD_POOL: prepare(STANDARD_POOL, "hold_up", load),
        OURS: prepare(OUR_POOL, "hold_up", load),
    }
    interleaved.run(libraries, measure="hold_up_seconds", scenario="hold_up", loop=loop, load=load)
