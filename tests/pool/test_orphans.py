"""Workers that become children of the program: it is PID 1 of a container, or a subreaper."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest

from tests.support import scripts
from tests.support.worker_pools import METHODS

if TYPE_CHECKING:
    from pathlib import Path

_SUBREAPER = """
    import asyncio, ctypes, gc, os, signal, subprocess, time, warnings
    warnings.simplefilter("ignore")
    assert ctypes.CDLL(None).prctl(36, 1, 0, 0, 0) == 0  # PR_SET_CHILD_SUBREAPER
    from async_batcher import WorkerPool

    def stat(pid):
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()

    def children():
        found = {}
        for name in filter(str.isdigit, os.listdir("/proc")):
            try:
                state, parent = stat(name)[:2]
            except OSError:
                continue
            if int(parent) == os.getpid():
                found[int(name)] = state
        return found

    async def use():
        global kept
        kept = WorkerPool(2, mp_context=METHOD)
        await kept.start()
        await kept.run(abs, -1)
        pids.update(worker.pid for worker in kept.workers())
        if WAY == "server":
            os.kill(int(stat(kept.workers()[0].pid)[1]), signal.SIGKILL)
        if WAY != "loop":
            kept = None
            gc.collect()
            await asyncio.sleep(0.01)

    pids = set()
    own = subprocess.Popen(["sh", "-c", "exit 3"])
    for _ in range(3):
        asyncio.run(use())
        kept = None
        gc.collect()
    deadline = time.monotonic() + 15
    while left := children().keys() & pids:
        assert time.monotonic() < deadline, left
        time.sleep(0.01)
    assert children()[own.pid] == "Z"
    assert own.wait() == 3
    print(len(pids))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="subreapers")
@pytest.mark.parametrize(
    ("way", "method"),
    [*((way, method) for way in ("drop", "loop") for method in METHODS), ("server", METHODS[0])],
)
def test_workers_of_a_dropped_pool_are_reaped(tmp_path: Path, way: str, method: str) -> None:
    """Also if its loop or its fork server has ended; other children are left to the program."""
    pytest.importorskip("ctypes")
    text = _SUBREAPER.replace("METHOD", repr(method)).replace("WAY", repr(way))
    assert scripts.run_script(tmp_path, text) == "6\n"
