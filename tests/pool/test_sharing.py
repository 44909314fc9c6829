"""A pool on several event loops, and shared by several batchers."""

from __future__ import annotations

import asyncio
import os
import sys
from typing import TYPE_CHECKING, Any

import pytest

from async_batcher import WorkerPool, batched
from async_batcher.exceptions import (
    BatcherStoppedError,
)
from tests.support import worker_functions as work
from tests.support.polling import wait_for_exit, wait_until
from tests.support.worker_pools import METHODS, may_warn_of_fork, pids_of

if TYPE_CHECKING:
    from pathlib import Path


pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="no event loop there watches sockets"),
    may_warn_of_fork,
]


async def test_a_second_event_loop(pool: WorkerPool) -> None:
    """A call there fails with what to do; the pool goes on here."""
    assert await pool.run(abs, -1) == 1

    async def elsewhere() -> None:
        for use in (pool.run(abs, -1), pool.start(), pool.stop()):
            with pytest.raises(RuntimeError, match="another event loop"):
                await use

    await asyncio.to_thread(asyncio.run, elsewhere())
    assert await pool.run(abs, -1) == 1


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pending", ["idle", "busy", "starting", "copying"])
def test_a_loop_that_has_closed(tmp_path: Path, method: str, pending: str) -> None:
    """A pool that was not stopped gets new workers on the next loop; the old ones are killed."""
    pool = WorkerPool(2, mp_context=method)
    pids: list[int] = []

    async def first() -> None:
        if pending == "starting":
            call = asyncio.ensure_future(pool.run(abs, -1))
            await asyncio.sleep(0)
            return
        pids.extend(await asyncio.gather(pool.run(os.getpid), pool.run(os.getpid)))
        if pending == "copying":
            call = asyncio.ensure_future(pool.run(len, bytearray(100 << 20)))
            await asyncio.sleep(0)
        elif pending == "busy":
            call = asyncio.ensure_future(pool.run(work.note_pid_and_wait, tmp_path, [0]))
            await wait_until(lambda: work.noted(tmp_path, "pid"))
            assert not call.done()

    async def last() -> None:
        assert await pool.run(os.getpid) not in pids
        await pool.stop()

    for _ in range(2):
        asyncio.run(first())
    asyncio.run(last())
    asyncio.run(wait_for_exit(pids))


async def test_batchers_take_turns(tmp_path: Path) -> None:
    """A batcher with many batches delays neither another batcher nor a single call."""
    order: list[str] = []
    async with WorkerPool(1) as pool:
        options: dict[str, Any] = {"executor": pool, "max_batch_size": 1, "max_queue_time": 0}
        many, one = batched(work.same, concurrency=100, **options), batched(work.same, **options)
        blocker = asyncio.ensure_future(pool.run(work.note_pid_and_wait, tmp_path, [0]))
        await wait_until(lambda: work.noted(tmp_path, "pid"))

        async def call(name: str, batcher: Any, item: int) -> None:
            assert await batcher(item) == item
            order.append(name)

        crowd = [asyncio.ensure_future(call("many", many, i)) for i in range(50)]
        for _ in range(5):
            await asyncio.sleep(0)
        single = [asyncio.ensure_future(call("one", one, i)) for i in range(2)]
        direct = asyncio.ensure_future(pool.run(abs, -1))
        direct.add_done_callback(lambda _: order.append("direct"))
        for _ in range(5):
            await asyncio.sleep(0)
        (tmp_path / "go").touch()
        await asyncio.gather(blocker, *crowd, *single, direct)
        await many.stop()
        await one.stop()
    assert order.index("one") <= 3
    assert order.index("direct") <= 3
    assert [i for i, name in enumerate(order) if name == "one"][1] <= 8


async def test_a_batcher_on_a_given_pool(pool: WorkerPool) -> None:
    """It runs one batch per worker, and leaves the pool running after any stop."""
    pids = pids_of(pool)
    for force in (False, True):
        async with batched(work.pids, executor=pool, max_batch_size=1) as batcher:
            assert batcher.concurrency == 2
            assert set(await asyncio.gather(*(batcher(i) for i in range(8)))) <= set(pids)
            await batcher.stop(force=force)
    assert await pool.run(abs, -1) == 1
    assert pids_of(pool) == pids


async def test_a_batcher_starts_a_given_pool() -> None:
    """It does not stop the pool."""
    pool = WorkerPool(1)
    async with batched(work.pids, executor=pool) as batcher:
        pid = await batcher(1)
    assert await pool.run(os.getpid) == pid
    await pool.stop()
    with pytest.raises(BatcherStoppedError):
        await batched(work.pids, executor=pool)(1)
