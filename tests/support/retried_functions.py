"""Functions whose first tries end in one way or another, for workers: importable there."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Any

from async_batcher import Later, current_batch
from tests.support import worker_functions

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SOON = 0.001  # seconds


def _attempt() -> int:
    info = current_batch()
    assert info is not None
    return info.attempt


def return_later(batch: list[int]) -> list[Any]:
    """Put odd items off twice; twice the item is the result of the others."""
    attempt = _attempt()
    return [Later(SOON) if item % 2 and attempt < 3 else item * 2 for item in batch]


def yield_later(batch: list[int]) -> Iterator[Any]:
    """Do the same as a generator, which raises a `Later` for the last item at first."""
    attempt = _attempt()
    for index, item in enumerate(batch):
        if attempt == 1 and index == len(batch) - 1:
            raise Later(SOON)
        yield Later(SOON) if item % 2 and attempt < 3 else item * 2


def yield_by_name(batch: list[tuple[Any, ...]]) -> Iterator[Any]:
    """Note each item, and yield its name or what that says; raise at some names, half way."""
    attempt = _attempt()
    for folder, name, *_ in batch:
        worker_functions.note(folder, "begun", name)
        if name == "later" and attempt == 1:
            raise Later(SOON)
        if name == "raise":
            raise LookupError(name)
        if name == "end":
            return
        if name == "return later" and attempt == 1:
            yield Later(SOON)
        elif name == "error":
            yield ValueError(name)
        elif name == "lock":
            yield threading.Lock()
        else:
            yield name


def raise_later(batch: list[int]) -> list[int]:
    """Raise a `Later` at first, then one with a cause."""
    attempt = _attempt()
    if attempt == 1:
        raise Later(SOON)
    if attempt == 2:
        msg = "busy"
        raise Later(SOON) from ConnectionError(msg)
    return [item * 2 for item in batch]


def always_later(batch: list[str]) -> list[Any]:
    """Raise or return a `Later`, with or without a cause, as the first item says."""
    if batch[0] == "raise":
        raise Later(SOON)
    if batch[0] == "raise from":
        try:
            raise KeyError("service")  # noqa: EM101, TRY301 - a cause with a traceback
        except KeyError as exc:
            raise Later(SOON) from exc
    later = Later(SOON)
    if batch[0] == "return from":
        later.__cause__ = KeyError("service")
    return [later] * len(batch)


def fail_at_first(batch: list[int]) -> list[Any]:
    """Raise at first, then return exceptions, then twice the items."""
    attempt = _attempt()
    if attempt == 1:
        msg = "at first"
        raise ConnectionError(msg)
    if attempt == 2:
        return [ConnectionError(item) for item in batch]
    return [item * 2 for item in batch]


def crash_at_first(batch: list[int]) -> list[int]:
    """End the process at first."""
    if _attempt() == 1:
        os._exit(3)
    return [item * 2 for item in batch]


def hang_at_first(batch: list[int]) -> list[int]:
    """Exceed any time limit at first."""
    if _attempt() == 1:
        threading.Event().wait()
    return [item * 2 for item in batch]


def end_slowly(batch: list[tuple[Path, str]]) -> list[str]:
    """Note the one item; if it is slow, hang until the interrupt, and then until there is a file."""
    ((folder, name),) = batch
    if name == "slow":
        try:
            worker_functions.note(folder, "begun", name)
            threading.Event().wait()
        finally:
            worker_functions.note(folder, "interrupted", str(os.getpid()))
            worker_functions.wait_for(folder / "end")
    worker_functions.note(folder, "begun", name)
    return [name]


def put_off_when_interrupted(batch: list[tuple[Path, str]]) -> list[str]:
    """Note the one item; if it is to hang, hang until the interrupt, and put it off then."""
    ((folder, name),) = batch
    if name == "hang":
        try:
            worker_functions.note(folder, "begun", name)
            threading.Event().wait()
        finally:
            raise Later(1e6)
    worker_functions.note(folder, "begun", name)
    return [name]


def put_off_by_file(batch: list[tuple[Any, ...]]) -> list[str]:
    """Note the one item, wait for its file, and put it off for ever if it is called so."""
    ((folder, name, *_),) = batch
    worker_functions.note(folder, "begun", name)
    if name in ("put-off", "hold"):
        worker_functions.wait_for(folder / name)
    if name == "put-off":
        raise Later(1e6)
    return [name]


def put_off_at_first(batch: list[tuple[Path, int]]) -> list[int]:
    """Note the items; put every second batch off at first."""
    for folder, number in batch:
        worker_functions.note(folder, "begun", str(number))
    if _attempt() == 1 and batch[0][1] % 4 == 0:
        raise Later(SOON)
    return [number * 2 for _, number in batch]
