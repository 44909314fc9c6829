"""What an item costs when there are very many of them, and what memory they take."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from benchmarks.children import OLD, OURS, STREAMED

if TYPE_CHECKING:
    from benchmarks.contest import Contest

LIMITS = {"place": "coroutine", "max_batch_size": 64, "max_queue_time": 0.01}
ONE_BY_ONE = "async_batcher, submit and gather"


def test_many(contest: Contest, ask: Any, loop: str) -> None:
    """One call for 100,000 items, or what a rival has for it."""
    load = {**LIMITS, "items": 5_000 if contest.quick else 100_000}
    rivals = {rival: ask(rival, "many", load) for rival in (OLD, "aiodataloader")}
    rivals[ONE_BY_ONE] = ask(OURS, "gather", load)
    rivals[OURS] = ask(OURS, "many", load)
    contest.run(rivals, measure="seconds_per_item", rounds=2 if contest.quick else 9, question="many", loop=loop, load=load)


def test_stream(contest: Contest, ask: Any, loop: str) -> None:
    """A million items from a generator, whose results are consumed one by one; and the same with all of them at once."""
    load = {**LIMITS, "items": 40_000 if contest.quick else 1_000_000}
    rivals = {
        "process_many, all at once": ask(STREAMED, "stream", {**load, "whole": True}),
        OURS: ask(STREAMED, "stream", {**load, "whole": False}),
    }
    rounds = 1 if contest.quick else 5
    contest.run(rivals, measure="seconds_per_item", rounds=rounds, warm_up=False, question="stream", loop=loop, load=load)
