"""Each caller gets the exception itself, or a copy of its own."""

from __future__ import annotations

import asyncio
import functools
import gc
import sys
import traceback
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

from async_batcher import WorkerPool, batched
from async_batcher.exceptions import BatchError
from async_batcher.failures import isolate
from tests.support import exception_kinds as kinds
from tests.support.exception_kinds import KINDS, UNPICKLABLE, made, shown
from tests.support.threads import HAS_GIL

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable


async def gather(batcher: Any, items: list[Any]) -> list[Any]:
    """Return the result or exception of each call; all calls are made at once."""
    return await asyncio.gather(*map(batcher, items), return_exceptions=True)


@pytest.fixture(params=["coroutine", "threads", "loop threads", "given threads"])
def in_process(request: pytest.FixtureRequest) -> Any:
    """Make a batcher of a function that runs in this process."""
    executors: list[ThreadPoolExecutor] = []

    def make(function: Callable[[list[Any]], Any], **options: Any) -> Any:
        if request.param == "threads":
            return batched(function, executor="thread", max_workers=1, **options)
        if request.param == "given threads":
            executors.append(ThreadPoolExecutor(1))
            return batched(function, executor=executors[-1], **options)
        if request.param == "loop threads":
            return batched(function, **options)

        async def process_batch(batch: list[Any]) -> Any:
            return function(batch)

        return batched(process_batch, **options)

    yield make
    for executor in executors:
        executor.shutdown()


async def test_a_sole_caller_gets_the_object_itself(in_process: Any) -> None:
    """It is what this batch raised, without a note."""
    known: list[BaseException] = []

    def process_batch(batch: list[str]) -> None:
        known.append(made(batch[0]))
        raise known[-1]

    async with in_process(process_batch, max_batch_size=1) as batcher:
        for kind in [*KINDS, *UNPICKLABLE]:
            (error,) = await gather(batcher, [kind])
            assert error is known[-1], kind
            assert not any("in a batch of" in note for note in vars(error).get("__notes__", ()))


async def test_a_returned_exception_is_delivered_itself(in_process: Any) -> None:
    """If it is among the results once, and was not raised; else its callers get copies."""
    once, twice = kinds.KeywordOnlyError(retry_after=1), kinds.KeywordOnlyError(retry_after=2)

    def process_batch(batch: list[int]) -> list[Any]:
        return [once, twice, twice, *batch[3:]]

    async with in_process(process_batch, max_batch_size=4) as batcher:
        first, second, third, fourth = await gather(batcher, [0, 1, 2, 3])
        assert first is once
        assert fourth == 3
        assert len({id(one) for one in (second, third, twice)}) == 3
        assert [shown(one) for one in (second, third)] == [shown(twice)] * 2
        assert [one.__notes__[0].partition(" in a batch of ")[0] for one in (second, third)] == [
            "item 2 of 4",
            "item 3 of 4",
        ]


async def test_cancelled_callers_do_not_count(in_process: Any) -> None:
    """Only callers that still wait share an exception."""
    known = kinds.KeywordOnlyError(retry_after=1)
    begun, go_on = asyncio.Event(), []

    def process_batch(batch: list[int]) -> None:
        go_on.append(len(batch))
        raise known

    async with in_process(process_batch, max_batch_size=2, max_queue_time=1000.0) as batcher:
        gone, stays = batcher.submit(1), asyncio.ensure_future(batcher(2))
        gone.cancel()
        begun.set()
        stays2 = asyncio.ensure_future(batcher(3))
        errors = await asyncio.gather(stays, stays2, return_exceptions=True)
        assert {type(error) for error in errors} == {kinds.KeywordOnlyError}
    assert go_on == [2]


@pytest.mark.parametrize("returned", [False, True])
async def test_a_cached_exception_does_not_grow(in_process: Any, returned: bool) -> None:
    """An object that is raised or returned again and again collects no tracebacks or notes."""
    known = kinds.KeywordOnlyError(retry_after=1)

    def process_batch(batch: list[int]) -> list[Any]:
        if returned:
            return [known for _ in batch]
        raise known

    async def call(batcher: Any) -> BaseException:
        (error,) = await gather(batcher, [1])
        assert isinstance(error, BaseException)
        return error

    async with in_process(process_batch, max_queue_time=0) as batcher:
        depths, notes = [], []
        for _ in range(6):
            error = await call(batcher)
            depths.append(len(traceback.extract_tb(error.__traceback__)))
            notes.append(len(vars(error).get("__notes__", ())))
        assert len(set(depths[2:])) == 1
        assert max(depths) <= 2 * depths[0]
        assert set(notes) <= {0, 1}
        assert not hasattr(known, "__notes__")
        assert len(traceback.extract_tb(known.__traceback__)) <= max(depths)


