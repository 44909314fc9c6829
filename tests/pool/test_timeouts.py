"""`WorkerPool.run(timeout=)`: calls that run for too long, and workers that hang."""

from __future__ import annotations

import asyncio
import math
import os
import re
import signal
import sys
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

from async_batcher import WorkerPool
from async_batcher.exceptions import (
    BatchTimeoutError,
)
from tests.support import worker_functions as work
from tests.support.polling import wait_for_exit, wait_until
from tests.support.worker_pools import METHODS, may_warn_of_fork, numbers, pids_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="no event loop there watches sockets"),
    may_warn_of_fork,
]


HANGS: dict[str, Callable[..., Any]] = {
    "waits": signal.pause,
    "stopped": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "in_c": lambda: sum(range(10**12)),
    "in_re": lambda: re.match(r"(a+)+$", "a" * 60 + "b"),
    "deaf": lambda: (signal.signal(signal.SIGTERM, signal.SIG_IGN), signal.pause()),  # type: ignore[func-returns-value]
}


# Start methods differ in how the exit of the worker is seen.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "method"),
    [*((way, METHODS[0]) for way in HANGS), *(("stopped", method) for method in METHODS[1:])],
)
async def test_a_batch_that_hangs(tmp_path: Path, way: str, method: str) -> None:
    """Its worker is killed, and no other: the call beside it ends in its own worker."""
    async with WorkerPool(2, mp_context=method) as pool:
        beside = asyncio.ensure_future(pool.run(work.note_pid_and_wait, tmp_path, [1]))
        await wait_until(lambda: numbers(tmp_path, "pid"))
        (other,) = numbers(tmp_path, "pid")
        (victim,) = set(pids_of(pool)) - {other}
        with pytest.raises(
            BatchTimeoutError, match=rf"longer than 0\.2 seconds.*{victim}"
        ) as caught:
            await pool.run(HANGS[way], timeout=0.2)
        assert isinstance(caught.value, TimeoutError)
        await wait_for_exit([victim])
        assert not beside.done()
        (tmp_path / "go").touch()
        assert await beside == [1]
        assert other in pids_of(pool)
        await wait_until(lambda: [worker.state for worker in pool.workers()] == ["idle"] * 2)


@pytest.mark.slow
async def test_a_timeout_that_is_not_reached(pool: WorkerPool) -> None:
    """It changes nothing, neither at once nor later."""
    before = pids_of(pool)
    assert [await pool.run(abs, -i, timeout=2.0) for i in range(20)] == list(range(20))
    loop = asyncio.get_running_loop()
    start = loop.time()
    await wait_until(lambda: loop.time() > start + 2.2)
    assert pids_of(pool) == before


async def test_an_infinite_timeout(pool: WorkerPool) -> None:
    """``math.inf`` disables the timeout."""
    assert await pool.run(abs, -1, timeout=math.inf) == 1


@pytest.mark.slow
async def test_queue_time_does_not_count(tmp_path: Path) -> None:
    """The timeout runs from when the function starts."""
    async with WorkerPool(1) as pool:
        first = asyncio.ensure_future(pool.run(work.note_pid_and_wait, tmp_path, [0]))
        await wait_until(lambda: work.noted(tmp_path, "pid"))
        second = asyncio.ensure_future(pool.run(abs, -1, timeout=2.0))
        loop = asyncio.get_running_loop()
        start = loop.time()
        await wait_until(lambda: loop.time() > start + 2.2)
        assert not second.done()
        (tmp_path / "go").touch()
        assert await second == 1
        await first


@pytest.mark.slow
async def test_a_halted_idle_worker(pool: WorkerPool) -> None:
    """Another worker runs what a halted worker was sent and has not started."""
    pids = await asyncio.gather(*(pool.run(os.getpid) for _ in range(20)))
    victim = pids[-1]  # the next batch goes to the one that was busy last
    os.kill(victim, signal.SIGSTOP)
    results = await asyncio.gather(*(pool.run(os.getpid, timeout=2.0) for _ in range(4)))
    assert victim not in results
    await wait_for_exit([victim])


@pytest.mark.slow
async def test_calls_that_take_as_long_as_their_timeout(pool: WorkerPool) -> None:
    """Each caller gets the result or `BatchTimeoutError`, and nothing else."""
    import time

    def take(seconds: float) -> float:
        time.sleep(seconds)
        return seconds

    async def one(seconds: float) -> str:
        try:
            return "result" if await pool.run(take, seconds, timeout=0.05) == seconds else "wrong"
        except BatchTimeoutError:
            return "timeout"

    results = Counter(await asyncio.gather(*(one(0.044 + i * 0.0003) for i in range(40))))
    assert set(results) <= {"result", "timeout"}
    assert await pool.run(abs, -1) == 1
