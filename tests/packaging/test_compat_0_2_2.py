"""The public API of async-batcher 0.2.2, as programs that were written for it use it."""

from __future__ import annotations

import asyncio
import gc
import inspect
import logging
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest.mock import AsyncMock, MagicMock, patch

import pytest

from async_batcher.batcher import AsyncBatcher
from async_batcher.exceptions import QueueFullException


class Upper(AsyncBatcher[str, str]):
    """As in the old documentation: async, the batch by its name."""

    async def process_batch(self, batch: list[str]) -> list[str]:
        """Shout."""
        return [text.upper() for text in batch]


class Lengths(AsyncBatcher[str, int]):
    """Sync, with attributes of its own, and options passed through."""

    def __init__(self, base: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.base = base
        self.batches: list[int] = []

    def process_batch(self, batch: list[str]) -> list[int]:
        """Count."""
        self.batches.append(len(batch))
        return [self.base + len(text) for text in batch]


MODULE_LEVEL = Upper(max_batch_size=16, max_queue_time=0.001)


def test_a_batcher_can_be_created_outside_of_a_loop() -> None:
    """At import time, as a global; the loop in which it is used first does not matter."""
    assert asyncio.run(MODULE_LEVEL.process(item="a")) == "A"
    assert asyncio.run(MODULE_LEVEL.process("b")) == "B"


def test_the_import_paths() -> None:
    """Those of the batcher and of the exception, which is not a RuntimeError."""
    assert AsyncBatcher.__module__ == "async_batcher.batcher"
    assert QueueFullException.__module__ == "async_batcher.exceptions"
    assert issubclass(QueueFullException, Exception)
    from async_batcher.exceptions import AsyncBatchException

    assert issubclass(QueueFullException, AsyncBatchException)


def test_the_signatures() -> None:
    """Every parameter of 0.2.2 has its name and default, or a None that means the same."""
    init = inspect.signature(AsyncBatcher.__init__).parameters
    expected = {
        "max_batch_size": -1,
        "max_queue_size": -1,
        "executor": None,
    }
    assert {name: init[name].default for name in expected} == expected
    assert (Upper().concurrency, Upper().max_queue_time) == (1, 0.01)
    process = inspect.signature(AsyncBatcher.process).parameters
    assert [
        name for name, parameter in process.items() if parameter.kind is not parameter.KEYWORD_ONLY
    ] == ["self", "item"]
    stop = inspect.signature(AsyncBatcher.stop).parameters
    assert {name: parameter.default for name, parameter in stop.items() if name != "self"} == {
        "force": False,
        "timeout": None,
    }
    assert list(inspect.signature(AsyncBatcher.process_batch).parameters) == ["self", "batch"]


async def test_process_by_keyword_and_in_a_gather() -> None:
    """The item may be a keyword argument; concurrent calls become a batch."""
    batcher = Lengths(100, max_batch_size=10)
    assert await asyncio.gather(*(batcher.process(item="x" * n) for n in range(25))) == [
        100 + n for n in range(25)
    ]
    assert batcher.batches == [10, 10, 5]
    await batcher.stop()


async def test_is_running_is_awaited() -> None:
    """False before the first call, True after it, False after the stop."""
    batcher = Upper(max_queue_time=0)
    assert await batcher.is_running() is False
    await batcher.process("a")
    assert await batcher.is_running() is True
    await batcher.stop()
    assert await batcher.is_running() is False


async def test_process_after_stop_raises_a_runtime_error() -> None:
    """As in 0.2.2."""
    batcher = Upper(max_queue_time=0)
    await batcher.process("a")
    await batcher.stop()
    with pytest.raises(RuntimeError):
        await batcher.process("b")


async def test_stop_takes_its_arguments_by_position() -> None:
    """stop(True), stop(False, 1.0)."""
    batcher = Upper(max_queue_time=0)
    await batcher.process("a")
    await batcher.stop(False, 5.0)  # noqa: FBT003 - as old programs do
    await batcher.stop(True)  # noqa: FBT003


async def test_a_stop_that_times_out_raises_a_timeout_error() -> None:
    """asyncio.TimeoutError, which is TimeoutError."""

    class Slow(AsyncBatcher[int, int]):
        async def process_batch(self, batch: list[int]) -> list[int]:
            await asyncio.sleep(3600)
            return batch

    batcher = Slow(max_queue_time=0)
    call = asyncio.ensure_future(batcher.process(1))
    await asyncio.sleep(0)
    with pytest.raises(asyncio.TimeoutError):
        await batcher.stop(timeout=0.01)
    assert isinstance(call.exception(), RuntimeError)


async def test_a_stop_that_is_not_awaited_is_harmless() -> None:
    """The old examples omit the await: the batcher keeps running, and Python warns."""
    batcher = Upper(max_queue_time=0)
    assert await batcher.process("a") == "A"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        batcher.stop()  # type: ignore[unused-coroutine]  # noqa: RUF100
        gc.collect()
    assert [str(warning.message) for warning in caught] == [
        "coroutine 'AsyncBatcher.stop' was never awaited"
    ]
    assert await batcher.process("b") == "B"
    await batcher.stop()


async def test_the_queue_is_full() -> None:
    """max_queue_size limits the items in the queue, not those in running batches."""
    gate = asyncio.Event()

    class Gated(AsyncBatcher[int, int]):
        async def process_batch(self, batch: list[int]) -> list[int]:
            await gate.wait()
            return batch

    batcher = Gated(max_queue_size=2, max_batch_size=2, max_queue_time=3600)
    calls = [asyncio.ensure_future(batcher.process(item)) for item in range(4)]
    await asyncio.sleep(0)
    with pytest.raises(QueueFullException):
        await batcher.process(4)
    gate.set()
    assert await asyncio.gather(*calls) == [0, 1, 2, 3]
    assert await asyncio.gather(*map(batcher.process, [5, 6])) == [5, 6]
    await batcher.stop()


async def test_exceptions_raised_and_among_the_results() -> None:
    """All callers get what process_batch raises; one caller gets an exception among the results."""

    class Picky(AsyncBatcher[int, int]):
        async def process_batch(self, batch: list[int]) -> list[Any]:
            if 0 in batch:
                raise ZeroDivisionError
            return [item if item > 0 else ValueError(item) for item in batch]

    batcher = Picky()
    results = await asyncio.gather(*map(batcher.process, [1, -1, 2]), return_exceptions=True)
    assert (results[0], type(results[1]), results[2]) == (1, ValueError, 2)
    results = await asyncio.gather(*map(batcher.process, [1, 0]), return_exceptions=True)
    assert [type(result) for result in results] == [ZeroDivisionError] * 2
    await batcher.stop()


async def test_a_wrong_count_raises_a_value_error() -> None:
    """The message has both counts."""

    class Short(AsyncBatcher[int, int]):
        async def process_batch(self, batch: list[int]) -> list[int]:
            return batch[1:]

    batcher = Short()
    results = await asyncio.gather(*map(batcher.process, [1, 2, 3]), return_exceptions=True)
    assert all(
        isinstance(result, ValueError) and "2" in str(result) and "3" in str(result)
        for result in results
    )
    await batcher.stop()


async def test_none_is_a_result_for_all() -> None:
    """For a process_batch that returns nothing."""

    class Sink(AsyncBatcher[int, None]):
        async def process_batch(self, batch: list[int]) -> None:
            assert batch == [1, 2]

    batcher = Sink()
    assert await asyncio.gather(*map(batcher.process, [1, 2])) == [None, None]
    await batcher.stop()


async def test_a_given_executor() -> None:
    """A sync process_batch runs there, by default one batch at a time; stop leaves it running."""
    with ThreadPoolExecutor(2, thread_name_prefix="mine") as executor:
        batcher = Lengths(0, executor=executor)
        assert batcher.executor is executor
        assert await batcher.process("abc") == 3
        await batcher.stop()
        assert executor.submit(len, "ab").result() == 2


@pytest.mark.parametrize("concurrency", [-1, 1, 5])
async def test_concurrency(concurrency: int) -> None:
    """-1 runs all batches at a time."""
    batcher = Upper(concurrency=concurrency, max_batch_size=2)
    assert batcher.concurrency == concurrency
    assert await asyncio.gather(*map(batcher.process, "abcdef")) == list("ABCDEF")
    await batcher.stop()


async def test_options_are_read_and_set_as_attributes() -> None:
    """max_batch_size and max_queue_time may change while the batcher runs."""
    batcher = Lengths(0, max_batch_size=5, max_queue_time=0.02)
    assert (batcher.max_batch_size, batcher.max_queue_time) == (5, 0.02)
    await asyncio.gather(*(batcher.process("") for _ in range(5)))
    batcher.max_batch_size = 2
    batcher.max_queue_time = 0
    await asyncio.gather(*(batcher.process("") for _ in range(4)))
    assert batcher.batches == [5, 2, 2]
    await batcher.stop()


async def test_executor_and_concurrency_may_be_set_before_the_start() -> None:
    """They were plain attributes, which a subclass could set after super().__init__()."""
    with ThreadPoolExecutor(2) as executor:

        class Own(Lengths):
            def __init__(self) -> None:
                super().__init__(0)
                self.executor = executor
                self.concurrency = 2

        batcher = Own()
        assert (batcher.executor, batcher.concurrency) == (executor, 2)
        assert await batcher.process("abc") == 3
        await batcher.stop()


def test_the_logger() -> None:
    """It is a class attribute, which a subclass may replace."""
    assert isinstance(AsyncBatcher.logger, logging.Logger)
    assert isinstance(Upper().logger, logging.Logger)
    assert AsyncBatcher.logger.name.startswith("async_batcher")


@pytest.mark.parametrize("name", ["sleep_time", "buffering_time", "batch_size"])
async def test_old_options_warn_and_work(name: str) -> None:
    """A UserWarning and no error."""
    with pytest.warns(UserWarning, match=name):
        batcher = Lengths(0, **{name: 2}, max_queue_time=0)
    assert await batcher.process("ab") == 2
    await batcher.stop()


async def test_mocks_are_called_as_before() -> None:
    """An async process_batch gets the batch by keyword, a sync one by position."""

    class AsyncMocked(AsyncBatcher[int, int]):
        process_batch = AsyncMock(side_effect=lambda batch: batch)

    class Mocked(AsyncBatcher[int, int]):
        process_batch = MagicMock(side_effect=lambda batch: batch)

    for cls in (AsyncMocked, Mocked):
        batcher = cls()
        assert await asyncio.gather(*map(batcher.process, [1, 2])) == [1, 2]
        await batcher.stop()
    AsyncMocked.process_batch.assert_awaited_once_with(batch=[1, 2])
    Mocked.process_batch.assert_called_once_with([1, 2])


@pytest.mark.parametrize("executor", [None, "thread"])
async def test_a_replaced_process_batch_runs_at_once(executor: str | None) -> None:
    """In the class or the instance, until the original one is restored."""
    batcher = Lengths(base=100) if executor is None else Lengths(base=100, executor=executor)
    results = [await batcher.process("ab")]
    with patch.object(Lengths, "process_batch", return_value=[9]) as mocked:
        results.append(await batcher.process("ab"))
    mocked.assert_called_once_with(["ab"])
    results.append(await batcher.process("ab"))
    batcher.process_batch = lambda batch: [8]  # type: ignore[method-assign]  # noqa: ARG005 - as the old one's
    results.append(await batcher.process("ab"))
    assert results == [102, 9, 102, 8]
    await batcher.stop()


async def test_an_async_mock_may_replace_process_batch() -> None:
    """While the batcher runs, on the event loop."""
    batcher = Upper()
    assert await batcher.process("a") == "A"
    with patch.object(
        Upper, "process_batch", new_callable=AsyncMock, return_value=["mocked"]
    ) as mocked:
        assert await batcher.process("a") == "mocked"
    mocked.assert_awaited_once_with(batch=["a"])
    assert await batcher.process("a") == "A"
    await batcher.stop()


async def test_run_in_a_task() -> None:
    """Programs may start run() in a task, which ends when the batcher stops."""
    batcher = Upper(max_queue_time=0)
    task = asyncio.ensure_future(batcher.run())
    assert await batcher.process("a") == "A"
    await batcher.stop()
    await asyncio.wait_for(task, 5.0)


@pytest.mark.parametrize("turns", [1, 20])
async def test_cancelling_run_stops_by_force(turns: int) -> None:
    """Also while the batcher starts."""
    batcher = Upper(max_queue_time=3600)
    task = asyncio.ensure_future(batcher.run())
    call = asyncio.ensure_future(asyncio.wait_for(batcher.process("a"), 5.0))
    for _ in range(turns):
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert isinstance((await asyncio.gather(call, return_exceptions=True))[0], RuntimeError)
    assert not await batcher.is_running()
