"""Set-ups for workers, with and without a tear-down; see `worker_functions`."""

from __future__ import annotations

import atexit
import os
import time
from typing import TYPE_CHECKING

from tests.support.worker_functions import fail_by, note, noted, wait_for, where

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def set_up(folder: Path, name: str = "") -> Iterator[None]:
    """Record when and where set-up and tear-down run."""
    note(folder, f"{name}up", str(where()))
    yield
    note(folder, f"{name}down", str(where()))


def slow_set_up(folder: Path, seconds: float) -> Iterator[None]:
    """Take some time."""
    note(folder, "begun", str(os.getpid()))
    time.sleep(seconds)
    yield from set_up(folder)


def gated_set_up(folder: Path) -> None:
    """Wait for the test."""
    note(folder, "begun", str(os.getpid()))
    wait_for(folder / "go")


def gated_after_first(folder: Path, process: int, way: str) -> None:
    """Wait, raise or exit in every process but the first ones."""
    note(folder, "begun", str(os.getpid()))
    if process <= len(noted(folder, "passed")):
        if way == "hang":
            wait_for(folder / "go")
        elif way == "raise":
            msg = "not here"
            raise LookupError(msg)
        else:
            fail_by(way)
    note(folder, "passed")
    note(folder, "up", str(where()))


def failing_tear_down() -> Iterator[None]:
    """Raise in the tear-down."""
    yield
    msg = "the connection is gone"
    raise OSError(msg)


def yields_twice() -> Iterator[None]:
    """Yield twice."""
    yield
    yield


def hangs_in_tear_down(folder: Path) -> Iterator[None]:
    """Wait for the test in the tear-down."""
    yield
    note(folder, "begun", str(os.getpid()))
    wait_for(folder / "go")


def waits_in_tear_down(folder: Path) -> Iterator[None]:
    """Take a moment in the tear-down."""
    note(folder, "up", str(where()))
    yield
    note(folder, "begun")
    time.sleep(0.2)
    note(folder, "down", str(where()))


def notes_its_exit(folder: Path) -> None:
    """Record that the process runs its exit handlers."""
    atexit.register(note, folder, "exit")


def notes_its_exit_and_tears_down(folder: Path) -> Iterator[None]:
    """Record exit handlers and the tear-down."""
    notes_its_exit(folder)
    yield
    note(folder, "down")


def hangs_at_first(folder: Path) -> None:
    """Wait for the test, in the first process only."""
    note(folder, "begun", str(os.getpid()))
    if len(noted(folder, "begun")) == 1:
        wait_for(folder / "go")
