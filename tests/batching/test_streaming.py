"""Streams: `AsyncBatcher.map`, on a virtual clock with a runner that does what the test says, and in real threads."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random
import signal
import sys
import threading
import weakref
from typing import TYPE_CHECKING, Any

import pytest

from async_batcher import WorkerPool, batched
from async_batcher.exceptions import BatcherStoppedError, BatchTimeoutError, ItemTimeoutError, WorkerDiedError
from tests.support.polling import wait_until
from tests.support.virtual_clock import FakeBatcher as Rig
from tests.support.worker_functions import DEADLINE

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path


class Source:
    """Numbers from 0 on, and what becomes of who reads them.

    Args:
        count: How many; None: without an end.
        error: Raised after the last.
    """

    def __init__(self, count: int | None = None, error: BaseException | None = None) -> None:
        self.count = count
        self.error = error
        self.read = 0
        self.closed_in: int | None = None  # the thread's identity
        self.failing = False  # whether closing fails

    def __iter__(self) -> Iterator[int]:
        """A generator."""
        try:
            while self.count is None or self.read < self.count:
                self.read += 1
                yield self.read - 1
            if self.error is not None:
                raise self.error
        finally:
            self.closed_in = threading.get_ident()
            if self.failing:
                msg = "cannot be closed"
                raise OSError(msg)

    async def __aiter__(self) -> AsyncIterator[int]:
        """An async one."""
        try:
            for item in iter(self):
                yield item
                await asyncio.sleep(0)
        finally:
            self.closed_in = threading.get_ident()


class Sync:
    """A source that can be iterated only without awaiting."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def __iter__(self) -> Iterator[int]:
        """As the source."""
        return iter(self.source)


WAYS = ["sync", "async"]


def of(source: Source, way: str) -> Any:
    """The source to be read that way."""
    return Sync(source) if way == "sync" else source


async def turn(times: int = 8) -> None:
    """Let the loop go round."""
    for _ in range(times):
        await asyncio.sleep(0)


class Consumer:
    """A task that takes results as a test allows.

    Args:
        results: What it consumes.
        allowed: How many it takes at once; None: all.
    """

    def __init__(self, results: Any, allowed: int | None = None) -> None:
        self.taken: list[Any] = []
        self._results = results
        self._allowed = asyncio.Semaphore(10**9 if allowed is None else allowed)
        self.task = asyncio.create_task(self._run())

    def allow(self, count: int) -> None:
        """Let it take so many more."""
        for _ in range(count):
            self._allowed.release()

    async def _run(self) -> None:
        await self._allowed.acquire()
        async with contextlib.aclosing(self._results):
            async for result in self._results:
                self.taken.append(result)
                await self._allowed.acquire()


# ---- on a virtual clock


