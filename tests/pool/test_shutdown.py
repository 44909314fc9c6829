"""`WorkerPool.stop`, and what ends a pool without it."""

from __future__ import annotations

import asyncio
import functools
import gc
import os
import signal
import sys
import time
from typing import TYPE_CHECKING

import pytest

from async_batcher import WorkerPool, batched
from async_batcher.exceptions import (
    BatcherStoppedError,
)
from tests.support import scripts
from tests.support import worker_functions as work
from tests.support.batchers import stop_by
from tests.support.polling import block_until, wait_for_exit, wait_until
from tests.support.worker_pools import METHODS, may_warn_of_fork, numbers, pids_of

if TYPE_CHECKING:
    from pathlib import Path


pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="no event loop there watches sockets"),
    may_warn_of_fork,
]


async def test_stop_runs_queued_calls(tmp_path: Path) -> None:
    """It returns after the last call; meanwhile new calls fail. A second stop does nothing."""
    pool = WorkerPool(1)
    calls = asyncio.gather(*(pool.run(work.note_pid_and_wait, tmp_path, [i]) for i in range(4)))
    await wait_until(lambda: work.noted(tmp_path, "pid"))
    stop = asyncio.ensure_future(pool.stop())
    await asyncio.sleep(0)
    with pytest.raises(BatcherStoppedError, match=r"start\(\) reopens"):
        await pool.run(abs, -1)
    assert not stop.done()
    (tmp_path / "go").touch()
    await asyncio.gather(stop, pool.stop())
    assert calls.done()
    assert await calls == [[0], [1], [2], [3]]
    await pool.stop()
    assert pool.workers() == []


@pytest.mark.parametrize("outcome", ["raise", "os._exit"])
def test_a_stop_ends_after_a_callback_has_raised_system_exit(outcome: str) -> None:
    """The stop goes on if the loop runs again."""

    def leave(_: object) -> None:
        raise SystemExit(1)

    async def use() -> asyncio.Future[None]:
        batcher = batched(work.crash_in_batch, executor=pool, on_batch=leave)
        await pool.start()
        call = asyncio.ensure_future(batcher(outcome))
        await asyncio.sleep(0)
        stops.append(asyncio.ensure_future(pool.stop()))
        await asyncio.wait([call])
        raise AssertionError

    async def wait() -> None:
        async with asyncio.timeout(work.DEADLINE):
            await stops[0]

    pool = WorkerPool(1)
    stops: list[asyncio.Future[None]] = []
    with asyncio.Runner() as runner:
        loop = runner.get_loop()
        with pytest.raises(SystemExit):
            loop.run_until_complete(loop.create_task(use()))
        loop.run_until_complete(wait())
    assert pool.workers() == []


@pytest.mark.parametrize("way", ["force", "timeout", "cancel", "exception"])
async def test_forced_stops(tmp_path: Path, way: str) -> None:
    """All callers get an error, and no worker is left.

    The stop is forced by its argument, by its timeout, by a cancellation, or by an exception that
    leaves the ``async with`` block.
    """
    pool = WorkerPool(2)
    calls = asyncio.gather(
        *(pool.run(work.note_pid_and_wait, tmp_path, [i]) for i in range(6)), return_exceptions=True
    )
    await wait_until(lambda: len(numbers(tmp_path, "pid")) == 2)
    if way != "exception":
        await stop_by(way, pool)
    else:
        with pytest.raises(ZeroDivisionError):
            async with pool:
                raise ZeroDivisionError
    assert [type(error) for error in await calls] == [BatcherStoppedError] * 6
    assert pool.workers() == []
    assert not any(scripts.is_alive(pid) for pid in numbers(tmp_path, "pid"))
    with pytest.raises(BatcherStoppedError):
        await pool.run(abs, -1)


def _has_lost_a_worker(pids: list[int]) -> bool:
    return not all(map(scripts.is_alive, pids))


