"""When a pool counts as ready."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import _work
from _rival import check

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from _rival import Pool

_PATIENCE = 60.0  # seconds for a pool to get ready


async def get_ready(pool: Pool) -> None:
    """Have every worker answer, and see that they are as many as they should be."""
    async with asyncio.timeout(_PATIENCE):
        check(await answers_of_all(pool.call, pool.workers, 0.02) == pool.workers)


async def answers_of_all(call: Callable[..., Awaitable[Any]], workers: int, hold: float = 0.005) -> int:
    """Go on until so many workers have answered, each of which is kept for so many seconds.

    Returns:
        How many have.
    """
    seen: set[int] = set()
    while len(seen) < workers:
        seen.update(await asyncio.gather(*[call(_work.hold, hold) for _ in range(workers)]))
    return len(seen)
