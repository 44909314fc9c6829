"""Batches that are interrupted before their worker is killed: at a time limit, without callers."""

from __future__ import annotations

import asyncio
import functools
import os
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING

import pytest

from async_batcher import WorkerPool, batched
from async_batcher._pool.state import time_limits
from async_batcher._worker import signals
from async_batcher._worker.user_function import UserFunction
from async_batcher.exceptions import BatchTimeoutError
from async_batcher.stats import WorkerCounts
from tests.support import hanging_functions as hanging
from tests.support import scripts
from tests.support import worker_functions as work
from tests.support import worker_setups as setups
from tests.support.polling import wait_for_exit, wait_until
from tests.support.worker_pools import METHODS, may_warn_of_fork, numbers, pids_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="no event loop there watches sockets"),
    may_warn_of_fork,
]

LIMIT = 0.3  # seconds; the function must have begun


async def _import_functions(pool: WorkerPool) -> None:
    """Have the worker import them: while it does, it is not interrupted."""
    await pool.run(repr, hanging.SlowToLoad)


@pytest.mark.slow
@pytest.mark.parametrize("way", hanging.WAYS)
@pytest.mark.usefixtures("long_graces")
async def test_finally_blocks_at_a_time_limit(tmp_path: Path, way: str) -> None:
    """The caller gets its error at the limit; user code gets KeyboardInterrupt, which says why."""
    async with WorkerPool(1) as pool:
        await _import_functions(pool)
        (pid,) = pids_of(pool)
        with pytest.raises(BatchTimeoutError, match=f"{pid} was interrupted and replaced"):
            await pool.run(hanging.note_the_end, tmp_path, way, timeout=LIMIT)
        await wait_for_exit([pid])
        (seen,) = work.noted(tmp_path, "finally")
        assert seen.startswith("KeyboardInterrupt('the batch ran for longer than its timeout")
        assert work.noted(tmp_path, "exception") == []
        assert await pool.run(os.getpid) != pid
        await wait_until(lambda: pool.worker_counts() == WorkerCounts(2, {"timeout": 1}, 0))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.usefixtures("long_graces")
async def test_a_worker_that_replies_is_stopped(tmp_path: Path, method: str) -> None:
    """Its exit handlers and tear-downs run, even if user code has suppressed the interrupt."""

    def process_batch(batch: list[Path]) -> list[Path]:
        try:
            time.sleep(60)
        except KeyboardInterrupt:
            work.note(batch[0], "interrupted")
        return batch

    def set_up() -> Iterator[None]:
        yield from setups.set_up(tmp_path)

    async with WorkerPool(1, mp_context=method) as pool:
        batcher = batched(process_batch, setup_worker=set_up, executor=pool, batch_timeout=LIMIT)
        with pytest.raises(BatchTimeoutError):
            await batcher(tmp_path)
        await wait_until(lambda: work.noted(tmp_path, "down"))
        assert len(work.noted(tmp_path, "interrupted")) == 1
        assert work.noted(tmp_path, "down")[0] in work.noted(tmp_path, "up")
        await batcher.stop()
        await wait_until(lambda: pool.worker_counts().crashed == {"timeout": 1})


@pytest.mark.slow
async def test_user_code_that_suppresses_the_interrupt(tmp_path: Path) -> None:
    """Its worker is killed a moment later."""
    async with WorkerPool(1) as pool:
        await _import_functions(pool)
        (pid,) = pids_of(pool)
        with pytest.raises(BatchTimeoutError):
            await pool.run(hanging.suppress_interrupts, tmp_path, timeout=LIMIT)
        await wait_for_exit([pid])
        await wait_until(lambda: pool.worker_counts().crashed == {"timeout": 1})


def _is_exiting_beside_another(pool: WorkerPool) -> bool:
    return sorted(worker.state for worker in pool.workers()) == ["exiting", "idle"]


