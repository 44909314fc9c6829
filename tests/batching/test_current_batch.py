"""`current_batch` in coroutines and threads, and what the front end says of a batch."""

from __future__ import annotations

import asyncio
import contextvars
import dataclasses
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from async_batcher import AsyncBatcher, BatchInfo, batched, current_batch
from async_batcher._runners.coroutine import CoroutineRunner
from async_batcher._worker.user_function import UserFunction
from async_batcher.failures import isolate
from tests.support.batch_infos import infos, infos_yielded, infos_yielded_later
from tests.support.batchers import make_batcher
from tests.support.polling import turn
from tests.support.virtual_clock import FakeBatcher, now

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from async_batcher.current import BatchFacts
    from async_batcher.stats import BatchRecord

pytestmark = pytest.mark.usefixtures("no_noise")
every_loop = pytest.mark.every_loop

PLAIN = {
    "key": None,
    "attempt": 1,
    "seconds_to_first_deadline": None,
    "seconds_to_last_deadline": None,
    "worker": None,
}


def plain(size: int) -> BatchInfo:
    """Return what a batch knows that has no key and no deadlines, in this process."""
    return BatchInfo(size=size, **PLAIN)  # type: ignore[arg-type]


def only_infos(results: list[Any]) -> list[BatchInfo | None]:
    """Return what batches know, without the process."""
    return [info for _, info in results]


async def async_infos(batch: list[Any]) -> list[Any]:
    """Do the same as `infos`, also after a turn of the loop."""
    before = current_batch()
    await asyncio.sleep(0)
    assert current_batch() == before
    return infos(batch)


async def async_infos_yielded(batch: list[Any]) -> AsyncIterator[Any]:
    """Do the same as `infos_yielded`."""
    for _ in range(len(batch)):
        await asyncio.sleep(0)
        yield infos([0])[0]


# --- where it is known


@every_loop
@pytest.mark.parametrize(
    ("function", "executor"),
    [
        *[(function, None) for function in (async_infos, async_infos_yielded)],
        *[
            (function, executor)
            for function in (infos, infos_yielded, infos_yielded_later)
            for executor in (None, "thread", "given")
        ],
    ],
)
async def test_a_batch_knows_its_size(function: Callable[..., Any], executor: str | None) -> None:
    """In the function and in a generator, and no longer when the batch has ended."""
    records: list[BatchInfo | None] = []

    def on_batch(_: BatchRecord) -> None:
        records.append(current_batch())

    with ThreadPoolExecutor(1) as threads:
        options: dict[str, Any] = {"on_batch": on_batch, "max_batch_size": 3}
        if executor == "thread":
            options |= {"executor": executor, "max_workers": 1}
        elif executor == "given":
            options["executor"] = threads
        async with make_batcher(function, **options) as batcher:
            results = await batcher.process_many(range(5))
        assert threads.submit(current_batch).result() is None
    assert only_infos(results) == [plain(3)] * 3 + [plain(2)] * 2
    assert records == [None, None]
    assert current_batch() is None


@every_loop
@pytest.mark.parametrize("executor", ["loop", None, "thread"])
async def test_no_batch_runs_in_a_set_up(executor: str | None) -> None:
    """Nor in a tear-down, also not if a batch of another batcher made this one."""
    seen: list[BatchInfo | None] = []

    def set_up() -> Any:
        seen.append(current_batch())
        yield
        seen.append(current_batch())

    async def outer(batch: list[Any]) -> list[Any]:
        options: dict[str, Any] = {"setup_worker": set_up, "max_queue_time": 0}
        if executor == "loop":
            inner = make_batcher(async_infos, **options)
        else:
            workers = {"max_workers": 1} if executor == "thread" else {}
            inner = make_batcher(infos, executor=executor, **workers, **options)
        async with inner:
            results = only_infos([await inner.process(0)])
        return [(results, current_batch())] * len(batch)

    async with batched(outer, max_batch_size=2) as batcher:
        results = await batcher.process_many([1, 2])
    assert results == [([plain(1)], plain(2))] * 2
    assert seen == [None, None]


async def test_what_a_batch_starts() -> None:
    """Its tasks and `asyncio.to_thread` have its context, another thread has not."""

    async def process_batch(batch: list[Any]) -> list[Any]:
        with ThreadPoolExecutor(1) as threads:
            other = threads.submit(contextvars.Context().run, current_batch).result()
        task = asyncio.create_task(asyncio.to_thread(current_batch))
        return [(other, await task)] * len(batch)

    assert await batched(process_batch, max_queue_time=0).process(1) == (None, plain(1))


async def test_batches_at_the_same_time() -> None:
    """Each knows its own size."""
    barrier = threading.Barrier(2)

    def process_batch(batch: list[int]) -> list[Any]:
        barrier.wait(10)
        return [current_batch()] * len(batch)

    async with batched(process_batch, executor="thread", max_workers=2, max_batch_size=3) as one:
        assert await one.process_many(range(5)) == [plain(3)] * 3 + [plain(2)] * 2


