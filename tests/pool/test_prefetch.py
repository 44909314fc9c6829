"""Batches that wait at busy workers: who runs them, who takes them back, and what callers see."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from async_batcher import WorkerPool, batched
from async_batcher._pool.worker_handle import WorkerHandle
from async_batcher._transport.shared_memory import SharedBlock
from async_batcher.exceptions import BatcherStoppedError, BatchTimeoutError, WorkerDiedError
from async_batcher.failures import isolate
from tests.support import worker_functions as work
from tests.support.polling import block_until, turn, wait_until
from tests.support.worker_pools import pids_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from async_batcher._pool.state.worker import Trip
    from async_batcher.stats import BatchRecord

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no event loop there has workers")


@pytest.fixture
async def one() -> AsyncIterator[WorkerPool]:
    """One worker."""
    async with WorkerPool(1) as pool:
        await pool.run(work.note_and_hold, Path(), [])  # it has loaded the function
        yield pool


def begun(folder: Path) -> list[str]:
    """Return what has begun, in order."""
    return work.noted(folder, "begun")


async def held(pool: WorkerPool, folder: Path, name: str) -> asyncio.Task[Any]:
    """Return a call that runs until its file is there."""
    call = asyncio.ensure_future(pool.run(work.note_and_hold, folder, [name]))
    await wait_until(lambda: name in begun(folder))
    return call


def sent_ahead(pool: WorkerPool) -> list[Trip]:
    """Return what waits at busy workers."""
    dispatcher = pool._lifecycle.session
    assert dispatcher is not None
    return list(dispatcher._state.supervisor.ahead.values())


async def test_the_next_call_begins_without_the_event_loop(one: WorkerPool, tmp_path: Path) -> None:
    """It is at the worker already; the loop stands still meanwhile."""
    first = await held(one, tmp_path, "hold")
    second = asyncio.ensure_future(one.run(work.note_and_hold, tmp_path, ["next"]))
    await turn()
    (tmp_path / "hold").touch()
    block_until(lambda: begun(tmp_path) == ["hold", "next"])
    assert (await first, await second) == (["hold"], ["next"])


async def test_calls_run_in_order(one: WorkerPool, tmp_path: Path) -> None:
    """Each runs once."""
    first = await held(one, tmp_path, "hold")
    calls = [one.run(work.note_and_hold, tmp_path, [str(i)]) for i in range(20)]
    results = asyncio.gather(*calls)
    await turn()
    (tmp_path / "hold").touch()
    assert await results == [[str(i)] for i in range(20)]
    await first
    assert sorted(begun(tmp_path)) == sorted(["hold", *map(str, range(20))])


async def test_a_small_call_after_a_large_one(one: WorkerPool, tmp_path: Path) -> None:
    """It does not overtake the large one, which is copied by a helper thread first."""

    def size(name: str, data: bytes) -> int:
        work.note(tmp_path, "begun", name)
        return len(data)

    assert await one.run(size, "first", b"") == 0
    for round_ in range(2):
        names = [f"{name}-{round_}" for name in ("large", "small", "large-too", "small-too")]
        sizes = [4 << 20, 1, 4 << 20, 1]
        calls = [
            one.run(size, name, bytes(count)) for name, count in zip(names, sizes, strict=True)
        ]
        assert await asyncio.gather(*calls) == sizes
        assert begun(tmp_path)[-4:] == names


async def test_an_idle_worker_takes_over_what_waits(tmp_path: Path) -> None:
    """A call does not stay at a worker that is busy for long while another one has nothing to do."""
    async with WorkerPool(2) as pool:
        await asyncio.gather(*(pool.run(work.note_and_hold, tmp_path, []) for _ in range(2)))
        long, short = [await held(pool, tmp_path, name) for name in ("hold-long", "hold-short")]
        waiting = [
            asyncio.ensure_future(pool.run(work.note_and_hold, tmp_path, [f"waits-{i}"]))
            for i in range(2)
        ]
        await turn()
        (tmp_path / "hold-short").touch()
        assert await asyncio.gather(short, *waiting) == [["hold-short"], ["waits-0"], ["waits-1"]]
        assert not long.done()
        (tmp_path / "hold-long").touch()
        assert await long == ["hold-long"]


async def test_a_crash_loses_the_call_that_had_begun(one: WorkerPool, tmp_path: Path) -> None:
    """The one that waits goes to another worker."""
    first = await held(one, tmp_path, "hold")
    second = asyncio.ensure_future(one.run(work.note_and_hold, tmp_path, ["next"]))
    await turn()
    os.kill(pids_of(one)[0], signal.SIGKILL)
    with pytest.raises(WorkerDiedError):
        await first
    assert await second == ["next"]
    assert begun(tmp_path) == ["hold", "next"]


async def test_a_crash_of_the_second_while_the_loop_stands_still(
    one: WorkerPool, tmp_path: Path
) -> None:
    """The first has ended, and its result counts; the second fails, and does not run again."""
    first = await held(one, tmp_path, "hold")
    second = asyncio.ensure_future(one.run(work.note_and_hold, tmp_path, ["hold-2"]))
    third = asyncio.ensure_future(one.run(work.note_and_hold, tmp_path, ["third"]))
    await turn()
    (tmp_path / "hold").touch()
    block_until(lambda: "hold-2" in begun(tmp_path))
    os.kill(pids_of(one)[0], signal.SIGKILL)
    assert await first == ["hold"]
    with pytest.raises(WorkerDiedError):
        await second
    assert await third == ["third"]
    assert begun(tmp_path) == ["hold", "hold-2", "third"]


async def test_a_cancelled_call_is_taken_back(one: WorkerPool, tmp_path: Path) -> None:
    """It never runs; the next one does."""
    first = await held(one, tmp_path, "hold")
    calls = [asyncio.ensure_future(one.run(work.note_and_hold, tmp_path, [name])) for name in "abc"]
    await turn()
    calls[0].cancel()
    await turn()
    (tmp_path / "hold").touch()
    await first
    assert [await call for call in calls[1:]] == [["b"], ["c"]]
    assert begun(tmp_path) == ["hold", "b", "c"]


@pytest.mark.usefixtures("long_graces")
async def test_a_forced_stop_takes_back_what_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It never runs, even if its worker comes to it before the signal; its caller gets an error."""
    tokens_left: list[set[int]] = []
    kill = WorkerHandle.kill

    def look_and_kill(handle: WorkerHandle) -> None:
        tokens_left.append(handle._tokens.take_all())
        kill(handle)

    monkeypatch.setattr(WorkerHandle, "kill", look_and_kill)
    async with WorkerPool(1) as pool:
        await pool.run(work.note_and_hold, tmp_path, [])
        calls = [await held(pool, tmp_path, "hold")]
        calls.append(asyncio.ensure_future(pool.run(work.note_and_hold, tmp_path, ["next"])))
        await turn()
        assert any(trip.is_sent for trip in sent_ahead(pool))
        await pool.stop(force=True)
        assert tokens_left == [set()], "with its token, the worker would begin what waits"
        for error in await asyncio.gather(*calls, return_exceptions=True):
            assert isinstance(error, BatcherStoppedError)
    assert begun(tmp_path) == ["hold"]


