"""aiodataloader, without its cache: batches the items of one iteration of the event loop."""

from __future__ import annotations

from typing import Any

from benchmarks.libraries.base import BatcherAdapter, NotAvailableError, no_stop
from benchmarks.scenarios import workloads


def open_batcher(load: dict[str, Any]) -> BatcherAdapter:
    """Make a loader, which has no window and nothing to stop."""
    from aiodataloader import DataLoader

    if load["place"] != "coroutine":
        msg = "its batch function is a coroutine: threads and processes are left to the user"
        raise NotAvailableError(msg)
    process_batch = workloads.as_coroutine(workloads.find(load).run)
    loader = DataLoader(process_batch, max_batch_size=load["max_batch_size"], cache=False)
    return BatcherAdapter(loader.load, loader.load, no_stop, many=loader.load_many)


if __name__ == "__main__":
    from benchmarks.libraries.serve import serve

    serve(open_batcher, "aiodataloader")
