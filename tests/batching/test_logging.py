"""What the package logs."""

from __future__ import annotations

import asyncio
import copy
import gc
import logging
from typing import Any

import pytest

from async_batcher import AsyncBatcher, batched
from async_batcher.exceptions import BadResultError, ItemTimeoutError
from async_batcher.failures import isolate
from tests.support.batchers import async_echo, package_logs, process_all

pytestmark = pytest.mark.usefixtures("no_noise")


WRONG_COUNT = (
    "BadResultError: process_batch returned 0 results for 3 items; "
    "its argument is the list of items, and it must return one result for each, in order"
)


async def test_a_failed_batch_is_logged_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    """It has the function, the number of items, and the error's type and message."""

    @batched(max_batch_size=3)
    async def fail(batch: list[str]) -> list[Any]:
        if batch[0] == "wrong count":
            return []
        if batch[0] == "some":
            return [ValueError(item) for item in batch]
        raise LookupError(len(batch))

    name = f"{__name__}.{fail.process_batch.__qualname__}"
    caplog.set_level(logging.DEBUG)
    await process_all(fail, "secret 1", "secret 2", "secret 3")
    await process_all(fail, "wrong count", "secret 2", "secret 3")
    assert [record.getMessage() for record in package_logs(caplog)] == [
        f"{name}: a batch of 3 items failed: LookupError: 3",
        f"{name}: a batch of 3 items failed: {WRONG_COUNT}",
    ]
    await process_all(fail, "some", "secret 2", "secret 3")
    assert len(package_logs(caplog)) == 2, "the batch did not fail"
    assert all(
        record.exc_info is None and record.levelno == logging.ERROR
        for record in package_logs(caplog)
    )
    await fail.stop()


async def test_a_name_replaces_the_function_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """Also in the notes on exceptions; a copy of the batcher has the same name."""

    class Failing(AsyncBatcher[int, int]):
        name = "an attribute of the user's"

        async def process_batch(self, batch: list[int]) -> list[int]:
            raise LookupError(self.name, len(batch))

    batcher = copy.copy(Failing(name="prices", max_batch_size=2))
    errors = await process_all(batcher, 1, 2)
    assert [record.getMessage() for record in package_logs(caplog)] == [
        'prices: a batch of 2 items failed: LookupError: ("an attribute of the user\'s", 2)'
    ]
    assert [error.__notes__ for error in errors] == [
        ["item 1 of 2 in a batch of prices"],
        ["item 2 of 2 in a batch of prices"],
    ]
    await batcher.stop()


async def test_messages_count_in_words(caplog: pytest.LogCaptureFixture) -> None:
    """One item, or one second, is no plural."""

    @batched(max_queue_time=0, on_failure=isolate())
    async def fail(batch: list[str]) -> Any:
        if batch == ["as a string"]:
            return "result"
        raise LookupError(len(batch))

    name = f"{__name__}.{fail.process_batch.__qualname__}"
    await process_all(fail, "alone")
    with pytest.raises(BadResultError, match="returned one str for 1 item;"):
        await fail("as a string")
    assert next(record.getMessage() for record in package_logs(caplog)) == (
        f"{name}: a batch of 1 item failed: LookupError: 1"
    )
    late = batched(async_echo, max_queue_time=60.0)
    call = asyncio.ensure_future(late("late", timeout=1))
    with pytest.raises(ItemTimeoutError, match="within 1 second: it was still queued"):
        await call
    await late.stop()
    await fail.stop()


async def test_success_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    """A batch that succeeds logs nothing."""
    caplog.set_level(logging.DEBUG)
    async with batched(async_echo, max_queue_time=0) as batcher:
        await batcher.process("secret")
    assert package_logs(caplog) == []


@pytest.mark.parametrize("where", ["coroutine", "thread"])
async def test_a_log_filter_that_raises_changes_no_result(where: str) -> None:
    """The loop's exception handler gets its error; callers get their results."""

    def refuse(record: logging.LogRecord) -> bool:
        raise ZeroDivisionError(record.msg)

    reported: list[Any] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: reported.append(context["exception"]))
    logger = logging.getLogger("async_batcher")
    logger.addFilter(refuse)

    def fail(batch: list[int]) -> list[int]:
        if 0 in batch:
            raise KeyError(0)
        return batch

    async def fail_on_the_loop(batch: list[int]) -> list[int]:
        return fail(batch)

    batcher = batched(
        fail_on_the_loop if where == "coroutine" else fail, max_queue_time=0.0, concurrency=1
    )
    try:
        assert [repr(error) for error in await process_all(batcher, 0, 1)] == ["KeyError(0)"] * 2
        assert await process_all(batcher, 2) == [2]
        await asyncio.wait_for(batcher.stop(), 5.0)
    finally:
        logger.removeFilter(refuse)
    gc.collect()  # reports the task's exception
    await asyncio.sleep(0)
    assert [type(error) for error in reported] == [ZeroDivisionError]
