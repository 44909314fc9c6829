"""`WorkerPool.restart_workers`."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from functools import partial
from typing import TYPE_CHECKING

import pytest

from async_batcher import WorkerPool, batched
from async_batcher._transport.protocol import MAX_CACHED_FUNCTIONS
from async_batcher.exceptions import BatcherStoppedError, PoolBrokenError, WorkerDiedError
from tests.support import worker_functions as work
from tests.support.polling import wait_for_exit, wait_until
from tests.support.worker_pools import (
    METHODS,
    may_warn_of_fork,
    no_backoff,
    numbers,
    parent_of,
    pids_of,
)

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="no event loop there watches sockets"),
    may_warn_of_fork,
]


def wait_if_told(folder: Path) -> None:
    """Wait for a file while another one is there, or raise; an initializer."""
    if (folder / "wait").exists():
        work.wait_for(folder / "go")
    if (folder / "refuse").exists():
        msg = "no licence"
        raise RuntimeError(msg)


@pytest.mark.parametrize("method", METHODS)
async def test_every_worker_is_replaced(tmp_path: Path, method: str) -> None:
    """The new ones have run the initializer and the set-ups before they take batches."""

    def set_up(folder: Path = tmp_path) -> None:
        work.note(folder, "setup", str(os.getpid()))

    async with WorkerPool(
        2, mp_context=method, initializer=work.note, initargs=(tmp_path, "initializer")
    ) as pool:
        async with batched(work.pids, executor=pool, setup_worker=set_up) as batcher:
            old = pids_of(pool)
            await pool.restart_workers()
            new = pids_of(pool)
            assert not set(old) & set(new)
            await wait_for_exit(old)
            assert sorted(numbers(tmp_path, "setup")) == sorted([*old, *new])
            assert len(work.noted(tmp_path, "initializer")) == 4
            assert [worker.state for worker in pool.workers()] == ["idle"] * 2
            assert await batcher(0) in new
        assert "restarted" in [event for _, event, *_ in pool.debug_state()["events"]]


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
async def test_the_fork_server_is_started_anew() -> None:
    """New workers come from a new one; the old one ends with its last worker."""
    async with WorkerPool(2, mp_context="forkserver") as pool:
        server = parent_of(pids_of(pool)[0])
        await pool.restart_workers()
        parents = {parent_of(pid) for pid in pids_of(pool)}
        assert len(parents) == 1
        assert server not in parents
        await wait_for_exit([server])


async def test_busy_workers_finish_their_batches(tmp_path: Path) -> None:
    """No call is lost or runs twice, and a worker takes batches until its replacement is ready."""
    async with WorkerPool(2, initializer=wait_if_told, initargs=(tmp_path,)) as pool:
        old = pids_of(pool)
        (tmp_path / "wait").touch()
        restart = asyncio.ensure_future(pool.restart_workers())
        await wait_until(lambda: len(pool.workers()) == 3)
        used = await asyncio.gather(*(pool.run(os.getpid) for _ in range(20)))
        assert set(used) <= set(old)
        calls = [
            asyncio.ensure_future(pool.run(work.note_pid_and_wait, tmp_path, [n])) for n in range(4)
        ]
        await wait_until(lambda: len(numbers(tmp_path, "pid")) == 2)
        assert not restart.done()
        (tmp_path / "go").touch()
        assert await asyncio.gather(*calls) == [[0], [1], [2], [3]]
        assert len(numbers(tmp_path, "pid")) == 4
        await restart
        assert not set(pids_of(pool)) & set(old)


async def test_a_replacement_that_cannot_be_started(tmp_path: Path) -> None:
    """The error has the cause; all workers work on, and a later restart may succeed."""
    async with WorkerPool(2, initializer=wait_if_told, initargs=(tmp_path,)) as pool:
        old = pids_of(pool)
        (tmp_path / "refuse").touch()
        with pytest.raises(PoolBrokenError, match=r"could not be restarted.*no licence") as caught:
            await pool.restart_workers()
        assert isinstance(caught.value.__cause__, RuntimeError)
        assert pids_of(pool) == old
        used = await asyncio.gather(*(pool.run(os.getpid) for _ in range(20)))
        assert set(used) <= set(old)
        (tmp_path / "refuse").unlink()
        await pool.restart_workers()
        assert len(pids_of(pool)) == 2
        assert not set(pids_of(pool)) & set(old)


@pytest.mark.parametrize("what", ["raise", "raise much", "crash"])
async def test_a_set_up_that_fails_in_a_replacement(
    tmp_path: Path, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The error has the cause, and is logged; all workers work on."""

    def set_up() -> None:
        if (tmp_path / "raise").exists():
            msg = "no such model"
            raise FileNotFoundError(msg)
        if (tmp_path / "raise much").exists():
            msg = "no such model"
            raise FileNotFoundError(msg, bytes(3_000_000))
        if (tmp_path / "crash").exists():
            os._exit(9)

    async with (
        WorkerPool(2) as pool,
        batched(work.pids, executor=pool, setup_worker=set_up) as batcher,
    ):
        old = pids_of(pool)
        (tmp_path / what).touch()
        match = "exited with exit code 9.*setup_worker" if what == "crash" else "no such model"
        with pytest.raises(PoolBrokenError, match=f"could not be restarted.*{match}") as caught:
            await pool.restart_workers()
        cause = WorkerDiedError if what == "crash" else FileNotFoundError
        assert isinstance(caught.value.__cause__, cause)
        await wait_until(lambda: pids_of(pool) == old)
        assert str(caught.value) in caplog.text
        assert {await batcher(0) for _ in range(20)} <= set(old)
        (tmp_path / what).unlink()
        await pool.restart_workers()
        assert not set(pids_of(pool)) & set(old)