@pytest.mark.virtual_clock
class TestScripted:
    """Each batch ends when the test says so."""

    @pytest.mark.parametrize("way", WAYS)
    async def test_results_come_in_the_order_of_their_items(self, way: str) -> None:
        """Whichever batch ends first; each as soon as those before it are there."""
        rig = Rig(max_batch_size=2, concurrency=3, max_queue_time=1000.0)
        consumer = Consumer(rig.map(of(Source(6), way)))
        await turn(30)
        assert rig.batches == [[0, 1], [2, 3], [4, 5]]
        rig.runner.end(1)
        await turn()
        assert consumer.taken == []
        rig.runner.end(0)
        await turn()
        assert consumer.taken == [0, 1, 2, 3]
        rig.runner.end(0)
        await consumer.task
        assert consumer.taken == list(range(6))
        await rig.stop()

    @pytest.mark.parametrize("way", WAYS)
    async def test_unordered_results_come_as_they_are_there(self, way: str) -> None:
        """Those of the batch that has ended."""
        rig = Rig(max_batch_size=2, concurrency=3, max_queue_time=1000.0)
        consumer = Consumer(rig.map(of(Source(6), way), ordered=False))
        await turn(30)
        for index in (1, 1, 0):
            rig.runner.end(index)
            await turn()
        await consumer.task
        assert consumer.taken == [2, 3, 4, 5, 0, 1]
        await rig.stop()

    @pytest.mark.parametrize("ordered", [True, False])
    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize("window", [1, 2, 5, 12])
    async def test_no_more_than_the_window_is_read_ahead(self, window: int, way: str, ordered: bool) -> None:  # noqa: FBT001
        """However slow the consumer: what has been read and not consumed is at most the window, and no item is kept from it."""
        rig = Rig(max_batch_size=2, concurrency=2, max_queue_time=1000.0)
        source = Source(40)
        consumer = Consumer(rig.map(of(source, way), window=window, ordered=ordered), allowed=1)
        for _ in range(41):
            await turn(30)
            assert source.read <= len(consumer.taken) + window
            while rig.runner.running:
                rig.runner.end()
                await turn()
            consumer.allow(1)
        await consumer.task
        assert consumer.taken == list(range(40))
        assert all(len(batch) <= 2 for batch in rig.batches)
        await rig.stop()

    @pytest.mark.parametrize("ordered", [True, False])
    async def test_results_with_their_items(self, ordered: bool) -> None:  # noqa: FBT001 - a parameter
        """In any order it is clear which item a result, or an exception, belongs to."""
        rig = Rig(max_batch_size=2, concurrency=2, max_queue_time=1000.0)
        consumer = Consumer(rig.map("abcd", ordered=ordered, return_exceptions=True, pairs=True))
        await turn(30)
        rig.runner.end(1, ["C", KeyError("d")])
        await turn()
        rig.runner.end(0, ["A", "B"])
        await consumer.task
        shown = [(item, result if isinstance(result, str) else repr(result)) for item, result in consumer.taken]
        expected = [("a", "A"), ("b", "B"), ("c", "C"), ("d", "KeyError('d')")]
        assert shown == (expected if ordered else expected[2:] + expected[:2])
        await rig.stop()

    async def test_the_usual_window_keeps_every_worker_busy(self) -> None:
        """Three batches for each: as many wait as run, and results of as many may lie about."""
        rig = Rig(max_batch_size=4, concurrency=2, max_queue_time=1000.0)
        source = Source()
        consumer = Consumer(rig.map(source), allowed=0)
        consumer.allow(1)
        await turn(60)
        assert source.read == 3 * 2 * 4
        assert [len(batch) for batch in rig.batches] == [4, 4]
        assert rig.stats().queued == 16
        consumer.task.cancel()
        await turn()
        assert (rig.stats().queued, rig.stats().running, rig.stats().cancelled) == (0, 0, 24)
        await rig.stop(force=True)

    async def test_a_loop_that_is_held_up_while_it_reads(self) -> None:
        """That the time for reading is over before anything has been read is not the source's end."""
        rig = Rig(max_batch_size=4)
        loop: Any = asyncio.get_running_loop()
        seconds = itertools.count(loop.time())
        loop.time = lambda: next(seconds)
        consumer = Consumer(rig.map(range(6)))
        while not consumer.task.done():
            await turn()
            if rig.runner.running:
                rig.runner.end()
        assert consumer.taken == list(range(6))
        await rig.stop()

    async def test_a_window_that_fills_no_batch(self) -> None:
        """What has been read is run at once, since nothing can come before it has been consumed."""
        rig = Rig(max_batch_size=10, max_queue_time=1000.0)
        consumer = Consumer(rig.map(range(6), window=3))
        for expected in ([0, 1, 2], [3, 4, 5]):
            await turn(20)
            assert rig.batches[-1] == expected
            rig.runner.end()
        await consumer.task
        await rig.stop()

    async def test_the_last_batch_waits_for_nobody(self) -> None:
        """When the source has come to its end, what is left of it is run at once."""
        rig = Rig(max_batch_size=4, max_queue_time=1000.0)
        consumer = Consumer(rig.map(range(6)))
        await turn(20)
        rig.runner.end()
        await turn()
        assert rig.batches == [[0, 1, 2, 3], [4, 5]]
        rig.runner.end()
        await consumer.task
        await rig.stop()

    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize("ordered", [True, False])
    async def test_an_error_of_the_source_comes_after_the_results_before_it(self, way: str, ordered: bool) -> None:  # noqa: FBT001
        """Also if their batches end after it was raised."""
        rig = Rig(max_batch_size=2, concurrency=2, max_queue_time=1000.0)
        source = Source(4, ZeroDivisionError("source"))
        consumer = Consumer(rig.map(of(source, way), ordered=ordered))
        await turn(30)
        assert source.closed_in is not None
        assert not consumer.task.done()
        rig.runner.end(0)
        rig.runner.end(0)
        with pytest.raises(ZeroDivisionError, match="source"):
            await consumer.task
        assert consumer.taken == [0, 1, 2, 3]
        await rig.stop()

    async def test_a_source_that_is_cancelled(self) -> None:
        """Is an error of the source: the consumer has not been cancelled."""

        async def source() -> AsyncIterator[int]:
            yield 0
            raise asyncio.CancelledError

        rig = Rig()
        consumer = Consumer(rig.map(source()))
        await turn()
        rig.runner.end()
        with pytest.raises(RuntimeError, match="was cancelled"):
            await consumer.task
        assert consumer.taken == [0]
        await rig.stop()

    @pytest.mark.parametrize("ordered", [True, False])
    async def test_an_item_that_fails_ends_the_loop_in_its_place(self, ordered: bool) -> None:  # noqa: FBT001 - a parameter
        """The results before it are consumed, what is queued is never run, and the source is closed."""
        rig = Rig(max_batch_size=2, max_queue_time=1000.0)
        source = Source()
        consumer = Consumer(rig.map(source, ordered=ordered))
        await turn(30)
        rig.runner.end(0, [0, ZeroDivisionError("one")])
        with pytest.raises(ZeroDivisionError, match="one"):
            await consumer.task
        assert consumer.taken == [0]
        assert source.closed_in is not None
        assert rig.stats().queued == 0
        rig.runner.end()
        await turn()
        assert rig.batches == [[0, 1], [2, 3]]
        await rig.stop()

    async def test_exceptions_among_the_results(self) -> None:
        """With ``return_exceptions`` each failed item has its own, and the stream goes on."""
        rig = Rig(max_batch_size=2, max_queue_time=1000.0)
        consumer = Consumer(rig.map(range(6), return_exceptions=True))
        await turn(20)
        rig.runner.end(0, [0, ValueError("one")])
        await turn()
        rig.runner.end(0, ZeroDivisionError("both"))
        await turn()
        rig.runner.end()
        await consumer.task
        assert [type(result) for result in consumer.taken] == [int, ValueError, ZeroDivisionError, ZeroDivisionError, int, int]
        await rig.stop()

    @pytest.mark.parametrize("way", WAYS)
    async def test_leaving_early_closes_the_source_and_drops_what_is_queued(self, way: str) -> None:
        """What runs goes on unseen."""
        rig = Rig(max_batch_size=2, max_queue_time=1000.0)
        source = Source()

        async def leave_early() -> None:
            async for result in rig.map(of(source, way)):
                assert result == 0
                break

        task = asyncio.create_task(leave_early())
        await turn(20)
        rig.runner.end()
        await task
        await turn(20)  # the loop closes generators that are left behind
        assert source.closed_in is not None
        assert (rig.stats().queued, rig.stats().running) == (0, 0)
        assert rig.batches == [[0, 1], [2, 3]]
        rig.runner.end()
        await rig.stop()

    async def test_with_aclosing_all_is_over_when_the_block_is_left(self) -> None:
        """Not sometime later."""
        rig = Rig(max_batch_size=2, cancel_abandoned=True, max_queue_time=1000.0)
        source = Source()
        async with contextlib.aclosing(rig.map(source)) as results:
            first = asyncio.ensure_future(anext(results))
            await turn(20)
            rig.runner.end()
            assert await first == 0
        assert source.closed_in is not None
        assert rig.stats().queued == 0
        assert rig.runner.cancelled == [([2, 3], True)]
        assert len(asyncio.all_tasks()) == 1
        await rig.stop()

    async def test_a_consumer_that_is_cancelled(self) -> None:
        """Closes the source, like one that leaves."""
        rig = Rig()
        source = Source()
        consumer = Consumer(rig.map(source))
        await turn()
        consumer.task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await consumer.task
        assert source.closed_in is not None
        assert rig.stats().queued == 0
        await rig.stop(force=True)

    async def test_a_source_that_cannot_be_closed(self) -> None:
        """Its error is not lost."""
        rig = Rig(max_batch_size=1, max_queue_time=1000.0)
        source = Source()
        source.failing = True
        results = rig.map(Sync(source))
        first = asyncio.ensure_future(anext(results))
        await turn(20)
        rig.runner.end()
        assert await first == 0
        with pytest.raises(OSError, match="cannot be closed"):
            await results.aclose()
        await rig.stop(force=True)

    async def test_two_streams_and_single_calls_share_a_batcher(self) -> None:
        """Each gets its own."""
        rig = Rig(max_batch_size=5, concurrency=2, max_queue_time=1000.0)
        consumers = [Consumer(rig.map(range(start, start + 20), window=4)) for start in (0, 100)]
        call = rig.call("single")
        while not all(consumer.task.done() for consumer in consumers):
            await turn(4)
            while rig.runner.running:
                rig.runner.end()
        assert [consumer.taken for consumer in consumers] == [list(range(20)), list(range(100, 120))]
        assert await call == "single"
        await rig.stop()

    @pytest.mark.parametrize("when_full", ["raise", "wait"])
    async def test_items_wait_for_room_in_the_queue(self, when_full: Any) -> None:
        """However large the window, no item is refused."""
        rig = Rig(max_batch_size=2, max_queue_size=3, when_full=when_full, max_queue_time=1000.0)
        consumer = Consumer(rig.map(range(20), window=10))
        while not consumer.task.done():
            await turn()
            assert rig.stats().queued <= 3
            if rig.runner.running:
                rig.runner.end()
        assert consumer.taken == list(range(20))
        assert rig.stats().rejected == 0
        await rig.stop()

    async def test_deadlines(self) -> None:
        """Each item has its time from when it was read."""
        rig = Rig(max_batch_size=1, item_timeout=5.0, max_queue_time=1000.0)
        consumer = Consumer(rig.map(range(3), return_exceptions=True))
        await asyncio.sleep(1.0)
        rig.runner.end()
        await asyncio.sleep(6.0)
        await consumer.task
        assert [type(result) for result in consumer.taken] == [int, ItemTimeoutError, ItemTimeoutError]
        await rig.stop(force=True)

    @pytest.mark.parametrize("force", [True, False])
    async def test_stop(self, force: bool) -> None:  # noqa: FBT001 - a parameter
        """What has been read is run, unless forced; then the consumer is told."""
        rig = Rig(max_batch_size=2, max_queue_time=1000.0)
        source = Source()
        consumer = Consumer(rig.map(source, window=6, return_exceptions=True))
        await turn(20)
        stopping = asyncio.create_task(rig.stop(force=force))
        while not stopping.done():
            await turn()
            if rig.runner.running:
                rig.runner.end()
        with pytest.raises(BatcherStoppedError):
            await consumer.task
        whole = [result for result in consumer.taken if not isinstance(result, BatcherStoppedError)]
        assert whole == ([] if force else list(range(6)))
        assert source.closed_in is not None

    async def test_when_every_slot_is_lost(self) -> None:
        """What waits and what is read next fails, and the consumer is told."""
        rig = Rig(max_batch_size=1, max_queue_time=1000.0)
        consumer = Consumer(rig.map(Source(), window=4, return_exceptions=True))
        await turn(20)
        rig.runner.late[0](BatchTimeoutError("too long"))
        with pytest.raises(BatchTimeoutError, match="every batch"):
            await consumer.task
        assert [type(result) for result in consumer.taken] == [BatchTimeoutError] * 4
        await rig.stop(force=True)

    @pytest.mark.parametrize(
        ("options", "error", "text"),
        [
            ({"window": 0}, ValueError, "window=0"),
            ({"window": 1.5}, TypeError, "window=1.5"),
            ({"items": 5}, TypeError, "iterable"),
            ({"items": Source(), "read_in_thread": True}, TypeError, "async iterable"),
        ],
    )
    async def test_nonsense_is_refused_at_the_call(self, options: dict[str, Any], error: type[Exception], text: str) -> None:
        """Before anything is read."""
        rig = Rig()
        with pytest.raises(error, match=text):
            rig.map(**{"items": [], **options})
        await rig.stop()

    async def test_a_stream_that_is_stopped_before_it_begins(self) -> None:
        """Is told so, and its source is not read."""
        rig = Rig()
        await rig.stop()
        source = Source()
        with pytest.raises(BatcherStoppedError):
            await anext(rig.map(Sync(source)))
        assert source.read == 0

    async def test_a_feeder_that_is_cancelled(self) -> None:
        """By one who cancels every task but his own: that the stream is not whole is said, after the results before it."""
        rig = Rig(max_batch_size=2, max_queue_time=1000.0)
        consumer = Consumer(rig.map(Source(), window=4))
        await turn(20)
        for task in asyncio.all_tasks() - {asyncio.current_task(), consumer.task}:
            task.cancel()
        while not consumer.task.done():
            await turn()
            if rig.runner.running:
                rig.runner.end()
        with pytest.raises(RuntimeError, match="was cancelled"):
            await consumer.task
        assert consumer.taken == list(range(4))
        await rig.stop()

    @pytest.mark.parametrize("why", ["stop", "the end", "asyncio.run"])
    async def test_a_source_that_is_closing_is_not_cancelled(self, why: str) -> None:
        """Its cleanup may take its time, however the stream has ended, unless somebody cancels that."""
        cleaned = []

        async def source() -> AsyncIterator[int]:
            try:
                for item in range(3 if why == "the end" else 10**6):
                    yield item
                    await asyncio.sleep(0)
            finally:
                await asyncio.sleep(1.0)
                cleaned.append(True)

        rig = Rig(max_batch_size=3, max_queue_time=1000.0)
        consumer = Consumer(rig.map(source()))
        await turn(30)
        if why == "stop":
            stopping = asyncio.create_task(rig.stop(force=True))
            with pytest.raises(BatcherStoppedError):
                await consumer.task
            await stopping
        elif why == "the end":
            rig.runner.end()
            await consumer.task
        else:
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()
            await asyncio.gather(consumer.task, return_exceptions=True)
        assert cleaned == [True]
        await rig.stop(force=True)

    async def test_a_consumer_that_is_cancelled_while_the_source_closes(self) -> None:
        """Waits for it all the same, and what it raises then is not lost; nor is the cancellation."""
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

        rig = Rig(max_batch_size=2)
        consumer = Consumer(rig.map(source()), allowed=1)
        await turn(20)
        consumer.task.cancel()
        await closing.wait()
        consumer.task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await consumer.task
        assert ended == [True]
        assert len(asyncio.all_tasks()) == 1
        await rig.stop(force=True)

    async def test_the_end_of_a_source_while_items_wait_for_room(self) -> None:
        """What gets room later need not wait for more either."""
        rig = Rig(max_batch_size=10, max_queue_size=3, max_queue_time=1000.0)
        began = asyncio.get_running_loop().time()
        consumer = Consumer(rig.map(range(5), window=6))
        while not consumer.task.done():
            await turn()
            if rig.runner.running:
                rig.runner.end()
        assert consumer.taken == list(range(5))
        assert asyncio.get_running_loop().time() == began
        await rig.stop()

    async def test_unordered_results_are_let_go_one_by_one(self) -> None:
        """Though an item that was read with them still runs."""

        class Result:
            """Something that can be watched."""

        rig = Rig(max_batch_size=1, concurrency=2)
        results = rig.map(range(2), ordered=False)
        first = asyncio.ensure_future(anext(results))
        await turn(20)
        rig.runner.end(1, [Result()])
        watched = weakref.ref(await first)
        del first
        await turn()
        assert watched() is None
        rig.runner.end()
        assert [result async for result in results] == [0]
        await rig.stop()

    @pytest.mark.slow
    @pytest.mark.parametrize("ordered", [True, False])
    async def test_memory_does_not_grow_with_what_has_passed(self, ordered: bool) -> None:  # noqa: FBT001 - a parameter
        """Of what has been consumed nothing is kept."""
        alive: weakref.WeakSet[Any] = weakref.WeakSet()

        class Item:
            """Something that can be counted."""

            def __init__(self) -> None:
                alive.add(self)

        rig = Rig(max_batch_size=4, max_queue_time=1000.0)
        results = rig.map((Item() for _ in range(400)), ordered=ordered)
        most = seen = 0
        next_one: asyncio.Future[Any] | None = None
        while seen < 400:
            next_one = asyncio.ensure_future(anext(results))
            while not next_one.done():
                await turn(2)
                if rig.runner.running:
                    rig.runner.end()
                    rig.runner.batches.clear()
            next_one.result()
            seen += 1
            most = max(most, len(alive))
        assert most <= 3 * 4 + 4
        await results.aclose()
        await rig.stop()


