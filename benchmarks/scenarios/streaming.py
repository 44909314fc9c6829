"""A stream of a million items: the time per item, and the memory held on the way."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Any

from benchmarks.scenarios.memory import resident, trim

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    Load = dict[str, Any]

MEMORY_SAMPLES = 20
ITEM_BYTES = 100


async def stream(
    results_of: Callable[[Iterator[tuple[int, bytes]]], AsyncIterator[int]], load: Load
) -> dict[str, float]:
    """Process items from a generator, and consume the results one by one, in order."""
    items = load["items"]
    memory: list[float] = []
    trim()
    before, began, seen = resident(), time.perf_counter(), 0
    generator: Any = results_of((number, bytes(ITEM_BYTES)) for number in range(items))
    async with contextlib.aclosing(generator) as results:
        async for result in results:
            if result != seen:
                msg = "an item got another item's result"
                raise ValueError(msg)
            seen += 1
            if seen * MEMORY_SAMPLES % items < MEMORY_SAMPLES:
                memory.append((resident() - before) / 1e6)
    seconds = time.perf_counter() - began
    if seen != items:
        msg = f"{seen} results for {items} items"
        raise ValueError(msg)
    return {
        "seconds_per_item": seconds / items,
        "memory_growth": memory[-1] - memory[0],
        "memory_most": max(memory),
        **{f"memory_{part}": grown for part, grown in enumerate(memory)},
    }
