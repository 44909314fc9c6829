"""The question about the start of a pool, to be put to a process that has not had one before."""

from __future__ import annotations

import time
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

import _work
from _ready import answers_of_all
from _rival import NotAvailableError, check

if TYPE_CHECKING:
    from _rival import Pool

    Load = dict[str, Any]

_HOLD = 0.002  # seconds that keep a worker from answering for another


async def start(pool: Pool, load: Load) -> dict[str, float]:
    """A pool is made, and called.

    Returns:
        ``first_seconds``: from before it is made until a trivial call is answered; ``all_seconds``: until every worker has
        answered one; ``worker_bytes``: the memory of a worker, with its share of what it has in common with other processes
        (Linux only).
    """
    if pool.pids is None:
        msg = "it has no worker processes of its own"
        raise NotAvailableError(msg)
    check(await pool.call(_work.same, 1) == 1)
    first = time.perf_counter() - load["opened"]
    answering = await answers_of_all(pool.call, pool.workers, _HOLD)
    whole = time.perf_counter() - load["opened"]
    check(answering == len(pool.pids()) == pool.workers)
    sizes = [size for size in map(_memory, pool.pids()) if size]
    return {"first_seconds": first, "all_seconds": whole, **({"worker_bytes": mean(sizes)} if sizes else {})}


def _memory(pid: int) -> int:
    """Bytes, those that it shares with others divided by their number; 0 where it cannot be seen."""
    try:
        lines = Path("/proc", str(pid), "smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