@pytest.mark.slow
@pytest.mark.parametrize("why", ["memory", "restart"])
async def test_what_waits_at_a_worker_that_is_to_be_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    """It is taken back, and runs once: on the replacement, as soon as that takes over."""
    too_large: set[int | None] = set()
    monkeypatch.setattr(
        WorkerHandle, "memory", lambda handle, _=0: 2 * (handle.worker.pid in too_large)
    )

    def note_and_hold(name: str) -> int:
        work.note_and_hold(tmp_path, [name])
        return os.getpid()

    async with WorkerPool(1, max_memory_per_child=1) as pool:
        old = await pool.run(note_and_hold, "warm-up")
        names = ["hold", "hold-too", "last"]
        calls = [asyncio.ensure_future(pool.run(note_and_hold, name)) for name in names]
        await wait_until(lambda: len(begun(tmp_path)) == 2)
        too_large.update([old] if why == "memory" else [])
        (tmp_path / "hold").touch()
        await calls[0]
        await wait_until(lambda: len(begun(tmp_path)) == 3)
        restart = asyncio.ensure_future(pool.restart_workers()) if why == "restart" else None
        await wait_until(lambda: [one.state for one in pool.workers()] == ["busy", "idle"])
        assert not sent_ahead(pool)
        (tmp_path / "hold-too").touch()
        (new,) = set(pids_of(pool)) - {old}
        assert await asyncio.gather(*calls) == [old, old, new]
        await (restart or wait_until(lambda: pids_of(pool) == [new]))
    assert sorted(begun(tmp_path)) == sorted(["warm-up", *names])


async def test_a_batcher_that_is_stopped_by_force_takes_back_what_waits(tmp_path: Path) -> None:
    """It never runs, while the pool of others goes on."""
    async with WorkerPool(1) as pool:
        function = partial(work.note_and_hold, tmp_path)
        batcher = batched(function, executor=pool, max_batch_size=1)
        calls = [asyncio.ensure_future(batcher(name)) for name in ("hold", "next")]
        await wait_until(lambda: begun(tmp_path) == ["hold"])
        await wait_until(lambda: batcher.stats().queued == 1)
        stop = asyncio.ensure_future(batcher.stop(force=True))
        for error in await asyncio.gather(*calls, return_exceptions=True):
            assert isinstance(error, BatcherStoppedError)
        (tmp_path / "hold").touch()
        await stop
        assert await pool.run(work.note_and_hold, tmp_path, ["other"]) == ["other"]
    assert begun(tmp_path) == ["hold", "other"]


