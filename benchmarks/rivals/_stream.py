"""A stream of very many items: what one costs, and what memory is held on the way."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Any

from _memory import give_back, resident

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    Load = dict[str, Any]

_PARTS = 20  # in which the memory is looked at
_PAYLOAD = 100  # bytes of an item


async def stream(results: Callable[[Iterator[tuple[int, bytes]]], AsyncIterator[int]], load: Load) -> dict[str, float]:
    """Items from a generator, whose results are consumed in order, one by one."""
    items = load["items"]
    memory: list[float] = []
    give_back()
    before, began, seen = resident(), time.perf_counter(), 0
    async with contextlib.aclosing(results((number, bytes(_PAYLOAD)) for number in range(items))) as answers:  # type: ignore[type-var]
        async for answer in answers:
            if answer != seen:
                msg = "an item got another's answer"
                raise ValueError(msg)
            seen += 1
            if seen * _PARTS % items < _PARTS:
                memory.append((resident() - before) / 1e6)
    seconds = time.perf_counter() - began
    if seen != items:
        msg = f"{seen} answers for {items} items"
        raise ValueError(msg)
    return {
        "seconds_per_item": seconds / items,
        "memory_growth": memory[-1] - memory[0],
        "memory_most": max(memory),
        **{f"memory_{part}": grown for part, grown in enumerate(memory)},
    }