@pytest.mark.slow
@pytest.mark.parametrize("way", ["reply", "force", "drop", "without loop"])
async def test_stops_while_a_batch_is_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """Another worker takes calls meanwhile. A stop waits; one by force kills, as does any end."""
    monkeypatch.setattr(time_limits, "INTERRUPT_GRACE", work.DEADLINE)
    pool = WorkerPool(1)
    await _import_functions(pool)
    with pytest.raises(BatchTimeoutError):
        await pool.run(hanging.suppress_interrupts, tmp_path, timeout=LIMIT)
    (pid,) = numbers(tmp_path, "begun")
    assert await pool.run(os.getpid) != pid
    assert scripts.is_alive(pid)
    await wait_until(functools.partial(_is_exiting_beside_another, pool))
    await wait_until(lambda: work.noted(tmp_path, "interrupted"))
    if way == "reply":
        stop = asyncio.ensure_future(pool.stop())
        await asyncio.sleep(0.05)
        assert not stop.done()
        (tmp_path / "go").touch()
        await stop
        assert not scripts.is_alive(pid)
    elif way == "force":
        async with asyncio.timeout(work.DEADLINE / 2):
            await pool.stop(force=True)
        assert not scripts.is_alive(pid)
    elif way == "without loop":
        await asyncio.sleep(0.1)  # nothing is left to do on the loop
        pool._lifecycle.session.close_without_loop()  # type: ignore[union-attr]
    del pool
    await wait_for_exit([pid])


@pytest.mark.slow
@pytest.mark.usefixtures("long_graces")
async def test_finally_blocks_of_an_abandoned_batch(tmp_path: Path) -> None:
    """With ``cancel_abandoned``, a batch without callers is interrupted, too."""

    def process_batch(batch: list[Path]) -> list[Path]:
        hanging.note_the_end(batch[0], "sleep")
        return batch

    async with WorkerPool(1) as pool:
        batcher = batched(process_batch, executor=pool, cancel_abandoned=True)
        call = asyncio.ensure_future(batcher(tmp_path))
        await wait_until(lambda: numbers(tmp_path, "begun"))
        call.cancel()
        await wait_until(lambda: work.noted(tmp_path, "finally"))
        await wait_until(lambda: pool.worker_counts().crashed == {"abandoned": 1})
        await batcher.stop()


@pytest.mark.slow
async def test_only_the_function_is_interrupted(tmp_path: Path) -> None:
    """Not what unpickles its items, nor by a signal that the pool has not sent."""

    def interrupt_self() -> str:
        os.kill(os.getpid(), signal.SIGURG)
        time.sleep(0.01)
        return "not interrupted"

    async with WorkerPool(1) as pool:
        assert await pool.run(interrupt_self) == "not interrupted"
        await _import_functions(pool)
        (pid,) = pids_of(pool)
        with pytest.raises(BatchTimeoutError):
            await pool.run(repr, hanging.SlowToLoad(tmp_path), timeout=LIMIT)
        await wait_for_exit([pid])
        assert numbers(tmp_path, "begun") == [pid]
        assert work.noted(tmp_path, "finally") == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["function", "generator"])
def test_interrupts_at_any_moment(kind: str) -> None:
    """An interrupt is the outcome of the batch, or has no effect; it is raised nowhere else."""

    def process_batch(batch: list[int]) -> list[int]:
        return [item for item in batch for _ in "12"][::2]

    def generate(batch: list[int]) -> Iterator[int]:
        yield from process_batch(batch)

    chosen = process_batch if kind == "function" else generate
    function = UserFunction(chosen, by_keyword=False, setup=None)
    batch, main = list(range(20)), threading.main_thread().ident
    assert main is not None
    done = threading.Event()
    counts: dict[type, int] = {list: 0, KeyboardInterrupt: 0}

    def send() -> None:
        while not done.is_set():
            signal.pthread_kill(main, signal.SIGURG)
            time.sleep(50e-6)

    before = signal.getsignal(signal.SIGURG)
    sender = threading.Thread(target=send)
    signals.handle_interrupt(lambda: True)
    try:
        sender.start()
        deadline = time.monotonic() + work.DEADLINE
        while min(counts.values()) < 50 and time.monotonic() < deadline:
            outcome = function.run(batch)
            assert outcome == batch or type(outcome) is KeyboardInterrupt
            counts[type(outcome)] += 1
    finally:
        done.set()
        sender.join()
        signal.signal(signal.SIGURG, before)
    assert min(counts.values()) == 50
