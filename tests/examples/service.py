"""A FastAPI service: each request is an item, and batches run in worker processes.

::

    pip install fastapi uvicorn prometheus-client
    export PROMETHEUS_MULTIPROC_DIR=/run/digests  # a folder that is empty at each start
    uvicorn service:app --workers 2 --timeout-graceful-shutdown 40

Without that timeout, a client that keeps its connection open can delay the end for ever.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest, multiprocess

from async_batcher import WorkerPool, batched
from async_batcher.exceptions import (
    BatchTimeoutError,
    ItemTimeoutError,
    QueueFullException,
    WorkerDiedError,
)
from async_batcher.integrations.prometheus import export_metrics

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Coroutine

MAX_QUEUE_SIZE = 100
os.environ["PROMETHEUS_MULTIPROC_DIR"]  # fails now, by name, rather than when the process ends


# Workers import the module of this function. A module without FastAPI would start them faster.
def digests(batch: list[str]) -> list[str]:
    """Return one digest per text: the CPU-bound work."""
    return [hashlib.pbkdf2_hmac("sha256", text.encode(), b"", 10_000).hex() for text in batch]


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Start the workers before the first request, and end them after the last one."""
    # Each server process has a pool of its own: server processes times max_workers should be
    # about the number of cores. Several batchers can share the pool.
    pool = WorkerPool(max_workers=1)
    batcher = batched(
        digests,
        name="digests",
        executor=pool,
        max_batch_size=16,
        max_queue_size=MAX_QUEUE_SIZE,
        item_timeout=30.0,
        batch_timeout=20.0,  # replaces a worker that hangs
        cancel_abandoned=True,  # ends a batch whose clients have all hung up
    )
    # After SIGTERM, uvicorn answers the open requests and then leaves this block.
    async with pool, batcher:
        export_metrics(batcher)
        app.state.digest = batcher
        yield
    multiprocess.mark_process_dead(os.getpid())  # the sums leave out its gauges from now on


app = FastAPI(lifespan=lifespan)


async def unless_disconnected(request: Request, call: Coroutine[Any, Any, str]) -> Response:
    """Await a call, and cancel it when the client hangs up, which FastAPI does not do."""

    async def disconnected() -> None:
        # What comes after the body of the request is the disconnect.
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.create_task(call), asyncio.create_task(disconnected())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        # The client does not see the status 499; it is for the access log.
        return Response(await tasks[0]) if tasks[0].done() else Response(status_code=499)
    finally:
        for task in tasks:
            task.cancel()


@app.get("/digest")
async def digest(request: Request, text: str) -> Response:
    """Return the digest of a text."""
    return await unless_disconnected(request, app.state.digest(text))


@app.exception_handler(QueueFullException)
@app.exception_handler(ItemTimeoutError)
async def overloaded(_: Request, error: Exception) -> Response:
    """Tell the client to come back later."""
    return Response(str(error), status_code=503, headers={"Retry-After": "1"})


@app.exception_handler(BatchTimeoutError)
@app.exception_handler(WorkerDiedError)
async def failed(_: Request, error: Exception) -> Response:
    """Say what happened to the batch: its text may be the cause, so a retry may not help."""
    return Response(str(error), status_code=500)


@app.get("/ready")
async def ready() -> Response:
    """Tell the load balancer whether this process can take more requests."""
    has_capacity = app.state.digest.stats().queued < MAX_QUEUE_SIZE // 2
    return Response(status_code=200 if has_capacity else 503)


@app.get("/metrics")
def metrics() -> Response:  # not async: it reads files, so FastAPI calls it in a thread
    """Return the sums over all server processes."""
    registry = CollectorRegistry()
    multiprocess.MultiProcessCollector(registry)
    return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)
