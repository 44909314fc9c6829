"""``batch_timeout`` where no worker can be killed: on the loop, in threads, in a standard pool.

``pool/test_timeouts.py`` tests it with a `WorkerPool`.
"""

from __future__ import annotations

import asyncio
import functools
import importlib
import multiprocessing
import sys
import threading
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

from async_batcher import batched
from async_batcher.exceptions import BatchError, BatchTimeoutError
from tests.support import worker_functions as work
from tests.support.polling import turn
from tests.support.scheduler_rig import Rig

if TYPE_CHECKING:
    from pathlib import Path

SHORT = 0.02  # seconds; batches that time out wait for the test
TIMED_OUT = "timed out"


async def process_fine(batcher: Any) -> None:
    """Process an item that does not wait; on a busy machine it may take longer than `SHORT`."""
    while True:
        try:
            assert await batcher("fine") == "fine"
        except BatchTimeoutError:
            await asyncio.sleep(0)
        else:
            break


def _has_timed_out(future: asyncio.Future[Any]) -> bool:
    return future.done() and type(future.exception()) is BatchTimeoutError


# The event loop, on a virtual clock.


@pytest.mark.virtual_clock
async def test_timed_out_batch_fails_its_callers_and_keeps_its_slot() -> None:
    """Its later outcome is dropped; the next batch waits for its slot."""
    rig = Rig(size=2, slots=2)
    futures = rig.ask_all(0, 1)
    fine = rig.ask_all(2, 3)
    waiting = rig.ask_all(4, 5)
    rig.runner.on_timeouts[0](BatchTimeoutError(TIMED_OUT))
    assert [str(future.exception()) for future in futures] == [TIMED_OUT, TIMED_OUT]
    assert futures[0].exception() is not futures[1].exception()
    await turn()
    assert len(rig.batches) == 2
    rig.runner.end(1)
    assert [future.result() for future in fine] == [2, 3]
    assert len(rig.batches) == 3
    rig.runner.end(0)
    rig.runner.end(0)
    assert [future.result() for future in waiting] == [4, 5]


@pytest.mark.virtual_clock
async def test_with_every_slot_leaked_items_fail() -> None:
    """Queued and new items fail until one of the batches returns."""
    rig = Rig(size=1, slots=2)
    futures = rig.ask_all(0, 1)
    waiting = rig.ask_all(2, 3)
    for on_timeout in rig.runner.on_timeouts:
        on_timeout(BatchTimeoutError(TIMED_OUT))
    assert all(map(_has_timed_out, futures))
    assert all(map(_has_timed_out, waiting))
    assert "until one of them returns" in str(waiting[0].exception())
    with pytest.raises(BatchTimeoutError, match="until one of them returns"):
        rig.ask(4)
    assert rig.timers() == 0
    rig.runner.end(0)
    (again,) = rig.ask_all(5)
    rig.runner.end(1)
    assert again.result() == 5
    rig.runner.end(0)
    assert rig.queue.running == rig.queue.leaked_slots == 0


@pytest.mark.virtual_clock
async def test_timed_out_batch_does_not_block_a_forced_stop() -> None:
    """A forced stop returns at once; a plain one waits for the batch that runs on."""
    rig = Rig(size=1)
    (future,) = rig.ask_all(0)
    rig.runner.on_timeouts[0](BatchTimeoutError(TIMED_OUT))
    stop = asyncio.ensure_future(rig.scheduler.close(force=False, timeout=None))
    await turn()
    assert _has_timed_out(future)
    assert not stop.done()
    rig.runner.end()
    await stop


@pytest.mark.virtual_clock
async def test_timed_out_coroutine_is_cancelled() -> None:
    """Its callers get the error in time, and the next batch runs."""
    ended: list[str] = []

    @batched(max_batch_size=1, batch_timeout=5.0)
    async def process_batch(batch: list[float]) -> list[float]:
        try:
            await asyncio.sleep(batch[0])
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise
        return batch

    loop = asyncio.get_running_loop()
    async with process_batch:
        assert await process_batch(4.9) == 4.9
        began = loop.time()
        with pytest.raises(BatchTimeoutError, match=r"5 seconds"):
            await process_batch(1000.0)
        assert loop.time() - began == pytest.approx(5.0)
        assert await process_batch(1.0) == 1.0
    assert ended == ["cancelled"]


