"""Functions that ask what their batch knows of itself, for workers: importable there."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from async_batcher import BatchInfo, current_batch
from tests.support.worker_functions import note, note_and_hold

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

Seen = tuple[int, "BatchInfo | None"]


def infos(batch: list[Any]) -> list[Seen]:
    """Return, for each item, the process and what the batch knows."""
    return [(os.getpid(), current_batch())] * len(batch)


def infos_yielded(batch: list[Any]) -> Iterator[Seen]:
    """Do the same, anew for each result."""
    for _ in range(len(batch)):
        yield os.getpid(), current_batch()


def infos_yielded_later(batch: list[Any]) -> Any:
    """Return the generator: the function itself ends before it runs."""
    return infos_yielded(batch)


def infos_after_hold(folder: Path, batch: list[str]) -> list[BatchInfo | None]:
    """Return what the batch knows, after `note_and_hold`."""
    note_and_hold(folder, batch)
    return [current_batch()] * len(batch)


def note_info(folder: Path, kind: str) -> None:
    """Note what is known where no batch runs; a set-up or an initializer."""
    note(folder, kind, repr(current_batch()))