class Waiting:
    """A batcher over a pool of one worker, which is busy, with a batch that waits there."""

    def __init__(self, pool: WorkerPool, folder: Path, **options: Any) -> None:
        self.records: list[BatchRecord] = []
        self.folder = folder
        self.batcher = batched(
            partial(work.note_and_hold, folder),
            executor=pool,
            max_batch_size=2,
            max_queue_time=0,
            on_batch=self.records.append,
            **options,
        )

    async def calls(self) -> list[asyncio.Future[str]]:
        """Return two calls that run until "hold" is there, and two that wait."""
        running = [self.batcher.submit(name) for name in ("hold", "hold-too")]
        await wait_until(lambda: len(begun(self.folder)) == 2)
        waiting = [self.batcher.submit(name) for name in ("c", "d")]
        await turn()
        return [*running, *waiting]

    def release(self) -> None:
        """Let the batch that runs end."""
        (self.folder / "hold").touch()
        (self.folder / "hold-too").touch()


async def test_a_full_batch_waits_at_the_worker(one: WorkerPool, tmp_path: Path) -> None:
    """It is counted as queued, its wait is queue time, and it begins without the loop."""
    waiting = Waiting(one, tmp_path)
    calls = await waiting.calls()
    stats = waiting.batcher.stats()
    assert (stats.queued, stats.running) == (2, 2)
    await asyncio.sleep(0.2)
    waiting.release()
    block_until(lambda: len(begun(tmp_path)) == 4)
    assert await asyncio.gather(*calls) == ["hold", "hold-too", "c", "d"]
    first, second = waiting.records
    assert second.queue_time >= 0.2
    assert first.run_time >= 0.2
    assert waiting.batcher.stats().queue_waits.count == 4
    await waiting.batcher.stop()


async def test_a_partial_batch_stays_in_the_queue(one: WorkerPool, tmp_path: Path) -> None:
    """It can still grow."""
    waiting = Waiting(one, tmp_path)
    calls = await waiting.calls()
    calls.append(waiting.batcher.submit("e"))
    await turn()
    calls.append(waiting.batcher.submit("f"))
    await turn()
    waiting.release()
    assert await asyncio.gather(*calls) == ["hold", "hold-too", "c", "d", "e", "f"]
    assert [record.size for record in waiting.records] == [2, 2, 2]
    await waiting.batcher.stop()


async def test_a_batch_without_callers_is_taken_back(one: WorkerPool, tmp_path: Path) -> None:
    """An item whose batch has another caller runs."""
    waiting = Waiting(one, tmp_path)
    calls = await waiting.calls()
    calls[2].cancel()
    await turn()
    waiting.release()
    assert await calls[3] == "d"
    await turn()
    assert sorted(begun(tmp_path)) == ["c", "d", "hold", "hold-too"]
    await waiting.batcher.stop()


async def test_a_batch_that_lost_its_callers_never_runs(one: WorkerPool, tmp_path: Path) -> None:
    """The worker skips it, and runs the next one."""
    waiting = Waiting(one, tmp_path)
    calls = await waiting.calls()
    for call in calls[2:]:
        call.cancel()
    await turn()
    assert waiting.batcher.stats().queued == 0
    (record,) = waiting.records
    assert (record.run_time, record.failed) == (0, 0)
    assert waiting.batcher.stats().run_times.count == 0
    waiting.release()
    assert await asyncio.gather(*calls[:2]) == ["hold", "hold-too"]
    assert await waiting.batcher("later") == "later"
    assert sorted(begun(tmp_path)) == ["hold", "hold-too", "later"]
    await waiting.batcher.stop()


async def test_fewer_batches_than_workers_send_nothing_ahead(tmp_path: Path) -> None:
    """With ``concurrency`` below the number of workers, a full batch waits in the queue."""
    async with WorkerPool(2) as pool:
        waiting = Waiting(pool, tmp_path, concurrency=1)
        calls = await waiting.calls()
        calls[2].cancel()
        waiting.release()
        await asyncio.gather(*calls[:2], calls[3])
        assert sorted(begun(tmp_path)) == ["d", "hold", "hold-too"]
        await waiting.batcher.stop()


