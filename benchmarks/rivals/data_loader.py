"""aiodataloader, without its cache: batches what one turn of the event loop brings."""

from __future__ import annotations

from typing import Any

from _protocol import Front, no_stop, nothing, serve


def open_front(load: dict[str, Any]) -> Front:
    """A loader; it has no window and nothing to stop."""
    from aiodataloader import DataLoader

    loader = DataLoader(nothing, max_batch_size=load["max_batch_size"], cache=False)
    return Front(loader.load, loader.load, no_stop, many=loader.load_many)


if __name__ == "__main__":
    serve(open_front, "aiodataloader")
