"""The results, the window and the memory of `map`, on a virtual clock."""

from __future__ import annotations

import asyncio
import itertools
import weakref
from typing import Any

import pytest

from async_batcher.exceptions import ItemTimeoutError
from tests.support.polling import turn
from tests.support.sources import ITERATIONS, Consumer, Source, readable
from tests.support.virtual_clock import FakeBatcher, now

pytestmark = pytest.mark.virtual_clock


@pytest.mark.parametrize("way", ITERATIONS)
async def test_stream_results_come_in_the_order_of_their_items(way: str) -> None:
    """Batches may finish in any order; a result comes when those before it have come."""
    batcher = FakeBatcher(max_batch_size=2, concurrency=3, max_queue_time=1000.0)
    consumer = Consumer(batcher.map(readable(Source(6), way)))
    await turn(30)
    assert batcher.batches == [[0, 1], [2, 3], [4, 5]]
    batcher.runner.end(1)
    await turn(8)
    assert consumer.taken == []
    batcher.runner.end(0)
    await turn(8)
    assert consumer.taken == [0, 1, 2, 3]
    batcher.runner.end(0)
    await consumer.task
    assert consumer.taken == list(range(6))
    await batcher.stop()


@pytest.mark.parametrize("way", ITERATIONS)
async def test_unordered_results_come_as_batches_finish(way: str) -> None:
    """With ``ordered=False`` the results of the first finished batch come first."""
    batcher = FakeBatcher(max_batch_size=2, concurrency=3, max_queue_time=1000.0)
    consumer = Consumer(batcher.map(readable(Source(6), way), ordered=False))
    await turn(30)
    for index in (1, 1, 0):
        batcher.runner.end(index)
        await turn(8)
    await consumer.task
    assert consumer.taken == [2, 3, 4, 5, 0, 1]
    await batcher.stop()


@pytest.mark.parametrize("ordered", [True, False])
async def test_map_returns_pairs_of_items_and_results(ordered: bool) -> None:
    """With ``pairs`` each result or exception comes with its item, in any order."""
    batcher = FakeBatcher(max_batch_size=2, concurrency=2, max_queue_time=1000.0)
    consumer = Consumer(
        batcher.map(list("abcd"), ordered=ordered, return_exceptions=True, pairs=True)
    )
    await turn(30)
    batcher.runner.end(1, ["C", KeyError("d")])
    await turn(8)
    batcher.runner.end(0, ["A", "B"])
    await consumer.task
    shown = [
        (item, result if isinstance(result, str) else repr(result))
        for item, result in consumer.taken
    ]
    expected = [("a", "A"), ("b", "B"), ("c", "C"), ("d", "KeyError('d')")]
    assert shown == (expected if ordered else expected[2:] + expected[:2])
    await batcher.stop()


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("way", ITERATIONS)
@pytest.mark.parametrize("window", [1, 2, 5, 12])
async def test_no_more_than_the_window_is_read_ahead(window: int, way: str, ordered: bool) -> None:
    """At most `window` items are read and not consumed, however slow the consumer is."""
    batcher = FakeBatcher(max_batch_size=2, concurrency=2, max_queue_time=1000.0)
    source = Source(40)
    consumer = Consumer(
        batcher.map(readable(source, way), window=window, ordered=ordered), allowed=1
    )
    for _ in range(41):
        await turn(30)
        assert source.read <= len(consumer.taken) + window
        while batcher.runner.running:
            batcher.runner.end()
            await turn(8)
        consumer.allow(1)
    await consumer.task
    assert consumer.taken == list(range(40))
    assert all(len(batch) <= 2 for batch in batcher.batches)
    await batcher.stop()


async def test_the_default_window_keeps_every_worker_busy() -> None:
    """It is three batches for each worker: one runs, one is queued, one is consumed."""
    batcher = FakeBatcher(max_batch_size=4, concurrency=2, max_queue_time=1000.0)
    source = Source()
    consumer = Consumer(batcher.map(source), allowed=0)
    consumer.allow(1)
    await turn(60)
    assert source.read == 3 * 2 * 4
    assert [len(batch) for batch in batcher.batches] == [4, 4]
    assert batcher.stats().queued == 16
    consumer.task.cancel()
    await turn(8)
    assert (batcher.stats().queued, batcher.stats().running, batcher.stats().cancelled) == (
        0,
        0,
        24,
    )
    await batcher.stop(force=True)


