"""What a worker inherits of the program."""

from __future__ import annotations

import multiprocessing
import os
import sys

import pytest

from async_batcher import WorkerPool
from tests.support.worker_pools import METHODS, may_warn_of_fork

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="no event loop there watches sockets"),
    may_warn_of_fork,
]


@pytest.mark.parametrize("method", METHODS)
async def test_multiprocessing_and_logging_know_the_worker(method: str) -> None:
    """They tell workers from the main process, and from each other."""
    async with WorkerPool(1, mp_context=method) as pool:
        assert await pool.run(_names) == ("async_batcher worker 0", os.getpid(), True)


def _names() -> tuple[str | None, int | None, bool]:
    import logging

    record = logging.makeLogRecord({})
    parent = multiprocessing.parent_process()
    assert parent is not None
    return record.processName, parent.pid, parent.is_alive()
