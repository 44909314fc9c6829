"""What an item costs on its way through the front end, with batches that do nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from benchmarks.children import OLD, OURS

if TYPE_CHECKING:
    from benchmarks.contest import Contest

RIVALS = (OLD, "aiodataloader", "bare futures", "no batching", OURS)
LIMITS = {"place": "coroutine", "max_batch_size": 64, "max_queue_time": 0.01}


def test_clients(contest: Contest, ask: Any, loop: str) -> None:
    """64 clients that each await one item after another."""
    load = {**LIMITS, "clients": 64, "items": 20 if contest.quick else 200}
    rivals = {rival: ask(rival, "clients", load) for rival in RIVALS}
    contest.run(rivals, measure="seconds_per_item", rounds=3 if contest.quick else 21, question="clients", loop=loop, load=load)


def test_gather(contest: Contest, ask: Any, loop: str) -> None:
    """One gather over many items: our `submit` against what each rival has for it."""
    load = {**LIMITS, "items": 1_280 if contest.quick else 6_400}
    rivals = {rival: ask(rival, "gather", load) for rival in RIVALS}
    contest.run(rivals, measure="seconds_per_item", rounds=3 if contest.quick else 21, question="gather", loop=loop, load=load)


def test_lone_item(contest: Contest, ask: Any, loop: str) -> None:
    """A lone item waits for its window, and not for longer: beside a bare timer of the same delay, one after the other."""
    load = {**LIMITS, "pairs": 10 if contest.quick else 40}
    rivals = {rival: ask(rival, "lone_item", load) for rival in (OLD, OURS)}
    contest.run(rivals, measure="wait_seconds", rounds=2 if contest.quick else 9, question="lone_item", loop=loop, load=load)
