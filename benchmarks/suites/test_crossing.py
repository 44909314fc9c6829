"""The break-even of processes and threads, by the work of an item, with and without the GIL."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from benchmarks.harness.calibration import steps
from benchmarks.harness.sizes import loads
from benchmarks.libraries.names import (
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

WORKERS = 2
BATCH_SECONDS = 0.02  # work in a batch at most, unless two items are more
BATCHES_IN_FLIGHT = 2 * WORKERS  # one runs in each worker, one waits for it


@pytest.mark.parametrize(
    "item_us",
    loads(quick=[100], usual=[1, 10, 1_000, 100_000], full=[3, 30, 300, 3_000, 10_000]),
)
@pytest.mark.parametrize("job", ["python", "hash"])
@pytest.mark.parametrize("loop", loads(quick=["asyncio"], full=["uvloop"]), indirect=True)
def test_crossing(
    interleaved: InterleavedRun, prepare: Any, loop: str, job: str, item_us: int
) -> None:
    """Clients that each await one item after another, always enough of them for full batches."""
    seconds = item_us / 1e6
    size = min(64, max(2, round(BATCH_SECONDS / seconds)))  # 0.2.2 needs at least two
    clients = BATCHES_IN_FLIGHT * size
    in_time = round(interleaved.pick(0.1, 0.3, 1.0) / seconds)
    items = max(clients, min(interleaved.pick(1_000, 2_000, 6_000), in_time))
    load = {
        "job": job,
        "steps": steps(job, seconds),
        "item_us": item_us,
        "workers": WORKERS,
        "max_batch_size": size,
        "max_queue_time": 0.005,
        "clients": clients,
        "items": round(items / clients),
        "settle": interleaved.pick(0.1, 0.2),
    }

    def at(name: str, place: str) -> Any:
        return prepare(name, "clients", {**load, "place": place})

    libraries = {
        INLINE: at(BY_HAND, "inline"),
        **interleaved.pick({}, {}, {THREADS_BY_HAND: at(BY_HAND, "thread")}),
        PROCESSES_BY_HAND: at(BY_HAND, "process"),
        OLD: at(OLD, "thread"),
        OURS_IN_THREADS: at(OURS, "thread"),
        OURS: at(OURS, "process"),
    }
    interleaved.run(
        libraries, measure="seconds_per_item", scenario="crossing", loop=loop, load=load
    )
