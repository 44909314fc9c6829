"""A generator as process_batch: each caller is resolved when its result is yielded."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import queue
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

from async_batcher import AsyncBatcher
from async_batcher._runners import batch_call
from async_batcher._runners.batch_call import ResultBuffer
from async_batcher.exceptions import BadResultError, BatcherStoppedError, BatchTimeoutError
from async_batcher.failures import isolate
from tests.support.batchers import make_batcher, package_logs, process_all
from tests.support.executors import make_executor
from tests.support.polling import turn, wait_until
from tests.support.virtual_clock import FakeBatcher, virtual_loop
from tests.support.worker_functions import DEADLINE
from tests.support.worker_pools import may_warn_of_fork

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from async_batcher.stats import BatchRecord

pytestmark = pytest.mark.usefixtures("no_noise")

END = object()

PLACES = ["coroutine", "default threads", "own thread", "given threads"]
every_place = pytest.mark.parametrize("place", PLACES)


class Raised:
    """A step that raises."""

    def __init__(self, error: BaseException) -> None:
        self.error = error


class Stepped:
    """A batcher whose batches do what the test says: yield a result, raise, or end.

    Attributes:
        batches: The items of each batch.
        ended: For each generator that has ended, whether it was closed.
        records: What ``on_batch`` got.
    """

    def __init__(self, place: str, **options: Any) -> None:
        self.batches: list[list[Any]] = []
        self.ended: list[bool] = []
        self.records: list[BatchRecord] = []
        self._executor: ThreadPoolExecutor | None = None
        self._steps: queue.SimpleQueue[Any] | asyncio.Queue[Any] = queue.SimpleQueue()
        function: Any = self._yield_steps
        if place == "coroutine":
            self._steps = asyncio.Queue()
            function = self._yield_async
        elif place == "own thread":
            options |= {"executor": "thread", "max_workers": 1}
        elif place == "given threads":
            options["executor"] = self._executor = ThreadPoolExecutor(1)
        options = {"max_queue_time": 0, "on_batch": self.records.append, **options}
        self.batcher = make_batcher(function, **options)

    def step(self, *steps: Any) -> None:
        """Add steps."""
        for step in steps:
            self._steps.put_nowait(step)

    def drop_steps(self) -> None:
        """Drop the steps that no batch has taken."""
        while not self._steps.empty():
            self._steps.get_nowait()

    def _yield_steps(self, batch: list[Any]) -> Iterator[Any]:
        assert isinstance(self._steps, queue.SimpleQueue)
        with self._noting(batch):
            while (step := self._steps.get(timeout=DEADLINE)) is not END:
                if isinstance(step, Raised):
                    raise step.error
                yield step

    async def _yield_async(self, batch: list[Any]) -> AsyncIterator[Any]:
        assert isinstance(self._steps, asyncio.Queue)
        with self._noting(batch):
            while (step := await self._steps.get()) is not END:
                if isinstance(step, Raised):
                    raise step.error
                yield step

    @contextlib.contextmanager
    def _noting(self, batch: list[Any]) -> Iterator[None]:
        self.batches.append(list(batch))
        was_closed = False
        try:
            yield
        except GeneratorExit:
            was_closed = True
            raise
        finally:
            self.ended.append(was_closed)

    async def __aenter__(self) -> Stepped:
        """Start the batcher."""
        await self.batcher.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        """Stop it, and end what is running."""
        self.step(*[END] * 3)
        await self.batcher.stop()
        if self._executor is not None:
            self._executor.shutdown()


async def result_of(future: asyncio.Future[Any]) -> Any:
    """Wait for one result, and not for long."""
    return await asyncio.wait_for(asyncio.shield(future), DEADLINE)


async def outcomes_of(futures: list[asyncio.Future[Any]]) -> list[Any]:
    """Wait for results and exceptions."""
    async with asyncio.timeout(DEADLINE):
        return await asyncio.gather(*futures, return_exceptions=True)


@pytest.mark.every_loop
@every_place
async def test_each_caller_has_its_result_when_it_is_yielded(place: str) -> None:
    """The others wait on; the counts are right in between; there is one record at the end."""
    async with Stepped(place) as stepped:
        futures = [stepped.batcher.submit(item) for item in range(3)]
        for index, future in enumerate(futures):
            stepped.step(index * 10)
            assert await result_of(future) == index * 10
            assert not any(later.done() for later in futures[index + 1 :])
            stats = stepped.batcher.stats()
            assert (stats.done, stats.running) == (index + 1, 2 - index)
            assert stepped.records == []
        stepped.step(END)
        await wait_until(lambda: stepped.records)
        assert [(record.size, record.failed) for record in stepped.records] == [(3, 0)]
        assert (stepped.batches, stepped.ended) == ([[0, 1, 2]], [False])


@pytest.mark.every_loop
@every_place
async def test_an_exception_half_way_is_that_of_the_items_without_a_result(
    place: str, caplog: pytest.LogCaptureFixture
) -> None:
    """They keep their places in the notes; the record counts them; the log says how far it came."""
    async with Stepped(place) as stepped:
        futures = [stepped.batcher.submit(item) for item in range(4)]
        stepped.step("a", KeyError("own"), Raised(ValueError("rest")))
        outcomes = await outcomes_of(futures)
        assert outcomes[0] == "a"
        assert [type(error) for error in outcomes[1:]] == [KeyError, ValueError, ValueError]
        assert not hasattr(outcomes[1], "__notes__")
        assert [error.__notes__[-1].split(" in ")[0] for error in outcomes[2:]] == [
            "item 3 of 4",
            "item 4 of 4",
        ]
        (record,) = stepped.records
        assert (record.failed, record.error) == (3, "builtins.ValueError")
        stats = stepped.batcher.stats()
        assert (stats.done, stats.failed, stats.running) == (1, 3, 0)
    assert "a batch of 4 items failed after 2 of its results: ValueError: rest" in caplog.text


@every_place
async def test_only_items_without_a_result_run_again(place: str) -> None:
    """A failed batch that has yielded results is isolated without them; so is a rerun."""
    async with Stepped(place, on_failure=isolate(), concurrency=1) as stepped:
        futures = [stepped.batcher.submit(item) for item in range(5)]
        stepped.step("0", Raised(ValueError("all")))
        stepped.step("1", Raised(ValueError("half")))  # of [1, 2]
        stepped.step("3", "4", END)
        stepped.step(Raised(ValueError("alone")))  # of [2]
        outcomes = await outcomes_of(futures)
        assert [str(outcome) for outcome in outcomes] == ["0", "1", "half", "3", "4"]
        assert stepped.batches == [[0, 1, 2, 3, 4], [1, 2], [3, 4]]
        assert [record.failed for record in stepped.records] == [0, 1, 0]
        stepped.step(END)


@every_place
async def test_too_few_results_are_an_error_for_the_rest(place: str) -> None:
    """Their callers get BadResultError."""
    async with Stepped(place) as stepped:
        futures = [stepped.batcher.submit(item) for item in range(3)]
        stepped.step("a", "b", END)
        outcomes = await outcomes_of(futures)
        assert outcomes[:2] == ["a", "b"]
        assert isinstance(outcomes[2], BadResultError)
        assert "2 results for 3 items" in str(outcomes[2])


@every_place
async def test_too_many_results_are_logged(place: str, caplog: pytest.LogCaptureFixture) -> None:
    """Each caller has its result, and the generator is closed."""
    async with Stepped(place) as stepped:
        futures = [stepped.batcher.submit(item) for item in range(2)]
        stepped.step("a", "b", "c", "d")
        assert await outcomes_of(futures) == ["a", "b"]
        await wait_until(lambda: stepped.records)
        assert stepped.ended == [True]
        assert (stepped.records[0].failed, stepped.records[0].error) == (0, None)
        (log,) = package_logs(caplog)
        assert "yielded more results than there were items (2)" in log.getMessage()


@pytest.mark.every_loop
@every_place
async def test_a_generator_without_callers_is_closed(place: str) -> None:
    """Between two results, when the callers of the other items are gone; the slot is free."""
    async with Stepped(place, concurrency=1) as stepped:
        futures = [stepped.batcher.submit(item) for item in range(4)]
        stepped.step("a")
        assert await result_of(futures[0]) == "a"
        for future in futures[1:]:
            future.cancel()
        stepped.step("b")
        await wait_until(lambda: stepped.records)
        assert stepped.ended == [True]
        assert (stepped.records[0].failed, stepped.records[0].error) == (0, None)
        stepped.drop_steps()  # it may have been closed right after "a"
        following = stepped.batcher.submit("next")
        stepped.step("c", END)
        assert await result_of(following) == "c"
        assert stepped.batcher.stats().cancelled == 3


@every_place
async def test_what_follows_the_last_result_runs(
    place: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Its failure is logged, since every caller has a result by then."""
    async with Stepped(place) as stepped:
        future = stepped.batcher.submit(1)
        stepped.step("a")
        assert await result_of(future) == "a"
        stepped.step(Raised(OSError("disk full")))
        await wait_until(lambda: stepped.records)
        assert (stepped.records[0].failed, stepped.records[0].error) == (
            0,
            "builtins.OSError",
        )
    assert "failed after 1 of its results: OSError: disk full" in caplog.text


