"""Batch functions that yield their results, for workers: importable there, without asyncio."""

from __future__ import annotations

import os
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

from tests.support.worker_functions import note, wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def doubles(batch: list[int]) -> Iterator[int]:
    """Yield twice each item."""
    for item in batch:
        yield item * 2


def held_after_one(folder: Path, batch: list[Any]) -> Iterator[Any]:
    """Yield the first item; then wait for the file ``go``, and yield the others.

    Notes what it yields, and its end.
    """
    try:
        for place, item in enumerate(batch):
            if place == 1:
                wait_for(folder / "go")
            note(folder, "yielded", str(place))
            yield item
    finally:
        note(folder, "closed")


def slowly(batch: list[Any]) -> Iterator[Any]:
    """Yield an item every few milliseconds."""
    for item in batch:
        time.sleep(0.003)
        yield item


def slowly_held(folder: Path, holds: int, batch: list[Any]) -> Iterator[Any]:
    """Do the same; after each of the first items, wait for the test."""
    for number, item in enumerate(slowly(batch)):
        if 0 < number <= holds:
            wait_for(folder / str(number))
        yield item


def by_name(batch: list[str]) -> Iterator[Any]:
    """Yield something for each item, or do something in its place."""
    for item in batch:
        match item:
            case "error":
                yield ValueError(item)
            case "lock":
                yield threading.Lock()
            case "raise":
                raise LookupError(item)
            case "exit":
                os._exit(3)
            case "end":
                return
            case "twice":
                yield item
                yield item
            case "hang":
                threading.Event().wait()
            case "fork":
                pid = os.fork()
                yield os.getpid()
                if pid:
                    os.waitpid(pid, 0)
            case "unreadable":
                yield Unreadable(os.getpid())
            case _:
                yield item


class Unreadable:
    """Cannot be unpickled in another process or interpreter than the one that made it."""

    def __init__(self, pid: int) -> None:
        self.place = pid, id(sys.modules)

    def __reduce__(self) -> tuple[Any, ...]:
        """Fail where it is unpickled."""
        return (_read_in, self.place)


def _read_in(pid: int, modules: int) -> Unreadable:
    if (os.getpid(), id(sys.modules)) != (pid, modules):
        msg = "made in another process"
        raise TypeError(msg)
    return Unreadable(pid)


def one_buffer(batch: list[int]) -> Iterator[bytearray]:
    """Yield the same large buffer again and again, filled with the item."""
    buffer = bytearray(1 << 20)
    for item in batch:
        buffer[:] = bytes([item]) * len(buffer)
        yield buffer


def items_themselves(batch: list[Any]) -> Iterator[Any]:
    """Yield the items, some of which may be in shared memory."""
    yield from batch


def drop_items(batch: list[Any]) -> Iterator[int]:
    """Yield their lengths, and keep no item."""
    while batch:
        yield len(batch.pop(0))


def returned_generator(batch: list[int]) -> Any:
    """Return a generator, although the function itself is none."""
    return (item * 2 for item in batch)


def noted_by_name(folder: Path, batch: list[str]) -> Iterator[Any]:
    """Do the same as `by_name`, and note each item."""
    for item in batch:
        note(folder, "begun", item)
        yield from by_name([item])


def late_after_one(folder: Path, batch: list[Any]) -> Iterator[Any]:
    """Yield the first item; yield the others when the batch has been interrupted."""
    yield batch[0]
    if len(batch) > 1:
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            note(folder, "interrupted")
        yield from batch[1:]