async def test_the_size_is_that_of_the_list_as_it_was_given() -> None:
    """The function may empty its list before it asks."""

    async def process_batch(batch: list[int]) -> list[Any]:
        size = len(batch)
        batch.clear()
        return [current_batch()] * size

    assert await batched(process_batch, max_queue_time=0).process(1) == plain(1)


async def test_a_method_of_a_batcher() -> None:
    """A subclass asks as a function does; a batch that fails leaves nothing behind."""

    class Failing(AsyncBatcher[int, None]):
        """A batcher that keeps what it sees."""

        seen: BatchInfo | None = None

        def process_batch(self, batch: list[int]) -> None:
            """Fail."""
            Failing.seen = current_batch()
            raise LookupError(batch)

    user_function = UserFunction(Failing().process_batch, by_keyword=False, setup=None)
    assert isinstance(user_function.run([1, 2]), LookupError)
    assert Failing.seen == plain(2)
    assert current_batch() is None


def test_a_coroutine_that_is_closed_elsewhere() -> None:
    """Its loop is closed, and the garbage collector closes it in another context."""

    async def forever(batch: list[Any]) -> list[Any]:
        assert current_batch() == plain(1)
        await _Forever()
        return batch

    function = UserFunction(forever, by_keyword=False, setup=None)
    loop = asyncio.new_event_loop()
    context = contextvars.copy_context()
    runner = CoroutineRunner(loop, function, context)
    coroutine = runner._process([1], bool, None)
    context.copy().run(coroutine.send, None)
    coroutine.close()
    assert current_batch() is None
    loop.close()


class _Forever:
    def __await__(self) -> Any:
        yield


def test_the_record_is_frozen() -> None:
    """It has slots, and cannot be changed."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        plain(1).size = 2  # type: ignore[misc]
    assert not hasattr(plain(1), "__dict__")


# --- deadlines


def test_the_seconds_count_from_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """They become negative when a deadline has passed."""
    clock = iter([90.0, 112.0, 112.0, 112.0])
    monkeypatch.setattr("async_batcher.current.monotonic", lambda: next(clock))
    seen: list[BatchInfo | None] = []

    def ask(batch: list[Any]) -> list[Any]:
        seen.extend(current_batch() for _ in range(2))
        return batch

    function = UserFunction(ask, by_keyword=False, setup=None)
    assert function.run([0, 0], None, ("key", 2, 100.0, 110.0)) == [0, 0]
    function.run([0], None, (("a", "b"), 3, None, None))
    assert [dataclasses.astuple(info) for info in seen if info] == [
        ("key", 2, 2, 10.0, 20.0, None),
        ("key", 2, 2, -12.0, -2.0, None),
        (("a", "b"), 1, 3, None, None, None),
        (("a", "b"), 1, 3, None, None, None),
    ]


START = 5000.0  # of `time.monotonic`, which stands still


@pytest.fixture
def offset(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `time.monotonic` be the virtual clock of the loop, plus `START`."""
    clock = SimpleNamespace(monotonic=lambda: START + now())
    monkeypatch.setattr("async_batcher._batching.item_timeouts.time", clock)


def deadlines(facts: BatchFacts | None) -> tuple[float | None, float | None]:
    """Return the deadlines of a batch as times of the loop."""
    assert facts is not None
    assert facts[:2] == (None, 1)
    first, last = facts[2:]
    return None if first is None else first - START, None if last is None else last - START


