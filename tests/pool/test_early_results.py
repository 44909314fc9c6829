"""What a function yields in a worker comes before the batch has ended."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from async_batcher import WorkerPool
from async_batcher._pool.pickled_function import PickledFunction
from async_batcher._pool.work_item import WorkItem
from async_batcher._transport import channel
from async_batcher._worker.user_function import UserFunction
from async_batcher.exceptions import (
    BadResultError,
    BatcherStoppedError,
    BatchTimeoutError,
    SerializationError,
    WorkerDiedError,
)
from async_batcher.failures import isolate
from tests.support import worker_functions as work
from tests.support import yielding_functions as functions
from tests.support.batchers import call_all, make_batcher
from tests.support.polling import block_until, wait_until
from tests.support.scripts import is_alive
from tests.support.worker_pools import METHODS, may_warn_of_fork, pids_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from async_batcher._worker.results import Outcome

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="no event loop there watches sockets"),
    may_warn_of_fork,
]


class _CallbackError(Exception):
    pass


class Trip:
    """A batch at a pool, and what comes of it.

    Attributes:
        calls: The lists of results that came early.
        outcome: A future.
    """

    def __init__(
        self,
        pool: WorkerPool,
        function: Callable[..., Any],
        batch: list[Any],
        timeout: float | None = None,
        client: object = None,
    ) -> None:
        self.calls: list[list[Any]] = []
        self.outcome: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        user_function = UserFunction(function, by_keyword=False, setup=None)
        self.item = WorkItem(
            PickledFunction(user_function, out_of_band=True),
            batch,
            client,
            timeout,
            on_outcome=self._on_outcome,
            on_early=self._on_early,
        )
        self.dispatcher = pool.dispatcher()
        self.dispatcher.submit(self.item)

    def _on_early(self, results: list[Any]) -> None:
        assert results
        assert not self.outcome.done()
        self.calls.append(results)

    def _on_outcome(self, outcome: Outcome) -> None:
        self.outcome.set_result(outcome)

    @property
    def early(self) -> list[Any]:
        """The results that came early."""
        return [result for results in self.calls for result in results]

    async def come(self, count: int) -> list[Any]:
        """Wait for as many early results."""
        await wait_until(lambda: len(self.early) >= count)
        return self.early

    async def all(self) -> list[Any]:
        """Return all results of a batch that does not fail."""
        outcome = await self.outcome
        assert isinstance(outcome, list), outcome
        return self.early + outcome


@pytest.mark.parametrize("method", METHODS)
async def test_a_result_comes_while_the_batch_runs(tmp_path: Path, method: str) -> None:
    """Whatever starts the workers."""
    async with WorkerPool(1, mp_context=method) as pool:
        trip = Trip(pool, partial(functions.held_after_one, tmp_path), ["a", "b", "c"])
        assert await trip.come(1) == ["a"]
        assert not trip.outcome.done()
        (tmp_path / "go").touch()
        assert await trip.all() == ["a", "b", "c"]
        assert len(work.noted(tmp_path, "closed")) == 1


@pytest.mark.parametrize("function", [functions.doubles, functions.returned_generator])
async def test_many_small_results(pool: WorkerPool, function: Any) -> None:
    """They come in order, each once, and the next batches run as ever."""
    items = list(range(10_000))
    trips = [Trip(pool, function, items) for _ in range(2)]
    for trip in trips:
        assert await trip.all() == [item * 2 for item in items]
        assert trip.calls
    assert await Trip(pool, work.double, [1, 2]).all() == [2, 4]


async def test_results_that_come_slowly(pool: WorkerPool, tmp_path: Path) -> None:
    """None waits for the one after it."""
    trip = Trip(pool, partial(functions.slowly_held, tmp_path, 5), list(range(30)))
    for number in range(1, 6):
        await trip.come(number)
        (tmp_path / str(number)).touch()
    assert await trip.all() == list(range(30))


async def test_results_that_come_fast(
    pool: WorkerPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They collect while the channel is paused, and the callers get them together."""
    monkeypatch.setattr(channel, "PAUSE_SECONDS", 0.5)
    trip = Trip(pool, partial(functions.slowly_held, tmp_path, 1), list(range(50)))
    await trip.come(1)
    (tmp_path / "1").touch()
    assert await trip.all() == list(range(50))
    assert 1 < len(trip.calls) < 20


async def test_a_function_that_returns_a_list(pool: WorkerPool) -> None:
    """Nothing comes early."""
    trip = Trip(pool, work.double, [1, 2, 3])
    assert await trip.outcome == [2, 4, 6]
    assert trip.calls == []


