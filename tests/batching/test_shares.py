"""Without ``max_batch_size``, due items are divided by the free workers; on a virtual clock."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from async_batcher.exceptions import BatchTimeoutError
from tests.support.polling import turn
from tests.support.virtual_clock import FakeBatcher, now, virtual_loop

pytestmark = pytest.mark.virtual_clock


class WorkerBatcher(FakeBatcher):
    """A `FakeBatcher` whose slots are workers."""

    def __init__(self, **options: Any) -> None:
        defaults = {"executor": "process", "max_workers": 3, "concurrency": None}
        super().__init__(**{**defaults, **options})

    def process_batch(self, batch: list[Any]) -> list[Any]:  # type: ignore[override]
        """Fail: the runner never calls it."""
        raise AssertionError(batch)

    @property
    def sizes(self) -> list[int]:
        """Return the sizes of the batches that were submitted to the runner."""
        return [len(batch) for batch in self.batches]


async def occupy(batcher: FakeBatcher, slots: int) -> None:
    """Occupy slots with a batch of one item each, and forget these batches."""
    for slot in range(slots):
        batcher.call(f"busy {slot}")
        await turn()
    batcher.batches.clear()


def call_with(batcher: FakeBatcher, kind: str, count: int) -> None:
    """Process the items 0, 1, ... at the same time, in calls of a kind."""
    if kind == "single":
        for item in range(count):
            batcher.call(item)
    elif kind == "bulk":
        batcher.call_many(range(count))
    else:
        batcher.call(0)
        batcher.call_many(range(1, count - 1))
        batcher.call(count - 1)


@pytest.mark.parametrize("kind", ["single", "bulk", "both"])
@pytest.mark.parametrize(
    ("workers", "busy", "sizes"),
    [
        (1, 0, [10]),
        (2, 0, [5, 5]),
        (3, 0, [4, 4, 2]),
        (3, 1, [5, 5]),
        (3, 2, [10]),
        (3, 3, []),
        (16, 0, [1] * 10),
    ],
)
async def test_due_items_are_divided_by_the_free_workers(
    kind: str, workers: int, busy: int, sizes: list[int]
) -> None:
    """Single and bulk calls alike; workers that are busy do not count."""
    batcher = WorkerBatcher(max_workers=workers)
    await occupy(batcher, busy)
    call_with(batcher, kind, 10)
    await turn()
    assert batcher.sizes == sizes
    assert [item for batch in batcher.batches for item in batch] == list(range(10 if sizes else 0))
    await batcher.stop(force=True)


@pytest.mark.parametrize(("kind", "size"), [("single", 10), ("bulk", 4), ("both", 4)])
async def test_a_worker_becomes_free_while_the_others_are_busy(kind: str, size: int) -> None:
    """It takes all single calls that are due; of a bulk call it leaves shares to the others."""
    batcher = WorkerBatcher()
    await occupy(batcher, 3)
    call_with(batcher, kind, 10)
    await turn()
    batcher.runner.end()
    assert batcher.batches == [list(range(size))]
    assert batcher.stats().batches.slot_available == 1
    if size < 10:
        batcher.runner.end()
        batcher.runner.end()
        assert batcher.batches == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    await batcher.stop(force=True)


@pytest.mark.parametrize("kind", ["single", "bulk", "both"])
@pytest.mark.parametrize(("size", "sizes"), [(4, [4, 4, 2]), (10, [10]), (100, [10])])
async def test_items_are_not_divided_with_a_size_limit(
    kind: str, size: int, sizes: list[int]
) -> None:
    """The user has said how large a batch is."""
    batcher = WorkerBatcher(max_batch_size=size)
    call_with(batcher, kind, 10)
    await turn()
    assert batcher.sizes == sizes
    await batcher.stop(force=True)


async def test_all_queued_items_leave_with_the_oldest() -> None:
    """As in one batch: not before the oldest is due, and the later ones do not wait longer."""
    batcher = WorkerBatcher(max_queue_time=1.0)
    start = now()
    for item in range(4):
        batcher.call(item)
        await asyncio.sleep(0.2)
    await asyncio.sleep(0.15)
    assert batcher.batches == []
    await asyncio.sleep(0.05)
    assert batcher.batches == [[0, 1], [2, 3]]
    assert (batcher.stats().batches.timeout, batcher.stats().batches.full) == (2, 0)
    batcher.call(4)  # its window is its own
    await asyncio.sleep(0.99)
    assert len(batcher.batches) == 2
    await asyncio.sleep(0.01)
    assert (batcher.batches[2:], round(now() - start, 6)) == ([[4]], 2.0)
    await batcher.stop(force=True)


@pytest.mark.parametrize(
    ("concurrency", "sizes"), [(1, [10]), (2, [5, 5]), (16, [4, 4, 2]), (-1, [4, 4, 2])]
)
async def test_an_explicit_concurrency(concurrency: int, sizes: list[int]) -> None:
    """Its slots count, as far as they are workers."""
    batcher = WorkerBatcher(concurrency=concurrency)
    call_with(batcher, "single", 10)
    await turn()
    assert batcher.sizes == sizes
    call_with(batcher, "single", 10)
    await turn()
    # With more slots than workers they do not wait for a worker.
    assert batcher.sizes[len(sizes) :] == ([10] if concurrency in (-1, 16) else [])
    await batcher.stop(force=True)


async def test_single_calls_are_not_divided_where_slots_are_not_workers() -> None:
    """A coroutine with a ``concurrency`` gets the batches that it got from 0.2.2."""
    batcher = FakeBatcher(concurrency=3)
    call_with(batcher, "single", 10)
    await turn()
    assert batcher.batches == [list(range(10))]
    await batcher.stop(force=True)


async def test_a_leaked_slot_is_not_free() -> None:
    """A batch that timed out and cannot be stopped still occupies its worker."""
    batcher = WorkerBatcher()
    await occupy(batcher, 1)
    batcher.runner.on_timeouts[0](BatchTimeoutError("leaked"))
    call_with(batcher, "single", 10)
    await turn()
    assert batcher.sizes == [5, 5]
    await batcher.stop(force=True)


async def test_batches_that_end_before_the_next_one_is_dispatched() -> None:
    """The number of shares is that of the workers that were free, not more."""
    batcher = WorkerBatcher()
    submit = batcher.runner.submit

    def submit_and_end(*args: Any) -> None:
        submit(*args)
        batcher.runner.end()

    batcher.runner.submit = submit_and_end  # type: ignore[assignment, method-assign]
    call_with(batcher, "single", 100)
    await turn()
    assert batcher.sizes == [34, 34, 32]
    await batcher.stop()


async def test_a_stop_divides_what_is_queued() -> None:
    """All of it is due then."""
    batcher = WorkerBatcher(max_queue_time=1000.0)
    call_with(batcher, "single", 10)
    await turn()
    stop = asyncio.create_task(batcher.stop())
    await turn()
    assert batcher.sizes == [4, 4, 2]
    assert batcher.stats().batches.drain == 3
    while batcher.runner.running:
        batcher.runner.end()
    await stop


@pytest.mark.parametrize("cls", [FakeBatcher, WorkerBatcher])
async def test_what_map_has_read_is_divided_by_all_workers(cls: type[FakeBatcher]) -> None:
    """It reads no more before results are consumed, so the next free worker needs a share too."""
    batcher = cls(concurrency=2)
    await occupy(batcher, 1)
    stream = batcher.map(range(100), window=12)
    first = asyncio.ensure_future(anext(stream))
    await turn()
    assert batcher.batches == [list(range(6))]
    batcher.runner.end()  # the other worker's
    assert batcher.batches == [list(range(6)), list(range(6, 12))]
    batcher.runner.end()
    assert await first == 0
    await stream.aclose()
    await batcher.stop(force=True)


async def test_a_lone_call_in_a_worker_pool_waits_for_nothing() -> None:
    """It leaves without a timer, in the next step of the loop after that of its caller."""
    batcher = WorkerBatcher(max_queue_time=None)
    start = now()
    batcher.call("lone")
    await asyncio.sleep(0)  # the caller's step
    assert (batcher.stats().queued, virtual_loop().timers()) == (1, 0)
    await asyncio.sleep(0)
    assert (batcher.batches, now() - start) == ([["lone"]], 0)
    await batcher.stop(force=True)


@pytest.mark.parametrize("executor", [None, "thread"])
async def test_a_lone_call_elsewhere_waits_for_others(executor: str | None) -> None:
    """For 0.01 seconds, as in 0.2.2."""
    batcher = WorkerBatcher(max_queue_time=None, executor=executor, max_workers=None)
    batcher.call("lone")
    await asyncio.sleep(0.0099)
    assert batcher.batches == []
    await asyncio.sleep(0.0001)
    assert batcher.batches == [["lone"]]
    await batcher.stop(force=True)


async def test_gathered_calls_in_a_worker_pool_share_batches() -> None:
    """Calls of one iteration of the loop leave together, without a window."""
    batcher = WorkerBatcher(max_queue_time=None, max_workers=2)
    calls = [batcher.call(item) for item in range(500)]
    await turn()
    assert batcher.sizes == [250, 250]
    while batcher.runner.running:
        batcher.runner.end()
    assert await asyncio.gather(*calls) == list(range(500))
    await batcher.stop()
