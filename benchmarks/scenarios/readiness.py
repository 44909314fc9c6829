"""When a pool counts as ready: every worker has returned a result."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from benchmarks.libraries.base import check
from benchmarks.scenarios import worker_functions

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from benchmarks.libraries.base import PoolAdapter

READY_TIMEOUT = 60.0  # seconds


async def wait_ready(pool: PoolAdapter) -> None:
    """Call every worker, and check that the pool has as many as it should."""
    async with asyncio.timeout(READY_TIMEOUT):
        check(await call_every_worker(pool.call, pool.workers, 0.02) == pool.workers)


async def call_every_worker(
    call: Callable[..., Awaitable[Any]], workers: int, hold: float = 0.005
) -> int:
    """Call until ``workers`` different workers have returned; each call holds one for ``hold`` s.

    Returns:
        The number of workers that have returned.
    """
    seen: set[int] = set()
    while len(seen) < workers:
        calls = [call(worker_functions.hold, hold) for _ in range(workers)]
        seen.update(await asyncio.gather(*calls))
    return len(seen)
