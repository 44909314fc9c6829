"""This project's batcher."""

from __future__ import annotations

from typing import Any

from async_batcher import batched, isolate
from benchmarks.libraries.base import BatcherAdapter
from benchmarks.scenarios import workloads


def open_batcher(load: dict[str, Any]) -> BatcherAdapter:
    """Make a batcher with the executor that ``place`` names."""
    run = workloads.find(load).run
    options = {
        "max_batch_size": load["max_batch_size"],
        "max_queue_time": load["max_queue_time"],
        **load.get("options", {}),
    }
    if load.get("isolates"):
        options["on_failure"] = isolate()
    if load["place"] == "coroutine":
        batcher: Any = batched(workloads.as_coroutine(run), **options)
    elif load["place"] == "loop threads":
        batcher = batched(run, **options)
    else:
        batcher = batched(run, executor=load["place"], max_workers=load["workers"], **options)

    async def discard() -> None:
        await batcher.stop(force=True)

    return BatcherAdapter(
        batcher.process, batcher.submit, batcher.stop, discard, batcher.process_many
    )


if __name__ == "__main__":
    from benchmarks.libraries.serve import serve

    serve(open_batcher, "async-batcher")
