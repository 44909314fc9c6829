"""Worker records, and workers that are replaced because of age or memory."""

from __future__ import annotations

import asyncio
import atexit
import dataclasses
import os
import signal
import sys
import time
from collections import Counter
from typing import TYPE_CHECKING

import pytest

from async_batcher import WorkerPool, batched
from async_batcher.exceptions import (
    WorkerDiedError,
)
from tests.support import worker_functions as work
from tests.support.polling import wait_for_exit, wait_until
from tests.support.worker_pools import METHODS, may_warn_of_fork, numbers, pids_of

if TYPE_CHECKING:
    from pathlib import Path


pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="no event loop there watches sockets"),
    may_warn_of_fork,
]


async def test_worker_info(tmp_path: Path) -> None:
    """A frozen record has the process id, the state, the number of batches and the memory."""
    pool = WorkerPool(2)
    start = asyncio.ensure_future(pool.start())
    await asyncio.sleep(0)
    assert [worker.state for worker in pool.workers()] == ["starting"] * 2
    await start
    workers = pool.workers()
    assert [(worker.state, worker.batches) for worker in workers] == [("idle", 0)] * 2
    assert len({worker.pid for worker in workers}) == 2
    assert all(1 << 20 < worker.memory < 1 << 30 for worker in workers)
    with pytest.raises(dataclasses.FrozenInstanceError):
        workers[0].batches = 3  # type: ignore[call-arg, misc, unused-ignore]
    call = asyncio.ensure_future(pool.run(work.note_pid_and_wait, tmp_path, [0]))
    await wait_until(lambda: numbers(tmp_path, "pid"))
    busy = {worker.pid: worker.state for worker in pool.workers()}
    assert busy[numbers(tmp_path, "pid")[0]] == "busy"
    assert sorted(busy.values()) == ["busy", "idle"]
    (tmp_path / "go").touch()
    await call
    for _ in range(4):
        await pool.run(abs, -1)
    assert sum(worker.batches for worker in pool.workers()) == 5
    await pool.stop()
    assert pool.workers() == []


async def test_worker_memory(pool: WorkerPool) -> None:
    """Memory that a batch keeps shows in the record of its worker alone."""

    def keep() -> int:
        import builtins

        builtins.kept = bytearray(b"x" * (50 << 20))  # type: ignore[attr-defined]
        return os.getpid()

    pid = await pool.run(keep)
    memory = {worker.pid: worker.memory for worker in pool.workers()}
    assert memory[pid] > 50 << 20
    assert min(memory.values()) < 50 << 20


@pytest.mark.slow
@pytest.mark.parametrize("most", [1, 2, 5])
@pytest.mark.parametrize("method", METHODS)
async def test_max_tasks_per_child(method: str, most: int) -> None:
    """Each worker runs exactly that many batches, or fewer if it is still there."""
    async with WorkerPool(2, mp_context=method, max_tasks_per_child=most) as pool:
        done = Counter(await asyncio.gather(*(pool.run(os.getpid) for _ in range(16))))
        for _ in range(5):
            done[await pool.run(os.getpid)] += 1
        left = pids_of(pool)
    assert sum(done.values()) == 21
    assert max(done.values()) <= most
    assert all(count == most for pid, count in done.items() if pid not in left)


@pytest.mark.parametrize("by_start", [False, True], ids=["by call", "by start"])
async def test_only_batches_count(by_start: bool) -> None:
    """Neither loading a function ahead nor asking for a missing class is a batch."""

    class Local:
        pass

    async with WorkerPool(1, max_tasks_per_child=2) as pool:
        batcher = batched(work.pids, executor=pool, max_batch_size=1, max_queue_time=0)
        if by_start:
            await batcher.start()
            assert [worker.batches for worker in pool.workers()] == [0]
        done = Counter([await batcher(Local()) for _ in range(8)])
        await batcher.stop()
    assert list(done.values()) == [2, 2, 2, 2]


async def test_a_replacement_is_ready_ahead(tmp_path: Path) -> None:
    """The replacement starts while a worker runs its last batch, and takes the next one."""
    async with WorkerPool(1, max_tasks_per_child=1) as pool:
        (first,) = pids_of(pool)
        call = asyncio.ensure_future(pool.run(work.note_pid_and_wait, tmp_path, [0]))
        await wait_until(lambda: [worker.state for worker in pool.workers()] == ["busy", "idle"])
        (second,) = set(pids_of(pool)) - {first}
        queued = asyncio.ensure_future(pool.run(os.getpid))
        await wait_until(lambda: numbers(tmp_path, "pid") == [first])
        assert not queued.done(), "one worker means one batch at a time"
        (tmp_path / "go").touch()
        await call
        assert await queued == second


async def test_a_worker_that_crashes_when_its_replacement_is_ready(tmp_path: Path) -> None:
    """The replacement takes its place, and there are no more workers than before."""
    async with WorkerPool(1, max_tasks_per_child=1) as pool:
        call = asyncio.gather(
            pool.run(work.note_pid_and_wait, tmp_path, [0]), return_exceptions=True
        )
        await wait_until(lambda: [worker.state for worker in pool.workers()] == ["busy", "idle"])
        await wait_until(lambda: numbers(tmp_path, "pid"))
        os.kill(numbers(tmp_path, "pid")[0], signal.SIGKILL)
        assert [type(error) for error in await call] == [WorkerDiedError]
        assert isinstance(await pool.run(os.getpid), int)
        await wait_until(
            lambda: (
                len([worker for worker in pool.workers() if worker.state in ("idle", "starting")])
                == 1
            )
        )


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
async def test_max_memory_per_child(method: str) -> None:
    """A worker above the limit is replaced when its replacement is ready, and not before."""

    def grow() -> int:
        import builtins

        builtins.kept = bytearray(b"x" * (80 << 20))  # type: ignore[attr-defined]
        return os.getpid()

    async with WorkerPool(1, mp_context=method, max_memory_per_child=60 << 20) as pool:
        usual = pids_of(pool)
        if method == "fork" and pool.workers()[0].memory > 50 << 20:
            pytest.skip("this process is large itself")
        assert [await pool.run(os.getpid) for _ in range(5)] == usual * 5
        grown = await pool.run(grow)
        pids = [await pool.run(os.getpid) for _ in range(3)]
        while pids[-1] == grown:
            pids.append(await pool.run(os.getpid))
        assert len(set(pids) - {grown}) == 1
        await wait_until(lambda: pids_of(pool) == [pids[-1]])
        await wait_for_exit([grown])


@pytest.mark.slow
async def test_a_replaced_worker_has_time_for_its_exit_handlers(tmp_path: Path) -> None:
    """More than the 2 seconds that idle workers get when the pool is stopped by force."""

    def end_slowly() -> None:
        time.sleep(2.5)
        work.note(tmp_path, "ended")

    async with WorkerPool(1, max_tasks_per_child=1) as pool:
        await pool.run(atexit.register, end_slowly)
        await wait_until(lambda: work.noted(tmp_path, "ended"))
