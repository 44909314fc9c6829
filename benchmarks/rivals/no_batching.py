"""Without a batcher: the batch function is awaited for each item, inline."""

from __future__ import annotations

from typing import Any

from _protocol import Front, no_stop, nothing, serve


async def process(item: int) -> int:
    """A batch of one."""
    return (await nothing([item]))[0]


def open_front(load: dict[str, Any]) -> Front:  # noqa: ARG001 - every rival gets it
    """Nothing to open."""
    return Front(process, process, no_stop)


if __name__ == "__main__":
    serve(open_front)
