"""batched, by Mixedbread: a task that polls every ``timeout_ms`` and takes all queued items.

An item's window is the rest of the task's sleep and does not start with the item. Without a window
the task never sleeps, so the loop spins for as long as the task lives. A sync batch function runs
in the loop's default threads, one batch at a time.
"""

from __future__ import annotations

from typing import Any

from benchmarks.libraries.base import BatcherAdapter, NotAvailableError, no_stop
from benchmarks.scenarios import workloads


def open_batcher(load: dict[str, Any]) -> BatcherAdapter:
    """Make a processor, which takes one item or a list of items."""
    from batched.aio import AsyncBatchProcessor

    if load["place"] == "process":
        msg = "cannot use a process pool"
        raise NotAvailableError(msg)
    run = workloads.find(load).run
    processor: Any = AsyncBatchProcessor(
        workloads.as_coroutine(run) if load["place"] == "coroutine" else run,
        batch_size=load["max_batch_size"],
        timeout_ms=1000 * load["max_queue_time"],
    )

    async def stop() -> None:
        msg = "has no stop: its task runs until its loop ends"
        raise NotAvailableError(msg)

    return BatcherAdapter(processor, processor, stop, no_stop, processor)


if __name__ == "__main__":
    from benchmarks.libraries.serve import serve

    serve(open_batcher, "batched")