# ---- read in a thread


def echo(batch: list[Any]) -> list[Any]:
    """The items."""
    return batch


async def echo_on_the_loop(batch: list[Any]) -> list[Any]:
    """The same."""
    return batch


@pytest.mark.every_loop
@pytest.mark.parametrize("ordered", [True, False])
async def test_a_source_that_is_read_in_a_thread(ordered: bool) -> None:  # noqa: FBT001 - a parameter
    """It is read and closed there, in one thread, and the results are the same."""
    source = Source(500)
    async with batched(echo_on_the_loop, max_batch_size=8) as batcher:
        results = [result async for result in batcher.map(Sync(source), ordered=ordered, read_in_thread=True)]
    assert sorted(results) == list(range(500))
    assert source.closed_in not in (None, threading.get_ident())


async def test_a_source_that_blocks_holds_nobody_up() -> None:
    """While it does, the loop runs, and what it has given before is on its way."""
    go_on = threading.Event()

    def source() -> Iterator[int]:
        yield 0
        assert go_on.wait(DEADLINE)
        yield 1

    async with batched(echo_on_the_loop) as batcher:
        results = batcher.map(source(), read_in_thread=True)
        assert await anext(results) == 0
        assert await batcher.process("meanwhile") == "meanwhile"
        go_on.set()
        assert [result async for result in results] == [1]


