"""What an item costs in the front end, with batches that do nothing, and memory of a million."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from benchmarks.harness.sizes import loads
from benchmarks.libraries.names import (
    AIODATALOADER,
    AT_ONCE,
    BARE_FUTURES,
    BATCHED,
    BY_HAND,
    OLD,
    ONE_BY_ONE,
    OURS,
    RAY_SERVE,
    STREAMED,
)

if TYPE_CHECKING:
    from benchmarks.harness.interleave import InterleavedRun

LIMITS = (BARE_FUTURES, BY_HAND)
NEAREST = (OLD, AIODATALOADER, BATCHED, RAY_SERVE)
LOAD = {"place": "coroutine", "max_batch_size": 64, "max_queue_time": 0.01}
ITEMS_PER_CLIENT = {1: (50, 250, 500), 64: (20, 100, 200), 1024: (2, 4, 12)}  # by mode


@pytest.mark.parametrize("clients", loads(quick=[64], usual=[1, 1024]))
def test_clients(interleaved: InterleavedRun, prepare: Any, loop: str, clients: int) -> None:
    """Clients that each await one item after another.

    The window of a single client is 0, because its time would be nothing but the window.
    """
    items = interleaved.pick(*ITEMS_PER_CLIENT[clients])
    load = {**LOAD, "clients": clients, "items": items}
    if clients == 1:
        load["max_queue_time"] = 0.0
    _compare(interleaved, prepare, "clients", loop, load)


def test_gather(interleaved: InterleavedRun, prepare: Any, loop: str) -> None:
    """One gather over many items: `submit` against the other libraries' call for one item."""
    load = {**LOAD, "items": interleaved.pick(1_280, 2_560, 6_400)}
    _compare(interleaved, prepare, "gather", loop, load)


def _compare(
    interleaved: InterleavedRun, prepare: Any, scenario: str, loop: str, load: dict[str, Any]
) -> None:
    names = interleaved.names((*LIMITS, *NEAREST, OURS))
    interleaved.run(
        {name: prepare(name, scenario, load) for name in names},
        measure="seconds_per_item",
        rounds=interleaved.pick(1, 9, 21),
        scenario=scenario,
        loop=loop,
        load=load,
    )


def test_many(interleaved: InterleavedRun, prepare: Any, loop: str) -> None:
    """One call for 100,000 items, or the nearest that a library has."""
    load = {**LOAD, "items": interleaved.pick(5_000, 100_000)}
    libraries = {name: prepare(name, "many", load) for name in interleaved.names(NEAREST)}
    libraries[ONE_BY_ONE] = prepare(OURS, "gather", load)
    libraries[OURS] = prepare(OURS, "many", load)
    interleaved.run(libraries, measure="seconds_per_item", scenario="many", loop=loop, load=load)


def test_lone_item(interleaved: InterleavedRun, prepare: Any, loop: str) -> None:
    """A single request waits for its window and no longer, compared with a bare timer."""
    load = {**LOAD, "pairs": interleaved.pick(10, 20, 40)}
    names = interleaved.names((OLD, BATCHED, RAY_SERVE, OURS))
    libraries = {name: prepare(name, "lone_item", load) for name in names}
    interleaved.run(libraries, measure="wait_seconds", scenario="lone_item", loop=loop, load=load)


@pytest.mark.parametrize("loop", loads(quick=["asyncio"], full=["uvloop"]), indirect=True)
def test_stream(interleaved: InterleavedRun, prepare: Any, loop: str) -> None:
    """A million items from a generator whose results are consumed one by one, and all at once."""
    load = {**LOAD, "items": interleaved.pick(40_000, 1_000_000)}
    libraries = {
        AT_ONCE: prepare(STREAMED, "stream", {**load, "whole": True}),
        OURS: prepare(STREAMED, "stream", {**load, "whole": False}),
    }
    interleaved.run(libraries, measure="seconds_per_item", scenario="stream", loop=loop, load=load)