async def test_a_slow_loop_does_not_end_the_stream() -> None:
    """A reading slice that is over before any item was read is not the source's end."""
    batcher = FakeBatcher(max_batch_size=4)
    loop: Any = asyncio.get_running_loop()
    seconds = itertools.count(loop.time())
    loop.time = lambda: next(seconds)
    consumer = Consumer(batcher.map(range(6)))
    while not consumer.task.done():
        await turn(8)
        if batcher.runner.running:
            batcher.runner.end()
    assert consumer.taken == list(range(6))
    await batcher.stop()


async def test_a_window_smaller_than_a_batch_starts_at_once() -> None:
    """A batch does not wait for items that cannot be read before its results are consumed."""
    batcher = FakeBatcher(max_batch_size=10, max_queue_time=1000.0)
    consumer = Consumer(batcher.map(range(6), window=3))
    for expected in ([0, 1, 2], [3, 4, 5]):
        await turn(20)
        assert batcher.batches[-1] == expected
        batcher.runner.end()
    await consumer.task
    await batcher.stop()


async def test_the_last_batch_starts_when_the_source_ends() -> None:
    """The last items of a source do not wait for their window."""
    batcher = FakeBatcher(max_batch_size=4, max_queue_time=1000.0)
    consumer = Consumer(batcher.map(range(6)))
    await turn(20)
    batcher.runner.end()
    await turn(8)
    assert batcher.batches == [[0, 1, 2, 3], [4, 5]]
    batcher.runner.end()
    await consumer.task
    await batcher.stop()


async def test_map_returns_exceptions() -> None:
    """With ``return_exceptions`` each failed item has its own, and the stream goes on."""
    batcher = FakeBatcher(max_batch_size=2, max_queue_time=1000.0)
    consumer = Consumer(batcher.map(range(6), return_exceptions=True))
    await turn(20)
    batcher.runner.end(0, [0, ValueError("one")])
    await turn(8)
    batcher.runner.end(0, ZeroDivisionError("both"))
    await turn(8)
    batcher.runner.end()
    await consumer.task
    assert [type(result) for result in consumer.taken] == [
        int,
        ValueError,
        ZeroDivisionError,
        ZeroDivisionError,
        int,
        int,
    ]
    await batcher.stop()


async def test_two_streams_and_single_calls_share_a_batcher() -> None:
    """Each stream and each call gets its own results."""
    batcher = FakeBatcher(max_batch_size=5, concurrency=2, max_queue_time=1000.0)
    consumers = [Consumer(batcher.map(range(start, start + 20), window=4)) for start in (0, 100)]
    call = batcher.call("single")
    while not all(consumer.task.done() for consumer in consumers):
        await turn(4)
        while batcher.runner.running:
            batcher.runner.end()
    assert [consumer.taken for consumer in consumers] == [list(range(20)), list(range(100, 120))]
    assert await call == "single"
    await batcher.stop()


@pytest.mark.parametrize("when_full", ["raise", "wait"])
async def test_stream_items_wait_for_queue_capacity(when_full: Any) -> None:
    """However large the window is, no item is rejected."""
    batcher = FakeBatcher(
        max_batch_size=2, max_queue_size=3, when_full=when_full, max_queue_time=1000.0
    )
    consumer = Consumer(batcher.map(range(20), window=10))
    while not consumer.task.done():
        await turn(8)
        assert batcher.stats().queued <= 3
        if batcher.runner.running:
            batcher.runner.end()
    assert consumer.taken == list(range(20))
    assert batcher.stats().rejected == 0
    await batcher.stop()


