"""``AsyncBatcher.flush``: what waits leaves now; on a virtual clock where that is possible."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING, Any

import pytest

from async_batcher.exceptions import (
    BatcherStoppedError,
    BatchTimeoutError,
    ItemTimeoutError,
    PoolBrokenError,
)
from async_batcher.failures import Later, isolate, retry
from async_batcher.limits import Limit
from tests.support.autopilot import Autopilot
from tests.support.batchers import make_batcher
from tests.support.polling import turn
from tests.support.virtual_clock import FakeBatcher, VirtualLoop, now, virtual_loop
from tests.support.worker_functions import DEADLINE

if TYPE_CHECKING:
    from concurrent.futures import Executor

virtual = pytest.mark.virtual_clock

QUEUES = pytest.mark.parametrize("with_key", [False, True])  # the two kinds of queue


def waiting_batcher(*, with_key: bool = False, **options: Any) -> FakeBatcher:
    """Make a batcher whose items wait for a minute."""
    if with_key:
        options["key"] = lambda _: "key"
    return FakeBatcher(**{"max_queue_time": 60.0, "concurrency": -1, **options})


def flush(batcher: FakeBatcher) -> asyncio.Task[None]:
    """Call `flush` in a task."""
    return asyncio.create_task(batcher.flush())


@virtual
@QUEUES
async def test_what_waits_leaves_at_once(with_key: bool) -> None:
    """Items of single and bulk calls; the flush returns when they have their results."""
    batcher = waiting_batcher(with_key=with_key)
    calls = [batcher.submit(0), batcher.call(1), batcher.call_many([2, 3])]
    await turn()
    assert batcher.batches == []
    start = now()
    flushing = flush(batcher)
    await turn()
    assert batcher.batches == [[0, 1, 2, 3]]
    assert not flushing.done()
    batcher.runner.end()
    await flushing
    assert all(call.done() for call in calls[:1])
    assert await asyncio.gather(*calls) == [0, 1, [2, 3]]
    assert now() == start
    assert virtual_loop().timers() == 0
    await batcher.stop()


@virtual
@QUEUES
async def test_a_flush_waits_for_what_runs(with_key: bool) -> None:
    """And for what waits for a slot; not for what came after it."""
    batcher = waiting_batcher(with_key=with_key, concurrency=1, max_batch_size=2)
    calls = [batcher.submit(item) for item in range(5)]
    flushing = flush(batcher)
    await turn()
    calls += [batcher.submit(item) for item in (5, 6, 7)]
    for size in (2, 2):
        assert len(batcher.runner.running[0][0]) == size
        batcher.runner.end()
        await turn()
        assert not flushing.done()
    assert batcher.batches[-1] == [4, 5]
    batcher.runner.end()
    await turn()
    assert flushing.done()
    assert not calls[6].done()
    while batcher.runner.running:
        batcher.runner.end()
    assert await asyncio.gather(*calls) == list(range(8))
    await batcher.stop()


@virtual
@QUEUES
async def test_what_comes_after_a_flush_has_its_window(with_key: bool) -> None:
    """Unless it fills up the batch of what was there before."""
    batcher = waiting_batcher(with_key=with_key)
    before = batcher.submit(0)
    flushing = flush(batcher)
    await turn()
    after = batcher.submit(1)
    batcher.runner.end()
    await flushing
    assert before.done()
    await asyncio.sleep(59.0)
    assert batcher.batches == [[0]]
    await asyncio.sleep(1.1)
    assert batcher.batches == [[0], [1]]
    batcher.runner.end()
    assert await after == 1
    await batcher.stop()


@virtual
async def test_a_flush_is_for_all_keys() -> None:
    """Each batch still has one key."""
    batcher = FakeBatcher(key=lambda item: item % 3, max_queue_time=60.0, concurrency=-1)
    Autopilot(batcher, 1.0)
    calls = [batcher.submit(item) for item in range(7)]
    start = now()
    await batcher.flush()
    assert now() == start + 1.0
    assert batcher.batches == [[0, 3, 6], [1, 4], [2, 5]]
    await asyncio.gather(*calls)
    await batcher.stop()


@virtual
@pytest.mark.parametrize("how", ["later", "returned", "isolate", "retry"])
async def test_a_flush_waits_for_what_comes_back(how: str) -> None:
    """It is due at once when its time has come."""
    options: dict[str, Any] = {"on_failure": [isolate()]} if how == "isolate" else {}
    if how == "retry":
        options["on_failure"] = [retry(backoff=1.0, budget=None)]
    batcher = waiting_batcher(**options)
    calls = [batcher.submit(item) for item in range(2)]
    flushing = flush(batcher)
    await turn()
    outcome: Any = {
        "later": Later(2.0), "returned": [0, Later(2.0)], "isolate": ValueError("no"),
        "retry": ValueError("no"),
    }[how]  # fmt: skip
    batcher.runner.end(outcome=outcome)
    await turn()
    assert not flushing.done()
    if how != "isolate":
        assert not batcher.runner.running
        await asyncio.sleep(2.1)
    assert batcher.runner.running
    while batcher.runner.running:
        assert not flushing.done()
        batcher.runner.end()
        await turn()
    await flushing
    assert await asyncio.gather(*calls) == [0, 1]
    await batcher.stop()


@virtual
@QUEUES
@pytest.mark.parametrize("how", ["error", "item error", "cancel", "timeout", "strict"])
async def test_a_flush_ends_however_the_items_end(with_key: bool, how: str) -> None:
    """It raises no error of theirs."""
    batcher = waiting_batcher(with_key=with_key)
    call: asyncio.Future[Any]
    if how == "strict":
        call = batcher.call_many([0, 1])
    else:
        call = batcher.call(0, timeout=1.0 if how == "timeout" else None)
    await turn()
    flushing = flush(batcher)
    await turn()
    assert batcher.runner.running
    if how == "cancel":
        call.cancel()
    elif how == "timeout":
        await asyncio.sleep(1.0)
    else:
        outcome: Any = ValueError("no")
        if how != "error":
            outcome = [outcome] * len(batcher.runner.running[0][0])
        batcher.runner.end(outcome=outcome)
    await turn()
    assert flushing.done()
    assert flushing.exception() is None
    result = (await asyncio.gather(call, return_exceptions=True))[0]
    kind = {"cancel": asyncio.CancelledError, "timeout": ItemTimeoutError}.get(how, ValueError)
    assert type(result) is kind
    await batcher.stop(force=True)


@virtual
@QUEUES
async def test_a_flush_ends_with_results_that_are_yielded(with_key: bool) -> None:
    """The batch may run on."""
    batcher = waiting_batcher(with_key=with_key)
    calls = [batcher.submit(item) for item in range(3)]
    flushing = flush(batcher)
    await turn()
    batcher.runner.yield_results(2)
    await turn()
    assert not flushing.done()
    batcher.runner.yield_results(1)
    await turn()
    assert flushing.done()
    batcher.runner.end()
    await asyncio.gather(*calls)
    await batcher.stop()


@virtual
@QUEUES
async def test_queued_items_that_leave_end_a_flush(with_key: bool) -> None:
    """They were cancelled, or timed out, before there was a slot."""
    batcher = waiting_batcher(with_key=with_key, concurrency=1, max_batch_size=1)
    running = batcher.submit(0)
    await turn()
    calls = [batcher.call(1), batcher.call_many([2, 3]), batcher.call(4, timeout=1.0)]
    await turn()
    flushing = flush(batcher)
    await turn()
    calls[0].cancel()
    calls[1].cancel()
    batcher.runner.yield_results(1)
    await turn()
    assert not flushing.done()
    start = now()
    await flushing
    assert now() == start + 1.0
    results = await asyncio.gather(running, *calls, return_exceptions=True)
    assert type(results[3]) is ItemTimeoutError
    await batcher.stop(force=True)


@virtual
async def test_a_cancelled_flush_leaves_the_items_alone() -> None:
    """They have left, and get their results; other flushes go on."""
    batcher = waiting_batcher()
    call = batcher.submit(0)
    flushes = [flush(batcher), flush(batcher)]
    await turn()
    flushes[0].cancel()
    await turn()
    assert flushes[0].cancelled()
    assert not flushes[1].done()
    batcher.runner.end()
    assert await call == 0
    await flushes[1]
    assert not batcher.scheduler._flushes.waiting
    await batcher.stop()


@virtual
@QUEUES
async def test_each_flush_waits_for_what_was_there(with_key: bool) -> None:
    """A later one for more; one of them may end before."""
    batcher = waiting_batcher(with_key=with_key)
    first = batcher.submit(0)
    flushes = [flush(batcher)]
    await turn()
    second = batcher.submit(1)
    flushes.append(flush(batcher))
    await turn()
    assert batcher.batches == [[0], [1]]
    batcher.runner.end(0)
    await turn()
    assert [flushing.done() for flushing in flushes] == [True, False]
    batcher.runner.end()
    await flushes[1]
    await asyncio.gather(first, second)
    await batcher.stop()


@virtual
async def test_a_flush_with_nothing_to_do() -> None:
    """Before the first call, while idle, and after a stop: it returns at once, and starts nothing."""
    batcher = waiting_batcher()
    await batcher.flush()
    assert not await batcher.is_running()
    await batcher.start()
    await batcher.flush()
    call = batcher.submit(0)
    await asyncio.sleep(61.0)
    batcher.runner.end()
    await batcher.flush()
    assert await call == 0
    await batcher.stop()
    await batcher.flush()
    assert not await batcher.is_running()


@virtual
@QUEUES
@pytest.mark.parametrize("bulk", [False, True])
async def test_a_flush_includes_callers_that_wait_for_capacity(with_key: bool, bulk: bool) -> None:
    """They are due as soon as they are queued."""
    batcher = waiting_batcher(with_key=with_key, max_queue_size=2, when_full="wait")
    Autopilot(batcher, 1.0)
    calls: list[asyncio.Future[Any]]
    if bulk:
        calls = [batcher.call_many([0, 1]), batcher.call_many([2, 3, 4])]
    else:
        calls = [batcher.call(item) for item in range(5)]
    await turn()
    assert batcher.stats().blocked == 3
    start = now()
    await batcher.flush()
    assert now() <= start + 3.0
    await asyncio.gather(*calls)
    assert sorted(item for batch in batcher.batches for item in batch) == [0, 1, 2, 3, 4]
    await batcher.stop()


@virtual
async def test_a_flush_includes_callers_that_wait_for_a_limit() -> None:
    """In their order, as the limit allows it."""
    limit = Limit(lambda item: item, queued=10, per_batch=10)
    batcher = waiting_batcher(limits=[limit], when_full="wait")
    Autopilot(batcher, 1.0)
    calls = [batcher.call(6), batcher.call_many([6, 1, 7]), batcher.call(2)]
    await turn()
    assert batcher.stats().blocked == 4
    start = now()
    await batcher.flush()
    assert now() < start + 5.0
    assert await asyncio.gather(*calls) == [6, [6, 1, 7], 2]
    await batcher.stop()


@virtual
@QUEUES
@pytest.mark.parametrize("holds", ["slot", "rate"])
async def test_a_forced_stop_ends_a_flush(with_key: bool, holds: str) -> None:
    """Also if nothing ran."""
    options: dict[str, Any] = {"concurrency": 1}
    if holds == "rate":
        options = {"limits": [Limit("batches", rate=(1, 100.0))]}
    batcher = waiting_batcher(with_key=with_key, max_batch_size=1, **options)
    calls = [batcher.submit(0)]
    await turn()
    if holds == "rate":
        batcher.runner.end()
    calls.append(batcher.submit(1))
    flushing = flush(batcher)
    await turn()
    assert not flushing.done()
    await batcher.stop(force=True)
    await turn()
    assert flushing.done()
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert type(results[1]) is BatcherStoppedError
    await flushing


@virtual
@QUEUES
async def test_a_stop_ends_a_flush_with_its_items(with_key: bool) -> None:
    """Callers on the waitlist fail; the others get their results."""
    batcher = waiting_batcher(
        with_key=with_key, max_queue_size=1, max_batch_size=1, concurrency=1, when_full="wait"
    )
    calls = [batcher.call(0)]
    await turn()
    calls += [batcher.call(1), batcher.call(2)]
    await turn()
    flushing = flush(batcher)
    await turn()
    stopping = asyncio.create_task(batcher.stop())
    await turn()
    assert not flushing.done()
    for _ in range(2):
        batcher.runner.end()
        await turn()
    await flushing
    await stopping
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert results[:2] == [0, 1]
    assert type(results[2]) is BatcherStoppedError


@virtual
@QUEUES
async def test_leaked_slots_end_a_flush(with_key: bool) -> None:
    """If no slot is left, all that waits fails."""
    batcher = waiting_batcher(with_key=with_key, concurrency=1, max_batch_size=1)
    calls = [batcher.submit(item) for item in range(3)]
    flushing = flush(batcher)
    await turn()
    batcher.runner.on_timeouts[0](BatchTimeoutError("timed out"))
    await turn()
    assert flushing.done()
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert {type(result) for result in results} == {BatchTimeoutError}
    batcher.runner.end()
    await batcher.stop()


async def test_a_factory_that_fails_ends_a_flush() -> None:
    """Its items waited for the executor."""
    called = threading.Event()

    def factory() -> Executor:
        assert called.wait(DEADLINE)
        raise ZeroDivisionError

    batcher = make_batcher(executor=factory)
    call = batcher.submit(0)
    flushing = asyncio.create_task(batcher.flush())
    await turn()
    assert not flushing.done()
    called.set()
    async with asyncio.timeout(DEADLINE):
        with pytest.raises(PoolBrokenError):
            await call
        await flushing
    await batcher.stop()


# --- where it must not be called


async def test_a_coroutine_cannot_flush_its_own_batcher() -> None:
    """It would wait for its own end."""

    async def process_batch(batch: list[Any]) -> list[Any]:
        with pytest.raises(RuntimeError, match="process_batch cannot wait for its own end"):
            await batcher.flush()
        await other.flush()
        return batch

    async def echo(batch: list[Any]) -> list[Any]:
        return batch

    batcher = make_batcher(process_batch, max_queue_time=0)
    other = make_batcher(echo, max_queue_time=0)
    async with batcher, other:
        queued = other.submit("other")
        assert await batcher.process(1) == 1
        assert queued.done()


@pytest.mark.parametrize("executor", [None, "thread"])
async def test_a_thread_cannot_flush_its_own_batcher(executor: Any) -> None:
    """By `run_coroutine_threadsafe`; it may flush another one."""
    loop = asyncio.get_running_loop()

    def process_batch(batch: list[Any]) -> list[Any]:
        own = asyncio.run_coroutine_threadsafe(batcher.flush(), loop)
        with pytest.raises(RuntimeError, match="process_batch cannot wait for its own end"):
            own.result(DEADLINE)
        asyncio.run_coroutine_threadsafe(other.flush(), loop).result(DEADLINE)
        return batch

    batcher = make_batcher(process_batch, executor=executor, max_queue_time=0)
    other = make_batcher(max_queue_time=60.0)
    async with batcher, other:
        queued = other.submit("other")
        assert await batcher.process(1) == 1
        assert queued.done()


def test_a_flush_on_another_event_loop_is_an_error() -> None:
    """While the batcher's loop is open."""
    batcher = waiting_batcher()
    with (
        asyncio.Runner(loop_factory=VirtualLoop) as first,
        asyncio.Runner(loop_factory=VirtualLoop) as second,
    ):
        first.run(batcher.start())
        with pytest.raises(RuntimeError, match="runs on another event loop"):
            second.run(batcher.flush())
        first.run(batcher.stop())
    with asyncio.Runner(loop_factory=VirtualLoop) as third:
        third.run(batcher.flush())


async def test_another_thread_may_flush() -> None:
    """By `run_coroutine_threadsafe`."""
    loop = asyncio.get_running_loop()
    async with make_batcher(max_queue_time=60.0) as batcher:
        call = batcher.submit("item")

        def flush_elsewhere() -> bool:
            asyncio.run_coroutine_threadsafe(batcher.flush(), loop).result(DEADLINE)
            return call.done()

        assert await asyncio.to_thread(flush_elsewhere)
        assert await call == "item"
