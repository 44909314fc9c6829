"""What a failure costs: who is hurt, for how long, and what is left of it."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import pytest

from benchmarks.children import BATCHED, BY_HAND, NEAREST_POOLS, OLD, OTHER_POOLS, OUR_POOL, OURS, OURS_ISOLATING, RAY_SERVE
from benchmarks.modes import loads

if TYPE_CHECKING:
    from benchmarks.contest import Contest

WORKERS = 2


@pytest.mark.parametrize("loop", loads(quick=["asyncio"], full=["uvloop"]), indirect=True)
def test_successor(contest: Contest, ask: Any, loop: str) -> None:
    """A worker is killed: until the pool is whole again."""
    load = {"workers": WORKERS, "kills": contest.pick(2, 5)}
    rivals = {rival: ask(rival, "successor", load) for rival in NEAREST_POOLS}
    rivals[OURS] = ask(OUR_POOL, "successor", load)
    contest.run(rivals, measure="seconds", question="successor", loop=loop, load=load)


@pytest.mark.parametrize("loop", loads(quick=["asyncio"], full=["uvloop"]), indirect=True)
def test_killed(contest: Contest, ask: Any, loop: str) -> None:
    """A busy worker is killed while clients call: how many calls fail, for how long none is answered, when all is as before."""
    load = {"workers": WORKERS, "clients": 8, "batch_ms": 5.0, "seconds": contest.pick(0.6, 2.0)}
    rivals = {rival: ask(rival, "killed", load) for rival in contest.names(NEAREST_POOLS, OTHER_POOLS)}
    rivals[OURS] = ask(OUR_POOL, "killed", load)
    contest.run(rivals, measure="back_seconds", question="killed", loop=loop, load=load)


@pytest.mark.parametrize("loop", loads(quick=["asyncio"], full=["uvloop"]), indirect=True)
@pytest.mark.skipif(sys.platform != "linux", reason="descriptors and processes are counted in /proc")
def test_kills(contest: Contest, ask: Any, loop: str) -> None:
    """Workers killed one after the other, idle and busy ones: no descriptor, thread or process is left over."""
    load = {"workers": WORKERS, "kills": contest.pick(30, 200)}
    rivals = {OURS: ask(OUR_POOL, "kills", load)}
    contest.run(rivals, measure="seconds", rounds=contest.pick(1, 1, 5), question="kills", loop=loop, load=load)


@pytest.mark.parametrize("loop", loads(quick=["asyncio"], full=["uvloop"]), indirect=True)
@pytest.mark.parametrize("place", ["coroutine", "thread", "process"])
def test_poison(contest: Contest, ask: Any, loop: str, place: str) -> None:
    """64 clients fill a batch, and one item makes it raise: who is hurt, and how long it takes until all know."""
    work = {"job": "poison", "steps": 2_000, "clients": 64, "trips": contest.pick(3, 10, 20)}
    load = {**work, "place": place, "workers": WORKERS, "max_batch_size": 64, "max_queue_time": 0.01}
    others = (BY_HAND, OLD, "aiodataloader", BATCHED, *contest.pick((), (RAY_SERVE,)))
    rivals = {rival: ask(rival, "poison", load) for rival in (*others, OURS)}
    rivals[OURS_ISOLATING] = ask(OURS, "poison", {**load, "options": {"isolate_failures": True}})
    contest.run(rivals, measure="seconds", question="poison", loop=loop, load=load)
