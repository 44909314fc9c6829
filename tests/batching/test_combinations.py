"""Limits, keys, items that come back, isolation, bulk calls and ``map``, in combination."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from async_batcher import AsyncBatcher, Later, Limit, batched, current_batch, isolate, retry
from tests.support.virtual_clock import now

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = [pytest.mark.usefixtures("no_noise"), pytest.mark.virtual_clock]

ITEMS = list(range(40))
RATE, SECONDS = 12, 1.0
PER_BATCH = 9
BAD = {7, 20, 33}


def cost(item: int) -> int:
    """Return the cost of an item."""
    return item % 5


def key(item: int) -> int:
    """Return the key of an item."""
    return item % 3


class Runs:
    """An async ``process_batch`` that notes when it begins and ends, and fails.

    Args:
        fail: Called with each batch and its attempt; raises, or returns its results.
    """

    def __init__(self, fail: Callable[[list[int], int], list[Any]]) -> None:
        self.began: list[tuple[float, list[int]]] = []
        self.running: list[int] = []  # keys
        self.most_of_a_key = 0
        self._fail = fail

    async def __call__(self, batch: list[int]) -> list[Any]:
        """Run for a moment."""
        self.began.append((now(), list(batch)))
        self.running.append(key(batch[0]))
        self.most_of_a_key = max(self.most_of_a_key, *map(self.running.count, self.running))
        try:
            await asyncio.sleep(0.01)
            info = current_batch()
            assert info is not None
            return self._fail(batch, info.attempt)
        finally:
            self.running.remove(key(batch[0]))

    def check_limits(self) -> None:
        """Check that no batch and no span of time had more than the limits allow."""
        for began, batch in self.began:
            assert len(batch) == 1 or sum(map(cost, batch)) <= PER_BATCH
            in_span = [
                sum(map(cost, other)) for at, other in self.began if began <= at < began + SECONDS
            ]
            assert sum(in_span) <= RATE

    def check_keys(self) -> None:
        """Check that no batch had two keys, and no two of a key ran at a time."""
        assert all(len(set(map(key, batch))) == 1 for _, batch in self.began)
        assert self.most_of_a_key == 1


def put_off(batch: list[int], attempt: int) -> list[Any]:
    """Put every third item off, and every fifth batch, twice."""
    if attempt < 3 and batch[0] % 5 == 0:
        raise Later(0.05)
    return [Later(0.02) if attempt < 3 and item % 3 == 0 else item * 2 for item in batch]


def reject(batch: list[int], _: int) -> list[Any]:
    """Fail a batch with a bad item."""
    if not BAD.isdisjoint(batch):
        raise ValueError(batch)
    return [item * 2 for item in batch]


def drop_connection(batch: list[int], attempt: int) -> list[Any]:
    """Fail at first, then put off or reject."""
    if attempt == 1:
        raise ConnectionError
    reject(batch, attempt)
    return put_off(batch, attempt)


LIMITS: dict[str, Any] = {"limits": [Limit(by=cost, per_batch=PER_BATCH, rate=(RATE, SECONDS))]}
KEYS: dict[str, Any] = {"key": key, "key_concurrency": 1}
RESULTS = [item * 2 for item in ITEMS]


async def process_each(batcher: AsyncBatcher[int, Any]) -> list[Any]:
    """Call for each item."""
    return await asyncio.gather(*map(batcher.process, ITEMS), return_exceptions=True)


async def process_all(batcher: AsyncBatcher[int, Any]) -> list[Any]:
    """Call for all items."""
    return await batcher.process_many(ITEMS, return_exceptions=True)


async def read_map(batcher: AsyncBatcher[int, Any]) -> list[Any]:
    """Map all items."""
    return [result async for result in batcher.map(ITEMS, return_exceptions=True)]


WAYS = pytest.mark.parametrize("way", [process_each, process_all, read_map])


@WAYS
async def test_limits_hold_for_what_comes_back(way: Any) -> None:
    """Each try costs what the item costs."""
    runs = Runs(put_off)
    async with batched(runs, max_batch_size=8, concurrency=3, **LIMITS) as batcher:
        assert await way(batcher) == RESULTS
        assert batcher.stats().retried > 10
    runs.check_limits()
    assert sum(len(batch) for _, batch in runs.began) > len(ITEMS)


@WAYS
async def test_limits_and_keys_hold_for_parts_of_failed_batches(way: Any) -> None:
    """Parts that run alone cost what their items cost, and wait for their key."""
    runs = Runs(reject)
    async with batched(
        runs, max_batch_size=8, concurrency=3, on_failure=[isolate()], **LIMITS, **KEYS
    ) as batcher:
        results = await way(batcher)
    assert {item for item, result in enumerate(results) if isinstance(result, ValueError)} == BAD
    assert [result for item, result in enumerate(results) if item not in BAD] == [
        item * 2 for item in ITEMS if item not in BAD
    ]
    runs.check_limits()
    runs.check_keys()


@WAYS
async def test_all_of_them_together(way: Any) -> None:
    """Each item has its own result or error, in order, within the limits and its key."""
    runs = Runs(drop_connection)
    policies = [retry(ConnectionError, attempts=2, backoff=0.01, budget=None), isolate(ValueError)]
    async with batched(
        runs, max_batch_size=8, concurrency=3, on_failure=policies, **LIMITS, **KEYS
    ) as batcher:
        results = await way(batcher)
        stats = batcher.stats()
    for item, result in zip(ITEMS, results, strict=True):
        if item in BAD:
            assert isinstance(result, ValueError)
        else:
            assert result == item * 2
    assert (stats.queued, stats.running, stats.failed) == (0, 0, len(BAD))
    runs.check_limits()
    runs.check_keys()


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("after", [0.0, 0.005, 0.015, 0.1, 1.0, 3.0])
async def test_a_stop_or_cancellations_at_any_time(after: float, force: bool) -> None:
    """Every second caller is cancelled, then the batcher is stopped: each caller has an end."""
    runs = Runs(drop_connection)
    policies = [retry(ConnectionError, attempts=2, backoff=0.01, budget=None), isolate(ValueError)]
    batcher = batched(runs, max_batch_size=8, concurrency=3, on_failure=policies, **LIMITS, **KEYS)
    calls = [asyncio.ensure_future(batcher(item)) for item in ITEMS]
    await asyncio.sleep(after)
    for call in calls[::2]:
        call.cancel()
    await asyncio.sleep(after)
    await batcher.stop(force=force)
    assert all(call.done() for call in calls)
    stats = batcher.stats()
    assert (stats.queued, stats.blocked, stats.running) == (0, 0, 0)
    assert stats.done + stats.failed + stats.cancelled + stats.rejected == len(ITEMS)
    for item, call in zip(ITEMS, calls, strict=True):
        if not call.cancelled() and call.exception() is None:
            assert call.result() == item * 2
    runs.check_limits()
    runs.check_keys()
