"""Groups items from concurrent asyncio callers into batches, and runs each batch in a process, a thread or a coroutine.

==================  ======================================================================
``batcher``         `AsyncBatcher`; ``decorator``, `batched`: what users call
``exceptions``      the errors; ``stats``, the records of what a batcher does; ``loops``, `run`
``integrations``    metrics for Prometheus, spans for OpenTelemetry
``cli``             the command ``async-batcher``
``_batching``       the front end, on the event loop: queue, deadlines, delivery, isolation
``_runners``        where one batch runs: a coroutine, an executor, a `WorkerPool`
``_pool``           `WorkerPool`: worker processes, as the parent sees them
``_worker``         what runs in a worker process; no asyncio
``_transport``      bytes and shared-memory blocks between parent and worker
``_serialization``  objects to bytes and back
``_eventloop``      asyncio helpers that batcher and pool share
==================  ======================================================================

A package imports only from those below its line (``tests/packaging/test_layers.py``). Public names are resolved when they
are first used, so that a worker process does not import asyncio.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from async_batcher._pool.pool import WorkerInfo, WorkerPool
    from async_batcher.batcher import AsyncBatcher
    from async_batcher.decorator import BatchedFunction, batched
    from async_batcher.loops import run

__all__ = ["AsyncBatcher", "BatchedFunction", "WorkerInfo", "WorkerPool", "batched", "run"]

__version__ = "0.3.0"

_HOMES = {
    "AsyncBatcher": "batcher",
    "BatchedFunction": "decorator",
    "WorkerInfo": "_pool.pool",
    "WorkerPool": "_pool.pool",
    "batched": "decorator",
    "run": "loops",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for."""
    if name not in _HOMES:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    """The public names."""
    return sorted({*globals(), *__all__})