@pytest.mark.slow
@every_place
async def test_a_time_limit_is_that_of_the_items_without_a_result(place: str) -> None:
    """A coroutine is cancelled; a thread's generator is closed at its next result."""
    async with Stepped(place, batch_timeout=1.0, concurrency=1) as stepped:
        futures = [stepped.batcher.submit(item) for item in range(3)]
        stepped.step("a")
        outcomes = await outcomes_of(futures)
        assert outcomes[0] == "a"
        assert [type(error) for error in outcomes[1:]] == [BatchTimeoutError, BatchTimeoutError]
        if place != "coroutine":
            stepped.step("late")
        await wait_until(lambda: stepped.records)
        assert stepped.ended == [place != "coroutine"]


@pytest.mark.virtual_clock
async def test_a_time_limit_of_a_coroutine_and_isolation() -> None:
    """Only the items without a result run again, each in a run that ends, or that is cancelled."""
    batches: list[list[str]] = []

    async def process_batch(batch: list[str]) -> AsyncIterator[str]:
        batches.append(list(batch))
        for item in batch:
            if item == "hang":
                await asyncio.Event().wait()
            yield item

    options: dict[str, Any] = {"batch_timeout": 5.0, "on_failure": isolate(), "max_queue_time": 0}
    async with make_batcher(process_batch, concurrency=1, **options) as batcher:
        outcomes = await process_all(batcher, "a", "b", "hang", "c", "d")
        assert batcher.stats().done == 4
    assert outcomes[:2] + outcomes[3:] == ["a", "b", "c", "d"]
    assert type(outcomes[2]) is BatchTimeoutError
    assert batches == [["a", "b", "hang", "c", "d"], ["hang", "c"], ["d"], ["hang"], ["c"]]


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES[1:])
async def test_a_time_limit_in_a_thread_is_not_isolated(place: str) -> None:
    """The batch runs on: no item runs again, and what is yielded after the limit is dropped."""
    options: dict[str, Any] = {"batch_timeout": 0.5, "concurrency": 1, "on_failure": isolate()}
    async with Stepped(place, **options) as stepped:
        futures = [stepped.batcher.submit(item) for item in range(4)]
        stepped.step("a")
        outcomes = await outcomes_of(futures)
        assert outcomes[0] == "a"
        assert [type(error) for error in outcomes[1:]] == [BatchTimeoutError] * 3
        stepped.step("late")
        await wait_until(lambda: stepped.records)
        assert (stepped.batches, stepped.ended) == ([[0, 1, 2, 3]], [True])
        stats = stepped.batcher.stats()
        assert (stats.done, stats.failed) == (1, 3)
        following = stepped.batcher.submit("next")
        stepped.step("b", END)
        assert await result_of(following) == "b"
        assert stepped.batches[1:] == [["next"]]


