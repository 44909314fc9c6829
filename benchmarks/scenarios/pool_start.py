"""The start of a pool, measured in a process that has not had one before."""

from __future__ import annotations

import time
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from benchmarks.libraries.base import NotAvailableError, check
from benchmarks.scenarios import worker_functions
from benchmarks.scenarios.readiness import call_every_worker

if TYPE_CHECKING:
    from benchmarks.libraries.base import PoolAdapter

    Load = dict[str, Any]

_HOLD_SECONDS = 0.002  # a held worker cannot take a second call


async def start(pool: PoolAdapter, load: Load) -> dict[str, float]:
    """Open a pool and call it.

    Returns:
        ``first_seconds``: from before the pool is made to the result of a trivial call;
        ``all_seconds``: until every worker has returned one; ``worker_bytes``: the proportional
        memory (Pss) of a worker, on Linux only.
    """
    if pool.pids is None:
        msg = "it has no worker processes of its own"
        raise NotAvailableError(msg)
    check(await pool.call(worker_functions.same, 1) == 1)
    first = time.perf_counter() - load["opened"]
    called = await call_every_worker(pool.call, pool.workers, _HOLD_SECONDS)
    complete = time.perf_counter() - load["opened"]
    check(called == len(pool.pids()) == pool.workers)
    sizes = [size for size in map(_memory, pool.pids()) if size]
    memory = {"worker_bytes": mean(sizes)} if sizes else {}
    return {"first_seconds": first, "all_seconds": complete, **memory}


def _memory(pid: int) -> int:
    """Return the proportional bytes of a process, or 0 where the system does not report them."""
    try:
        lines = Path("/proc", str(pid), "smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
