"""When a pool counts as ready."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import _work
from _rival import check

if TYPE_CHECKING:
    from _rival import Pool

_PATIENCE = 60.0  # seconds for a pool to get ready


async def get_ready(pool: Pool) -> None:
    """Have every worker answer, and see that they are as many as they should be."""
    seen: set[int] = set()
    async with asyncio.timeout(_PATIENCE):
        while len(seen) < pool.workers:
            seen.update(await asyncio.gather(*[pool.call(_work.hold, 0.02) for _ in range(pool.workers)]))
    check(len(seen) == pool.workers)
