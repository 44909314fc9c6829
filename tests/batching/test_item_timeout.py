"""`item_timeout` and the `timeout` of a call, on a virtual clock."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from async_batcher import retry
from async_batcher.exceptions import BatcherStoppedError, BatchTimeoutError, ItemTimeoutError
from tests.support.polling import turn
from tests.support.virtual_clock import FakeBatcher, now, virtual_loop

pytestmark = pytest.mark.virtual_clock


@pytest.mark.parametrize(
    "ways", [{"item_timeout": 5.0}, {"timeout": 5.0}, {"item_timeout": 1000.0, "timeout": 5.0}]
)
@pytest.mark.parametrize("call", ["process", "submit"])
async def test_a_queued_item_times_out_and_never_runs(ways: dict[str, float], call: str) -> None:
    """Its caller gets ItemTimeoutError, a TimeoutError, exactly at the deadline."""
    batcher = FakeBatcher(**{name: value for name, value in ways.items() if name == "item_timeout"})
    first = batcher.submit("first", timeout=1000.0)
    await turn()
    start = now()
    with pytest.raises(
        ItemTimeoutError, match=r"5 seconds: it was still queued, and was removed"
    ) as caught:
        await getattr(batcher, call)(
            "late", **{name: value for name, value in ways.items() if name == "timeout"}
        )
    assert now() == start + 5.0
    assert isinstance(caught.value, TimeoutError)
    batcher.runner.end()
    assert await first == "first"
    await turn()
    assert batcher.batches == [["first"]]
    await batcher.stop()
    assert virtual_loop().timers() == 0


async def test_a_running_item_times_out_for_its_caller_alone() -> None:
    """The other items of its batch are unaffected."""
    batcher = FakeBatcher(max_batch_size=3)
    first, short, last = batcher.call(0), batcher.call(1, timeout=2.0), batcher.call(2)
    with pytest.raises(ItemTimeoutError, match="still running"):
        await short
    assert not first.done()
    assert batcher.runner.cancelled == []
    batcher.runner.end()
    assert [await first, await last] == [0, 2]
    await batcher.stop()


async def test_no_item_starts_after_its_deadline_even_if_the_timer_is_late() -> None:
    """A loop that was blocked checks deadlines before it starts batches."""
    batcher = FakeBatcher(max_queue_time=10.0)
    expired = batcher.call("late", timeout=10.0)
    other = batcher.call("other", timeout=30.0)
    await turn()
    virtual_loop().advance(20.0)
    with pytest.raises(ItemTimeoutError):
        await expired
    await turn()
    assert batcher.batches == [["other"]]
    batcher.runner.end()
    assert await other == "other"
    await batcher.stop()


async def test_a_deadline_at_the_end_of_the_window() -> None:
    """An item without time left does not start."""
    batcher = FakeBatcher(max_queue_time=1.0)
    with pytest.raises(ItemTimeoutError):
        await batcher.process(0, timeout=1.0)
    assert batcher.batches == []
    await batcher.stop()


async def test_a_result_before_the_deadline() -> None:
    """A deadline that is not reached changes nothing, and leaves no timer."""
    batcher = FakeBatcher(item_timeout=5.0)
    call = batcher.call("item")
    await asyncio.sleep(4.999)
    batcher.runner.end()
    assert await call == "item"
    await batcher.stop()
    assert virtual_loop().timers() == 0


async def test_no_timer_is_left_without_pending_items() -> None:
    """Timers are cancelled with the last item, however distant its deadline is."""
    batcher = FakeBatcher(item_timeout=1000.0)
    futures = [batcher.submit(0), batcher.submit(1, timeout=500.0)]
    await turn()
    assert virtual_loop().timers() == 1
    batcher.runner.end()
    assert await asyncio.gather(*futures) == [0, 1]
    assert virtual_loop().timers() == 0
    later = batcher.submit(2, timeout=5.0)
    with pytest.raises(ItemTimeoutError):
        await later
    assert virtual_loop().timers() == 0
    await batcher.stop(force=True)


async def test_a_batch_that_times_out_after_a_forced_stop() -> None:
    """Its callers already have an outcome, so its timeout and its end are dropped."""
    batcher = FakeBatcher()
    future = batcher.submit(0)
    await turn()
    stopping = asyncio.create_task(batcher.stop(force=True))
    await asyncio.sleep(0)
    assert isinstance(future.exception(), BatcherStoppedError)
    batcher.runner.on_timeouts[0](BatchTimeoutError("too long"))
    batcher.runner.end()
    await stopping


async def test_a_drain_does_not_wait_for_expired_items() -> None:
    """An item that expires in the queue does not delay a stop."""
    batcher = FakeBatcher()
    running = batcher.call(0)
    await turn()
    queued = batcher.call(1, timeout=1.0)
    await turn()
    stopping = asyncio.create_task(batcher.stop())
    await asyncio.sleep(2.0)
    batcher.runner.end()
    await stopping
    assert await running == 0
    assert isinstance(queued.exception(), ItemTimeoutError)
    assert batcher.batches == [[0]]


@pytest.mark.parametrize("value", [0, -1, float("nan"), "1", True])
async def test_a_bad_timeout_is_rejected(value: Any) -> None:
    """The error is raised before anything is queued."""
    batcher = FakeBatcher()
    with pytest.raises((TypeError, ValueError), match="timeout="):
        await batcher.process(0, timeout=value)
    with pytest.raises((TypeError, ValueError), match="timeout="):
        batcher.submit(0, timeout=value)
    assert not await batcher.is_running()


async def test_huge_timeouts_never_expire() -> None:
    """A timeout may be infinite, or longer than the loop's timers accept."""
    batcher = FakeBatcher(item_timeout=float("inf"))
    calls = [batcher.call(0), batcher.call(1, timeout=1e12)]
    await turn()
    batcher.runner.end()
    assert await asyncio.gather(*calls) == [0, 1]
    await batcher.stop()