@pytest.mark.parametrize("place", range(3))
@pytest.mark.parametrize(
    ("name", "error"),
    [("error", ValueError), ("lock", SerializationError), ("unreadable", SerializationError)],
)
async def test_a_result_that_fails(
    pool: WorkerPool, place: int, name: str, error: type[Exception]
) -> None:
    """An exception, or what cannot be pickled or unpickled, concerns its item alone."""
    batch = ["a", "b", "c"]
    batch[place] = name
    results = await Trip(pool, functions.by_name, batch).all()
    failed = results.pop(place)
    assert type(failed) is error
    assert results == [item for item in batch if item != name]


@pytest.mark.parametrize(
    ("name", "error"),
    [("raise", LookupError), ("end", BadResultError), ("exit", WorkerDiedError)],
)
@pytest.mark.parametrize("count", [0, 2])
async def test_a_batch_that_fails_half_way(
    pool: WorkerPool, name: str, error: type[Exception], count: int
) -> None:
    """What was yielded before counts; the rest gets the exception."""
    trip = Trip(pool, functions.by_name, [*["a", "b"][:count], name, "c", "d"])
    outcome = await trip.outcome
    assert type(outcome) is error
    assert trip.early == ["a", "b"][:count]
    assert await Trip(pool, functions.doubles, [1, 2]).all() == [2, 4]


async def test_a_crash_that_is_seen_with_the_results(pool: WorkerPool) -> None:
    """What the worker had sent is read first."""
    pids = pids_of(pool)
    trip = Trip(pool, functions.by_name, ["a", "b", "exit", "c"])
    block_until(lambda: not all(map(is_alive, pids)))
    assert type(await trip.outcome) is WorkerDiedError
    assert trip.early == ["a", "b"]


async def test_a_time_limit_half_way(pool: WorkerPool) -> None:
    """What was yielded before counts; the worker is killed."""
    pids = pids_of(pool)
    trip = Trip(pool, functions.by_name, ["a", "b", "hang", "c"], timeout=0.3)
    assert type(await trip.outcome) is BatchTimeoutError
    assert trip.early == ["a", "b"]
    await wait_until(lambda: len(set(pids_of(pool)) & set(pids)) == 1)


async def test_too_many_results(capfd: pytest.CaptureFixture[str]) -> None:
    """Each item has its result; the log of the worker says so."""
    async with WorkerPool(1) as pool:
        assert await Trip(pool, functions.by_name, ["a", "twice"]).all() == ["a", "twice"]
    log = capfd.readouterr().err
    assert log.count("yielded more results than there were items (2)") == 1


async def test_too_many_results_that_are_collected(capfd: pytest.CaptureFixture[str]) -> None:
    """They come with the reply, since one item cannot be pickled. They are logged."""
    async with WorkerPool(1) as pool:
        trip = Trip(pool, functions.by_name, [threading.Lock(), "a", "twice"])
        failed, *others = await trip.all()
    assert type(failed) is SerializationError
    assert others == ["a", "twice"]
    assert trip.calls == []
    assert capfd.readouterr().err.count("yielded more results than there were items (2)") == 1


async def test_large_results(pool: WorkerPool) -> None:
    """They are what they were when they were yielded."""
    results = await Trip(pool, functions.one_buffer, list(range(20))).all()
    assert [len(result) for result in results] == [1 << 20] * 20
    assert [result[-1] for result in results] == list(range(20))
    assert all(type(result) is bytearray for result in results)


async def test_large_items(pool: WorkerPool) -> None:
    """They are in shared memory, and come back as they were."""
    items = [bytes([number]) * 300_000 for number in range(10)]
    for _ in range(3):
        assert await Trip(pool, functions.items_themselves, list(items)).all() == items
        assert await Trip(pool, functions.drop_items, list(items)).all() == [300_000] * 10


async def test_an_item_that_cannot_be_pickled(pool: WorkerPool) -> None:
    """It fails alone. The other results come with the reply."""
    trip = Trip(pool, functions.slowly, [0, threading.Lock(), *range(1, 10)])
    first, failed, *others = await trip.all()
    assert [first, *others] == list(range(10))
    assert type(failed) is SerializationError
    assert trip.calls == []


async def test_batches_that_wait_at_the_worker(tmp_path: Path) -> None:
    """Each batch gets its own results, also if it was sent while another one yielded."""
    async with WorkerPool(1) as pool:
        await Trip(pool, functions.doubles, [1]).all()
        first = Trip(pool, partial(functions.held_after_one, tmp_path), [1, 2])
        others = [Trip(pool, functions.doubles, [10 * i, 10 * i + 1]) for i in range(5)]
        assert await first.come(1) == [1]
        assert not any(trip.early for trip in others)
        (tmp_path / "go").touch()
        assert await first.all() == [1, 2]
        for i, trip in enumerate(others):
            assert await trip.all() == [20 * i, 20 * i + 2]


