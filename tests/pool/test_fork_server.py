"""The fork server, when it is killed or halted."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from typing import TYPE_CHECKING

import pytest

from async_batcher import WorkerPool
from async_batcher.exceptions import (
    PoolBrokenError,
    WorkerDiedError,
)
from tests.support import worker_functions as work
from tests.support.polling import wait_for_exit, wait_until
from tests.support.worker_pools import may_warn_of_fork, numbers, parent_of, pids_of

if TYPE_CHECKING:
    from pathlib import Path


pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="no event loop there watches sockets"),
    may_warn_of_fork,
]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
async def test_the_fork_server_is_killed(tmp_path: Path) -> None:
    """Its workers go on, their exits are seen, and new workers come from a new server."""
    async with WorkerPool(2, mp_context="forkserver") as pool:
        call = asyncio.ensure_future(pool.run(work.note_pid_and_wait, tmp_path, [1]))
        await wait_until(lambda: numbers(tmp_path, "pid"))
        before = pids_of(pool)
        server = parent_of(before[0])
        assert server not in (os.getpid(), 1)
        os.kill(server, signal.SIGKILL)
        await wait_for_exit([server])
        assert not call.done()
        (busy,) = numbers(tmp_path, "pid")
        (idle,) = set(before) - {busy}
        assert await pool.run(os.getpid) == idle
        with pytest.raises(WorkerDiedError) as caught:
            await pool.run(work.exit_now, 3)
        assert caught.value.pid == idle
        assert await pool.run(os.getpid) not in before
        (tmp_path / "go").touch()
        assert await call == [1]
        await wait_until(lambda: [worker.state for worker in pool.workers()] == ["idle"] * 2)
        (new,) = set(pids_of(pool)) - {busy}
        assert parent_of(new) != server


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
async def test_the_fork_server_is_killed_with_all_workers() -> None:
    """The next calls find new workers, and no caller gets an error."""
    async with WorkerPool(2, mp_context="forkserver") as pool:
        pids = pids_of(pool)
        server = parent_of(pids[0])
        for pid in (server, *pids):
            os.kill(pid, signal.SIGKILL)
        await wait_for_exit([server, *pids])
        results = await asyncio.gather(*(pool.run(os.getpid) for _ in range(10)))
        assert not set(results) & set(pids)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
async def test_the_fork_server_is_halted() -> None:
    """When a worker is not ready in time, another server starts it, and the call ends well."""
    async with WorkerPool(1, mp_context="forkserver", start_timeout=5.0) as pool:
        (pid,) = pids_of(pool)
        server = parent_of(pid)
        os.kill(server, signal.SIGSTOP)
        os.kill(pid, signal.SIGKILL)
        new = await pool.run(os.getpid)
        await wait_for_exit([server])
        assert parent_of(new) != server


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
async def test_a_requeued_call_after_failed_starts(tmp_path: Path) -> None:
    """A call that its crashed worker never started is run or fails; it does not hang."""

    def refuse(folder: Path) -> None:
        while (folder / "wait").exists():
            time.sleep(0.01)
        if (folder / "refuse").exists():
            msg = "no licence"
            raise RuntimeError(msg)

    pool = WorkerPool(2, initializer=refuse, initargs=(tmp_path,))
    await pool.start()
    halted, killed = pids_of(pool)
    (tmp_path / "wait").touch()
    (tmp_path / "refuse").touch()
    os.kill(killed, signal.SIGKILL)
    await wait_until(lambda: killed not in pids_of(pool) and len(pids_of(pool)) == 2)
    os.kill(halted, signal.SIGSTOP)
    call = asyncio.create_task(pool.run(abs, -1))
    await wait_until(lambda: any(worker.state == "busy" for worker in pool.workers()))
    os.kill(parent_of(halted), signal.SIGSTOP)
    server = parent_of(halted)
    (tmp_path / "wait").unlink()
    os.kill(halted, signal.SIGKILL)
    await asyncio.sleep(0.2)  # the failed start and the crash are reported together, most often
    os.kill(server, signal.SIGCONT)
    with pytest.raises(PoolBrokenError, match="no licence"):
        await asyncio.wait_for(call, work.DEADLINE)
    await pool.stop()