async def test_no_thread_to_read_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who consumes is told, and the source is closed."""
    closed: list[bool] = []

    def source() -> Iterator[int]:
        try:
            yield from range(3)
        finally:
            closed.append(True)

    def start(_: threading.Thread) -> None:
        msg = "can't start new thread"
        raise RuntimeError(msg)

    items = source()
    next(items)
    async with batched(echo_on_the_loop) as batcher:
        results = batcher.map(items, read_in_thread=True)
        monkeypatch.setattr(threading.Thread, "start", start)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            await asyncio.wait_for(anext(results), DEADLINE)
        await results.aclose()
    assert closed == [True]


async def test_a_thread_reads_no_further_than_the_window() -> None:
    """It waits until something has been consumed."""
    source = Source()
    async with batched(echo_on_the_loop, max_batch_size=2) as batcher:
        results = batcher.map(Sync(source), window=4, read_in_thread=True)
        for number in range(50):
            assert await anext(results) == number
            assert source.read <= number + 1 + 4
        await results.aclose()
    await wait_until(lambda: source.closed_in is not None)


async def test_a_thread_that_blocks_is_not_waited_for() -> None:
    """Leaving returns at once, and the source is closed by its thread when it can be."""
    go_on = threading.Event()
    source = Source()

    def blocking() -> Iterator[int]:
        try:
            yield from range(3)
            assert go_on.wait(DEADLINE)
            yield 3
        finally:
            source.closed_in = threading.get_ident()

    async with batched(echo_on_the_loop) as batcher:
        results = batcher.map(blocking(), read_in_thread=True)
        assert [await anext(results) for _ in range(3)] == [0, 1, 2]
        await results.aclose()
        assert source.closed_in is None
    go_on.set()
    await wait_until(lambda: source.closed_in is not None)
    assert source.closed_in != threading.get_ident()


async def test_an_error_in_a_thread_comes_after_the_results_before_it() -> None:
    """As on the loop."""
    source = Source(20, ZeroDivisionError("in a thread"))
    async with batched(echo_on_the_loop, max_batch_size=3) as batcher:
        stream = batcher.map(Sync(source), read_in_thread=True)
        results = [await anext(stream) for _ in range(20)]
        with pytest.raises(ZeroDivisionError, match="in a thread"):
            await anext(stream)
    assert results == list(range(20))


async def test_a_loop_that_closes_while_a_thread_reads() -> None:
    """The thread ends."""
    go_on = threading.Event()

    def blocking() -> Iterator[int]:
        yield 0
        assert go_on.wait(DEADLINE)
        yield 1

    async def begin() -> None:
        batcher = batched(echo_on_the_loop)
        assert await anext(batcher.map(blocking(), read_in_thread=True)) == 0

    await asyncio.to_thread(asyncio.run, begin())
    go_on.set()
    await wait_until(lambda: not any(thread.name == "async_batcher source" for thread in threading.enumerate()))


async def test_a_source_that_cannot_be_closed_in_its_thread() -> None:
    """Its error is not lost."""
    source = Source()
    source.failing = True
    async with batched(echo_on_the_loop) as batcher:
        results = batcher.map(Sync(source), window=1, read_in_thread=True)
        assert await anext(results) == 0
        await wait_until(lambda: source.read == 2)
        with pytest.raises(OSError, match="cannot be closed"):
            await results.aclose()


@pytest.mark.parametrize("closes", [True, False])
def test_a_stream_on_a_second_loop(closes: bool) -> None:  # noqa: FBT001 - a parameter
    """It says that it belongs to the first, open or closed, and can be closed."""
    # two at a time, whether or not they were read at once
    batcher = batched(echo_on_the_loop, max_batch_size=2, max_queue_time=DEADLINE)
    source = Source()
    results = batcher.map(Sync(source), window=4)

    async def go_on() -> None:
        assert await anext(results) == 1  # it was there before
        with pytest.raises(RuntimeError, match="another event loop"):
            await anext(results)

    loop = asyncio.new_event_loop()
    try:
        assert loop.run_until_complete(anext(results)) == 0
        if closes:
            loop.close()
        asyncio.run(go_on())
        if not closes:
            loop.run_until_complete(turn())
            assert source.closed_in is not None
            loop.run_until_complete(batcher.stop())
    finally:
        loop.close()


# ---- for real


@pytest.mark.parametrize("in_thread", [True, False])
async def test_a_file(tmp_path: Path, in_thread: bool) -> None:  # noqa: FBT001 - a parameter
    """Its lines are items; it stays its user's to close."""
    path = tmp_path / "lines"
    path.write_text("".join(f"{number}\n" for number in range(1000)))
    with path.open() as file:
        async with batched(echo, executor="thread", max_workers=2, max_batch_size=16) as batcher:
            results = batcher.map(file, read_in_thread=in_thread)
            assert await anext(results) == "0\n"
            await results.aclose()
            assert not file.closed
            file.seek(0)
            assert [int(line) async for line in batcher.map(file, read_in_thread=in_thread)] == list(range(1000))
        assert not file.closed


