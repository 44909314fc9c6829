"""Functions for workers that hang, and what they do when they are interrupted."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

from tests.support import worker_functions as work

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def _receive() -> None:
    ours, _theirs = socket.socketpair()
    ours.recv(1)


def _spin() -> None:
    while True:
        pass


WAYS: dict[str, Callable[..., Any]] = {
    "sleep": lambda: time.sleep(60),
    "socket": _receive,
    "lock": lambda: threading.Barrier(2).wait(),
    "subprocess": lambda: subprocess.run(["sleep", "60"], check=True),  # noqa: S607 - of the system
    "loop": _spin,
    "event loop": lambda: asyncio.run(asyncio.sleep(60)),
}


def note_the_end(folder: Path, way: str) -> None:
    """Hang, and record how it ends."""
    try:
        work.note(folder, "begun", str(os.getpid()))
        WAYS[way]()
    except Exception:  # noqa: BLE001 - as much code does
        work.note(folder, "exception")
    finally:
        work.note(folder, "finally", repr(sys.exc_info()[1]))


def suppress_interrupts(folder: Path) -> None:
    """Wait for the test, also after an interrupt."""
    try:
        work.note(folder, "begun", str(os.getpid()))
        work.wait_for(folder / "go")
    except KeyboardInterrupt:
        work.note(folder, "interrupted")
        work.wait_for(folder / "go")


class SlowToLoad:
    """An item that takes longer to unpickle than its batch may."""

    def __init__(self, folder: Path) -> None:
        """Keep the folder."""
        self.folder = folder

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Hang."""
        note_the_end(state["folder"], "sleep")
