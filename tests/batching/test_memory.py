"""What is freed, and when."""

from __future__ import annotations

import asyncio
import gc
import logging
import weakref
from typing import TYPE_CHECKING, Any

import pytest

from async_batcher import AsyncBatcher, batched
from tests.support.batchers import async_echo, make_batcher
from tests.support.polling import wait_until

if TYPE_CHECKING:
    from collections.abc import Sequence

pytestmark = pytest.mark.usefixtures("no_noise")


class WeakError(Exception):
    """Can be referred to weakly."""


class Item:
    """Can be referred to weakly."""


@pytest.mark.parametrize("way", ["process", "submit"])
@pytest.mark.parametrize("in_thread", [False, True])
async def test_a_failure_leaves_no_reference_cycle(way: str, in_thread: bool) -> None:
    """The exception, its cause and the item are freed without the garbage collector."""
    marks: list[weakref.ref[Any]] = []

    def fail(batch: list[Item]) -> None:
        error = WeakError("no")
        marks.append(weakref.ref(error))
        try:
            raise error
        finally:
            del error, batch

    async def async_fail(batch: list[Item]) -> None:
        try:
            fail(batch)
        finally:
            del batch

    async def call(batcher: AsyncBatcher[Item, Any]) -> None:
        item = Item()
        marks.append(weakref.ref(item))
        try:
            await (batcher.process(item) if way == "process" else batcher.submit(item))
        except WeakError as exc:
            marks.append(weakref.ref(exc))
        finally:
            del item

    async with make_batcher(fail if in_thread else async_fail, max_queue_time=0) as batcher:
        gc.collect()
        gc.disable()
        try:
            await call(batcher)
            for _ in range(5):
                await asyncio.sleep(0)
            for _ in range(1000 if in_thread else 0):  # a thread keeps its last call until the next
                await asyncio.get_running_loop().run_in_executor(None, int)
                if not any(mark() for mark in marks):
                    break
            alive = [mark() for mark in marks]
        finally:
            gc.enable()
        assert alive == [None, None, None]


@pytest.mark.slow
async def test_failures_do_not_accumulate_objects() -> None:
    """Ten thousand failed batches leave no traceback or other object."""

    @batched(max_batch_size=10)
    async def fail(batch: list[int]) -> list[Any]:
        if batch[0] % 2:
            raise WeakError(batch)
        return [WeakError(item) for item in batch]

    logger = logging.getLogger("async_batcher")
    logger.disabled = True
    try:

        async def rounds(count: int) -> None:
            for start in range(count):
                futures = [fail.submit(start) for _ in range(10)]
                await asyncio.wait(futures)
                assert all(isinstance(future.exception(), WeakError) for future in futures)

        await rounds(1100)  # fills the statistics of the last batches
        gc.collect()
        before = len(gc.get_objects())
        await rounds(10_000)
        gc.collect()
        assert len(gc.get_objects()) - before < 1000
    finally:
        logger.disabled = False
    await fail.stop()


async def test_a_stopped_batcher_is_freed() -> None:
    """After a stop nothing refers to the batcher, its items or its results."""

    class Echo(AsyncBatcher[Item, Item]):
        async def process_batch(self, batch: list[Item]) -> Sequence[Item]:
            return batch

    batcher = Echo(max_queue_time=0)
    item = Item()
    marks: list[weakref.ref[Any]] = [weakref.ref(batcher), weakref.ref(item)]
    assert await batcher.process(item) is item
    await batcher.stop()
    del batcher, item
    await asyncio.sleep(0)
    gc.collect()
    assert [mark() for mark in marks] == [None, None]


async def test_a_subclass_that_is_dropped_is_freed() -> None:
    """By the garbage collector, since its scheduler refers to it; also with a running timer."""

    class Echo(AsyncBatcher[int, int]):
        async def process_batch(self, batch: list[int]) -> list[int]:
            return batch

    batcher = Echo(max_queue_time=0, item_timeout=60.0)
    mark = weakref.ref(batcher)
    assert await batcher.process(1) == 1
    del batcher
    await wait_until(lambda: gc.collect() >= 0 and mark() is None)


async def test_a_finished_batch_is_freed_while_the_batcher_runs() -> None:
    """An idle batcher refers to no item and no result."""
    async with batched(async_echo, max_queue_time=0) as batcher:
        item = Item()
        mark = weakref.ref(item)
        assert await batcher.process(item) is item
        del item
        for _ in range(3):
            await asyncio.sleep(0)
        gc.collect()
        assert mark() is None