async def test_a_generator_that_nobody_iterates() -> None:
    """Leaves nothing behind."""
    async with batched(echo_on_the_loop) as batcher:
        batcher.map([1, 2, 3])
        assert batcher.stats().queued == 0


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no WorkerPool")
@pytest.mark.parametrize("ordered", [True, False])
async def test_poison_in_a_stream(ordered: bool) -> None:  # noqa: FBT001 - a parameter
    """An item that kills its worker fails alone, and the stream goes on."""
    items = [item if item % 60 != 35 else f"kill {item}" for item in range(120)]
    options: dict[str, Any] = {"executor": "process", "max_workers": 2, "max_batch_size": 16, "isolate_failures": True}
    async with batched(kill_or_echo, **options) as batcher:
        results: list[Any] = [result async for result in batcher.map(items, ordered=ordered, return_exceptions=True)]
    failed = [place for place, result in enumerate(results) if isinstance(result, WorkerDiedError)]
    if ordered:
        assert failed == [place for place, item in enumerate(items) if isinstance(item, str)]
    assert len(failed) == sum(isinstance(item, str) for item in items)
    whole = [result for result in results if not isinstance(result, WorkerDiedError)]
    assert (whole if ordered else sorted(whole)) == [item for item in items if isinstance(item, int)]