@every_place
async def test_a_stop_by_force_fails_the_items_without_a_result(place: str) -> None:
    """What a thread yields after it is dropped."""
    async with Stepped(place) as stepped:
        futures = [stepped.batcher.submit(item) for item in range(3)]
        stepped.step("a")
        assert await result_of(futures[0]) == "a"
        await stepped.batcher.stop(force=True)
        if place != "coroutine":
            stepped.step("late")
            await wait_until(lambda: stepped.ended)
        errors = await outcomes_of(futures[1:])
        assert [type(error) for error in errors] == [BatcherStoppedError] * 2


@every_place
@pytest.mark.parametrize("fails", [False, True])
async def test_process_many_keeps_results_that_were_yielded(place: str, fails: bool) -> None:
    """The rest of the call has the failure of the batch; another call in it has its results."""
    async with Stepped(place, max_queue_time=DEADLINE, max_batch_size=6) as stepped:
        single = stepped.batcher.submit("x")
        many = asyncio.create_task(
            stepped.batcher.process_many(range(3), return_exceptions=True, timeout=DEADLINE)
        )
        strict = asyncio.create_task(stepped.batcher.process_many(range(2), timeout=DEADLINE))
        stepped.step("x!")
        assert await result_of(single) == "x!"
        stepped.step(0, KeyError("one"))
        await wait_until(lambda: stepped.batcher.stats().failed == 1)
        assert stepped.batcher.stats().running == 3
        stepped.step(*([Raised(ValueError("rest"))] if fails else [2, 3, 4, END]))
        outcome = await many
        assert outcome[0] == 0
        assert isinstance(outcome[1], KeyError)
        if not fails:
            assert outcome[2] == 2
            assert await strict == [3, 4]
            return
        assert isinstance(outcome[2], ValueError)
        assert outcome[2].__notes__[-1].startswith("item 4 of 6 in a batch")
        with pytest.raises(ValueError, match="rest"):
            await strict


