"""This project under more load than it can bear, with deadlines and limits, or without."""

from __future__ import annotations

import time
from typing import Any

import _overload
from _protocol import Front, serve

from async_batcher import batched

WORK = 0.002  # seconds for an item


def slow(batch: list[tuple[int, bytes]]) -> list[int]:
    """Take as long as the items ask for, and no processor: what is measured is the queue, not the cores."""
    time.sleep(WORK * len(batch))
    return [number for number, _ in batch]


def open_front(load: dict[str, Any]) -> Front:
    """A batcher in front of a pool."""
    limits = {"item_timeout": load["patience"], "max_queue_size": load["room"]} if load["limits"] else {}
    batcher: Any = batched(slow, executor="process", max_workers=load["workers"], max_batch_size=load["max_batch_size"], **limits)

    async def discard() -> None:
        await batcher.stop(force=True)

    return Front(batcher.process, batcher.submit, batcher.stop, discard)


if __name__ == "__main__":
    serve(open_front, "async-batcher", _overload)