def kill_or_echo(batch: list[Any]) -> list[Any]:
    """The items, unless one of them asks for the worker's death."""
    if any(isinstance(item, str) for item in batch):
        os.kill(os.getpid(), signal.SIGKILL)
    return batch


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no WorkerPool")
async def test_many_items_while_workers_are_killed() -> None:
    """Every item of a stream and of a bulk call has its own result, or the death of its worker, and none waits in vain."""
    chance = random.Random(5)  # noqa: S311 - for a test
    async with WorkerPool(2) as pool:

        async def kill() -> None:
            while True:
                await asyncio.sleep(chance.uniform(0.005, 0.05))
                pids = [worker.pid for worker in pool.workers() if worker.pid and worker.state in ("idle", "busy")]
                if pids:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(chance.choice(pids), signal.SIGKILL)

        async with batched(echo, executor=pool, max_batch_size=32) as batcher, asyncio.timeout(2 * DEADLINE):
            killer = asyncio.create_task(kill())
            bulk = asyncio.create_task(batcher.process_many(range(5_000), return_exceptions=True))
            stream = [result async for result in batcher.map(range(5_000), return_exceptions=True)]
            results = await bulk
            killer.cancel()
            assert await batcher.process("after") == "after"
    for some in (stream, results):
        assert len(some) == 5_000
        assert all(result == item or isinstance(result, WorkerDiedError) for item, result in enumerate(some))
        assert sum(isinstance(result, WorkerDiedError) for result in some) < 2_500
