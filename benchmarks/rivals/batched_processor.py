"""batched, by Mixedbread: a task that looks every ``timeout_ms`` whether items have come, and takes all there are.

An item's window is what is left of the task's sleep, not counted from its arrival; without a window the task never sleeps, and
turns the loop for as long as it lives. A sync function runs in the loop's default threads, one batch at a time.
"""

from __future__ import annotations

from typing import Any

import _jobs
from _rival import Front, NotAvailableError, no_stop


def open_front(load: dict[str, Any]) -> Front:
    """A processor; it is called with one item, or with a list of them."""
    from batched.aio import AsyncBatchProcessor

    if load["place"] == "process":
        msg = "cannot use a process pool"
        raise NotAvailableError(msg)
    run = _jobs.find(load).run
    processor: Any = AsyncBatchProcessor(
        _jobs.as_coroutine(run) if load["place"] == "coroutine" else run,
        batch_size=load["max_batch_size"],
        timeout_ms=1000 * load["max_queue_time"],
    )

    async def stop() -> None:
        msg = "has no stop: its task runs until its loop ends"
        raise NotAvailableError(msg)

    return Front(processor, processor, stop, no_stop, processor)


if __name__ == "__main__":
    from _protocol import serve

    serve(open_front, "batched")
