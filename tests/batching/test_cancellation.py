"""Cancelled callers and timeouts around calls, on real event loops."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from async_batcher import batched
from async_batcher.exceptions import BatcherStoppedError
from tests.support.batchers import async_echo, make_batcher, process_all

pytestmark = pytest.mark.usefixtures("no_noise")
every_loop = pytest.mark.every_loop


@every_loop
async def test_a_submitted_future_can_be_cancelled_in_any_way() -> None:
    """Cancelled itself, by a gather, its task or a timeout: a queued item never runs."""
    ran: list[Any] = []

    @batched(max_queue_time=0.02)
    async def process_batch(batch: list[str]) -> list[str]:
        ran.extend(batch)
        return batch

    async def wait(future: asyncio.Future[str]) -> str:
        return await future

    direct = process_batch.submit("direct")
    assert direct.cancel("why")
    gathered = asyncio.gather(
        process_batch.submit("gathered"), process_batch.submit("gathered too")
    )
    gathered.cancel()
    task = asyncio.ensure_future(wait(process_batch.submit("awaited")))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(process_batch.submit("timed out"), 0)
    kept = process_batch.submit("kept")
    assert await kept == "kept"
    for future in (direct, gathered, task):
        with pytest.raises(asyncio.CancelledError):
            await future
    assert ran == ["kept"]
    await process_batch.stop()


@every_loop
async def test_a_timeout_around_process_affects_its_caller_only() -> None:
    """It gets TimeoutError; the other callers, also of its batch, get their results."""
    gate = asyncio.Event()

    @batched(max_batch_size=2)
    async def process_batch(batch: list[int]) -> list[int]:
        await gate.wait()
        return batch

    stays = asyncio.ensure_future(process_batch.process(1))
    await asyncio.sleep(0)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await process_batch.process(2)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(process_batch.process(3), 0.01)
    gate.set()
    assert await stays == 1
    await process_batch.stop()


async def test_a_coroutine_batch_abandoned_before_it_starts_never_runs(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It never starts, and does not count as a failure."""
    batches: list[list[int]] = []

    @batched(max_batch_size=2, max_queue_time=1000.0)
    async def process_batch(batch: list[int]) -> list[int]:
        batches.append(batch)
        return batch

    calls = [asyncio.create_task(process_batch(item)) for item in range(2)]
    await asyncio.sleep(0)
    assert not batches
    for call in calls:
        call.cancel()
    assert await process_all(process_batch, 2, 3) == [2, 3]
    assert batches == [[2, 3]]
    await process_batch.stop()
    assert caplog.records == []


async def test_a_batch_abandoned_while_it_waits_for_a_thread_never_runs() -> None:
    """A free thread skips batches without callers."""
    batches: list[list[int]] = []
    started, go_on = threading.Event(), threading.Event()

    def process_batch(batch: list[int]) -> list[int]:
        batches.append(batch)
        started.set()
        assert go_on.wait(30.0)
        return batch

    with ThreadPoolExecutor(1) as executor:
        batcher = batched(process_batch, executor=executor, max_batch_size=1, concurrency=4)
        calls = [asyncio.create_task(batcher(item)) for item in range(4)]
        await asyncio.to_thread(started.wait, 30.0)
        for call in calls[1:3]:
            call.cancel()
        await asyncio.wait(calls[1:3])
        go_on.set()
        assert [await calls[0], await calls[3]] == [0, 3]
        await batcher.stop()
    assert batches == [[0], [3]]


async def test_a_failure_without_callers_is_no_unretrieved_exception() -> None:
    """If callers were cancelled, or their coroutine closed, asyncio logs nothing."""
    gate = asyncio.Event()

    async def fail(batch: list[int]) -> None:
        await gate.wait()
        assert len(batch) == 3
        msg = "without callers"
        raise ValueError(msg)

    process_batch = make_batcher(fail, max_batch_size=3)
    cancelled = asyncio.ensure_future(process_batch.process(1))
    closed = process_batch.process(2)
    closed.send(None)
    submitted = process_batch.submit(3)
    await asyncio.sleep(0)
    cancelled.cancel()
    closed.close()
    submitted.cancel()
    gate.set()
    await process_batch.stop()


async def test_a_rejected_call_is_no_unretrieved_exception() -> None:
    """For a rejected call asyncio logs nothing."""
    batcher = batched(async_echo)
    await batcher.stop()
    for _ in range(3):
        with pytest.raises(BatcherStoppedError):
            batcher.submit(1)
        with pytest.raises(BatcherStoppedError):
            await batcher.process(1)
