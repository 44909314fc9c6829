"""Send items through a batch in a pool, and see what comes back."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from async_batcher import AsyncBatcher, batched
from tests.support import worker_functions as work

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Executor


async def results_of(batcher: Any, items: list[Any]) -> list[Any]:
    """Return the result or exception of each item; all items are in one batch."""
    async with asyncio.timeout(work.DEADLINE / 2):
        return await asyncio.gather(*map(batcher.process, items), return_exceptions=True)


async def round_trip(
    pool: Executor, items: list[Any], function: Callable[[list[Any]], Any] = work.same
) -> list[Any]:
    """Return the results of one batch, run by a new batcher."""
    batcher: AsyncBatcher[Any, Any] = batched(function, executor=pool)
    try:
        return await results_of(batcher, items)
    finally:
        await batcher.stop(force=True)
