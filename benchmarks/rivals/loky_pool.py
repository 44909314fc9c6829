"""loky, with its own way to start workers: it has no fork server."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from _executors import open_executor

if TYPE_CHECKING:
    from _rival import Pool

with contextlib.suppress(ImportError):  # `serve` says so
    import loky


def open_pool(load: dict[str, Any]) -> Pool:
    """Its executor."""
    return open_executor(lambda: loky.ProcessPoolExecutor(load["workers"]), load["workers"])


if __name__ == "__main__":
    from _protocol import serve

    serve(open_pool, "loky")