async def test_a_batch_without_callers_is_closed(tmp_path: Path) -> None:
    """At its next yield; the worker goes on with other batches."""
    async with WorkerPool(1) as pool:
        (pid,) = pids_of(pool)
        trip = Trip(pool, partial(functions.held_after_one, tmp_path), list(range(1000)))
        waiting = Trip(pool, partial(functions.held_after_one, tmp_path), [7, 8, 9])
        await trip.come(1)
        trip.dispatcher.cancel(trip.item, force=False)
        assert not trip.outcome.done()
        (tmp_path / "go").touch()
        await trip.outcome
        assert await waiting.all() == [7, 8, 9]
        # The second result, if the worker had looked at the status page before.
        assert len(work.noted(tmp_path, "yielded")) <= 2 + 3
        assert len(work.noted(tmp_path, "closed")) == 2
        assert pids_of(pool) == [pid]


async def test_a_client_that_is_stopped_by_force(tmp_path: Path) -> None:
    """Its running batch is closed at the next yield, and nothing comes of it afterwards."""
    async with WorkerPool(1) as pool:
        trip = Trip(pool, partial(functions.held_after_one, tmp_path), [1] * 1000, client="a")
        await trip.come(1)
        trip.dispatcher.abort("a", BatcherStoppedError("stopped"))
        assert type(await trip.outcome) is BatcherStoppedError
        (tmp_path / "go").touch()
        assert await Trip(pool, functions.doubles, [1, 2]).all() == [2, 4]
        assert len(work.noted(tmp_path, "yielded")) <= 2
        assert trip.early == [1]


async def test_a_callback_that_raises(pool: WorkerPool, caplog: pytest.LogCaptureFixture) -> None:
    """It is logged, and the outcome comes."""

    class Raising(Trip):
        def _on_early(self, results: list[Any]) -> None:
            super()._on_early(results)
            raise _CallbackError

    trip = Raising(pool, functions.slowly, list(range(10)))
    assert await trip.all() == list(range(10))
    assert "_CallbackError" in caplog.text


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
async def test_a_function_that_forks(pool: WorkerPool) -> None:
    """What the child yields does not reach the callers."""
    pids = pids_of(pool)
    first, pid, last = await Trip(pool, functions.by_name, ["a", "fork", "b"]).all()
    assert (first, last) == ("a", "b")
    assert pid in pids


async def test_a_call_that_returns_a_generator(pool: WorkerPool) -> None:
    """A call has one result, which a generator cannot be."""
    with pytest.raises(SerializationError, match="generator"):
        await pool.run(functions.doubles, [1, 2])


# --- callers of a batcher


async def test_the_first_caller(tmp_path: Path, pool: WorkerPool) -> None:
    """It resumes while the batch runs."""
    function = partial(functions.held_after_one, tmp_path)
    async with make_batcher(function, executor=pool, max_batch_size=3) as batcher:
        first, *others = (batcher.submit(item) for item in "abc")
        assert await first == "a"
        assert not any(future.done() for future in others)
        (tmp_path / "go").touch()
        assert await asyncio.gather(*others) == ["b", "c"]


@pytest.mark.parametrize("way", ["process", "process_many"])
@pytest.mark.parametrize("isolates", [False, True])
async def test_a_crash_half_way(tmp_path: Path, pool: WorkerPool, way: str, isolates: bool) -> None:
    """It concerns the items without a result; with `isolate` only those run again."""
    function = partial(functions.noted_by_name, tmp_path)
    options: dict[str, Any] = {"executor": pool, "on_failure": [isolate()] if isolates else []}
    async with make_batcher(function, max_batch_size=5, **options) as batcher:
        items = ["a", "b", "exit", "c", "d"]
        if way == "process":
            results = await call_all(batcher, items)
        else:
            results = await batcher.process_many(items, return_exceptions=True)
    assert results[:2] == ["a", "b"]
    assert type(results[2]) is WorkerDiedError
    if isolates:
        assert results[3:] == ["c", "d"]
    else:
        assert [type(result) for result in results[3:]] == [WorkerDiedError] * 2
    begun = Counter(work.noted(tmp_path, "begun"))
    assert begun["a"] == begun["b"] == 1
    assert begun["c"] == begun["d"] == isolates
    assert (begun["exit"] > 1) is isolates


