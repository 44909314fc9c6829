"""The standard library's process pool, from a fork server."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from typing import TYPE_CHECKING, Any

from _executors import open_executor

if TYPE_CHECKING:
    from _rival import Pool


def open_pool(load: dict[str, Any]) -> Pool:
    """Its executor."""
    context = multiprocessing.get_context("forkserver")
    return open_executor(lambda: ProcessPoolExecutor(load["workers"], mp_context=context), load["workers"])


if __name__ == "__main__":
    from _protocol import serve

    serve(open_pool)