@every_place
@pytest.mark.parametrize("ordered", [True, False])
async def test_map_gives_results_when_they_are_yielded(place: str, ordered: bool) -> None:
    """Not only when their batch has ended."""
    # A busy machine may read the items in several turns of the loop.
    async with Stepped(place, max_batch_size=3, max_queue_time=DEADLINE) as stepped:
        stream = stepped.batcher.map(range(3), ordered=ordered)
        async with contextlib.aclosing(stream), asyncio.timeout(DEADLINE):
            for index in range(3):
                stepped.step(index * 10)
                assert await anext(stream) == index * 10
            assert stepped.ended == []
            stepped.step(END)
            assert [result async for result in stream] == []


VAR: contextvars.ContextVar[str] = contextvars.ContextVar("VAR", default="")


@pytest.mark.parametrize("is_async", [False, True])
async def test_a_batch_keeps_its_context_between_results(is_async: bool) -> None:
    """It starts in that of the batcher; what it sets is its own."""

    def process_batch(batch: list[int]) -> Iterator[str]:
        for _ in batch:
            VAR.set(VAR.get() + "+")
            yield VAR.get()

    async def process_async(batch: list[int]) -> AsyncIterator[str]:
        for result in process_batch(batch):
            yield result

    VAR.set("made")
    async with make_batcher(process_async if is_async else process_batch) as batcher:
        for _ in range(2):
            assert await process_all(batcher, 1, 2) == ["made+", "made++"]
    assert VAR.get() == "made"


async def test_a_generator_runs_in_the_slot_of_its_thread() -> None:
    """Attributes that the set-up has bound are there after the first result too."""

    class Numbered(AsyncBatcher[int, int]):
        model: int

        def setup_worker(self) -> None:
            self.model = 7

        def process_batch(self, batch: list[int]) -> Iterator[int]:
            for item in batch:
                yield item * self.model

    async with Numbered(executor="thread") as batcher:
        assert await process_all(batcher, 1, 2) == [7, 14]


async def test_a_coroutine_may_return_a_generator() -> None:
    """What it has yielded before it failed counts."""

    def results(batch: list[int]) -> Iterator[float]:
        for item in batch:
            yield 12 / item

    async def process_batch(batch: list[int]) -> Iterator[float]:
        return results(batch)

    async with make_batcher(process_batch) as batcher:
        outcomes = await process_all(batcher, 1, 0, 2)
    assert outcomes[0] == 12.0
    assert [type(error) for error in outcomes[1:]] == [ZeroDivisionError] * 2


def halves(batch: list[int]) -> Iterator[float]:
    """Yield 12 divided by each item."""
    for item in batch:
        yield 12 / item


@pytest.mark.slow
@may_warn_of_fork
async def test_a_given_process_pool_collects() -> None:
    """What was yielded before an exception counts there, too."""
    with make_executor("standard_spawn") as executor:
        async with make_batcher(halves, executor=executor, max_batch_size=2) as batcher:
            assert await process_all(batcher, 1, 2) == [12.0, 6.0]
            result, error = await process_all(batcher, 1, 0)
            assert result == 12.0
            assert type(error) is ZeroDivisionError


async def test_many_results_of_a_thread_keep_their_order() -> None:
    """However they are joined on their way."""

    def process_batch(batch: list[int]) -> Iterator[int]:
        yield from batch

    async with make_batcher(process_batch, max_queue_time=0.01) as batcher:
        items = list(range(5_000))
        assert await batcher.process_many(items) == items