@pytest.mark.slow
@pytest.mark.parametrize("way", ["process", "process_many"])
@pytest.mark.parametrize("isolates", [False, True])
@pytest.mark.parametrize("has_keys", [False, True])
async def test_a_time_limit_and_isolation(
    tmp_path: Path, pool: WorkerPool, way: str, isolates: bool, has_keys: bool
) -> None:
    """The limit concerns the items without a result; with `isolate` only those run again.

    With ``key_concurrency`` the batch has its outcome when its worker no longer runs it.
    """
    function = partial(functions.noted_by_name, tmp_path)
    options: dict[str, Any] = {"executor": pool, "batch_timeout": 0.4, "max_batch_size": 5}
    options["on_failure"] = [isolate()] if isolates else []
    if has_keys:
        options |= {"key": type, "key_concurrency": 1}
    async with make_batcher(function, **options) as batcher:
        items = ["a", "b", "hang", "c", "d"]
        if way == "process":
            results = await call_all(batcher, items)
        else:
            results = await batcher.process_many(items, return_exceptions=True)
    assert results[:2] == ["a", "b"]
    assert type(results[2]) is BatchTimeoutError
    if isolates:
        assert results[3:] == ["c", "d"]
    else:
        assert [type(result) for result in results[3:]] == [BatchTimeoutError] * 2
    begun = Counter(work.noted(tmp_path, "begun"))
    assert begun["a"] == begun["b"] == 1
    assert begun["c"] == begun["d"] == isolates
    assert (begun["hang"] > 1) is isolates


@pytest.mark.slow
async def test_a_crash_and_a_time_limit_in_one_batch(tmp_path: Path, pool: WorkerPool) -> None:
    """Each item that fails gets its own error; each of the others is run and delivered once."""
    function = partial(functions.noted_by_name, tmp_path)
    items = ["a", "hang", "b", "c", "exit", "d", "raise", "e"]
    options: dict[str, Any] = {"executor": pool, "batch_timeout": 1.0, "on_failure": isolate()}
    async with make_batcher(function, max_batch_size=8, **options) as batcher:
        results = dict(zip(items, await call_all(batcher, items), strict=True))
        stats = batcher.stats()
    errors = {item: type(results.pop(item)) for item in ("hang", "exit", "raise")}
    assert errors == {"hang": BatchTimeoutError, "exit": WorkerDiedError, "raise": LookupError}
    assert all(item == result for item, result in results.items())
    assert (stats.done, stats.failed) == (5, 3)
    begun = Counter(work.noted(tmp_path, "begun"))
    assert {begun[item] for item in results} == {1}


@pytest.mark.slow
@pytest.mark.usefixtures("long_graces")
async def test_results_that_come_after_the_time_limit(tmp_path: Path) -> None:
    """A generator that catches the interrupt, and yields, cannot resolve its callers again."""
    async with WorkerPool(1) as pool:
        function = partial(functions.late_after_one, tmp_path)
        options: dict[str, Any] = {"executor": pool, "batch_timeout": 1.0}
        async with make_batcher(function, max_batch_size=3, **options) as batcher:
            first, *rest = await call_all(batcher, ["a", "b", "c"])
            assert first == "a"
            assert [type(result) for result in rest] == [BatchTimeoutError] * 2
            await wait_until(lambda: work.noted(tmp_path, "interrupted"))
            assert await batcher.process("d") == "d"
            stats = batcher.stats()
    assert (stats.done, stats.failed) == (2, 2)


@pytest.mark.parametrize("way", ["process", "process_many"])
async def test_callers_that_are_cancelled(tmp_path: Path, pool: WorkerPool, way: str) -> None:
    """When all are, the function is closed at its next yield, and the slot is free."""
    pids = pids_of(pool)
    function = partial(functions.held_after_one, tmp_path)
    options: dict[str, Any] = {"executor": pool, "concurrency": 1}
    async with make_batcher(function, max_batch_size=100, **options) as batcher:
        if way == "process":
            calls = [asyncio.ensure_future(batcher.process(item)) for item in range(100)]
            await calls[0]
        else:
            calls = [asyncio.ensure_future(batcher.process_many(range(100)))]
            await wait_until(lambda: work.noted(tmp_path, "yielded"))
        for call in calls:
            call.cancel()
        await asyncio.wait(calls)
        await asyncio.sleep(0)  # the batcher looks at its batches in the next iteration
        (tmp_path / "go").touch()
        assert await batcher.process(-1) == -1
        assert len(work.noted(tmp_path, "yielded")) < 50
        await wait_until(lambda: len(work.noted(tmp_path, "closed")) == 2)
        assert pids_of(pool) == pids
