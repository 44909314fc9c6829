"""`Later` and `retry` where batches run: one contract for the loop, threads and processes."""

from __future__ import annotations

import asyncio
import os
import threading
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from async_batcher import Later, WorkerPool, batched, isolate, retry
from async_batcher.exceptions import (
    BadResultError,
    BatchError,
    BatcherStoppedError,
    BatchTimeoutError,
    SerializationError,
    WorkerDiedError,
)
from tests.support import retried_functions as work
from tests.support import worker_functions
from tests.support.executors import INTERPRETERS, LOKY, POOLS, STANDARD, make_executor
from tests.support.polling import turn, wait_until
from tests.support.scripts import is_alive
from tests.support.worker_pools import may_warn_of_fork
from tests.support.yielding_functions import Unreadable

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

pytestmark = [may_warn_of_fork, pytest.mark.usefixtures("no_noise")]

QUICK = ["coroutine", "threads", "pool_forkserver"]
SLOW = [kind for kind in [*STANDARD, *POOLS, *LOKY, *INTERPRETERS] if kind not in QUICK]
PICKLING = ["pool_forkserver", *(pytest.param(kind, marks=pytest.mark.slow) for kind in SLOW)]
PLACES = [*QUICK, *(pytest.param(kind, marks=pytest.mark.slow) for kind in SLOW)]
ITEMS = range(6)
RESULTS = [item * 2 for item in ITEMS]


@pytest.fixture(scope="module", autouse=True)
def _standing_helpers_of_loky() -> None:
    """Start the helper processes that loky keeps, which are not leaks."""
    for kind in LOKY:
        with make_executor(kind) as made:
            made.submit(int).result()


@pytest.fixture(params=PLACES)
async def make(request: pytest.FixtureRequest) -> AsyncIterator[Any]:
    """Return what makes a batcher for a place."""
    kind: str = request.param
    executor = None if kind == "coroutine" else make_executor(kind)
    batchers = []

    def make_batcher(function: Callable[[list[Any]], Any], **options: Any) -> Any:
        async def process_batch(batch: list[Any]) -> Any:
            return function(batch)

        options = {"max_queue_time": 0.005, "max_batch_size": 4, **options}
        if executor is None:
            batcher: Any = batched(process_batch, **options)
        else:
            batcher = batched(function, executor=executor, **options)
        batchers.append(batcher)
        return batcher

    yield make_batcher
    for batcher in batchers:
        await batcher.stop()
    if isinstance(executor, WorkerPool):
        await executor.stop()
    elif executor is not None:
        executor.shutdown()


@pytest.mark.parametrize("name", ["return_later", "yield_later", "raise_later"])
async def test_items_that_are_put_off_have_their_results(make: Any, name: str) -> None:
    """Returned, yielded and raised; in each way to call, each caller gets its own result."""
    batcher = make(getattr(work, name))
    assert await batcher.process_many(ITEMS) == RESULTS
    futures = [batcher.submit(item) for item in ITEMS]
    assert [await future for future in futures] == RESULTS
    assert [result async for result in batcher.map(ITEMS)] == RESULTS
    unordered = [pair async for pair in batcher.map(ITEMS, ordered=False, pairs=True)]
    assert sorted(unordered) == list(zip(ITEMS, RESULTS, strict=True))
    stats = batcher.stats()
    assert (stats.done, stats.failed) == (24, 0)
    assert stats.retried > 0


@pytest.mark.parametrize("how", ["raise", "raise from", "return", "return from"])
async def test_what_callers_get_when_the_attempts_are_used_up(make: Any, how: str) -> None:
    """The cause that the batch function named; a `BatchError` if it named none."""
    batcher = make(work.always_later, on_failure=retry(Later, attempts=2))
    errors = await batcher.process_many([how, how], return_exceptions=True)
    if how.endswith("from"):
        assert [(type(error), error.args) for error in errors] == [(KeyError, ("service",))] * 2
    else:
        assert [type(error) for error in errors] == [BatchError] * 2
        assert "in attempt 2, and on_failure allows no more" in str(errors[0])
        assert errors[0].__cause__ is None
    assert errors[0] is not errors[1]


