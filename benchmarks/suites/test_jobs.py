"""What real work gains from worker processes, compared with threads and with the event loop."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from benchmarks.harness.sizes import loads
from benchmarks.libraries.names import (
    AIODATALOADER,
    BY_HAND,
    INLINE,
    OLD,
    OURS,
    OURS_IN_THREADS,
    PROCESSES_BY_HAND,
    THREADS_BY_HAND,
)

if TYPE_CHECKING:
    from benchmarks.harness.interleave import InterleavedRun

LIBRARIES = {  # by name in the results: adapter and place
    INLINE: (BY_HAND, "inline"),
    PROCESSES_BY_HAND: (BY_HAND, "process"),
    OLD: (OLD, "thread"),
    OURS_IN_THREADS: (OURS, "thread"),
}
FULL_LIBRARIES = {
    THREADS_BY_HAND: (BY_HAND, "thread"),
    "async_batcher, on the loop": (OURS, "coroutine"),
    AIODATALOADER: (AIODATALOADER, "coroutine"),
}
LOAD = {"workers": 2, "max_queue_time": 0.005}
CLIENTS = {"sources": 64, "texts": 200, "forest": 200}
BATCH_SIZES = {"sources": 8, "texts": 16, "forest": 16}
ITEMS = {"sources": 240, "texts": 600, "forest": 400}  # about a second of one core


CASES = loads(
    quick=[("asyncio", "sources")],
    usual=[("asyncio", "texts"), ("uvloop", "sources")],
    full=[("asyncio", "forest"), ("uvloop", "texts"), ("uvloop", "forest")],
)


@pytest.mark.parametrize(("loop", "job"), CASES, indirect=["loop"])
def test_job(interleaved: InterleavedRun, prepare: Any, loop: str, job: str) -> None:
    """Clients of a service on two cores: time per item, their waits, the lateness of the loop."""
    load = {
        **LOAD,
        "job": job,
        "clients": CLIENTS[job],
        "max_batch_size": BATCH_SIZES[job],
        "items": interleaved.pick(40, ITEMS[job]),
    }
    places = {**LIBRARIES, **interleaved.pick({}, {}, FULL_LIBRARIES), OURS: (OURS, "process")}
    libraries = {
        name: prepare(adapter, "job", {**load, "place": place})
        for name, (adapter, place) in places.items()
    }
    interleaved.run(libraries, measure="seconds_per_item", scenario="job", loop=loop, load=load)
