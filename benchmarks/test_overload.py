"""What becomes of callers, and of memory, when more items come than can be processed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from benchmarks.children import OURS, OVERLOADED

if TYPE_CHECKING:
    from benchmarks.contest import Contest

LOAD = {"workers": 2, "max_batch_size": 16, "patience": 0.25, "room": 128, "times_capacity": 2.0, "seed": 1, "settle": 1.0}


def test_overload(contest: Contest, ask: Any, loop: str) -> None:
    """Arrivals at twice the capacity for ten seconds, with deadlines and a limit on the queue, and without."""
    load = {**LOAD, "seconds": 2 if contest.quick else 10}
    rivals = {
        "without deadlines and limits": ask(OVERLOADED, "overload", {**load, "limits": False}),
        OURS: ask(OVERLOADED, "overload", {**load, "limits": True}),
    }
    rounds = 1 if contest.quick else 5
    about = {"question": "overload", "loop": loop, "load": load}
    contest.run(rivals, measure="seconds_per_good_item", rounds=rounds, warm_up=False, **about)