async def test_a_policy_by_the_type_of_the_cause(make: Any) -> None:
    """It matches a cause in a worker, and no `Later` without one."""
    batcher = make(work.raise_later, on_failure=retry(ConnectionError, attempts=3))
    assert await batcher.process_many(ITEMS) == RESULTS
    batcher = make(work.raise_later, on_failure=retry(ConnectionError, attempts=2))
    errors = await batcher.process_many([1, 2], return_exceptions=True)
    assert [(type(error), error.args) for error in errors] == [(ConnectionError, ("busy",))] * 2


async def test_failures_are_retried(make: Any) -> None:
    """Raised for the batch, and returned for its items."""
    batcher = make(work.fail_at_first, on_failure=retry(ConnectionError, backoff=0.001))
    assert await batcher.process_many(ITEMS) == RESULTS
    assert batcher.stats().retried == 12
    batcher = make(work.fail_at_first, on_failure=retry(ConnectionError, attempts=2, backoff=0.001))
    errors = await batcher.process_many([1, 2], return_exceptions=True)
    assert [(type(error), error.args) for error in errors] == [
        (ConnectionError, (1,)),
        (ConnectionError, (2,)),
    ]


@pytest.mark.parametrize("isolates", [False, True])
@pytest.mark.parametrize("how", ["later", "raise", "end"])
async def test_what_is_yielded_before_a_batch_ends_half_way(
    make: Any, how: str, isolates: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is delivered, also where results are collected; only the rest is put off, or fails."""
    batcher = make(work.yield_by_name, on_failure=[isolate()] if isolates else [])
    names = ["a", "error", how, "b"]
    results = await batcher.process_many([(tmp_path, n) for n in names], return_exceptions=True)
    assert [results[0], str(results[1])] == ["a", "error"]
    assert type(results[1]) is ValueError
    error = {"raise": LookupError, "end": BadResultError}.get(how)
    if error is None:
        assert results[2:] == ["later", "b"]
    elif isolates:
        assert type(results[2]) is error
        assert results[3] == "b"
    else:
        assert [type(result) for result in results[2:]] == [error] * 2
        assert [result.__notes__[-1].split(" in ")[0] for result in results[2:]] == [
            "item 3 of 4",
            "item 4 of 4",
        ]
    begun = Counter(worker_functions.noted(tmp_path, "begun"))
    assert (begun["a"], begun["error"]) == (1, 1)
    stats = batcher.stats()
    assert stats.retried == (2 if how == "later" else 0)
    assert stats.done == (3 if how == "later" else 2 if isolates else 1)
    if how != "later":
        assert "a batch of 4 items failed" in caplog.text


@pytest.mark.parametrize("bad", ["item", "pickle of an item"])
@pytest.mark.parametrize(("place", "how"), [(0, "later"), (2, "raise"), (5, "later")])
@pytest.mark.parametrize("make", PICKLING, indirect=True)
async def test_what_is_yielded_before_a_batch_ends_half_way_beside_a_bad_item(
    make: Any, place: int, how: str, bad: str, tmp_path: Path
) -> None:
    """Items travel one by one then; each still has its own result, and runs once."""
    batcher = make(work.yield_by_name, max_batch_size=6)
    names = ["a", "return later", "lock", how, "b"]
    items: list[Any] = [(tmp_path, name) for name in names]
    content = threading.Lock() if bad == "item" else Unreadable(os.getpid())
    items.insert(place, (tmp_path, "bad", content))
    results = await batcher.process_many(items, return_exceptions=True)
    assert type(results.pop(place)) is SerializationError
    assert results[:2] == ["a", "return later"]
    assert type(results[2]) is SerializationError
    if how == "later":
        assert results[3:] == ["later", "b"]
    else:
        assert [type(result) for result in results[3:]] == [LookupError] * 2
    begun = Counter(worker_functions.noted(tmp_path, "begun"))
    rest = {"later": 2, "b": 1} if how == "later" else {"raise": 1}
    assert begun == {"a": 1, "return later": 2, "lock": 1, **rest}


POOL_KINDS = [POOLS[0], *(pytest.param(kind, marks=pytest.mark.slow) for kind in POOLS[1:])]


@pytest.fixture
async def pool(request: pytest.FixtureRequest) -> AsyncIterator[WorkerPool]:
    """Return a `WorkerPool` with a start method."""
    async with make_executor(request.param) as made:
        yield made


@pytest.mark.slow
@pytest.mark.parametrize("pool", POOLS, indirect=True)
async def test_the_items_of_a_crash_are_retried_by_name(pool: WorkerPool) -> None:
    """In the worker that replaces it; with a policy for other errors they fail."""
    options: dict[str, Any] = {"executor": pool, "max_queue_time": 0.005, "max_batch_size": 4}
    policies = [retry(WorkerDiedError, attempts=2, backoff=0.001)]
    async with batched(work.crash_at_first, on_failure=policies, **options) as batcher:
        assert await batcher.process_many(ITEMS) == RESULTS
        assert batcher.stats().retried == 6
    async with batched(work.crash_at_first, on_failure=retry(), **options) as batcher:
        (error,) = await batcher.process_many([1], return_exceptions=True)
        assert type(error) is WorkerDiedError


@pytest.mark.slow
@pytest.mark.parametrize("kind", STANDARD)
async def test_a_crash_of_a_standard_pool_that_the_batcher_makes(kind: str) -> None:
    """The batcher makes a new pool, and the items run there."""

    def factory() -> Any:
        return make_executor(kind)

    policies = [retry(WorkerDiedError, attempts=2, backoff=0.001)]
    options: dict[str, Any] = {"max_queue_time": 0.005, "max_batch_size": 4}
    async with batched(
        work.crash_at_first, executor=factory, on_failure=policies, **options
    ) as batcher:
        assert await batcher.process_many([1, 2, 3]) == [2, 4, 6]


@pytest.mark.slow
@pytest.mark.parametrize("pool", POOLS, indirect=True)
async def test_the_items_of_a_batch_that_timed_out_are_retried_by_name(pool: WorkerPool) -> None:
    """The worker is interrupted or replaced."""
    policies = [retry(BatchTimeoutError, attempts=5, backoff=0.001)]
    async with batched(
        work.hang_at_first, executor=pool, batch_timeout=0.3, on_failure=policies
    ) as batcher:
        assert await batcher.process_many([1, 2, 3]) == [2, 4, 6]
        assert batcher.stats().failed == 0


@pytest.mark.parametrize("how", ["timeout", "abandoned"])
@pytest.mark.parametrize("pool", POOL_KINDS, indirect=True)
@pytest.mark.usefixtures("long_graces")
async def test_a_key_waits_for_its_batch_that_is_interrupted(
    pool: WorkerPool, how: str, tmp_path: Path
) -> None:
    """Its ``finally`` blocks still run: a batch of that key never runs beside it."""
    options: dict[str, Any] = {"cancel_abandoned": True}
    if how == "timeout":
        options = {"batch_timeout": 1.0}
    async with batched(
        work.end_slowly,
        executor=pool,
        key=lambda _: 0,
        key_concurrency=1,
        max_batch_size=1,
        **options,
    ) as batcher:
        calls = [asyncio.ensure_future(batcher((tmp_path, name))) for name in ("slow", "next")]
        begun = partial(worker_functions.noted, tmp_path, "begun")
        await wait_until(lambda: "slow" in begun())
        if how == "abandoned":
            calls[0].cancel()
        await wait_until(lambda: worker_functions.noted(tmp_path, "interrupted"))
        await pool.run(worker_functions.same, [0])  # at the other worker, which is free
        seen = begun()
        (pid,) = worker_functions.noted(tmp_path, "interrupted")
        assert seen == ["slow"] or not is_alive(int(pid))  # killed, if this took too long
        (tmp_path / "end").touch()
        error, result = await asyncio.gather(*calls, return_exceptions=True)
        assert type(error) is (BatchTimeoutError if how == "timeout" else asyncio.CancelledError)
        assert result == "next"


@pytest.mark.virtual_clock
@pytest.mark.parametrize("named", [True, False])
async def test_a_coroutine_that_timed_out_is_retried_by_name(named: bool) -> None:
    """It was cancelled, so it does not run on."""
    runs: list[list[int]] = []

    async def process_batch(batch: list[int]) -> list[int]:
        runs.append(batch)
        await asyncio.sleep(100 if len(runs) == 1 else 0)
        return [item * 2 for item in batch]

    policy = retry(BatchTimeoutError) if named else retry()
    async with batched(process_batch, batch_timeout=1.0, on_failure=policy) as batcher:
        results = await batcher.process_many([1, 2], return_exceptions=True)
    if named:
        assert results == [2, 4]
    else:
        assert [type(error) for error in results] == [BatchTimeoutError] * 2
    assert len(runs) == 1 + named


@pytest.mark.parametrize("pool", POOL_KINDS, indirect=True)
@pytest.mark.parametrize("policies", [[], [isolate(ValueError)]], ids=["none", "isolate"])
async def test_a_batch_that_raises_a_later_beside_an_item_that_cannot_be_pickled(
    pool: WorkerPool, policies: list[Any]
) -> None:
    """That item fails, the others come back, and the batcher pauses for them."""
    options: dict[str, Any] = {"executor": pool, "max_queue_time": 0.005, "max_batch_size": 3}
    async with batched(work.raise_later, on_failure=policies, **options) as batcher:
        items: list[Any] = [1, threading.Lock(), 3]
        results = await batcher.process_many(items, return_exceptions=True)
        assert type(results.pop(1)) is SerializationError
        assert results == [2, 6]
        assert batcher.stats().retried == 4


@pytest.mark.parametrize("pool", POOL_KINDS, indirect=True)
async def test_a_generator_that_raises_beside_an_item_that_cannot_be_pickled(
    pool: WorkerPool,
) -> None:
    """Its results before that stay; only the last item comes back."""
    options: dict[str, Any] = {"executor": pool, "max_queue_time": 0.005, "max_batch_size": 4}
    async with batched(work.yield_later, on_failure=isolate(ValueError), **options) as batcher:
        items: list[Any] = [0, 2, threading.Lock(), 4]
        results = await batcher.process_many(items, return_exceptions=True)
        assert type(results.pop(2)) is SerializationError
        assert results == [0, 4, 8]


@pytest.mark.parametrize("keyed", [False, True])
@pytest.mark.parametrize("pool", POOL_KINDS, indirect=True)
@pytest.mark.usefixtures("long_graces")
async def test_no_batch_begins_after_one_was_put_off_while_it_was_cancelled(
    pool: WorkerPool, keyed: bool, tmp_path: Path
) -> None:
    """The limit that it hit counts, although no caller is left."""
    options: dict[str, Any] = {"key": lambda _: 0, "key_concurrency": 1} if keyed else {}
    batcher = batched(
        work.put_off_when_interrupted,
        executor=pool,
        max_batch_size=1,
        cancel_abandoned=True,
        **options,
    )
    call = asyncio.ensure_future(batcher((tmp_path, "hang")))
    begun = partial(worker_functions.noted, tmp_path, "begun")
    await wait_until(begun)
    call.cancel()
    await asyncio.wait([call])
    await turn()
    await pool.restart_workers()  # the one that was interrupted has exited
    following = asyncio.ensure_future(batcher((tmp_path, "next")))
    await turn()
    assert await pool.run(worker_functions.same, [0]) == [0]
    await pool.restart_workers()  # for as long, nothing begins
    assert batcher.stats().queued == 1
    assert begun() == ["hang"]
    await batcher.stop(force=True)
    (error,) = await asyncio.gather(following, return_exceptions=True)
    assert type(error) is BatcherStoppedError


@pytest.mark.parametrize("concurrency", [None, 12])
@pytest.mark.parametrize("pool", POOL_KINDS, indirect=True)
async def test_no_batch_begins_after_one_has_raised_a_later(
    pool: WorkerPool, concurrency: int | None, tmp_path: Path
) -> None:
    """Two run, one waits at each of the two workers, and those beyond that in the pool."""
    assert pool.max_workers == 2
    options: dict[str, Any] = {"max_batch_size": 1, "concurrency": concurrency}
    batcher = batched(work.put_off_by_file, executor=pool, **options)
    count = concurrency or 4
    names = ["put-off", "hold", *map(str, range(count - 2))]
    calls = [asyncio.ensure_future(batcher((tmp_path, name))) for name in names]
    begun = partial(worker_functions.noted, tmp_path, "begun")
    await wait_until(lambda: len(begun()) == 2)
    await wait_until(lambda: batcher.stats().queued == count - 2)
    (tmp_path / "put-off").touch()
    await wait_until(lambda: batcher.stats().retried == 1)
    await wait_until(lambda: batcher.stats().queued == count - 1)
    (tmp_path / "hold").touch()
    assert await calls[1] == "hold"
    stats = batcher.stats()
    assert (stats.queued, stats.running, stats.failed, stats.retried) == (count - 1, 0, 0, 1)
    await pool.restart_workers()  # for as long, nothing else begins
    assert sorted(begun()) == ["hold", "put-off"]
    await batcher.stop(force=True)
    others = [calls[0], *calls[2:]]
    for error in await asyncio.gather(*others, return_exceptions=True):
        assert type(error) is BatcherStoppedError


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("pool", POOL_KINDS, indirect=True)
async def test_a_large_batch_that_is_being_copied_does_not_begin_after_a_later(
    pool: WorkerPool, ahead: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither at a worker that was idle, nor at the one that raised it."""
    numpy = pytest.importorskip("numpy")
    copies: list[tuple[asyncio.Future[Any], Callable[[], Any]]] = []

    def hold(loop: asyncio.AbstractEventLoop, _: object, copy: Callable[[], Any]) -> Any:
        copies.append((loop.create_future(), copy))
        return copies[-1][0]

    batcher = batched(work.put_off_by_file, executor=pool, max_batch_size=1)
    names = ["put-off", "hold"] if ahead else ["put-off"]
    calls = [asyncio.ensure_future(batcher((tmp_path, name))) for name in names]
    begun = partial(worker_functions.noted, tmp_path, "begun")
    await wait_until(lambda: len(begun()) == len(names))
    monkeypatch.setattr("async_batcher._transport.worker_blocks.run_in_helper", hold)
    large = [(tmp_path, f"large {n}", numpy.zeros(1_000_000)) for n in range(len(names))]
    calls += [asyncio.ensure_future(batcher(item)) for item in large]
    await wait_until(lambda: len(copies) == len(large))
    (tmp_path / "put-off").touch()
    await wait_until(lambda: batcher.stats().retried == 1)
    (tmp_path / "hold").touch()
    await wait_until(lambda: batcher.stats().queued == len(large) + 1)
    for future, copy in copies:
        future.set_result(copy())
    for _ in range(4):
        assert await pool.run(worker_functions.same, [0]) == [0]
    await pool.restart_workers()
    assert sorted(begun()) == sorted(names)
    await batcher.stop(force=True)
    await asyncio.gather(*calls, return_exceptions=True)


@pytest.mark.parametrize("pool", POOL_KINDS, indirect=True)
async def test_what_others_sent_behind_a_large_batch_keeps_its_order_after_a_later(
    pool: WorkerPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The large batch was being copied for that worker; each call runs once and has its result."""
    numpy = pytest.importorskip("numpy")
    copies: list[tuple[asyncio.Future[Any], Callable[[], Any]]] = []

    def hold(loop: asyncio.AbstractEventLoop, _: object, copy: Callable[[], Any]) -> Any:
        copies.append((loop.create_future(), copy))
        return copies[-1][0]

    def call(name: str) -> asyncio.Task[Any]:
        work = pool.run(worker_functions.note_and_hold, tmp_path, [name])
        return asyncio.ensure_future(work)

    begun = partial(worker_functions.noted, tmp_path, "begun")
    calls = [call("hold-1"), call("hold-2")]  # both workers have the function then
    await wait_until(lambda: len(begun()) == 2)
    for name in ("hold-1", "hold-2"):
        (tmp_path / name).touch()
    await asyncio.gather(*calls)
    batcher = batched(work.put_off_by_file, executor=pool, max_batch_size=1)
    held = [asyncio.ensure_future(batcher((tmp_path, "put-off")))]
    await wait_until(lambda: "put-off" in begun())
    monkeypatch.setattr("async_batcher._transport.worker_blocks.run_in_helper", hold)
    held.append(asyncio.ensure_future(batcher((tmp_path, "large", numpy.zeros(1_000_000)))))
    await wait_until(lambda: copies)
    names = ["hold-3", "hold-4", "hold-5", "hold-6"]
    calls = [call(name) for name in names[:2]]  # one behind each of the two
    await turn()
    (tmp_path / "put-off").touch()
    await wait_until(lambda: set(begun()) & set(names))
    calls += [call(name) for name in names[2:]]
    await turn()
    for future, copy in copies:
        future.set_result(copy())
    for name in names:
        (tmp_path / name).touch()
    async with asyncio.timeout(20):
        assert await asyncio.gather(*calls) == [[name] for name in names]
    assert sorted(begun()) == sorted(["hold-1", "hold-2", "put-off", *names])
    await batcher.stop(force=True)
    await asyncio.gather(*held, return_exceptions=True)


@pytest.mark.parametrize("pool", POOL_KINDS, indirect=True)
async def test_what_others_sent_ahead_runs_once_after_a_later(
    pool: WorkerPool, tmp_path: Path
) -> None:
    """It is handed back, and runs at any worker, while the batcher that put its items off waits."""
    batcher = batched(work.put_off_by_file, executor=pool, max_batch_size=1)
    held = [asyncio.ensure_future(batcher((tmp_path, name))) for name in ("put-off", "hold")]
    begun = partial(worker_functions.noted, tmp_path, "begun")
    await wait_until(lambda: len(begun()) == 2)
    names = [f"other-{number}" for number in range(8)]
    others = [
        asyncio.ensure_future(pool.run(worker_functions.note_and_hold, tmp_path, [name]))
        for name in names
    ]
    await turn()
    (tmp_path / "put-off").touch()
    assert await asyncio.gather(*others) == [[name] for name in names]
    (tmp_path / "hold").touch()
    assert await held[1] == "hold"
    assert sorted(begun()) == sorted(["hold", "put-off", *names])
    await batcher.stop(force=True)
    (error,) = await asyncio.gather(held[0], return_exceptions=True)
    assert type(error) is BatcherStoppedError


@pytest.mark.parametrize("pool", POOL_KINDS, indirect=True)
async def test_each_item_runs_once_more_after_each_later(pool: WorkerPool, tmp_path: Path) -> None:
    """Also what waits at workers, again and again; `retried` counts what has run."""
    options: dict[str, Any] = {"max_batch_size": 2, "on_failure": [retry(ValueError, attempts=9)]}
    async with batched(work.put_off_at_first, executor=pool, **options) as batcher:
        items = [(tmp_path, number) for number in range(60)]
        assert await batcher.process_many(items) == [number * 2 for number in range(60)]
        begun = [int(number) for number in worker_functions.noted(tmp_path, "begun")]
        assert {begun.count(number) for number in range(60)} <= {1, 2}
        assert batcher.stats().retried == len(begun) - 60
        assert len(begun) > 60
