"""This project."""

from __future__ import annotations

from typing import Any

import _jobs
from _rival import Front

from async_batcher import batched


def open_front(load: dict[str, Any]) -> Front:
    """A batcher; `submit` is the fast path for many items."""
    run = _jobs.find(load).run
    options = {"max_batch_size": load["max_batch_size"], "max_queue_time": load["max_queue_time"], **load.get("options", {})}
    if load["place"] == "coroutine":
        batcher: Any = batched(_jobs.as_coroutine(run), **options)
    elif load["place"] == "loop threads":
        batcher = batched(run, **options)
    else:
        batcher = batched(run, executor=load["place"], max_workers=load["workers"], **options)

    async def discard() -> None:
        await batcher.stop(force=True)

    return Front(batcher.process, batcher.submit, batcher.stop, discard, batcher.process_many)


if __name__ == "__main__":
    from _protocol import serve

    serve(open_front, "async-batcher")
