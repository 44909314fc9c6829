"""`start`, `stop` and ``async with`` on real event loops."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from async_batcher import AsyncBatcher, batched
from async_batcher.exceptions import BatcherStoppedError
from tests.support.batchers import async_echo, echo, make_batcher, process_all
from tests.support.worker_functions import DEADLINE

pytestmark = pytest.mark.usefixtures("no_noise")
every_loop = pytest.mark.every_loop


@every_loop
async def test_leaving_async_with_drains_the_queue() -> None:
    """The queued items run; then the batcher is stopped."""
    async with batched(async_echo, max_queue_time=3600) as batcher:
        assert await batcher.is_running()
        futures = [batcher.submit(item) for item in range(3)]
    assert [future.result() for future in futures] == [0, 1, 2]
    assert not await batcher.is_running()
    with pytest.raises(BatcherStoppedError, match="start"):
        await batcher.process(1)
    async with batcher:
        batcher.max_queue_time = 0
        assert await batcher.process(1) == 1


@every_loop
async def test_an_exception_in_async_with_forces_the_stop() -> None:
    """The callers get BatcherStoppedError, and the exception propagates."""
    forever = asyncio.Event()

    @batched(max_batch_size=1)
    async def process_batch(batch: list[int]) -> None:
        assert len(batch) == 1
        await forever.wait()

    futures: list[asyncio.Future[Any]] = []
    with pytest.raises(ZeroDivisionError):  # noqa: PT012 - tests the block
        async with process_batch:
            futures += [process_batch.submit(item) for item in range(3)]
            await asyncio.sleep(0)
            raise ZeroDivisionError
    assert [type(future.exception()) for future in futures] == [BatcherStoppedError] * 3
    assert len(asyncio.all_tasks()) == 1


@every_loop
@pytest.mark.parametrize("way", ["force", "timeout", "cancel"])
async def test_no_batch_coroutine_outlives_a_stop(way: str) -> None:
    """After a forced, timed-out or cancelled stop no batch runs and no caller waits."""
    forever = asyncio.Event()
    ended: list[int] = []

    async def wait(batch: list[int]) -> None:
        try:
            await forever.wait()
        finally:
            ended.extend(batch)

    process_batch = make_batcher(wait, max_batch_size=1, concurrency=2)
    calls = [asyncio.ensure_future(process_batch.process(item)) for item in range(4)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    if way == "force":
        await process_batch.stop(force=True)
    elif way == "timeout":
        with pytest.raises(TimeoutError):
            await process_batch.stop(timeout=0)
    else:
        stopping = asyncio.ensure_future(process_batch.stop())
        await asyncio.sleep(0)
        stopping.cancel()
        with pytest.raises(asyncio.CancelledError):
            await stopping
    assert sorted(ended) == [0, 1]
    errors = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(error) for error in errors] == [BatcherStoppedError] * 4
    assert len(asyncio.all_tasks()) == 1


async def test_stop_waits_for_a_thread() -> None:
    """A drain returns when the batch in the thread has finished."""
    gate = threading.Event()

    def process_batch(batch: list[int]) -> list[int]:
        gate.wait(30)
        return batch

    async with batched(
        process_batch, max_queue_time=0, executor="thread", max_workers=1
    ) as batcher:
        future = batcher.submit(1)
        await asyncio.sleep(0)
        stopping = asyncio.ensure_future(batcher.stop())
        for _ in range(10):
            await asyncio.sleep(0)
        assert not stopping.done()
        gate.set()
        await stopping
        assert future.result() == 1


async def test_a_forced_stop_does_not_wait_for_a_thread() -> None:
    """Its callers fail at once; the thread, which cannot be stopped, finishes its batch."""
    gate, entered = threading.Event(), threading.Event()

    def process_batch(batch: list[int]) -> list[int]:
        entered.set()
        gate.wait(30)
        return batch

    batcher = batched(process_batch, max_queue_time=0, executor="thread", max_workers=1)
    future = batcher.submit(1)
    await asyncio.get_running_loop().run_in_executor(None, entered.wait, DEADLINE)
    await batcher.stop(force=True)
    assert isinstance(future.exception(), BatcherStoppedError)
    gate.set()


async def test_a_given_executor_is_left_running() -> None:
    """The batcher does not shut down an executor that it was given, not even by force."""
    with ThreadPoolExecutor(1) as executor:
        for force in (False, True):
            batcher = batched(echo, executor=executor)
            assert await batcher.process(1) == 1
            await batcher.stop(force=force)
        assert executor.submit(echo, [1]).result() == [1]


@pytest.mark.parametrize("force", [False, True])
async def test_stop_during_a_set_up_in_a_thread(force: bool) -> None:
    """The set-up does not block the loop, not even one that waits for the loop."""
    loop = asyncio.get_running_loop()
    entered, loop_ran, finished = threading.Event(), threading.Event(), threading.Event()
    in_time: list[bool] = []

    def setup_worker() -> None:
        entered.set()
        in_time.append(loop_ran.wait(DEADLINE))
        finished.set()

    batcher = batched(echo, setup_worker=setup_worker, executor="thread", max_workers=1)
    starting = asyncio.ensure_future(batcher.start())
    await loop.run_in_executor(None, entered.wait, DEADLINE)
    loop.call_later(0.01, loop_ran.set)
    await batcher.stop(force=force)
    await asyncio.wait([starting], timeout=DEADLINE)
    assert starting.done()
    starting.exception()
    await loop.run_in_executor(None, finished.wait, DEADLINE)
    assert in_time == [True], "the loop was blocked"


@every_loop
async def test_a_forced_stop_during_an_async_set_up() -> None:
    """The caller of start() gets BatcherStoppedError."""
    never = asyncio.Event()

    async def setup_worker() -> None:
        await never.wait()

    batcher = batched(async_echo, setup_worker=setup_worker)
    starting = asyncio.ensure_future(batcher.start())
    for _ in range(3):
        await asyncio.sleep(0)
    await batcher.stop(force=True)
    await asyncio.wait([starting], timeout=1)
    done = starting.done()
    starting.cancel()
    assert done
    with pytest.raises(BatcherStoppedError):
        await starting


@every_loop
async def test_stop_inside_process_batch_is_an_error() -> None:
    """stop() in a batch raises instead of deadlocking, and the batcher runs on."""

    class Stopper(AsyncBatcher[int, str]):
        async def process_batch(self, batch: list[int]) -> list[str]:
            with pytest.raises(RuntimeError, match="force=True"):
                await self.stop()
            return ["alive" for _ in batch]

    batcher = Stopper(max_queue_time=0)
    assert await process_all(batcher, 1) == ["alive"]
    assert await process_all(batcher, 2) == ["alive"]
    await batcher.stop()


@every_loop
async def test_a_batch_can_stop_its_batcher_by_force() -> None:
    """Its callers fail at once, and the batch is cancelled."""
    ended = asyncio.Event()

    class Stopper(AsyncBatcher[int, str]):
        async def process_batch(self, batch: list[int]) -> None:  # noqa: ARG002 - never returns
            try:
                await self.stop(force=True)
            finally:
                ended.set()

    batcher = Stopper(max_queue_time=0)
    errors = await process_all(batcher, 1, 2)
    assert [type(error) for error in errors] == [BatcherStoppedError] * 2
    await asyncio.wait_for(ended.wait(), 5.0)
    assert not await batcher.is_running()


async def test_is_running_from_start_to_stop() -> None:
    """is_running() is true from the first call or start() to the stop."""
    batcher = batched(async_echo, max_queue_time=0)
    assert not await batcher.is_running()
    await batcher.process(1)
    assert await batcher.is_running()
    await batcher.stop()
    assert not await batcher.is_running()
    await batcher.start()
    assert await batcher.is_running()
    await batcher.stop(force=True)
    assert not await batcher.is_running()
