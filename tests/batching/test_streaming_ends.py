"""How a stream ends: errors, cancellation, leaving early, and stops."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

import pytest

from async_batcher.exceptions import BatcherStoppedError, BatchTimeoutError
from tests.support.polling import turn
from tests.support.sources import ITERATIONS, Consumer, Source, SyncSource, readable
from tests.support.virtual_clock import FakeBatcher

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

pytestmark = pytest.mark.virtual_clock


async def test_aclosing_closes_the_source_before_the_block_ends() -> None:
    """Queued items are dropped and abandoned batches cancelled by then."""
    batcher = FakeBatcher(max_batch_size=2, cancel_abandoned=True, max_queue_time=1000.0)
    source = Source()
    async with contextlib.aclosing(batcher.map(source)) as results:
        first = asyncio.ensure_future(anext(results))
        await turn(20)
        batcher.runner.end()
        assert await first == 0
    assert source.closed_in is not None
    assert batcher.stats().queued == 0
    assert batcher.runner.cancelled == [([2, 3], True)]
    assert len(asyncio.all_tasks()) == 1
    await batcher.stop()


async def test_a_cancelled_consumer_closes_the_source() -> None:
    """Cancelling the consumer closes the source and drops queued items."""
    batcher = FakeBatcher()
    source = Source()
    consumer = Consumer(batcher.map(source))
    await turn(8)
    consumer.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await consumer.task
    assert source.closed_in is not None
    assert batcher.stats().queued == 0
    await batcher.stop(force=True)


async def test_an_error_of_closing_the_source_is_raised() -> None:
    """aclose() raises the exception of the source."""
    batcher = FakeBatcher(max_batch_size=1, max_queue_time=1000.0)
    source = Source()
    source.fails_at_close = True
    results = batcher.map(SyncSource(source))
    first = asyncio.ensure_future(anext(results))
    await turn(20)
    batcher.runner.end()
    assert await first == 0
    with pytest.raises(OSError, match="cannot be closed"):
        await results.aclose()
    await batcher.stop(force=True)


@pytest.mark.parametrize("way", ITERATIONS)
async def test_leaving_early_closes_the_source_and_drops_queued_items(way: str) -> None:
    """Running batches finish, and their results are dropped."""
    batcher = FakeBatcher(max_batch_size=2, max_queue_time=1000.0)
    source = Source()

    async def leave_early() -> None:
        async for result in batcher.map(readable(source, way)):
            assert result == 0
            break

    task = asyncio.create_task(leave_early())
    await turn(20)
    batcher.runner.end()
    await task
    await turn(20)  # the loop closes the generator
    assert source.closed_in is not None
    assert (batcher.stats().queued, batcher.stats().running) == (0, 0)
    assert batcher.batches == [[0, 1], [2, 3]]
    batcher.runner.end()
    await batcher.stop()


@pytest.mark.parametrize("force", [True, False])
async def test_stop_ends_a_stream(force: bool) -> None:
    """Items that were read run, unless forced; then the consumer gets an error."""
    batcher = FakeBatcher(max_batch_size=2, max_queue_time=1000.0)
    source = Source()
    consumer = Consumer(batcher.map(source, window=6, return_exceptions=True))
    await turn(20)
    stopping = asyncio.create_task(batcher.stop(force=force))
    while not stopping.done():
        await turn(8)
        if batcher.runner.running:
            batcher.runner.end()
    with pytest.raises(BatcherStoppedError):
        await consumer.task
    plain = [result for result in consumer.taken if not isinstance(result, BatcherStoppedError)]
    assert plain == ([] if force else list(range(6)))
    assert source.closed_in is not None


async def test_a_stream_fails_when_every_slot_has_leaked() -> None:
    """Queued items and the next one read fail, and the consumer gets BatchTimeoutError."""
    batcher = FakeBatcher(max_batch_size=1, max_queue_time=1000.0)
    consumer = Consumer(batcher.map(Source(), window=4, return_exceptions=True))
    await turn(20)
    batcher.runner.on_timeouts[0](BatchTimeoutError("too long"))
    with pytest.raises(BatchTimeoutError, match="every batch"):
        await consumer.task
    assert [type(result) for result in consumer.taken] == [BatchTimeoutError] * 4
    await batcher.stop(force=True)


async def test_a_stream_of_a_stopped_batcher_is_an_error() -> None:
    """The consumer gets BatcherStoppedError, and the source is not read."""
    batcher = FakeBatcher()
    await batcher.stop()
    source = Source()
    with pytest.raises(BatcherStoppedError):
        await anext(batcher.map(SyncSource(source)))
    assert source.read == 0


async def test_a_cancelled_feeder_is_an_error() -> None:
    """If the reading task is cancelled, the consumer learns that the stream is incomplete."""
    batcher = FakeBatcher(max_batch_size=2, max_queue_time=1000.0)
    consumer = Consumer(batcher.map(Source(), window=4))
    await turn(20)
    for task in asyncio.all_tasks() - {asyncio.current_task(), consumer.task}:
        task.cancel()
    while not consumer.task.done():
        await turn(8)
        if batcher.runner.running:
            batcher.runner.end()
    with pytest.raises(RuntimeError, match="was cancelled"):
        await consumer.task
    assert consumer.taken == list(range(4))
    await batcher.stop()


@pytest.mark.parametrize("why", ["stop", "the end", "asyncio.run"])
async def test_a_source_that_is_closing_is_not_cancelled(why: str) -> None:
    """Its cleanup may take time, however the stream has ended."""
    cleaned = []

    async def source() -> AsyncIterator[int]:
        try:
            for item in range(3 if why == "the end" else 10**6):
                yield item
                await asyncio.sleep(0)
        finally:
            await asyncio.sleep(1.0)
            cleaned.append(True)

    batcher = FakeBatcher(max_batch_size=3, max_queue_time=1000.0)
    consumer = Consumer(batcher.map(source()))
    await turn(30)
    if why == "stop":
        stopping = asyncio.create_task(batcher.stop(force=True))
        with pytest.raises(BatcherStoppedError):
            await consumer.task
        await stopping
    elif why == "the end":
        batcher.runner.end()
        await consumer.task
    else:
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        await asyncio.gather(consumer.task, return_exceptions=True)
    assert cleaned == [True]
    await batcher.stop(force=True)


async def test_a_consumer_cancelled_while_the_source_closes() -> None:
    """It still waits for the source, then raises CancelledError."""
    closing = asyncio.Event()
    ended = []

    async def source() -> AsyncIterator[int]:
        try:
            while True:
                yield 0
        finally:
            closing.set()
            try:
                await asyncio.sleep(1000.0)
            finally:
                ended.append(True)

    batcher = FakeBatcher(max_batch_size=2)
    consumer = Consumer(batcher.map(source()), allowed=1)
    await turn(20)
    consumer.task.cancel()
    await closing.wait()
    consumer.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await consumer.task
    assert ended == [True]
    assert len(asyncio.all_tasks()) == 1
    await batcher.stop(force=True)


async def test_a_cancelled_source_is_an_error_of_the_source() -> None:
    """The consumer has not been cancelled, so it gets a RuntimeError."""

    async def source() -> AsyncIterator[int]:
        yield 0
        raise asyncio.CancelledError

    batcher = FakeBatcher()
    consumer = Consumer(batcher.map(source()))
    await turn(8)
    batcher.runner.end()
    with pytest.raises(RuntimeError, match="was cancelled"):
        await consumer.task
    assert consumer.taken == [0]
    await batcher.stop()


@pytest.mark.parametrize("way", ITERATIONS)
@pytest.mark.parametrize("ordered", [True, False])
async def test_a_source_error_comes_after_the_results_before_it(way: str, ordered: bool) -> None:
    """Earlier results come first, even if their batches finish after the error."""
    batcher = FakeBatcher(max_batch_size=2, concurrency=2, max_queue_time=1000.0)
    source = Source(4, ZeroDivisionError("source"))
    consumer = Consumer(batcher.map(readable(source, way), ordered=ordered))
    await turn(30)
    assert source.closed_in is not None
    assert not consumer.task.done()
    batcher.runner.end(0)
    batcher.runner.end(0)
    with pytest.raises(ZeroDivisionError, match="source"):
        await consumer.task
    assert consumer.taken == [0, 1, 2, 3]
    await batcher.stop()


@pytest.mark.parametrize("ordered", [True, False])
async def test_a_failing_item_ends_the_stream_in_its_place(ordered: bool) -> None:
    """Earlier results come first, queued items never run, and the source is closed."""
    batcher = FakeBatcher(max_batch_size=2, max_queue_time=1000.0)
    source = Source()
    consumer = Consumer(batcher.map(source, ordered=ordered))
    await turn(30)
    batcher.runner.end(0, [0, ZeroDivisionError("one")])
    with pytest.raises(ZeroDivisionError, match="one"):
        await consumer.task
    assert consumer.taken == [0]
    assert source.closed_in is not None
    assert batcher.stats().queued == 0
    batcher.runner.end()
    await turn(8)
    assert batcher.batches == [[0, 1], [2, 3]]
    await batcher.stop()
