"""Batches whose large items are copied by a helper thread, and what waits behind them."""

from __future__ import annotations

import inspect
import sys
import threading
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from async_batcher import WorkerPool, batched
from async_batcher._pool import worker_handle
from async_batcher._transport import protocol
from async_batcher._transport.shared_memory import SharedBlock
from tests.support import worker_functions as work
from tests.support.polling import turn, wait_until
from tests.support.worker_pools import pids_of

if TYPE_CHECKING:
    import asyncio
    from collections.abc import AsyncIterator, Callable, Iterator, Sequence
    from pathlib import Path

    from async_batcher import Batcher
    from async_batcher._pool.dispatcher import PoolDispatcher
    from async_batcher._pool.state.worker import Trip

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no event loop there has workers")


@pytest.fixture
def may_copy(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Set when copies into shared memory may be made."""
    event, write = threading.Event(), SharedBlock.write

    def write_later(block: SharedBlock, buffers: Sequence[Any]) -> None:
        event.wait(work.DEADLINE)
        write(block, buffers)

    monkeypatch.setattr(SharedBlock, "write", write_later)
    yield event
    event.set()


@pytest.fixture
async def one() -> AsyncIterator[WorkerPool]:
    """One worker."""
    async with WorkerPool(1) as pool:
        yield pool


def note_names(folder: Path, batch: list[tuple[str, bytes]]) -> list[str]:
    """Note what runs."""
    for name, _ in batch:
        work.note(folder, "ran", name)
    return [name for name, _ in batch]


def first_of(data: bytearray, batch: list[int]) -> list[int]:
    """Use what is sent with the function."""
    return [data[0] for _ in batch]


async def started(pool: WorkerPool, folder: Path, **options: Any) -> Batcher[Any, str]:
    """Return a batcher whose function the worker has loaded."""
    options = {"max_batch_size": 1, "max_queue_time": 0, "concurrency": 2} | options
    batcher = batched(partial(note_names, folder), executor=pool, **options)
    assert await batcher(("first", b"")) == "first"
    return batcher


def dispatcher_of(pool: WorkerPool) -> PoolDispatcher:
    """Return what runs the pool."""
    dispatcher = pool._lifecycle.session
    assert dispatcher is not None
    return dispatcher


def at_worker(pool: WorkerPool) -> list[Trip]:
    """Return what the only worker has, and what waits there."""
    supervisor = dispatcher_of(pool)._state.supervisor
    (worker,) = supervisor.workers
    return [trip for trip in (worker.trip, supervisor.ahead.get(worker)) if trip is not None]


async def copied_and_held(
    batcher: Batcher[Any, str], pool: WorkerPool
) -> list[asyncio.Future[str]]:
    """Return the calls of a batch that is being copied, and of one that is held behind it."""
    calls = [batcher.submit(("large", bytes(8_000_000))), batcher.submit(("small", b""))]
    await wait_until(lambda: len(at_worker(pool)) == 2)
    assert all(trip.is_staging for trip in at_worker(pool))
    return calls


def fails_once(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that raises `MemoryError` at first."""
    errors = [MemoryError("no memory for this one")]

    def fail_or_call(*args: Any) -> Any:
        if errors:
            raise errors.pop()
        return function(*args)

    return fail_or_call


@pytest.mark.parametrize("cancel_abandoned", [False, True])
async def test_both_are_cancelled(
    one: WorkerPool, tmp_path: Path, cancel_abandoned: bool, may_copy: threading.Event
) -> None:
    """Neither runs, and the worker, which has nothing, takes the next one."""
    batcher = await started(one, tmp_path, cancel_abandoned=cancel_abandoned)
    (pid,) = pids_of(one)
    for call in await copied_and_held(batcher, one):
        call.cancel()
    await turn()
    may_copy.set()
    assert await batcher(("next", b"")) == "next"
    await batcher.stop()
    assert work.noted(tmp_path, "ran") == ["first", "next"]
    assert pids_of(one) == [pid]
    assert one.worker_counts().crashed == {}


async def test_the_one_that_is_copied_is_cancelled(
    one: WorkerPool, tmp_path: Path, may_copy: threading.Event
) -> None:
    """The next one does not wait for the copy."""
    batcher = await started(one, tmp_path)
    large, small = await copied_and_held(batcher, one)
    large.cancel()
    assert await small == "small"
    assert not may_copy.is_set()
    may_copy.set()
    assert await batcher(("next", bytes(8_000_000))) == "next"
    await batcher.stop()
    assert work.noted(tmp_path, "ran") == ["first", "small", "next"]


async def test_the_one_that_is_copied_cannot_be_sent(
    one: WorkerPool, tmp_path: Path, may_copy: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its caller gets the error, and no other."""
    batcher = await started(one, tmp_path)
    large, small = await copied_and_held(batcher, one)
    send_batch = fails_once(worker_handle.WorkerHandle._send_batch)
    monkeypatch.setattr(worker_handle.WorkerHandle, "_send_batch", send_batch)
    may_copy.set()
    with pytest.raises(MemoryError, match="no memory for this one"):
        await large
    assert await small == "small"
    assert await batcher(("next", b"")) == "next"
    await batcher.stop()
    assert work.noted(tmp_path, "ran") == ["first", "small", "next"]


@pytest.mark.parametrize("is_cancelled", [False, True], ids=["copied", "cancelled"])
async def test_the_one_that_is_held_cannot_be_sent(
    one: WorkerPool,
    tmp_path: Path,
    may_copy: threading.Event,
    monkeypatch: pytest.MonkeyPatch,
    is_cancelled: bool,
) -> None:
    """Its caller gets the error, whether the one before is sent or cancelled."""
    batcher = await started(one, tmp_path)
    large, small = await copied_and_held(batcher, one)
    later = batcher.submit(("later", b""))  # sent ahead as soon as it may
    monkeypatch.setattr(worker_handle, "encode_batch", fails_once(protocol.encode_batch))
    if is_cancelled:
        large.cancel()
        await turn()
    may_copy.set()
    with pytest.raises(MemoryError, match="no memory for this one"):
        await small
    assert await later == "later"
    if not is_cancelled:
        assert await large == "large"
    await batcher.stop()
    copied = [] if is_cancelled else ["large"]
    assert work.noted(tmp_path, "ran") == ["first", *copied, "later"]


async def test_a_batch_that_is_asked_back_before_it_is_sent(
    one: WorkerPool, tmp_path: Path, may_copy: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not sent, although the one before is taken from the worker; both run once, later."""
    batcher = await started(one, tmp_path)
    large = batcher.submit(("large", bytes(8_000_000)))
    await wait_until(lambda: at_worker(one))
    state, driver = dispatcher_of(one)._state, dispatcher_of(one)._driver
    with monkeypatch.context() as patch:  # a command before causes what follows
        patch.setattr(driver, "carry_out", lambda: None)
        small = batcher.submit(("small", b""))
        await wait_until(lambda: len(at_worker(one)) == 2)
        (trip, _) = at_worker(one)
        assert trip.item.client is not None
        state.recalled(trip.item.client, time.monotonic())
    driver.carry_out()
    may_copy.set()
    assert [await large, await small] == ["large", "small"]
    await batcher.stop()
    assert sorted(work.noted(tmp_path, "ran")) == ["first", "large", "small"]


@pytest.mark.parametrize("size", [10_000, 100_000], ids=["message", "block"])
async def test_many_workers_get_a_batch_at_once(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """One is sent after the other, not inside of that: the stack does not grow with their number."""
    depths: list[int] = []
    send = worker_handle.WorkerHandle.send

    def note_depth(handle: worker_handle.WorkerHandle, trip: Trip) -> None:
        depths.append(len(inspect.stack(0)))
        send(handle, trip)

    async with WorkerPool(3) as pool:
        monkeypatch.setattr(worker_handle.WorkerHandle, "send", note_depth)
        batcher = batched(partial(first_of, bytearray(size)), executor=pool)
        await batcher.start()
        assert len(depths) >= 3
        assert len(set(depths[:3])) == 1
        await batcher.stop()
