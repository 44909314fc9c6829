"""loky, with its own way to start workers: it has no fork server."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from benchmarks.libraries.executor_pool import open_executor

if TYPE_CHECKING:
    from benchmarks.libraries.base import PoolAdapter

with contextlib.suppress(ImportError):  # `serve` reports it
    import loky


def open_pool(load: dict[str, Any]) -> PoolAdapter:
    """Open its executor."""
    return open_executor(lambda: loky.ProcessPoolExecutor(load["workers"]), load["workers"])


if __name__ == "__main__":
    from benchmarks.libraries.serve import serve

    serve(open_pool, "loky")
