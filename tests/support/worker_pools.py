"""What tests of worker pools share."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from async_batcher._pool.state import supervisor
from tests.support import worker_functions as work

if TYPE_CHECKING:
    from async_batcher import WorkerPool

METHODS = ["forkserver", "spawn", "fork"] if sys.platform == "linux" else ["forkserver", "spawn"]

# From Python 3.12 a fork beside other threads warns.
may_warn_of_fork = pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")


class FakeFunction:
    """Stands for a pickled function."""

    payload = (False, b"", ())
    name = "f"

    def __init__(self, key: bytes, *, has_setup: bool) -> None:
        self.key = key
        self.has_setup = has_setup


def pids_of(pool: WorkerPool) -> list[int]:
    """Return the process ids of a pool's workers."""
    return [worker.pid for worker in pool.workers() if worker.pid is not None]


def numbers(folder: Path, kind: str) -> list[int]:
    """Return the complete numbers that workers have noted."""
    return [int(text) for text in work.noted(folder, kind) if text]


def parent_of(pid: int) -> int:
    """Return the parent of a process, from /proc."""
    return int(Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()[1])


def no_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retry failed starts sooner."""
    monkeypatch.setattr(supervisor, "_BACKOFF_DELAYS", (0.01, 0.02, 0.03))