@pytest.mark.virtual_clock
async def test_coroutine_that_suppresses_its_cancellation() -> None:
    """Its callers get the error; its slot is free when it ends."""
    go = asyncio.Event()

    @batched(max_batch_size=1, batch_timeout=1.0)
    async def process_batch(batch: list[str]) -> list[str]:
        while batch[0] == "deaf" and not go.is_set():
            try:
                await go.wait()
            except asyncio.CancelledError:
                continue
        return batch

    async with process_batch:
        with pytest.raises(BatchTimeoutError, match="cancelled, but runs on, and holds its slot"):
            await process_batch("deaf")
        with pytest.raises(BatchTimeoutError, match="until one of them returns"):
            await process_batch("fine")
        go.set()
        await turn()
        await turn()
        assert await process_batch("fine") == "fine"


@pytest.mark.virtual_clock
async def test_users_cancelled_error_is_not_a_timeout() -> None:
    """A CancelledError that the user's code raises in time is not a timeout."""

    @batched(batch_timeout=1.0)
    async def process_batch(_: list[int]) -> list[int]:
        raise asyncio.CancelledError

    async with process_batch:
        with pytest.raises(BatchError):
            await process_batch(1)


# Threads and standard pools.


async def test_timed_out_thread_keeps_its_slot() -> None:
    """The caller gets the error in time; with all slots leaked every caller does."""
    go = threading.Event()

    def process_batch(batch: list[str]) -> list[str]:
        if batch[0] == "slow":
            assert go.wait(work.DEADLINE)
        return batch

    for options in ({"executor": "thread", "max_workers": 2}, {"concurrency": 2}):
        go.clear()
        batcher = batched(process_batch, max_batch_size=1, batch_timeout=SHORT, **options)
        async with asyncio.timeout(work.DEADLINE):
            await process_fine(batcher)
            with pytest.raises(BatchTimeoutError, match="cannot be stopped where it runs"):
                await batcher("slow")
            await process_fine(batcher)
            with pytest.raises(BatchTimeoutError):
                await batcher("slow")
            with pytest.raises(BatchTimeoutError, match="until one of them returns"):
                await batcher("fine")
            go.set()
            await process_fine(batcher)
            await batcher.stop()


@pytest.mark.slow
async def test_batch_timeout_starts_with_the_batch() -> None:
    """The time limit of a batch starts when a thread starts the batch."""
    go = threading.Event()
    with ThreadPoolExecutor(1) as executor:
        executor.submit(go.wait, work.DEADLINE)
        batcher = batched(work.double, executor=executor, max_batch_size=1, batch_timeout=1.0)
        call = asyncio.ensure_future(batcher(1))
        done, _ = await asyncio.wait([call], timeout=1.2)
        assert not done
        go.set()
        assert await call == 2
        await batcher.stop()


def _warm_up(folder: Path) -> None:
    """Load what batches need in this worker, when the other worker is there too."""
    work.note(folder, "warm")
    work.wait_for(folder / "warm-1")
    importlib.import_module("async_batcher._worker.run_batch")


@pytest.mark.slow
async def test_timed_out_batch_of_a_standard_pool_runs_on(tmp_path: Path) -> None:
    """Its caller gets the error, and the other worker goes on."""
    method = "forkserver" if sys.platform != "win32" else "spawn"
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context(method)) as executor:
        batcher = batched(
            functools.partial(work.wait_on_request, tmp_path),
            executor=executor,
            max_batch_size=1,
            batch_timeout=2.0,
        )
        for future in [executor.submit(_warm_up, tmp_path) for _ in range(2)]:
            await asyncio.wrap_future(future)
        await batcher.start()
        async with asyncio.timeout(work.DEADLINE):
            with pytest.raises(BatchTimeoutError, match="executor='process'"):
                await batcher("wait")
            assert await batcher("fine") == "fine"
            (tmp_path / "go").touch()
            await batcher.stop()


@pytest.mark.parametrize("value", [0, -1.0, float("nan")])
def test_batch_timeout_out_of_range(value: float) -> None:
    """The constructor rejects it, with the option's name and value."""
    with pytest.raises(ValueError, match=r"^batch_timeout=.*must be a number of seconds"):
        batched(lambda batch: batch, batch_timeout=value)


@pytest.mark.parametrize("value", ["1", True, [1]])
def test_batch_timeout_that_is_not_a_number(value: Any) -> None:
    """The constructor rejects it, with the option's name and value."""
    with pytest.raises(TypeError, match=r"^batch_timeout=.*must be a number of seconds"):
        batched(lambda batch: batch, batch_timeout=value)