async def test_a_time_limit_starts_with_the_batch(one: WorkerPool, tmp_path: Path) -> None:
    """Not while the batch waits at the worker for longer than that."""
    first = await held(one, tmp_path, "hold")
    second = asyncio.ensure_future(one.run(work.note_and_hold, tmp_path, ["next"], timeout=2.0))
    await wait_until(lambda: sent_ahead(one))
    await asyncio.sleep(2.2)
    (tmp_path / "hold").touch()
    assert (await first, await second) == (["hold"], ["next"])


async def test_a_time_limit_of_the_last_call(one: WorkerPool, tmp_path: Path) -> None:
    """It holds although nothing happens after the call has begun."""
    first = await held(one, tmp_path, "hold")
    hangs = one.run(work.note_and_hold, tmp_path, ["hold-too"], timeout=0.2)
    second = asyncio.ensure_future(hangs)
    await turn()
    (trip,) = sent_ahead(one)
    (tmp_path / "hold").touch()
    async with asyncio.timeout(work.DEADLINE):
        with pytest.raises(BatchTimeoutError, match=r"longer than 0\.2 seconds"):
            await second
    assert trip.worker.kill_reason == "timeout"
    assert await first == ["hold"]


async def test_a_failed_batch_is_isolated_while_full_batches_wait() -> None:
    """Reruns get their turn although the queue is never empty."""

    def reciprocals(batch: list[int]) -> list[float]:
        return [1 / item for item in batch]

    async with WorkerPool(1) as pool:
        batcher = batched(reciprocals, executor=pool, max_batch_size=2, on_failure=isolate())
        calls = [batcher.submit(item) for item in range(60)]
        await asyncio.wait(calls[:2])
        assert isinstance(calls[0].exception(), ZeroDivisionError)
        assert calls[1].result() == 1
        assert not calls[-1].done()
        assert await asyncio.gather(*calls[2:]) == [1 / item for item in range(2, 60)]
        await batcher.stop()


async def test_a_failed_batch_is_isolated_while_nothing_waits() -> None:
    """Its reruns are submitted while the reply is read, before the worker is free."""

    def reciprocals(batch: list[int]) -> list[float]:
        return [1 / item for item in batch]

    async with WorkerPool(1) as pool:
        batcher = batched(reciprocals, executor=pool, max_batch_size=2, on_failure=isolate())
        assert await batcher.process_many([1, 2]) == [1, 0.5]
        results = await batcher.process_many([0, 4], return_exceptions=True)
        assert isinstance(results[0], ZeroDivisionError)
        assert results[1] == 0.25
        await batcher.stop()


def blocks() -> int:
    """Return how many blocks of shared memory this process has open."""
    links = [link for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    # A block that is mapped has two descriptors.
    return len({link.stat().st_ino for link in links if "memfd" in str(link.readlink())})


@pytest.mark.skipif(sys.platform != "linux", reason="counts descriptors")
async def test_a_block_of_a_call_that_was_taken_back_is_free(
    one: WorkerPool, tmp_path: Path
) -> None:
    """The next call that waits there gets it, while the worker is still busy."""
    assert await one.run(len, b"") == 0
    first = await held(one, tmp_path, "hold")
    before = blocks()
    for _ in range(4):
        call = asyncio.ensure_future(one.run(len, bytes(1 << 20)))
        await wait_until(lambda: any(trip.is_sent for trip in sent_ahead(one)))
        call.cancel()
        await turn()
        assert not sent_ahead(one)
        assert blocks() == before + 1
    (tmp_path / "hold").touch()
    await first
    assert await one.run(len, bytes(1 << 20)) == 1 << 20


@pytest.mark.skipif(sys.platform != "linux", reason="counts descriptors")
async def test_blocks_of_calls_that_are_taken_back_while_they_are_copied(
    one: WorkerPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are freed, so that they do not become more."""
    may_copy, write = threading.Event(), SharedBlock.write

    def write_later(block: SharedBlock, buffers: Sequence[Any]) -> None:
        may_copy.wait(work.DEADLINE)
        write(block, buffers)

    monkeypatch.setattr(SharedBlock, "write", write_later)
    assert await one.run(len, b"") == 0
    first = await held(one, tmp_path, "hold")
    before = blocks()
    trips: list[Trip] = []
    for _ in range(8):
        call = asyncio.ensure_future(one.run(len, bytes(1 << 23)))
        await turn()
        trips += sent_ahead(one)
        call.cancel()
        await turn()
    assert any(trip.is_staging for trip in trips)
    may_copy.set()
    await wait_until(lambda: not any(trip.is_staging for trip in trips))
    assert blocks() <= before + 1, "of one that was sent before the call was cancelled"
    (tmp_path / "hold").touch()
    await first
    assert await one.run(len, bytes(1 << 19)) == 1 << 19