@pytest.mark.parametrize("crashes", [False, True])
async def test_a_caller_that_stops_the_pool_with_its_result(crashes: bool) -> None:
    """A caller resumes while its reply is handled, and may stop the pool there.

    That also holds if its worker's crash is the next event.
    """
    for _ in range(5):
        pool = WorkerPool(2)
        await pool.start()
        pids = pids_of(pool)
        other = asyncio.ensure_future(pool.run(time.sleep, work.DEADLINE))

        async def call_and_stop(pool: WorkerPool = pool) -> None:
            await (pool.run(work.crash_soon, "kill", 0.5) if crashes else pool.run(os.getpid))
            await pool.stop(force=True)

        caller = asyncio.ensure_future(call_and_stop())
        await asyncio.sleep(0)
        if crashes:  # the loop gets both events at once
            block_until(functools.partial(_has_lost_a_worker, pids))
        await asyncio.wait_for(caller, work.DEADLINE)
        with pytest.raises(BatcherStoppedError):
            await other
        assert pool.workers() == []


async def test_a_stop_timeout_that_is_not_reached() -> None:
    """It changes nothing."""
    pool = WorkerPool(1)
    call = asyncio.ensure_future(pool.run(abs, -1))
    await asyncio.sleep(0)
    await pool.stop(timeout=work.DEADLINE)
    assert await call == 1


async def test_a_forced_stop_during_a_stop(tmp_path: Path) -> None:
    """Both return."""
    pool = WorkerPool(1)
    call = asyncio.gather(pool.run(work.note_pid_and_wait, tmp_path, [0]), return_exceptions=True)
    await wait_until(lambda: work.noted(tmp_path, "pid"))
    stop = asyncio.ensure_future(pool.stop())
    await asyncio.sleep(0)
    await pool.stop(force=True)
    await stop
    assert [type(error) for error in await call] == [BatcherStoppedError]


@pytest.mark.slow
async def test_a_stopped_pool_can_be_started_again() -> None:
    """After any stop the pool has new workers."""
    pool = WorkerPool(1)
    pids = set()
    for force in (False, True, False):
        await pool.start()
        pids.add(await pool.run(os.getpid))
        await pool.stop(force=force)
    assert len(pids) == 3


async def test_stop_before_the_first_start() -> None:
    """It closes the pool, and does nothing else."""
    pool = WorkerPool(1)
    await pool.stop()
    with pytest.raises(BatcherStoppedError):
        await pool.run(abs, -1)


@pytest.mark.slow
async def test_a_halted_worker_does_not_delay_the_stop(pool: WorkerPool) -> None:
    """An idle worker that does not exit in time is killed."""
    pids = pids_of(pool)
    os.kill(pids[0], signal.SIGSTOP)
    async with asyncio.timeout(work.DEADLINE / 2):
        await pool.stop()
    assert not any(scripts.is_alive(pid) for pid in pids)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.usefixtures("long_graces")
async def test_exit_handlers_of_a_worker(tmp_path: Path, method: str) -> None:
    """Handlers that user code registers in a worker run there; those of the parent do not."""

    def register(folder: Path) -> None:
        import atexit

        atexit.register(work.note, folder, "exit", str(os.getpid()))

    async with WorkerPool(1, mp_context=method) as pool:
        pids = pids_of(pool)
        await pool.run(register, tmp_path)
    assert numbers(tmp_path, "exit") == pids


@pytest.mark.parametrize("method", METHODS)
async def test_a_pool_that_is_garbage_collected(method: str, tmp_path: Path) -> None:
    """Its workers are killed, idle or busy (conftest)."""
    pool = WorkerPool(2, mp_context=method)
    call = asyncio.ensure_future(pool.run(work.note_pid_and_wait, tmp_path, [0]))
    await wait_until(lambda: numbers(tmp_path, "pid"))
    pids = pids_of(pool)
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    del pool, call
    gc.collect()
    await wait_for_exit(pids)
