"""When a process pool beats the thread executor: by how much work an item is, and whether that work holds the GIL."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from benchmarks.calibration import steps
from benchmarks.children import BY_HAND, OLD, OURS, OURS_IN_THREADS
from benchmarks.modes import loads

if TYPE_CHECKING:
    from benchmarks.contest import Contest

WORKERS = 2
BATCH_SECONDS = 0.02  # of work at most, where an item is that much: nobody wants to wait for more
IN_FLIGHT = 2 * WORKERS  # batches: one at each worker, one that waits for it


@pytest.mark.parametrize("item_us", loads(quick=[100], usual=[1, 10, 1_000, 100_000], full=[3, 30, 300, 3_000, 10_000]))
@pytest.mark.parametrize("job", ["python", "hash"])
@pytest.mark.parametrize("loop", loads(quick=["asyncio"], full=["uvloop"]), indirect=True)
def test_crossing(contest: Contest, ask: Any, loop: str, job: str, item_us: int) -> None:
    """Items from clients who each await one after another, always enough of them for full batches."""
    seconds = item_us / 1e6
    size = min(64, max(2, round(BATCH_SECONDS / seconds)))  # 0.2.2 knows no batch of one
    clients = IN_FLIGHT * size
    items = max(clients, min(contest.pick(1_000, 2_000, 6_000), round(contest.pick(0.1, 0.3, 1.0) / seconds)))
    load = {
        "job": job,
        "steps": steps(job, seconds),
        "item_us": item_us,
        "workers": WORKERS,
        "max_batch_size": size,
        "max_queue_time": 0.005,
        "clients": clients,
        "items": round(items / clients),
        "settle": contest.pick(0.1, 0.2),
    }
    in_threads, in_processes = {**load, "place": "thread"}, {**load, "place": "process"}
    rivals = {
        "inline": ask(BY_HAND, "clients", {**load, "place": "inline"}),
        **contest.pick({}, {}, {"ThreadPoolExecutor by hand": ask(BY_HAND, "clients", in_threads)}),
        "ProcessPoolExecutor by hand": ask(BY_HAND, "clients", in_processes),
        OLD: ask(OLD, "clients", in_threads),
        OURS_IN_THREADS: ask(OURS, "clients", in_threads),
        OURS: ask(OURS, "clients", in_processes),
    }
    contest.run(rivals, measure="seconds_per_item", question="crossing", loop=loop, load=load)