async def test_results_that_the_loop_has_not_taken_come_with_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The batch ends before the next wake-up is due."""
    monkeypatch.setattr(batch_call, "_FLUSH_INTERVAL", 1000.0)
    async with Stepped("default threads") as stepped:
        futures = [stepped.batcher.submit(item) for item in range(4)]
        stepped.step("a")
        assert await result_of(futures[0]) == "a"
        stepped.step("b", "c", Raised(ValueError("rest")))
        outcomes = await outcomes_of(futures[1:])
        assert [str(outcome) for outcome in outcomes] == ["b", "c", "rest"]


@pytest.mark.virtual_clock
async def test_results_of_a_thread_wake_the_loop_once_in_a_millisecond() -> None:
    """The first one at once; what comes soon after it, with the next wake-up."""
    loop = virtual_loop()
    got: list[list[int]] = []
    buffer = ResultBuffer(loop, got.append)
    wake_ups = []
    call_soon_threadsafe = loop.call_soon_threadsafe

    def count(*args: Any) -> Any:
        wake_ups.append(args)
        return call_soon_threadsafe(*args)

    loop.call_soon_threadsafe = count  # type: ignore[method-assign,assignment]
    for result in range(3):
        buffer.put(result)
    await turn()
    assert got == [[0, 1, 2]]
    for result in range(3, 6):
        buffer.put(result)
        await turn()
    assert got == [[0, 1, 2]]
    await asyncio.sleep(0.001)
    await turn()
    assert got == [[0, 1, 2], [3, 4, 5]]
    assert len(wake_ups) == 1
    await asyncio.sleep(0.01)
    assert loop.timers() == 0
    buffer.put(6)
    await turn()
    assert got[2:] == [[6]]
    assert len(wake_ups) == 2
    buffer.put(7)
    buffer.close()
    assert got[3:] == [[7]]
    assert loop.timers() == 0


@pytest.mark.virtual_clock
@pytest.mark.parametrize("is_bulk", [False, True])
async def test_an_exception_that_is_yielded_twice_is_copied(is_bulk: bool) -> None:
    """Only the first caller has the object itself; notes have the places in the whole batch."""
    batcher = FakeBatcher()
    if is_bulk:
        call = batcher.call_many(range(4), return_exceptions=True)
    else:
        call = asyncio.create_task(process_all(batcher, *range(4)))
    await turn()
    error = ValueError("shared")
    batcher.runner.yield_results(results=[error])
    batcher.runner.yield_results(2, results=["b", error])
    batcher.runner.end(outcome=[error])
    outcomes = await call
    assert outcomes[:2] == [error, "b"]
    assert len({id(outcome) for outcome in outcomes}) == 4
    for place, copied in enumerate(outcomes[2:], 3):
        assert str(copied) == "shared"
        assert copied.__notes__[-1].startswith(f"item {place} of 4 in a batch")
    await batcher.stop()


@pytest.mark.virtual_clock
async def test_results_after_a_leaked_slot_are_dropped(caplog: pytest.LogCaptureFixture) -> None:
    """Its callers have got BatchTimeoutError."""
    records: list[BatchRecord] = []
    batcher = FakeBatcher(on_batch=records.append)
    futures = [batcher.submit(item) for item in range(3)]
    await turn()
    batcher.runner.yield_results()
    batcher.runner.on_timeouts[0](BatchTimeoutError("hangs"))
    batcher.runner.yield_results()
    batcher.runner.end()
    outcomes = await outcomes_of(futures)
    assert outcomes[0] == 0
    assert [type(error) for error in outcomes[1:]] == [BatchTimeoutError] * 2
    assert [record.size for record in records] == [3]
    assert len(package_logs(caplog)) == 1
    await batcher.stop()


@pytest.mark.virtual_clock
@pytest.mark.parametrize("ends", [True, False])
async def test_a_batch_abandoned_by_a_result_is_cancelled(ends: bool) -> None:
    """The callers of the other items were gone before: by force with cancel_abandoned."""
    batcher = FakeBatcher(cancel_abandoned=ends)
    futures = [batcher.submit(item) for item in range(3)]
    await turn()
    futures[1].cancel()
    futures[2].cancel()
    await turn()
    assert batcher.runner.cancelled == []
    batcher.runner.yield_results()
    await turn()
    assert batcher.runner.cancelled == [([0, 1, 2], ends)]
    assert futures[0].result() == 0
    if not ends:
        batcher.runner.end()
    await batcher.stop()


@pytest.mark.virtual_clock
async def test_a_result_is_freed_before_its_batch_ends() -> None:
    """The batch that runs on holds what callers have got no longer."""

    class Result:
        """Can be referred to weakly."""

    batcher = FakeBatcher()
    futures = [batcher.submit(item) for item in range(2)]
    await turn()
    result = Result()
    mark = weakref.ref(result)
    batcher.runner.yield_results(results=[result])
    assert futures.pop(0).result() is result
    del result
    await turn()
    gc.collect()
    assert mark() is None
    batcher.runner.end()
    await batcher.stop()
