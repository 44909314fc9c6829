"""Draining, timed-out, forced and cancelled stops, on a virtual clock."""

from __future__ import annotations

import asyncio

import pytest

from async_batcher import AsyncBatcher
from async_batcher.exceptions import BatcherStoppedError
from tests.support.batchers import GatedBatcher
from tests.support.polling import turn
from tests.support.scheduler_rig import Rig
from tests.support.virtual_clock import FakeRunner

pytestmark = pytest.mark.virtual_clock


async def test_stop_runs_queued_items_and_waits_for_the_last_batch() -> None:
    """A drain ends the window early, keeps the limits, and waits for every batch."""
    rig = Rig(size=2, window=1000.0)
    futures = rig.ask_all(*range(5))
    stopping = asyncio.create_task(rig.stop())
    await turn(1)
    for _ in range(3):
        assert not stopping.done()
        assert rig.runner.closed == []
        rig.runner.end()
        await turn(1)
    await stopping
    assert rig.batches == [[0, 1], [2, 3], [4]]
    assert [future.result() for future in futures] == list(range(5))
    assert rig.runner.closed == [False]
    assert rig.timers() == 0


async def test_an_idle_stop_takes_no_time() -> None:
    """A batcher without work stops at once."""
    rig = Rig()
    before = rig.loop.time()
    await rig.stop()
    assert rig.loop.time() == before


async def test_a_stopping_batcher_rejects_items() -> None:
    """Items are rejected as soon as a stop begins, also while it drains."""
    rig = Rig(size=1)
    rig.ask(0)
    stopping = asyncio.create_task(rig.stop())
    await turn(1)
    with pytest.raises(BatcherStoppedError):
        rig.ask(1)
    rig.runner.end()
    await stopping


async def test_a_drain_does_not_wait_for_cancelled_items() -> None:
    """A drain ends with the running batch if the queued items were cancelled."""
    rig = Rig(size=1, slots=1)
    first, second = rig.ask_all(0, 1)
    stopping = asyncio.create_task(rig.stop())
    await turn(1)
    second.cancel()
    rig.runner.end()
    await stopping
    assert await first == 0
    assert rig.batches == [[0]]


async def test_a_stop_that_times_out_fails_unfinished_items() -> None:
    """They get BatcherStoppedError, the runner is closed, then TimeoutError is raised."""
    rig = Rig(size=2, window=1000.0)
    futures = rig.ask_all(*range(5))
    before = rig.loop.time()
    with pytest.raises(TimeoutError, match=r"7\.5 seconds"):
        await rig.stop(timeout=7.5)
    assert rig.loop.time() == before + 7.5
    assert all(isinstance(future.exception(), BatcherStoppedError) for future in futures)
    assert rig.runner.closed == [True]
    assert rig.timers() == 0


async def test_a_stop_within_its_timeout_raises_nothing() -> None:
    """A timeout that is not reached changes nothing."""
    rig = Rig(size=2)
    futures = rig.ask_all(0, 1)
    rig.loop.call_later(5.0, rig.runner.end)
    await rig.stop(timeout=5.001)
    assert [future.result() for future in futures] == [0, 1]
    await Rig().stop(timeout=0)


async def test_a_forced_stop_fails_every_item_at_once() -> None:
    """No future stays pending, neither queued nor running."""
    rig = Rig(size=2, window=1000.0)
    futures = rig.ask_all(*range(5))
    before = rig.loop.time()
    await rig.stop(force=True)
    assert rig.loop.time() == before
    assert all(isinstance(future.exception(), BatcherStoppedError) for future in futures)
    assert len({id(future.exception()) for future in futures}) == 5, "an exception is shared"
    assert rig.batches == [[0, 1]]
    assert rig.runner.closed == [True]
    assert rig.timers() == 0


@pytest.mark.parametrize("window", [0.0, 1000.0])
async def test_a_forced_stop_starts_no_batch(window: float) -> None:
    """Queued items fail without being run, even if there is a free slot."""
    rig = Rig(window=window, slots=2)
    futures = rig.ask_all(0, 1)
    await rig.stop(force=True)
    assert all(isinstance(future.exception(), BatcherStoppedError) for future in futures)
    assert rig.batches == []


async def test_cancelling_a_stop_forces_it() -> None:
    """The stop completes, then raises CancelledError."""
    rig = Rig(size=2, window=1000.0)
    futures = rig.ask_all(*range(5))
    stopping = asyncio.create_task(rig.stop())
    await turn(1)
    stopping.cancel()
    with pytest.raises(asyncio.CancelledError):
        await stopping
    assert all(isinstance(future.exception(), BatcherStoppedError) for future in futures)
    assert rig.runner.closed == [True]


