"""What a batcher with nothing to do costs, and how soon it ends."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from benchmarks.children import OLD, OURS

if TYPE_CHECKING:
    from benchmarks.contest import Contest

LIMITS = {"max_batch_size": 64, "max_queue_time": 0.01, "workers": 2}
# Seconds before a batcher counts as idle: the second worker process is still starting when the first has answered.
SETTLE = {"process": 0.5}


@pytest.mark.parametrize("place", ["coroutine", "loop threads", "thread", "process"])
def test_stop(contest: Contest, ask: Any, loop: str, place: str) -> None:
    """`stop` of an idle batcher that has run one batch; with a pool, until its workers have ended."""
    load = {**LIMITS, "place": place, "settle": SETTLE.get(place, 0.1)}
    rivals = {rival: ask(rival, "stop", load) for rival in (OLD, OURS)}
    contest.run(rivals, measure="seconds", rounds=1 if contest.quick else 9, question="stop", loop=loop, load=load)


@pytest.mark.parametrize("place", ["coroutine", "thread", "process"])
def test_idle(contest: Contest, ask: Any, loop: str, place: str) -> None:
    """How often a program with an idle batcher wakes, and what it burns; beside one without a batcher."""
    load = {**LIMITS, "place": place, "settle": SETTLE.get(place, 0.1), "seconds": 0.3 if contest.quick else 3.0}
    rivals = {rival: ask(rival, "idle", load) for rival in ("no batching", OURS, OLD)}
    contest.run(rivals, measure="cpu_seconds", rounds=1 if contest.quick else 7, question="idle", loop=loop, load=load)
