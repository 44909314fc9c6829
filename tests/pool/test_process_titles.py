"""Titles of workers and of the fork server, where setproctitle is installed."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from async_batcher import WorkerPool, batched
from tests.support.worker_functions import same
from tests.support.worker_pools import METHODS, may_warn_of_fork, parent_of

pytestmark = [pytest.mark.skipif(sys.platform != "linux", reason="/proc"), may_warn_of_fork]


def _title(pid: int) -> str:
    return Path("/proc", str(pid), "cmdline").read_bytes().strip(b"\0").decode()


def _name(pid: int) -> str:
    return Path("/proc", str(pid), "comm").read_text().strip()


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
async def test_titles(method: str) -> None:
    """A worker's names the function that it has loaded last; the program keeps its own."""
    pytest.importorskip("setproctitle")
    own = _title(os.getpid())

    class Model:
        def predict(self, batch: list[int]) -> list[int]:
            return batch

    async with WorkerPool(1, mp_context=method) as pool:
        pid = await pool.run(os.getpid)
        assert _title(pid) == "async_batcher worker 0"
        assert _name(pid) == "async_batcher"
        for function, name in ((same, "same"), (Model().predict, "Model.predict")):
            batcher = batched(function, executor=pool)
            await batcher(1)
            assert _title(pid) == f"async_batcher worker 0: {name}"
            await batcher.stop()
        if method == "forkserver":
            assert _title(parent_of(pid)) == "async_batcher fork server"
        assert _title(os.getpid()) == own
