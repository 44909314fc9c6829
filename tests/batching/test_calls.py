"""`submit`, and calls from inside a batch."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import pytest

from async_batcher import AsyncBatcher, batched
from tests.support.batchers import async_echo, process_all

pytestmark = pytest.mark.usefixtures("no_noise")
every_loop = pytest.mark.every_loop
needs_eager_tasks = pytest.mark.skipif(
    sys.version_info < (3, 12), reason="eager tasks came with Python 3.12"
)


@every_loop
async def test_a_batch_may_call_another_batcher() -> None:
    """process_batch may await items of another batcher."""
    async with batched(async_echo, max_queue_time=0) as inner:

        @batched(max_queue_time=0)
        async def outer(batch: list[int]) -> list[int]:
            return list(await asyncio.gather(*(inner.process(item * 10) for item in batch)))

        assert await process_all(outer, 1, 2, 3) == [10, 20, 30]
        await outer.stop()


@every_loop
async def test_a_batch_may_call_its_own_batcher() -> None:
    """With a free slot, process_batch may submit to the batcher that runs it."""

    class Countdown(AsyncBatcher[int, int]):
        async def process_batch(self, batch: list[int]) -> list[int]:
            return [0 if item == 0 else 1 + await self.submit(item - 1) for item in batch]

    async with Countdown(concurrency=6, max_queue_time=0) as batcher:
        assert await process_all(batcher, 5) == [5]
        assert await process_all(batcher, 3) == [3]


@needs_eager_tasks
@pytest.mark.slow
async def test_ten_thousand_eager_batches_in_a_row() -> None:
    """Batches that finish before `submit` returns do not grow the stack."""
    if not isinstance(asyncio.get_running_loop(), asyncio.BaseEventLoop):
        pytest.skip("uvloop does not support eager tasks on every Python")
    asyncio.get_running_loop().set_task_factory(asyncio.eager_task_factory)  # type: ignore[attr-defined,unused-ignore]
    async with batched(async_echo, max_batch_size=1) as batcher:
        assert await asyncio.gather(*(batcher.process(item) for item in range(10_000))) == list(
            range(10_000)
        )
        assert await asyncio.gather(*(batcher.submit(item) for item in range(10_000))) == list(
            range(10_000)
        )
    gate = asyncio.Event()

    async def gated(batch: list[int]) -> list[int]:
        if not gate.is_set():
            await gate.wait()
        return batch

    async with batched(gated, max_batch_size=1) as batcher:  # the others wait for the first
        futures = [batcher.submit(item) for item in range(10_000)]
        gate.set()
        assert await asyncio.gather(*futures) == list(range(10_000))


@every_loop
async def test_submit_returns_an_ordinary_future() -> None:
    """It works with gather, shield, wait_for and callbacks."""
    async with batched(async_echo, max_batch_size=10) as batcher:
        assert await asyncio.gather(*map(batcher.submit, range(25))) == list(range(25))
        future = batcher.submit("x")
        seen: list[asyncio.Future[Any]] = []
        future.add_done_callback(seen.append)
        assert await asyncio.wait_for(asyncio.shield(future), 5.0) == "x"
        await asyncio.sleep(0)
        assert seen == [future]
        assert future.get_loop() is asyncio.get_running_loop()
        assert "finished" in repr(future)


def test_submit_needs_a_running_loop() -> None:
    """Without a running event loop submit() raises RuntimeError."""
    with pytest.raises(RuntimeError, match="no running event loop"):
        batched(async_echo).submit(1)
