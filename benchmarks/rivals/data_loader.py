"""aiodataloader, without its cache: batches what one turn of the event loop brings."""

from __future__ import annotations

from typing import Any

import _jobs
from _rival import Front, NotAvailableError, no_stop


def open_front(load: dict[str, Any]) -> Front:
    """A loader; it has no window and nothing to stop."""
    from aiodataloader import DataLoader

    if load["place"] != "coroutine":
        msg = "its batch function is a coroutine: threads and processes are the user's own affair"
        raise NotAvailableError(msg)
    loader = DataLoader(_jobs.as_coroutine(_jobs.find(load).run), max_batch_size=load["max_batch_size"], cache=False)
    return Front(loader.load, loader.load, no_stop, many=loader.load_many)


if __name__ == "__main__":
    from _protocol import serve

    serve(open_front, "aiodataloader")
