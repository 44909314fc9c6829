"""loky, with its own way to start workers: it has no fork server."""

from __future__ import annotations

from typing import Any

import _trips
from _executors import open_executor
from _protocol import Pool, serve


def open_pool(load: dict[str, Any]) -> Pool:
    """Its executor."""
    from loky import ProcessPoolExecutor

    return open_executor(lambda: ProcessPoolExecutor(load["workers"]), load["workers"])


if __name__ == "__main__":
    serve(open_pool, "loky", _trips)