async def test_a_caller_is_cancelled_in_the_iteration_of_its_deadline() -> None:
    """Its item is dequeued once; other items stay in the queue."""
    batcher = FakeBatcher(max_queue_time=10.0)
    first = batcher.call("first")
    await turn()

    async def expire() -> None:
        async with asyncio.timeout(5.0 + 1e-10):  # just after the item's
            await batcher.process("expiring", timeout=5.0)

    expiring = [asyncio.create_task(expire()) for _ in range(3)]
    last = batcher.call("last")
    outcomes = await asyncio.gather(*expiring, return_exceptions=True)
    assert [isinstance(outcome, TimeoutError) for outcome in outcomes] == [True] * 3
    await asyncio.sleep(6.0)
    assert batcher.batches == [["first", "last"]]
    batcher.runner.end()
    assert [await first, await last] == ["first", "last"]
    assert batcher.stats().timed_out == 3
    await batcher.stop()


@pytest.mark.parametrize("runs", [False, True])
async def test_the_message_says_how_often_an_item_was_tried(runs: bool) -> None:
    """If that is more than once."""
    batcher = FakeBatcher(on_failure=retry(backoff=1.0, factor=1.0, attempts=9))
    call = batcher.call("a", timeout=3.5 if runs else 1.8)
    await turn()
    batcher.runner.end(0, ValueError())
    await asyncio.sleep(1.1)
    batcher.runner.end(0, [ValueError()])
    await asyncio.sleep(2.5)
    where = "its batch was still running, in attempt 3" if runs else "queued after 2 attempts, and"
    with pytest.raises(ItemTimeoutError, match=where):
        await call
    assert len(batcher.batches) == (3 if runs else 2)
    if runs:
        batcher.runner.end()
    await batcher.stop()


async def test_the_message_of_another_item_says_nothing_of_that() -> None:
    """An item that was tried once; and one whose caller had its result is forgotten."""
    batcher = FakeBatcher(on_failure=retry(backoff=1.0, factor=1.0, attempts=9))
    again = batcher.call("again", timeout=9.0)
    await turn()
    batcher.runner.end(0, ValueError())
    await asyncio.sleep(1.1)
    batcher.runner.end()
    assert await again == "again"
    assert not batcher.scheduler.item_timeouts._attempts
    once = batcher.call("once", timeout=2.0)
    await turn()
    with pytest.raises(ItemTimeoutError, match=r"still running$"):
        await once
    batcher.runner.end()
    await batcher.stop()