@pytest.mark.virtual_clock
@pytest.mark.usefixtures("offset")
class TestDeadlines:
    """The deadlines of the items of a batch, as a runner gets them."""

    async def test_without_deadlines(self) -> None:
        """There is nothing to send."""
        batcher = FakeBatcher(max_batch_size=2)
        calls = [batcher.call(0), batcher.call(1)]
        await turn()
        batcher.runner.end()
        await asyncio.gather(*calls)
        assert batcher.runner.facts == [None]
        await batcher.stop()

    async def test_each_item_counts_from_its_call(self) -> None:
        """The first and the last one of the batch."""
        batcher = FakeBatcher(item_timeout=60.0, max_queue_time=5.0)
        start = now()
        calls = [batcher.call(0)]
        await asyncio.sleep(3.0)
        calls += [batcher.call_many([1, 2])]
        await asyncio.sleep(2.5)
        assert deadlines(batcher.runner.facts[0]) == (start + 60.0, start + 63.0)
        batcher.runner.end()
        await asyncio.gather(*calls)
        await batcher.stop()

    @pytest.mark.parametrize("others", [None, math.inf])
    async def test_items_without_a_deadline(self, others: float | None) -> None:
        """Then the batch has a first deadline and no last one; an infinite timeout is none."""
        batcher = FakeBatcher(max_queue_time=1.0)
        start = now()
        calls = [
            batcher.call(0, timeout=others),
            batcher.call(1, timeout=20.0),
            batcher.call_many([2, 3], timeout=10.0),
        ]
        await asyncio.sleep(1.5)
        assert deadlines(batcher.runner.facts[0]) == (start + 10.0, None)
        batcher.runner.end()
        await asyncio.gather(*calls)
        calls = [batcher.call(0, timeout=others)]
        await asyncio.sleep(1.5)
        assert batcher.runner.facts[1] is None
        batcher.runner.end()
        await asyncio.gather(*calls)
        await batcher.stop()

    async def test_the_timeout_of_a_call_replaces_that_of_the_batcher(self) -> None:
        """It may be longer or shorter."""
        batcher = FakeBatcher(max_queue_time=1.0, item_timeout=30.0)
        start = now()
        calls = [batcher.call(i, timeout=seconds) for i, seconds in enumerate([40.0, None, 20.0])]
        await asyncio.sleep(1.5)
        assert deadlines(batcher.runner.facts[0]) == (start + 20.0, start + 40.0)
        batcher.runner.end()
        await asyncio.gather(*calls)
        await batcher.stop()

    async def test_items_that_waited_for_capacity(self) -> None:
        """Their time counts from the call, too."""
        batcher = FakeBatcher(
            item_timeout=50.0, max_queue_size=1, max_batch_size=1, when_full="wait"
        )
        start = now()
        calls = [batcher.call(i) for i in range(3)] + [batcher.call_many([3, 4])]
        await asyncio.sleep(5.0)
        for _ in range(5):
            batcher.runner.end()
            await asyncio.sleep(1.0)
        await asyncio.gather(*calls)
        expected = (start + 50.0, start + 50.0)
        assert [deadlines(facts) for facts in batcher.runner.facts] == [expected] * 5
        await batcher.stop()

    async def test_items_of_a_stream(self) -> None:
        """They have the deadline of the batcher, from when they were read."""
        batcher = FakeBatcher(item_timeout=50.0, max_batch_size=2)
        start = now()

        async def read() -> list[Any]:
            return [result async for result in batcher.map(range(2))]

        reading = asyncio.create_task(read())
        await turn()
        batcher.runner.end()
        assert await reading == [0, 1]
        assert batcher.runner.facts
        for facts in batcher.runner.facts:
            assert facts is None or deadlines(facts) == (start + 50.0, start + 50.0)
        await batcher.stop()

    async def test_reruns(self) -> None:
        """A part of a failed batch has the deadlines of its own items."""
        batcher = FakeBatcher(on_failure=isolate(), max_queue_time=1.0)
        start = now()
        calls = [batcher.call_many([0, 1], timeout=10.0), batcher.call_many([2, 3], timeout=20.0)]
        await asyncio.sleep(1.5)
        batcher.runner.end(outcome=LookupError())
        await turn()
        batcher.runner.end()
        await turn()
        batcher.runner.end()
        await asyncio.gather(*calls)
        assert [batch[:1] for batch in batcher.batches] == [[0], [0], [2]]
        assert [deadlines(facts) for facts in batcher.runner.facts] == [
            (start + 10.0, start + 20.0),
            (start + 10.0, start + 10.0),
            (start + 20.0, start + 20.0),
        ]
        await batcher.stop()

    async def test_deadlines_are_dropped_with_their_callers(self) -> None:
        """Those of a few callers are kept for a while; none if nothing is pending."""
        batcher = FakeBatcher(concurrency=-1, max_batch_size=1)
        last = batcher.call("pending", timeout=10_000.0)
        await turn()
        kept = batcher.scheduler.item_timeouts._deadlines
        for i in range(500):
            call = batcher.call(i, timeout=1000.0)
            await turn()
            batcher.runner.end(1)
            await call
            kept = batcher.scheduler.item_timeouts._deadlines
            assert len(kept) < 300
        batcher.runner.end()
        await last
        assert batcher.scheduler.item_timeouts._deadlines == {}
        await batcher.stop()

    async def test_expired_items(self) -> None:
        """An item that times out in the queue leaves nothing behind."""
        batcher = FakeBatcher()
        running = batcher.call(0, timeout=500.0)
        await turn()
        queued = batcher.call(1, timeout=1.0)
        with pytest.raises(TimeoutError):
            await queued
        assert len(batcher.scheduler.item_timeouts._deadlines) <= 2
        other = batcher.call(2)
        await turn()
        batcher.runner.end()
        await turn()
        assert batcher.runner.facts[1] is None
        batcher.runner.end()
        assert [await running, await other] == [0, 2]
        await batcher.stop()