async def test_several_stops_close_the_runner_once() -> None:
    """Each returns when all batches have finished, also one after the stop."""
    rig = Rig(size=2, window=1000.0)
    futures = rig.ask_all(*range(3))
    stops = [asyncio.create_task(rig.stop()) for _ in range(3)]
    await turn(1)
    assert not any(stop.done() for stop in stops)
    rig.runner.end()
    rig.runner.end()
    await asyncio.gather(*stops)
    await rig.stop(timeout=1.0)
    await rig.stop(force=True)
    assert rig.runner.closed == [False]
    assert await asyncio.gather(*futures) == [0, 1, 2]


async def test_a_forced_stop_ends_a_running_drain() -> None:
    """The caller of the earlier stop() returns too, without an error."""
    rig = Rig(size=2)
    futures = rig.ask_all(*range(3))
    draining = asyncio.create_task(rig.stop())
    await turn(1)
    await rig.stop(force=True)
    await draining
    assert all(isinstance(future.exception(), BatcherStoppedError) for future in futures)


async def test_cancelling_one_of_two_stops_forces_both() -> None:
    """The other one returns without an error."""
    rig = Rig(size=2)
    futures = rig.ask_all(*range(3))
    stops = [asyncio.create_task(rig.stop()) for _ in range(2)]
    await turn(1)
    stops[0].cancel()
    await asyncio.wait(stops)
    assert stops[0].cancelled()
    assert stops[1].exception() is None
    assert all(isinstance(future.exception(), BatcherStoppedError) for future in futures)


async def test_a_batch_that_ends_after_a_forced_stop_changes_nothing() -> None:
    """The outcome of a batch that survives the stop is dropped."""

    class IgnoresClose(FakeRunner):
        async def close(self, *, kill: bool) -> None:
            self.closed.append(kill)

    rig = Rig(size=2)
    rig.runner = rig.scheduler.inflight.runner = IgnoresClose()
    futures = rig.ask_all(0, 1, 2)
    await rig.stop(force=True)
    rig.runner.end()
    assert rig.runner.running == []
    assert all(isinstance(future.exception(), BatcherStoppedError) for future in futures)


async def test_start_reopens_while_an_earlier_stop_drains() -> None:
    """The stopped batcher rejects calls until start(); the drain is not disturbed."""
    batcher = GatedBatcher(max_batch_size=1)
    first = batcher.submit("first")
    stopping = asyncio.create_task(batcher.stop())
    await turn(1)
    with pytest.raises(BatcherStoppedError):
        await batcher.process("refused")
    assert not await batcher.is_running()
    await batcher.start()
    assert await batcher.is_running()
    second = batcher.submit("second")
    await turn(1)
    assert not stopping.done()
    batcher.gate.set()
    await stopping
    assert (await first, await second) == ("first", "second")
    assert await batcher.is_running()
    assert await batcher.process("third") == "third"
    await batcher.stop()
    assert not await batcher.is_running()


async def test_a_stop_before_the_first_call_closes_the_batcher() -> None:
    """It may be repeated; calls are rejected until start()."""
    batcher = GatedBatcher()
    await batcher.stop()
    await batcher.stop(force=True)
    with pytest.raises(BatcherStoppedError):
        await batcher.process(1)
    with pytest.raises(BatcherStoppedError):
        batcher.submit(1)
    await batcher.start()
    batcher.gate.set()
    assert await batcher.process(1) == 1
    await batcher.stop()


async def test_start_after_a_stop_that_timed_out() -> None:
    """A batcher can be reopened after any stop."""
    batcher = GatedBatcher(max_batch_size=1)
    future = batcher.submit(1)
    with pytest.raises(TimeoutError):
        await batcher.stop(timeout=3.0)
    assert isinstance(future.exception(), BatcherStoppedError)
    with pytest.raises(BatcherStoppedError):
        batcher.submit(2)
    await batcher.start()
    batcher.gate.set()
    assert await batcher.process(3) == 3
    await batcher.stop()


async def test_a_forced_stop_inside_a_batch_takes_no_time() -> None:
    """The stop and the batch that called it do not wait for each other."""

    class Stopper(AsyncBatcher[int, None]):
        async def process_batch(self, batch: list[int]) -> None:
            assert batch == [1]
            await self.stop(force=True)

    loop = asyncio.get_running_loop()
    batcher = Stopper(max_queue_time=0)
    before = loop.time()
    with pytest.raises(BatcherStoppedError):
        await batcher.process(1)
    await batcher.stop()
    while len(asyncio.all_tasks()) > 1:
        await asyncio.wait(asyncio.all_tasks() - {asyncio.current_task()})
    assert loop.time() == before
