"""What failures cost: how many callers get an error, and how long a pool takes to recover."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import pytest

from benchmarks.harness.sizes import loads
from benchmarks.libraries.names import (
    AIODATALOADER,
    BATCHED,
    BY_HAND,
    NEAREST_POOLS,
    OLD,
    OTHER_POOLS,
    OUR_POOL,
    OURS,
    OURS_ISOLATING,
    RAY_SERVE,
)

if TYPE_CHECKING:
    from benchmarks.harness.interleave import InterleavedRun

WORKERS = 2
ON_EACH_LOOP = pytest.mark.parametrize(
    "loop", loads(quick=["asyncio"], full=["uvloop"]), indirect=True
)


@ON_EACH_LOOP
def test_successor(interleaved: InterleavedRun, prepare: Any, loop: str) -> None:
    """An idle worker is killed: the time until the pool is complete again."""
    load = {"workers": WORKERS, "kills": interleaved.pick(2, 5)}
    libraries = {name: prepare(name, "successor", load) for name in NEAREST_POOLS}
    libraries[OURS] = prepare(OUR_POOL, "successor", load)
    interleaved.run(libraries, measure="seconds", scenario="successor", loop=loop, load=load)


@ON_EACH_LOOP
def test_killed(interleaved: InterleavedRun, prepare: Any, loop: str) -> None:
    """A busy worker is killed while clients call: failed calls, and the time to recover."""
    seconds = interleaved.pick(0.6, 2.0)
    load = {"workers": WORKERS, "clients": 8, "batch_ms": 5.0, "seconds": seconds}
    names = interleaved.names(NEAREST_POOLS, OTHER_POOLS)
    libraries = {name: prepare(name, "killed", load) for name in names}
    libraries[OURS] = prepare(OUR_POOL, "killed", load)
    interleaved.run(libraries, measure="back_seconds", scenario="killed", loop=loop, load=load)


@ON_EACH_LOOP
@pytest.mark.skipif(sys.platform != "linux", reason="counts descriptors and processes in /proc")
def test_kills(interleaved: InterleavedRun, prepare: Any, loop: str) -> None:
    """Idle and busy workers are killed in turn: no descriptor, thread or process is left."""
    load = {"workers": WORKERS, "kills": interleaved.pick(30, 200)}
    interleaved.run(
        {OURS: prepare(OUR_POOL, "kills", load)},
        measure="seconds",
        rounds=interleaved.pick(1, 1, 5),
        scenario="kills",
        loop=loop,
        load=load,
    )


@ON_EACH_LOOP
@pytest.mark.parametrize("place", ["coroutine", "thread", "process"])
def test_poison(interleaved: InterleavedRun, prepare: Any, loop: str, place: str) -> None:
    """64 clients fill a batch in which one item raises: who gets an error, and how soon."""
    load = {
        "job": "poison",
        "steps": 2_000,
        "clients": 64,
        "trips": interleaved.pick(3, 10, 20),
        "place": place,
        "workers": WORKERS,
        "max_batch_size": 64,
        "max_queue_time": 0.01,
    }
    names = interleaved.names((BY_HAND, OLD, AIODATALOADER, BATCHED, RAY_SERVE, OURS))
    libraries = {name: prepare(name, "poison", load) for name in names}
    isolating = {**load, "isolates": True}
    libraries[OURS_ISOLATING] = prepare(OURS, "poison", isolating)
    interleaved.run(libraries, measure="seconds", scenario="poison", loop=loop, load=load)
