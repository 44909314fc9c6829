"""This project."""

from __future__ import annotations

from typing import Any

from _protocol import Front, nothing, serve

from async_batcher import batched


def same(batch: list[int]) -> list[int]:
    """`nothing`, for threads and processes."""
    return batch


def open_front(load: dict[str, Any]) -> Front:
    """A batcher; `submit` is the fast path for many items."""
    limits = {"max_batch_size": load["max_batch_size"], "max_queue_time": load["max_queue_time"]}
    if load["place"] == "coroutine":
        batcher = batched(nothing, **limits)
    elif load["place"] == "loop threads":
        batcher = batched(same, **limits)
    else:
        batcher = batched(same, executor=load["place"], max_workers=load["workers"], **limits)
    return Front(batcher.process, batcher.submit, batcher.stop, many=batcher.process_many)


if __name__ == "__main__":
    serve(open_front, "async-batcher")
