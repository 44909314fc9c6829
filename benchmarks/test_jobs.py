"""What a real job gains from worker processes, over threads and over doing it on the loop."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from benchmarks.children import BY_HAND, OLD, OURS, OURS_IN_THREADS
from benchmarks.modes import loads

if TYPE_CHECKING:
    from benchmarks.contest import Contest

OTHERS = {
    "ThreadPoolExecutor by hand": (BY_HAND, "thread"),
    "async_batcher, on the loop": (OURS, "coroutine"),
    "aiodataloader": ("aiodataloader", "coroutine"),
}
LOAD = {"workers": 2, "max_queue_time": 0.005}
CLIENTS = {"sources": 64, "texts": 200, "forest": 200}
BATCH = {"sources": 8, "texts": 16, "forest": 16}  # items at most; the demo's for sources
ITEMS = {"sources": 240, "texts": 600, "forest": 400}  # a second or so of one core; a row by itself takes as long as 16


CASES = loads(
    quick=[("asyncio", "sources")],
    usual=[("asyncio", "texts"), ("uvloop", "sources")],
    full=[("asyncio", "forest"), ("uvloop", "texts"), ("uvloop", "forest")],
)


@pytest.mark.parametrize(("loop", "job"), CASES, indirect=["loop"])
def test_job(contest: Contest, ask: Any, loop: str, job: str) -> None:
    """Many clients of a service that has two cores: how fast it is, how long they wait, how late its loop is for all else."""
    load = {**LOAD, "job": job, "clients": CLIENTS[job], "max_batch_size": BATCH[job], "items": contest.pick(40, ITEMS[job])}
    places = {
        "inline": (BY_HAND, "inline"),
        "ProcessPoolExecutor by hand": (BY_HAND, "process"),
        OLD: (OLD, "thread"),
        OURS_IN_THREADS: (OURS, "thread"),
        **contest.pick({}, {}, OTHERS),
        OURS: (OURS, "process"),
    }
    rivals = {name: ask(rival, "job", {**load, "place": place}) for name, (rival, place) in places.items()}
    contest.run(rivals, measure="seconds_per_item", question="job", loop=loop, load=load)
