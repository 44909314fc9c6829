"""The standard library's process pool, from a fork server."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from typing import TYPE_CHECKING, Any

from benchmarks.libraries.executor_pool import open_executor

if TYPE_CHECKING:
    from benchmarks.libraries.base import PoolAdapter


def open_pool(load: dict[str, Any]) -> PoolAdapter:
    """Open its executor."""
    workers, context = load["workers"], multiprocessing.get_context("forkserver")
    return open_executor(lambda: ProcessPoolExecutor(workers, mp_context=context), workers)


if __name__ == "__main__":
    from benchmarks.libraries.serve import serve

    serve(open_pool)
