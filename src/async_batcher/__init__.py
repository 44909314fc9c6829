"""Batching for asyncio: callers await single items, and a worker process gets them in batches.

::

    @batched(max_batch_size=64, executor="process")
    def lengths(batch: list[str]) -> list[int]:
        return [len(text) for text in batch]

    await lengths("one item")

- `batched` makes a `BatchedFunction` of a function; subclass `AsyncBatcher` to keep state.
- `WorkerPool` runs batches of several batchers, and single calls, in worker processes.
- `current_batch` says what the running batch knows of itself: size, deadlines, worker.
- `worker_number` tells the workers of a pool apart, to choose a GPU, say.
- `Limit` limits a batch, the queue or a rate by bytes, tokens or any cost.
- `Later` puts an item off; `retry` and `isolate` say what happens to failed ones.
- `run` runs a program on asyncio or uvloop.
- `async_batcher.exceptions` has the errors, `async_batcher.stats` the records of `stats()`.

The packages and modules; each imports only from those below it or beside it
(``tests/packaging/test_layers.py``):

==================  ==============================================================================
``cli``             the command ``async-batcher``
``integrations``    metrics for Prometheus, spans for OpenTelemetry
``decorator``       `batched` and what it makes
``batcher``         `AsyncBatcher`
``_batching``       the front end, on the event loop: queue, deadlines, delivery, isolation
``_runners``        where one batch runs: a coroutine, an executor, a `WorkerPool`
``_pool``           worker processes, as the parent sees them
``current``         `current_batch`, beside ``_worker``
``_worker``         what runs in a worker process; no asyncio
``_transport``      bytes and shared-memory blocks between parent and worker
``_serialization``  objects to bytes and back
``_eventloop``      asyncio helpers that batcher and pool share
``loops``           `run`
``stats``           the records of `stats()`, and of ``on_batch=``
``failures``        `Later`, `retry`, `isolate`: what happens to items that failed
``limits``          `Limit`: what a batch, the queue or a span of time may hold
``exceptions``      the errors
==================  ==============================================================================

Public names are resolved when they are first used, so that a worker does not import asyncio.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from async_batcher._pool.pool import WorkerInfo, WorkerPool
    from async_batcher._worker.identity import worker_number
    from async_batcher.batcher import AsyncBatcher
    from async_batcher.current import BatchInfo, current_batch
    from async_batcher.decorator import BatchedFunction, batched
    from async_batcher.failures import Later, isolate, retry
    from async_batcher.limits import Limit
    from async_batcher.loops import run

__all__ = [
    "AsyncBatcher",
    "BatchInfo",
    "BatchedFunction",
    "Later",
    "Limit",
    "WorkerInfo",
    "WorkerPool",
    "batched",
    "current_batch",
    "isolate",
    "retry",
    "run",
    "worker_number",
]

__version__ = "0.3.0"

_HOMES = {
    "AsyncBatcher": "batcher",
    "BatchInfo": "current",
    "BatchedFunction": "decorator",
    "Later": "failures",
    "Limit": "limits",
    "WorkerInfo": "_pool.pool",
    "WorkerPool": "_pool.pool",
    "batched": "decorator",
    "current_batch": "current",
    "isolate": "failures",
    "retry": "failures",
    "run": "loops",
    "worker_number": "_worker.identity",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