async def test_the_item_timeout_of_a_stream_runs_from_the_reading() -> None:
    """Each item of a stream has a deadline of its own."""
    batcher = FakeBatcher(max_batch_size=1, item_timeout=5.0, max_queue_time=1000.0)
    consumer = Consumer(batcher.map(range(3), return_exceptions=True))
    await asyncio.sleep(1.0)
    batcher.runner.end()
    await asyncio.sleep(6.0)
    await consumer.task
    assert [type(result) for result in consumer.taken] == [int, ItemTimeoutError, ItemTimeoutError]
    await batcher.stop(force=True)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"window": 0}, ValueError, "window=0"),
        ({"window": 1.5}, TypeError, "window=1.5"),
        ({"items": 5}, TypeError, "iterable"),
        ({"items": Source(), "read_in_thread": True}, TypeError, "async iterable"),
    ],
)
async def test_map_rejects_bad_arguments_at_the_call(
    options: dict[str, Any], error: type[Exception], text: str
) -> None:
    """map() raises before it reads the source."""
    batcher = FakeBatcher()
    with pytest.raises(error, match=text):
        batcher.map(**{"items": [], **options})
    await batcher.stop()


async def test_the_source_ends_while_items_wait_for_capacity() -> None:
    """Items that get capacity later do not wait for their window either."""
    batcher = FakeBatcher(max_batch_size=10, max_queue_size=3, max_queue_time=1000.0)
    start = now()
    consumer = Consumer(batcher.map(range(5), window=6))
    while not consumer.task.done():
        await turn(8)
        if batcher.runner.running:
            batcher.runner.end()
    assert consumer.taken == list(range(5))
    assert now() == start
    await batcher.stop()


async def test_unordered_results_are_freed_one_by_one() -> None:
    """A consumed result is freed while an item that was read with it still runs."""

    class Result:
        """Can be referred to weakly."""

    batcher = FakeBatcher(max_batch_size=1, concurrency=2)
    results = batcher.map(range(2), ordered=False)
    first = asyncio.ensure_future(anext(results))
    await turn(20)
    batcher.runner.end(1, [Result()])
    watched = weakref.ref(await first)
    del first
    await turn(8)
    assert watched() is None
    batcher.runner.end()
    assert [result async for result in results] == [0]
    await batcher.stop()


@pytest.mark.parametrize("ordered", [True, False])
async def test_the_items_of_pairs_are_freed_one_by_one(ordered: bool) -> None:
    """A consumed item is freed while an item that was read with it still runs."""

    class Item:
        """Can be referred to weakly."""

    batcher = FakeBatcher(max_batch_size=1, concurrency=2)
    results = batcher.map((Item() for _ in range(2)), ordered=ordered, pairs=True)
    first = asyncio.ensure_future(anext(results))
    await turn(20)
    batcher.runner.end(0, ["first"])
    item, result = await first
    assert (type(item), result) == (Item, "first")
    watched = weakref.ref(item)
    del first, item
    batcher.runner.batches.clear()
    await turn(8)
    assert watched() is None
    batcher.runner.end(0, ["second"])
    assert [result async for _, result in results] == ["second"]
    await batcher.stop()


@pytest.mark.slow
@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("options", [{}, {"pairs": True}])
async def test_a_stream_keeps_no_consumed_item(ordered: bool, options: dict[str, Any]) -> None:
    """Its memory does not grow with the number of items."""
    alive: weakref.WeakSet[Any] = weakref.WeakSet()

    class Item:
        """Can be counted."""

        def __init__(self) -> None:
            alive.add(self)

    batcher = FakeBatcher(max_batch_size=4, max_queue_time=1000.0)
    items = (Item() for _ in range(400))
    results = batcher.map(items, ordered=ordered, **options)
    peak = seen = 0
    following: asyncio.Future[Any] | None = None
    while seen < 400:
        following = asyncio.ensure_future(anext(results))
        while not following.done():
            await turn(2)
            if batcher.runner.running:
                batcher.runner.end()
                batcher.runner.batches.clear()
        following.result()
        seen += 1
        peak = max(peak, len(alive))
    assert peak <= 3 * 4 + 4
    await results.aclose()
    await batcher.stop()