async def test_a_cached_exception_refers_to_one_batch(in_process: Any) -> None:
    """The items of all earlier batches are freed."""

    class Item:
        pass

    known = kinds.KeywordOnlyError(retry_after=1)
    items: list[weakref.ref[Item]] = []

    def process_batch(batch: list[Item]) -> None:
        items.extend(map(weakref.ref, batch))
        raise known

    async with in_process(process_batch, max_batch_size=2) as batcher:
        for size in (1, 2, 1, 2, 1, 1):
            await gather(batcher, [Item() for _ in range(size)])
        gc.collect()
        assert [reference() for reference in items[:-1]] == [None] * 7


async def test_a_cached_exception_of_a_set_up_does_not_grow(in_process: Any) -> None:
    """Start raises the object the first time, then copies."""
    known = kinds.KeywordOnlyError(retry_after=1)

    def setup_worker() -> None:
        raise known

    depths = []
    for attempt in range(4):
        batcher = in_process(list, setup_worker=setup_worker)
        with pytest.raises(kinds.KeywordOnlyError) as caught:
            await batcher.start()
        assert (caught.value is known) is (attempt == 0)
        depths.append(len(traceback.extract_tb(known.__traceback__)))
        await batcher.stop()
    assert len(set(depths[1:])) == 1
    assert max(depths) == depths[0]


async def test_a_batcher_in_a_batcher(in_process: Any) -> None:
    """The traceback leads to where the inner batch raised, also if it raises one object often."""
    cached = kinds.KeywordOnlyError(retry_after=1)

    def fail(batch: list[int]) -> None:
        raise kinds.KeywordOnlyError(retry_after=1) if batch[0] else cached

    async with in_process(fail, max_queue_time=0) as inner:

        async def outer(batch: list[int]) -> list[Any]:
            return [await inner(item) for item in batch]

        async with batched(outer, max_batch_size=2) as batcher:
            for item in (0, 1, 0, 1, 0):
                for error in await gather(batcher, [item] * 2):
                    names = [entry.name for entry in traceback.extract_tb(error.__traceback__)]
                    assert (names.count("outer"), names.count("fail"), names[-1]) == (1, 1, "fail")


async def test_a_set_up_that_exits(in_process: Any) -> None:
    """The error names ``setup_worker``."""

    def setup_worker() -> None:
        raise GeneratorExit

    batcher = in_process(list, setup_worker=setup_worker)
    for call in (batcher.start, functools.partial(batcher, 1)):
        with pytest.raises(BatchError, match=r"^setup_worker raised builtins\.GeneratorExit"):
            await call()
    await batcher.stop()


async def test_a_strict_call_for_many_is_one_caller(in_process: Any) -> None:
    """process_many gets the object itself; with return_exceptions each item has its own copy."""
    known = kinds.KeywordOnlyError(retry_after=1)

    def process_batch(batch: list[int]) -> None:
        raise kinds.KeywordOnlyError(retry_after=len(batch)) if batch[0] else known

    async with in_process(process_batch, max_batch_size=3) as batcher:
        with pytest.raises(kinds.KeywordOnlyError) as caught:
            await batcher.process_many([0, 1, 2])
        assert caught.value is known
        errors = await batcher.process_many([1, 2, 3], return_exceptions=True)
        assert len({id(error) for error in errors}) == 3
        assert [error.__notes__[0].partition(" in a batch of ")[0] for error in errors] == [
            f"item {place} of 3" for place in (1, 2, 3)
        ]