async def test_all_workers_crash_during_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends; if no other ones can be started, the next call says so."""
    no_backoff(monkeypatch)
    pool = WorkerPool(1, initializer=wait_if_told, initargs=(tmp_path,))
    await pool.start()
    (pid,) = pids_of(pool)
    (tmp_path / "wait").touch()
    (tmp_path / "refuse").touch()
    restart = asyncio.ensure_future(pool.restart_workers())
    await wait_until(lambda: len(pids_of(pool)) == 2)
    os.kill(pid, 9)
    await wait_until(lambda: pid not in pids_of(pool))
    async with asyncio.timeout(work.DEADLINE):
        await restart
        (tmp_path / "go").touch()
        with pytest.raises(PoolBrokenError, match="no licence"):
            await pool.run(abs, -1)
    await pool.stop()


async def test_a_restart_of_a_pool_with_many_functions() -> None:
    """More than a worker keeps: the new one is ready all the same."""
    async with WorkerPool(1) as pool, contextlib.AsyncExitStack() as batchers:
        for number in range(MAX_CACHED_FUNCTIONS + 2):
            batcher = batched(partial(work.scaled, number), executor=pool)
            await batchers.enter_async_context(batcher)
        async with asyncio.timeout(work.DEADLINE):
            await pool.restart_workers()
            assert await batcher(1) == MAX_CACHED_FUNCTIONS + 1


@pytest.mark.parametrize("force", [False, True])
async def test_a_stop_during_a_restart(tmp_path: Path, force: bool) -> None:
    """Both end."""
    pool = WorkerPool(2, initializer=wait_if_told, initargs=(tmp_path,))
    await pool.start()
    (tmp_path / "wait").touch()
    restart = asyncio.ensure_future(pool.restart_workers())
    await wait_until(lambda: len(pids_of(pool)) == 3)
    async with asyncio.timeout(work.DEADLINE):
        await pool.stop(force=force)
        with pytest.raises(BatcherStoppedError):
            await restart


async def test_two_restarts_at_a_time(pool: WorkerPool) -> None:
    """Each returns when the workers of its call have exited."""
    old = pids_of(pool)
    first = asyncio.ensure_future(pool.restart_workers())
    await wait_until(lambda: not set(old) <= set(pids_of(pool)))
    present = pids_of(pool)
    await asyncio.gather(first, pool.restart_workers())
    assert not {*old, *present} & set(pids_of(pool))
    assert len(pids_of(pool)) == 2


async def test_a_cancelled_restart_goes_on(pool: WorkerPool) -> None:
    """The workers are replaced all the same."""
    old = pids_of(pool)
    restart = asyncio.ensure_future(pool.restart_workers())
    await asyncio.sleep(0)
    restart.cancel()
    await wait_until(lambda: not set(old) & set(pids_of(pool)))


async def test_a_pool_without_workers() -> None:
    """One that has not been used starts none; a stopped one raises."""
    pool = WorkerPool(1)
    await pool.restart_workers()
    assert pool.workers() == []
    await pool.run(abs, -1)
    await pool.stop()
    with pytest.raises(BatcherStoppedError):
        await pool.restart_workers()
