"""`stats`, and the records that ``on_batch`` gets."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest

from async_batcher import WorkerPool, batched
from async_batcher._batching.batch import Batch
from async_batcher._batching.records.recorder import StatsRecorder
from async_batcher.exceptions import BatchTimeoutError, QueueFullException
from async_batcher.failures import isolate
from async_batcher.stats import BatchCounts, BatchRecord, Quantiles, Stats
from tests.support import worker_functions as work
from tests.support.polling import turn, wait_until
from tests.support.virtual_clock import FakeBatcher

if TYPE_CHECKING:
    from pathlib import Path


def items_of(stats: Stats) -> dict[str, int]:
    """Return the counts of items that are not 0."""
    names = ("queued", "blocked", "running", "done", "failed", "cancelled", "timed_out", "rejected")
    return {name: count for name in names if (count := getattr(stats, name))}


@pytest.mark.virtual_clock
async def test_every_item_is_counted_in_one_place() -> None:
    """Before the first call, at each stage, and after the stop."""
    batcher = FakeBatcher(max_batch_size=4, max_queue_size=4)
    assert items_of(batcher.stats()) == {}
    futures = [batcher.submit(item) for item in range(4)]
    await turn()
    futures += [
        batcher.submit(4),
        batcher.submit(5),
        batcher.submit(6, timeout=1.0),
        batcher.submit(7),
    ]
    with pytest.raises(QueueFullException):
        batcher.submit(8)
    assert items_of(batcher.stats()) == {"running": 4, "queued": 4, "rejected": 1}
    futures[0].cancel()
    futures[4].cancel()
    assert items_of(batcher.stats()) == {"running": 3, "queued": 3, "rejected": 1, "cancelled": 2}
    await asyncio.sleep(2.0)
    assert items_of(batcher.stats()) == {
        "running": 3,
        "queued": 2,
        "rejected": 1,
        "cancelled": 2,
        "timed_out": 1,
    }
    batcher.runner.end(0, [0, 1, ValueError("two"), 3])
    assert items_of(batcher.stats()) == {
        "running": 2,
        "rejected": 1,
        "cancelled": 2,
        "timed_out": 1,
        "done": 2,
        "failed": 1,
    }
    batcher.runner.end(0, RuntimeError("all"))
    await batcher.stop()
    last = batcher.stats()
    assert items_of(last) == {"rejected": 1, "cancelled": 2, "timed_out": 1, "done": 2, "failed": 3}
    await asyncio.wait(futures)
    await batcher.start()
    again = batcher.submit("again")
    await turn()
    batcher.runner.end()
    assert await again == "again"
    assert batcher.stats().done == 3
    await batcher.stop()
    with pytest.raises(dataclasses.FrozenInstanceError):
        last.done = 1  # type: ignore[misc]


@pytest.mark.virtual_clock
async def test_items_on_the_waitlist_are_counted_as_blocked() -> None:
    """They are not counted as queued."""
    batcher = FakeBatcher(max_batch_size=1, max_queue_size=1, when_full="wait")
    calls = [batcher.call(item) for item in range(4)]
    await turn()
    assert items_of(batcher.stats()) == {"running": 1, "queued": 1, "blocked": 2}
    await batcher.stop(force=True)
    assert items_of(batcher.stats()) == {"failed": 4}
    await asyncio.wait(calls)


@pytest.mark.virtual_clock
async def test_batches_are_counted_by_reason() -> None:
    """Full, timeout, slot available, drain or isolation; with sizes and times."""
    records: list[BatchRecord] = []
    batcher = FakeBatcher(
        max_batch_size=2,
        max_queue_time=3.0,
        concurrency=2,
        on_failure=isolate(),
        on_batch=records.append,
    )
    futures = [batcher.submit(item) for item in range(2)]  # full
    futures.append(batcher.submit(2))
    await asyncio.sleep(3.0)  # timeout
    await turn()
    futures += [batcher.submit(item) for item in (3, 4)]  # full, without a slot
    await asyncio.sleep(1.0)
    batcher.runner.end(0)  # the first, after 4 s
    futures.append(batcher.submit(5))
    batcher.runner.end(0, ZeroDivisionError())  # the second, of one item
    batcher.runner.end(0, ZeroDivisionError())  # the third, in two parts
    batcher.runner.end(0)
    batcher.runner.end(0, ZeroDivisionError())
    stopping = asyncio.create_task(batcher.stop())
    await turn()
    batcher.runner.end(0)
    await stopping
    await asyncio.wait(futures)
    stats = batcher.stats()
    assert stats.batches == BatchCounts(
        full=1, timeout=1, slot_available=1, rate=0, drain=1, isolation=2
    )
    error = "builtins.ZeroDivisionError"
    assert records == [
        BatchRecord(2, "full", 0.0, 4.0, 0, None, "FakeBatcher", 1),
        BatchRecord(1, "timeout", 3.0, 1.0, 1, error, "FakeBatcher", 2),
        BatchRecord(2, "slot_available", 1.0, 0.0, 0, error, "FakeBatcher", 3),
        BatchRecord(1, "isolation", 0.0, 0.0, 0, None, "FakeBatcher", 4),
        BatchRecord(1, "isolation", 0.0, 0.0, 1, error, "FakeBatcher", 5),
        BatchRecord(1, "drain", 0.0, 0.0, 0, None, "FakeBatcher", 6),
    ]
    assert stats.sizes == Quantiles(1.0, 2.0, 2.0, 6)
    assert stats.queue_waits == Quantiles(0.0, 3.0, 3.0, 6)
    assert stats.run_times == Quantiles(0.0, 4.0, 4.0, 6)
    assert items_of(stats) == {"done": 4, "failed": 2}


@pytest.mark.virtual_clock
async def test_items_to_rerun_are_counted_as_running() -> None:
    """Items of a failed batch stay "running" while they wait for their rerun."""
    batcher = FakeBatcher(on_failure=isolate())
    futures = [batcher.submit(item) for item in range(4)]
    await turn()
    batcher.runner.end(0, ZeroDivisionError())
    assert items_of(batcher.stats()) == {"running": 4}
    futures[3].cancel()
    assert items_of(batcher.stats()) == {"running": 3, "cancelled": 1}
    batcher.runner.end(0)
    batcher.runner.end(0)
    assert items_of(batcher.stats()) == {"done": 3, "cancelled": 1}
    await batcher.stop()


def test_quantiles_of_recent_batches() -> None:
    """Of the last 1,024 batches, and of up to 16 items of each, evenly spread."""
    recorder = StatsRecorder()
    for number in range(5000):
        batch: Batch[int, None] = Batch(
            [0] * 100, [None] * 100, [float(i) for i in range(100)], [], "full"
        )
        batch.started_at = 100.0
        recorder.batch_started(batch)
        recorder.batch_finished(batch, 0, None, 100.0 + number)
    stats = recorder.stats(queued=0, blocked=0, running=0, workers=None)
    last = range(5000 - 1024, 5000)
    assert stats.sizes == Quantiles(100.0, 100.0, 100.0, 1024)
    assert stats.run_times == Quantiles(last[511], last[972], last[1013], 1024)
    assert stats.queue_waits == Quantiles(51.0, 100.0, 100.0, 15 * 1024)
    assert stats.batches.full == 5000


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no WorkerPool")
@pytest.mark.usefixtures("long_graces")
async def test_worker_counts(tmp_path: Path) -> None:
    """Starts, crashes by cause, and planned replacements; also after the stop."""

    def poisonous(batch: list[Any]) -> list[Any]:
        if batch == ["abandoned"]:
            return work.note_pid_and_wait(tmp_path, batch)
        return work.poisonous(batch)

    async with WorkerPool(2, max_tasks_per_child=3) as pool:
        records: list[BatchRecord] = []  # the callback is never pickled
        batcher = batched(
            poisonous,
            executor=pool,
            batch_timeout=4.0,
            cancel_abandoned=True,
            max_batch_size=1,
            on_batch=records.append,
        )
        async with batcher:
            assert batcher.stats().workers.started == 2
            for poison in ("kill", "os._exit"):
                assert isinstance(
                    (await asyncio.gather(batcher.process(poison), return_exceptions=True))[0],
                    Exception,
                )
            with pytest.raises(BatchTimeoutError):
                await batcher.process("hang")
            abandoned = asyncio.ensure_future(batcher.process("abandoned"))
            await wait_until(lambda: work.noted(tmp_path, "pid"))
            abandoned.cancel()
            await asyncio.wait([abandoned])
            await pool.start()  # waits for the workers
            os.kill(
                next(
                    worker.pid for worker in pool.workers() if worker.pid and worker.state == "idle"
                ),
                signal.SIGUSR1,
            )
            await wait_until(lambda: len(batcher.stats().workers.crashed) == 5)
            for item in range(12):
                await batcher.process(item)
            await wait_until(lambda: batcher.stats().workers.recycled >= 3)
        workers = batcher.stats().workers
    assert workers.crashed == {
        "SIGKILL": 1,
        "exit code 5": 1,
        "timeout": 1,
        "abandoned": 1,
        "SIGUSR1": 1,
    }
    assert workers.started >= 2 + 5 + workers.recycled
    assert [record.error for record in records[:3]] == [
        "async_batcher.exceptions.WorkerDiedError",
        "async_batcher.exceptions.WorkerDiedError",
        "async_batcher.exceptions.BatchTimeoutError",
    ]


async def test_run_times_are_measured_by_the_loops_clock() -> None:
    """A batch in a thread has the run time that the loop's clock shows."""

    def slow(batch: list[int]) -> list[int]:
        time.sleep(0.02)
        return batch

    batcher = batched(slow, executor="thread")
    async with batcher:
        await batcher.process(0)
        assert 0.01 < batcher.stats().run_times.p50 < work.DEADLINE  # a clock of milliseconds
        assert batcher.stats().workers.started == 0