async def test_map_raises_or_yields_exceptions(in_process: Any) -> None:
    """Map raises the exception of an item, or yields it."""

    def process_batch(batch: list[int]) -> list[Any]:
        return [made("keyword only") if item == 1 else item for item in batch]

    async with in_process(process_batch, max_batch_size=4) as batcher:
        results = [result async for result in batcher.map(range(4), return_exceptions=True)]
        assert [results[0], *results[2:]] == [0, 2, 3]
        assert shown(results[1]) == shown(made("keyword only"))
        with pytest.raises(kinds.KeywordOnlyError, match="retry after 3"):
            async for _ in batcher.map(range(4)):
                pass


async def test_an_isolated_item_gets_what_its_own_run_raised(in_process: Any) -> None:
    """Its caller gets the object itself."""
    known: list[BaseException] = []

    def process_batch(batch: list[int]) -> list[int]:
        if 1 in batch:
            known.append(made("keyword only"))
            raise known[-1]
        return batch

    async with in_process(process_batch, max_batch_size=4, on_failure=isolate()) as batcher:
        results = await gather(batcher, [0, 1, 2, 3])
        assert [results[0], *results[2:]] == [0, 2, 3]
        assert results[1] is known[-1]


async def test_start_raises_what_set_up_raised(in_process: Any) -> None:
    """The object itself."""
    known = kinds.KeywordOnlyError(retry_after=1)

    def setup_worker() -> None:
        raise known

    batcher = in_process(list, setup_worker=setup_worker)
    with pytest.raises(kinds.KeywordOnlyError) as caught:
        await batcher.start()
    assert caught.value is known
    await batcher.stop()


# Memory.


@pytest.fixture
def no_collector() -> Any:
    """Disable the garbage collector, so that only reference counting frees objects."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


async def _caught(call: Callable[[], Awaitable[Any]]) -> weakref.ref[BaseException]:
    try:
        await call()
    except kinds.TwoArgumentsError as exc:
        return weakref.ref(exc)
    raise AssertionError


def _fail_now(*_: Any) -> None:
    raise kinds.TwoArgumentsError(3, "x")


async def _fail_async(batch: list[Any]) -> None:
    _fail_now(batch)


async def _fail_two(batcher: Any) -> None:
    other = batcher.submit(2)
    try:
        await batcher(1)
    finally:
        assert type(other.exception()) is kinds.TwoArgumentsError


async def _fail_map(batcher: Any) -> None:
    async for _ in batcher.map([1]):
        pass


def _ways(pool: WorkerPool | None) -> dict[str, tuple[Any, Callable[[Any], Awaitable[Any]]]]:
    def returned(batch: list[Any]) -> list[Any]:
        return [kinds.TwoArgumentsError(3, "x") for _ in batch]

    ways: dict[str, tuple[Any, Callable[[Any], Awaitable[Any]]]] = {
        "coroutine": (batched(_fail_async), lambda batcher: batcher(1)),
        "thread": (batched(_fail_now, executor="thread"), lambda batcher: batcher(1)),
        "returned": (batched(returned), lambda batcher: batcher(1)),
        "two": (batched(_fail_async, max_batch_size=2), _fail_two),
        "many": (batched(_fail_async), lambda batcher: batcher.process_many([1, 2])),
        "map": (batched(_fail_async), _fail_map),
        "setup": (batched(list, setup_worker=_fail_now), lambda batcher: batcher.start()),
    }
    if pool is not None:
        ways |= {
            "worker": (batched(_fail_now, executor=pool), lambda batcher: batcher(1)),
            "worker, setup": (
                batched(list, executor=pool, setup_worker=_fail_now),
                lambda batcher: batcher.start(),
            ),
            "run": (pool, lambda pool: pool.run(_fail_now)),
        }
    return ways


IN_THREADS = ("thread", "returned", "setup")


@pytest.mark.usefixtures("no_collector")
async def test_exceptions_are_freed_at_once() -> None:
    """Reference counting frees what a caller has caught and dropped, however it arrived."""
    pool = WorkerPool(1) if sys.platform != "win32" else None
    left = []
    for way, (target, call) in _ways(pool).items():
        reference = await _caught(functools.partial(call, target))
        for _ in range(5_000):  # tasks, callbacks and threads that are ending
            if reference() is None:
                break
            await asyncio.sleep(0.001)
        if reference() is not None and (HAS_GIL or way not in IN_THREADS):
            left.append(way)
        if target is not pool:
            await target.stop()
    if pool is not None:
        await pool.stop()
    assert left == []
