"""The front end with real loops."""

from __future__ import annotations

import asyncio

import pytest

from async_batcher import AsyncBatcher, batched


class Doubler(AsyncBatcher[int, int]):
    """Doubles on the event loop."""

    async def process_batch(self, batch: list[int]) -> list[int]:
        """Twice each."""
        return [item * 2 for item in batch]


@pytest.mark.every_loop
async def test_each_caller_gets_its_own_result() -> None:
    """Whoever calls gets the result of its own item."""
    async with Doubler(max_batch_size=10) as batcher:
        assert await asyncio.gather(*(batcher.process(item) for item in range(25))) == [item * 2 for item in range(25)]


@pytest.mark.slow
async def test_a_lambda_runs_in_processes() -> None:
    """A function that only this program knows runs in worker processes."""
    async with batched(lambda batch: [item * 2 for item in batch], executor="process", max_workers=1) as double:
        assert await asyncio.gather(*(double(item) for item in range(25))) == [item * 2 for item in range(25)]
