"""Streams with ``read_in_thread``, on a second event loop, and at the end of a program."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
from typing import TYPE_CHECKING, Any, Literal

import pytest

from async_batcher import batched, run
from tests.support.batchers import async_echo
from tests.support.polling import block_until, turn, wait_until
from tests.support.sources import ITERATIONS, Consumer, Source, SyncSource, readable
from tests.support.worker_functions import DEADLINE

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.mark.every_loop
@pytest.mark.parametrize("ordered", [True, False])
async def test_read_in_thread_uses_one_thread(ordered: bool) -> None:
    """The source is read and closed there, and the results are the same."""
    source = Source(500)
    async with batched(async_echo, max_batch_size=8) as batcher:
        results = [
            result
            async for result in batcher.map(
                SyncSource(source), ordered=ordered, read_in_thread=True
            )
        ]
    assert sorted(results) == list(range(500))
    assert source.closed_in not in (None, threading.get_ident())


async def test_a_blocking_source_in_a_thread_does_not_block_the_loop() -> None:
    """Other calls run, and results of earlier items come."""
    gate = threading.Event()

    def source() -> Iterator[int]:
        yield 0
        assert gate.wait(DEADLINE)
        yield 1

    async with batched(async_echo) as batcher:
        results = batcher.map(source(), read_in_thread=True)
        assert await anext(results) == 0
        assert await batcher.process("meanwhile") == "meanwhile"
        gate.set()
        assert [result async for result in results] == [1]


async def test_a_reading_thread_that_cannot_start_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The consumer gets the error, and the source is closed."""
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
    async with batched(async_echo) as batcher:
        results = batcher.map(items, read_in_thread=True)
        monkeypatch.setattr(threading.Thread, "start", start)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            await asyncio.wait_for(anext(results), DEADLINE)
        await results.aclose()
    assert closed == [True]


async def test_a_thread_reads_no_further_than_the_window() -> None:
    """The reading thread waits until results are consumed."""
    source = Source()
    async with batched(async_echo, max_batch_size=2) as batcher:
        results = batcher.map(SyncSource(source), window=4, read_in_thread=True)
        for number in range(50):
            assert await anext(results) == number
            assert source.read <= number + 1 + 4
        await results.aclose()
    await wait_until(lambda: source.closed_in is not None)


async def test_leaving_does_not_wait_for_a_blocked_thread() -> None:
    """The thread closes the source when it can."""
    gate = threading.Event()
    source = Source()

    def blocking() -> Iterator[int]:
        try:
            yield from range(3)
            assert gate.wait(DEADLINE)
            yield 3
        finally:
            source.closed_in = threading.get_ident()

    async with batched(async_echo) as batcher:
        results = batcher.map(blocking(), read_in_thread=True)
        assert [await anext(results) for _ in range(3)] == [0, 1, 2]
        await results.aclose()
        assert source.closed_in is None
    gate.set()
    await wait_until(lambda: source.closed_in is not None)
    assert source.closed_in != threading.get_ident()


async def test_an_error_in_a_thread_comes_after_the_results_before_it() -> None:
    """The consumer gets all earlier results before the source's exception."""
    source = Source(20, ZeroDivisionError("in a thread"))
    async with batched(async_echo, max_batch_size=3) as batcher:
        stream = batcher.map(SyncSource(source), read_in_thread=True)
        results = [await anext(stream) for _ in range(20)]
        with pytest.raises(ZeroDivisionError, match="in a thread"):
            await anext(stream)
    assert results == list(range(20))


async def test_a_closed_loop_ends_the_reading_thread() -> None:
    """The thread ends when the source does not block any longer."""
    gate = threading.Event()

    def blocking() -> Iterator[int]:
        yield 0
        assert gate.wait(DEADLINE)
        yield 1

    async def begin() -> None:
        batcher = batched(async_echo)
        assert await anext(batcher.map(blocking(), read_in_thread=True)) == 0

    await asyncio.to_thread(asyncio.run, begin())
    gate.set()
    await wait_until(
        lambda: not any(thread.name == "async_batcher source" for thread in threading.enumerate())
    )


async def test_an_error_of_closing_in_a_thread_is_raised() -> None:
    """aclose() raises the exception of the source."""
    source = Source()
    source.fails_at_close = True
    async with batched(async_echo) as batcher:
        results = batcher.map(SyncSource(source), window=1, read_in_thread=True)
        assert await anext(results) == 0
        await wait_until(lambda: source.read == 2)
        with pytest.raises(OSError, match="cannot be closed"):
            await results.aclose()


@pytest.mark.parametrize("closes", [True, False])
def test_a_stream_on_a_second_loop_is_an_error(closes: bool) -> None:
    """A stream belongs to its first loop, open or closed, and can still be closed."""
    # batches of two, even if the items are read one by one
    batcher = batched(async_echo, max_batch_size=2, max_queue_time=DEADLINE)
    source = Source()
    results = batcher.map(SyncSource(source), window=4)

    async def consume_there(results: Any) -> None:
        assert await anext(results) == 1  # had come before
        with pytest.raises(RuntimeError, match="another event loop"):
            await anext(results)

    reported: list[str] = []
    loop = asyncio.new_event_loop()
    loop.set_exception_handler(lambda _, context: reported.append(context["message"]))
    try:
        assert loop.run_until_complete(anext(results)) == 0
        if closes:
            loop.close()
        asyncio.run(consume_there(results))
        if not closes:
            loop.run_until_complete(turn(8))
            assert source.closed_in is not None
            loop.run_until_complete(batcher.stop())
    finally:
        loop.close()
    del results
    gc.collect()
    # A loop that is closed without `shutdown_asyncgens` leaves the task that reads.
    assert reported == ["Task was destroyed but it is pending!"] * closes


@pytest.mark.usefixtures("no_noise")
@pytest.mark.parametrize("leave", ["break", "raise", "return", "keep", "forget", "cancel"])
@pytest.mark.parametrize("way", [*ITERATIONS, "read_in_thread"])
@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_a_program_that_ends_with_an_open_stream(
    loop: Literal["asyncio", "uvloop"], way: str, leave: str
) -> None:
    """The loop's end closes it, and logs nothing; however the program left it."""
    if loop == "uvloop":
        pytest.importorskip("uvloop")
    batcher = batched(async_echo, max_batch_size=2)
    source = Source()
    kept: list[Any] = []

    async def main() -> None:
        stream = batcher.map(
            readable(source, "async" if way == "async" else "sync"),
            read_in_thread=way == "read_in_thread",
        )
        if leave in ("keep", "forget"):
            assert await anext(stream) == 0
            kept.extend([stream] if leave == "keep" else [])
            return
        if leave == "cancel":
            consumer = Consumer(stream, allowed=1)
            kept.append(consumer)
            await wait_until(lambda: consumer.taken)
            return
        async for _ in stream:
            if leave == "return":
                return
            if leave == "raise":
                raise ZeroDivisionError
            break

    with contextlib.suppress(ZeroDivisionError):
        run(main(), loop=loop)
    block_until(lambda: source.closed_in is not None)
    kept.clear()
