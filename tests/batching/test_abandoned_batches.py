"""Batches whose callers were all cancelled or timed out, on a virtual clock."""

from __future__ import annotations

import asyncio

import pytest

from async_batcher import AsyncBatcher, Later, retry
from async_batcher.exceptions import BatcherStoppedError, ItemTimeoutError
from tests.support.polling import turn
from tests.support.virtual_clock import FAKE, FakeBatcher, now

pytestmark = pytest.mark.virtual_clock


@pytest.mark.parametrize("ends", [True, False])
async def test_an_abandoned_batch_is_cancelled(ends: bool) -> None:
    """When its last caller leaves: with cancel_abandoned also if the batch has started."""
    batcher = FakeBatcher(max_batch_size=3, cancel_abandoned=ends)
    calls = [batcher.call(0), batcher.call(1, timeout=3.0)]
    future = batcher.submit(2)
    await turn()
    assert batcher.batches == [[2, 0, 1]]
    calls[0].cancel()
    await asyncio.sleep(4.0)
    assert isinstance(calls[1].exception(), ItemTimeoutError)
    assert batcher.runner.cancelled == []
    future.cancel()
    await turn()
    assert batcher.runner.cancelled == [([2, 0, 1], ends)]
    assert bool(batcher.runner.running) is not ends
    following = batcher.call("next")
    await turn()
    assert batcher.batches[1:] == ([["next"]] if ends else [])
    batcher.runner.end()
    await turn()
    if not ends:
        batcher.runner.end()
    assert await following == "next"
    await batcher.stop()


async def test_a_batch_abandoned_at_once_is_cancelled_once() -> None:
    """All of its callers are cancelled in one iteration."""
    batcher = FakeBatcher(max_batch_size=100, cancel_abandoned=True)
    calls = [batcher.call(item) for item in range(100)]
    await turn()
    for call in calls:
        call.cancel()
    await turn()
    assert batcher.runner.cancelled == [([*range(100)], True)]
    assert not batcher.runner.running
    await batcher.stop()


async def test_an_abandoned_coroutine_is_cancelled() -> None:
    """The batch's task is cancelled, and the next batch gets its slot."""
    cancelled: list[list[int]] = []

    class Slow(AsyncBatcher[int, int]):
        async def process_batch(self, batch: list[int]) -> list[int]:
            try:
                await asyncio.sleep(100.0 if batch == [0] else 0.0)
            except asyncio.CancelledError:
                cancelled.append(batch)
                raise
            return batch

    batcher = Slow(max_batch_size=1, cancel_abandoned=True)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(batcher.process(0), 1.0)
    start = now()
    assert await batcher.process(1) == 1
    assert now() < start + 1.0
    assert cancelled == [[0]]
    await batcher.stop()


@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize("after", [5.0, None])
async def test_a_batch_that_is_put_off_while_it_is_cancelled(
    after: float | None, ends: bool
) -> None:
    """The batcher pauses, although no caller is left, for the time that a policy says."""
    begun: list[float] = []

    class PutOff(AsyncBatcher[int, int]):
        async def process_batch(self, batch: list[int]) -> list[int]:
            begun.append(now())
            if len(begun) > 1:
                return batch
            try:
                await asyncio.sleep(2.0)
            finally:
                raise Later(after)

    policy = retry(Later, backoff=5.0, max_backoff=5.0)
    batcher = PutOff(max_batch_size=1, cancel_abandoned=ends, on_failure=policy)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(batcher.process(0), 1.0)
    assert await batcher.process(1) == 1
    assert begun[1] - begun[0] == pytest.approx(6.0 if ends else 7.0, abs=0.1)
    await batcher.stop()


@pytest.mark.parametrize("stops", [False, True])
async def test_a_batch_that_was_cancelled_is_put_off_when_it_has_ended(stops: bool) -> None:
    """A worker replies after the slot was released; nothing pauses after a stop by force."""
    batcher = FakeBatcher(cancel_abandoned=True)
    future = batcher.submit(0)
    await turn()
    future.cancel()
    await turn()
    assert not batcher.runner.running
    waiting = batcher.call("next", timeout=10.0)
    if stops:
        await batcher.stop(force=True)
    batcher.runner.on_laters[0](Later(5.0))
    await turn()
    if stops:
        assert isinstance(waiting.exception(), BatcherStoppedError)
        assert batcher.batches == [[0]]
        return
    assert batcher.batches == [[0]]
    await asyncio.sleep(4.9)
    assert batcher.batches == [[0]]
    await asyncio.sleep(0.2)
    assert batcher.batches == [[0], ["next"]]
    batcher.runner.end()
    assert await waiting == "next"
    await batcher.stop()


async def test_a_failure_of_an_abandoned_batch_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """A batch that was cancelled because it was abandoned is not logged."""
    for ends in (False, True):
        batcher = FakeBatcher(cancel_abandoned=ends)
        future = batcher.submit(0)
        await turn()
        future.cancel()
        await turn()
        while batcher.runner.running:
            batcher.runner.end(0, ZeroDivisionError())
        await batcher.stop()
    assert [record.message for record in caplog.records] == [
        f"{FAKE}: a batch of 1 item failed: ZeroDivisionError"
    ]
