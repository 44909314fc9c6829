"""Threads that use a batcher at the same time: callers, batches and what reads its numbers."""

from __future__ import annotations

import asyncio
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, Any

import pytest

from async_batcher import AsyncBatcher, WorkerPool, batched
from async_batcher.exceptions import BatcherStoppedError
from tests.support.threads import frequent_switches, run_together
from tests.support.worker_functions import DEADLINE, double

if TYPE_CHECKING:
    from collections.abc import Iterator

CALLS = 60
WORKERS = [
    None,
    "thread",
    pytest.param(
        "process", marks=pytest.mark.skipif(sys.platform == "win32", reason="too slow there")
    ),
]


@pytest.fixture(autouse=True)
def _switches() -> Iterator[None]:
    with frequent_switches():
        yield


@pytest.mark.parametrize("executor", WORKERS)
async def test_calls_from_many_threads(executor: Any) -> None:
    """Each gets its own result, by ``run_coroutine_threadsafe``, and the numbers add up."""
    loop = asyncio.get_running_loop()
    options: Any = {"max_workers": 2} if executor else {}
    async with batched(double, executor=executor, max_batch_size=8, **options) as batcher:

        def call(number: int) -> list[int]:
            items = range(number * CALLS, (number + 1) * CALLS)
            calls = [asyncio.run_coroutine_threadsafe(batcher(item), loop) for item in items]
            for _ in range(20):
                stats = batcher.stats()
                assert stats.done <= 6 * CALLS
            return [call.result(DEADLINE) for call in calls]

        results = await asyncio.to_thread(run_together, call)
        assert [*chain(*results)] == [2 * item for item in range(6 * CALLS)]
        stats = batcher.stats()
        assert (stats.done, stats.queued, stats.running) == (6 * CALLS, 0, 0)


async def test_slots_do_not_mix() -> None:
    """Each thread has what its own set-up has bound, while other set-ups and batches run."""

    class Base(AsyncBatcher[int, Any]):
        @cached_property
        def lazy(self) -> int:
            return threading.get_ident()

    class Numbered(Base):
        shared: int

        def setup_worker(self) -> Any:
            self.own = [threading.get_ident()]
            self.early = self.lazy
            yield
            self.own.append(threading.get_ident())
            ended.append(self.own)

        def process_batch(self, batch: list[int]) -> list[Any]:
            assert self.own == [threading.get_ident()]
            assert self.early == self.lazy == threading.get_ident()
            return [item + self.shared for item in batch]

    ended: list[list[int]] = []
    for _ in range(10):
        batchers = []
        for workers in (3, 3):
            kind = type("Derived", (Numbered,), {"shared": 1})
            batchers.append(kind(executor="thread", max_workers=workers, max_batch_size=1))
        calls = [batcher.process(item) for item in range(30) for batcher in batchers]
        results = await asyncio.gather(*calls)
        assert results == [item + 1 for item in range(30) for _ in batchers]
        for batcher in batchers:
            await batcher.stop()
    assert ended
    assert all(first == last for first, last in ended)


async def test_a_function_that_is_replaced_while_batches_start() -> None:
    """A batch calls the old one or the new one, in the way in which that takes its batch."""

    class Patched(AsyncBatcher[int, Any]):
        def process_batch(self, batch: list[int]) -> list[int]:
            return batch

    def by_position(items: list[int], /) -> list[int]:
        return items

    def by_keyword(*, batch: list[int]) -> list[int]:
        return batch

    batcher = Patched(executor="thread", max_workers=6, max_batch_size=1)
    async with batcher:
        for _ in range(20):
            for function in (by_position, by_keyword):
                batcher.process_batch = function  # type: ignore[assignment,method-assign]
                results = await asyncio.gather(*map(batcher.process, range(12)))
                assert results == [*range(12)]


async def test_many_items_read_in_a_thread() -> None:
    """None is overlooked, and the end is noticed."""
    async with batched(double, executor="thread", max_batch_size=4) as batcher:
        for size in (0, 1, 7, 500):
            results = batcher.map(iter(range(size)), read_in_thread=True, window=4)
            assert [result async for result in results] == [2 * item for item in range(size)]


@pytest.mark.skipif(sys.platform == "win32", reason="no event loop there watches sockets")
def test_an_executor_of_many_threads() -> None:
    """Each thread gets its own results, also while others shut the executor down."""
    executor = WorkerPool(2).as_executor()

    def use(number: int) -> int:
        done = 0
        for item in range(100):
            try:
                future = executor.submit(divmod, number, item + 1)
            except RuntimeError as exc:
                assert "after shutdown" in str(exc)
                return done
            if number == 0 and item == 50:
                executor.shutdown(wait=False)
            assert future.result(DEADLINE) == divmod(number, item + 1)
            done += 1
        return done

    assert run_together(use)[0] == 50 + 1
    executor.shutdown()


def test_two_loops_start_a_batcher_at_once() -> None:
    """One of them has it, until it stops; the others get an error. Nothing is left."""

    async def use(batcher: AsyncBatcher[int, Any]) -> str:
        try:
            result = await batcher.process(1)
        except (RuntimeError, BatcherStoppedError) as exc:
            return str(exc)
        await batcher.stop()
        return str(result)

    for _ in range(10):
        batcher = batched(double, executor="thread", max_workers=2, max_queue_time=0.05)
        results = run_together(lambda _, b=batcher: asyncio.run(use(b)), threads=4)  # type: ignore[misc]
        assert "2" in results
        for refusal in set(results) - {"2"}:
            assert "runs on another event loop" in refusal or "has been stopped" in refusal


async def test_given_threads_are_slots_of_many_batchers() -> None:
    """Batchers that share an executor do not share what their set-ups bind."""

    class Numbered(AsyncBatcher[int, Any]):
        def __init__(self, number: int, executor: Any) -> None:
            super().__init__(executor=executor, concurrency=4, max_batch_size=1)
            self.number = number

        def setup_worker(self) -> None:
            self.mine = self.number

        def process_batch(self, batch: list[int]) -> list[int]:
            assert self.mine == self.number
            return batch

    with ThreadPoolExecutor(4) as executor:
        batchers = [Numbered(number, executor) for number in range(4)]
        calls = [batcher.process(item) for item in range(50) for batcher in batchers]
        assert await asyncio.gather(*calls) == [item for item in range(50) for _ in batchers]
        for batcher in batchers:
            await batcher.stop()
