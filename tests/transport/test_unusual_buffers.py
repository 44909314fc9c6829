"""Large buffers between a `WorkerPool` and its workers, the less usual ones: odd arrays, long stays, deaths and slow transfers.

The usual ones are in ``transport/test_large_buffers.py``.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import pickle
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from async_batcher import WorkerPool, batched
from async_batcher._pool import worker_handle
from async_batcher._serialization.out_of_band import MIN_BUFFER_SIZE
from async_batcher._transport import shared_memory
from async_batcher._transport.shared_memory import SHM_THRESHOLD
from async_batcher._transport.status_page import SIZE as STATUS_SIZE
from async_batcher.exceptions import BatchTimeoutError, WorkerDiedError
from tests.support import worker_functions as work
from tests.support.polling import wait_until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no event loop there watches sockets")

np = pytest.importorskip("numpy")

MB = 1 << 20


@pytest.fixture
async def pool() -> AsyncIterator[WorkerPool]:
    """One worker, which is warm: its first block of shared memory is yet to come."""
    async with WorkerPool(1) as one:
        yield one


def blocks_in_worker() -> int:
    """The blocks of shared memory that the worker which runs this has open."""
    blocks = set()
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # that of the folder itself
            if str(entry.readlink()).startswith("/memfd:async_batcher") and entry.stat().st_size > STATUS_SIZE:
                blocks.add(entry.stat().st_ino)
    return len(blocks)


class Counter:
    """Counts the blocks that are made, in this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[int] = []
        original = shared_memory.create_anonymous

        def counted(size: int) -> int:
            self.made.append(size)
            return original(size)

        monkeypatch.setattr(shared_memory, "create_anonymous", counted)


@pytest.fixture
async def no_memory(pool: WorkerPool, monkeypatch: pytest.MonkeyPatch) -> WorkerPool:
    """A pool that runs, on a system that has since run out of shared memory."""

    def fail(_: int) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shared_memory, "create_anonymous", fail)
    return pool


# Arrays arrive as they were.


def _arrays() -> dict[str, Any]:
    rng = np.random.default_rng(1)
    plain = rng.integers(0, 255, (300, 400), dtype=np.uint8)
    read_only = plain.copy()
    read_only.flags.writeable = False
    read_only_small = plain[:2].copy()
    read_only_small.flags.writeable = False
    return {
        "one": plain,
        "small": plain[:2].copy(),
        "empty": np.empty((0, 7)),
        "scalar": np.array(3.5),
        "fortran": np.asfortranarray(plain),
        "every_second": plain[::2, ::3],
        "reversed": plain[::-1],
        "transposed": plain.T,
        "read_only": read_only,
        "read_only_small": read_only_small,
        "floats": rng.random(50_000),
        "big_endian": plain.astype(">i4"),
        "records": np.zeros(9000, dtype=[("a", "i4"), ("b", "S7")]),
        "objects": np.array([1, "two", None], dtype=object),
        "times": np.arange("2026-01", "2028-01", dtype="M8[D]"),
        "masked": np.ma.masked_array(plain, plain > 100),
        "broadcast": np.broadcast_to(np.arange(1000.0), (50, 1000)),
        "view_of_large": np.zeros(5 * MB, dtype=np.uint8)[1000:101_000],
    }


async def test_arrays_of_all_kinds(pool: WorkerPool) -> None:
    """There and back: shape, type and content are the same, wherever their memory lies."""
    for name, array in _arrays().items():
        shape, dtype, back = await pool.run(lambda one: (one.shape, str(one.dtype), one), array)
        assert (shape, dtype) == (array.shape, str(array.dtype)), name
        assert type(back) is type(array), name
        assert (back.shape, back.dtype) == (array.shape, array.dtype), name
        assert np.array_equal(np.asarray(back), np.asarray(array)), name
    arrays = _arrays()
    back = await pool.run(lambda all_: all_, arrays)
    assert all(np.array_equal(np.asarray(back[name]), np.asarray(arrays[name])) for name in arrays)


async def test_what_a_batch_may_change(pool: WorkerPool) -> None:
    """An array of any size arrives as it is here: one that may be changed may be changed there, a read-only one may not."""

    def add(one: Any) -> Any:
        if one.flags.writeable:
            one += 1
        return one

    for size in (10, MIN_BUFFER_SIZE, SHM_THRESHOLD, 2 * MB):
        for is_writable in (True, False):
            array = np.zeros(size, dtype=np.uint8)
            array.flags.writeable = is_writable
            assert (await pool.run(add, array) == is_writable).all()
            assert not array.any()


@pytest.mark.slow
async def test_many_arrays(pool: WorkerPool) -> None:
    """Thousands in one batch, small and large ones mixed."""
    arrays = [np.full(size, i % 250, dtype=np.uint8) for i in range(1500) for size in (10, 5000)]
    back = await pool.run(lambda all_: [one + 1 for one in all_], arrays)
    assert all((new == old + 1).all() for new, old in zip(back, arrays, strict=True))


async def test_the_same_array_twice(pool: WorkerPool) -> None:
    """What is one object here is one object there."""
    array, data = np.zeros(100_000), bytes(100_000)
    assert await pool.run(lambda a, b, c, d: (a is b, c is d), array, array, data, data) == (True, True)


async def test_a_failure_that_carries_an_array(pool: WorkerPool) -> None:
    """An exception is no worse than a result; neither is one among the results of a batch."""

    def fail(size: int) -> None:
        raise work.FrankError("see inside", np.arange(size))  # noqa: EM101, TRY003 - what it carries is the point

    for size in (10, 10_000, MB):
        with pytest.raises(work.FrankError) as caught:
            await pool.run(fail, size)
        assert np.array_equal(np.asarray(caught.value.code), np.arange(size))

    def some_fail(batch: list[int]) -> list[Any]:
        return [work.FrankError("odd", np.arange(item)) if item % 2 else np.arange(item) for item in batch]

    async with batched(some_fail, executor=pool) as batcher:
        results = await asyncio.gather(*(batcher(50_000 + i) for i in range(4)), return_exceptions=True)
    for i, result in enumerate(results):
        array = result.code if isinstance(result, work.FrankError) else result
        assert isinstance(result, work.FrankError) == bool(i % 2)
        assert np.array_equal(np.asarray(array), np.arange(50_000 + i))


class Odd:
    """Its buffer is of another kind than bytes."""

    def __init__(self, content: Any) -> None:
        self.content = content

    def __reduce_ex__(self, protocol: Any) -> Any:
        """With its buffer beside the pickle."""
        return (Odd, (pickle.PickleBuffer(self.content),))


async def test_buffers_of_other_kinds(pool: WorkerPool) -> None:
    """Of items of several bytes, of several dimensions, or empty: what counts is their bytes."""
    import array

    for content in (
        array.array("d", range(20_000)),
        memoryview(bytes(60_000)).cast("B", (200, 300)),
        np.arange(12_000, dtype="f4").reshape(3, 4, 1000),
        b"",
    ):
        expected = bytes(memoryview(content).cast("B")) if len(content) else b""
        assert await pool.run(lambda one: bytes(one.content), Odd(content)) == expected


# Blocks of shared memory: kept while somebody looks, given back.


@pytest.mark.slow
async def test_a_block_that_is_too_small_makes_room(pool: WorkerPool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Growing needs do not pile blocks up."""
    counter = Counter(monkeypatch)
    for power in range(17, 24):
        data = bytes(1 << power)
        assert await pool.run(len, data) == len(data)
    assert len(counter.made) > 3
    if sys.platform == "linux":
        assert await pool.run(blocks_in_worker) <= 2


@pytest.mark.parametrize("size", [SHM_THRESHOLD, MB, 5 * MB])
async def test_what_user_code_keeps_is_not_written_over(pool: WorkerPool, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A view that a batch keeps, whatever it is made of, stays as it is; once it is let go, its block is used again."""
    counter = Counter(monkeypatch)

    def keep(one: Any, how: str) -> None:
        import builtins

        held = {"array": one, "slice": one[10:20], "view": memoryview(one)[5:], "read_only": memoryview(one).toreadonly()}[how]
        builtins.held = held  # type: ignore[attr-defined]

    def held_still() -> tuple[int, int]:
        import builtins

        return int(np.asarray(builtins.held).min()), int(np.asarray(builtins.held).max())  # type: ignore[attr-defined]

    def let_go() -> None:
        import builtins

        del builtins.held  # type: ignore[attr-defined]

    for how in ("array", "slice", "view", "read_only"):
        await pool.run(keep, np.full(size, 77, dtype=np.uint8), how)
        for number in range(4):
            back = await pool.run(lambda one: one + 1, np.full(size, number, dtype=np.uint8))
            assert (back == number + 1).all()
        assert await pool.run(held_still) == (77, 77)
        await pool.run(let_go)
    made = len(counter.made)
    for number in range(4):
        await pool.run(lambda one: one + 1, np.full(size, number, dtype=np.uint8))
    assert len(counter.made) == made
    assert made <= 4, "blocks that were let go are lent again"


async def test_kept_by_a_thread(pool: WorkerPool, tmp_path: Path) -> None:
    """A thread that a batch leaves behind may look at its array as long as it likes."""

    def start(one: Any, path: Path) -> None:
        import threading

        def check() -> None:
            work.wait_for(path / "go")
            work.note(path, "seen", str(set(np.unique(one).tolist())))

        threading.Thread(target=check, daemon=True).start()

    await pool.run(start, np.full(300_000, 9, dtype=np.uint8), tmp_path)
    for number in range(5):
        await pool.run(lambda one: one + 1, np.full(300_000, number, dtype=np.uint8))
    (tmp_path / "go").touch()
    await wait_until(lambda: any(work.noted(tmp_path, "seen")))
    assert work.noted(tmp_path, "seen") == ["{9}"]


async def test_results_that_are_the_batch(pool: WorkerPool) -> None:
    """Views of the batch itself, turned round, overlapping, in several results."""

    def views(one: Any) -> list[Any]:
        return [one, one[::-1], one[1000:], one.reshape(2, -1), one[:10]]

    for size in (SHM_THRESHOLD, 2 * MB):
        array = (np.arange(size) % 251).astype(np.uint8)
        back = await pool.run(views, array)
        for new, old in zip(back, views(array), strict=True):
            assert np.array_equal(new, old)


async def test_results_changed_in_place(pool: WorkerPool, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are read where they are; in a block of their own if they come otherwise, or if user code has them still."""
    counter = Counter(monkeypatch)

    def double(arrays: list[Any], how: str) -> list[Any]:
        import builtins

        for array in arrays:
            array *= 2  # noqa: PLW2901 - in place
        if how == "kept":
            builtins.kept = arrays  # type: ignore[attr-defined]
        return {"turned": arrays[::-1], "fewer": arrays[:1], "copied": [array.copy() for array in arrays]}.get(how, arrays)

    def change_what_is_kept() -> None:
        import builtins

        for array in builtins.kept:  # type: ignore[attr-defined]
            array[:] = 99

    for size in (SHM_THRESHOLD, 3 * MB):
        arrays = [np.full(size, number + 1, dtype=np.uint8) for number in range(3)]
        for _ in range(3):
            back = await pool.run(double, arrays, "in place")
            assert [(array.min(), array.max()) for array in back] == [(2, 2), (4, 4), (6, 6)]
            back[0][:] = 7
        assert len(counter.made) == 1, "one block for both ways"
        for how, numbers in (("turned", [6, 4, 2]), ("fewer", [2]), ("copied", [2, 4, 6]), ("kept", [2, 4, 6])):
            back = await pool.run(double, arrays, how)
            assert [(array.min(), array.max()) for array in back] == [(number, number) for number in numbers]
        await pool.run(change_what_is_kept)
        assert [array.max() for array in back] == [2, 4, 6]
        again = await pool.run(double, arrays, "in place")
        assert [array.max() for array in again] == [2, 4, 6]
        await pool.run(change_what_is_kept)
        assert [array.max() for array in again] == [2, 4, 6]
        counter.made.clear()


async def test_large_bytes_come_back_as_bytes(pool: WorkerPool) -> None:
    """Alone, many of them, empty ones among them, beside bytearrays and arrays; each the same, and of the same kind."""
    for batch in (
        [os.urandom(3 * MB)],
        [os.urandom(70_000) for _ in range(9)] + [b""],
        [os.urandom(100_000), bytearray(os.urandom(100_000)), bytearray(2 * MB), bytes(2 * MB)],
    ):
        back: list[Any] = await pool.run(list, batch)
        assert back == batch
        assert [type(entry) for entry in back] == [type(entry) for entry in batch]
    mixed = [os.urandom(2 * MB), np.arange(MB)]
    back = await pool.run(list, mixed)
    first, second = back
    assert first == mixed[0]
    assert np.array_equal(second, mixed[1])
    second[0] = 5


@pytest.mark.slow
async def test_death_while_a_large_batch_is_on_its_way() -> None:
    """At any moment of it the answer is right or the error is true, and nothing is left (conftest)."""
    array = np.arange(3 * MB, dtype=np.uint8)
    async with WorkerPool(1) as pool:
        for turns in (0, 1, 2, 3, 5, 8, 13, 30):
            victim = pool.workers()[0].pid
            call = asyncio.ensure_future(pool.run(lambda one: one + 1, array))
            for _ in range(turns):
                await asyncio.sleep(0)
            assert victim is not None
            os.kill(victim, signal.SIGKILL)
            result: Any = (await asyncio.gather(call, return_exceptions=True))[0]
            if isinstance(result, WorkerDiedError):
                assert (result.pid, result.exit_code) == (victim, -signal.SIGKILL)
            else:
                assert np.array_equal(result, array + 1)
            # an answer may have come before the death was seen: until then the victim stands there as idle
            await wait_until(lambda: [worker.state for worker in pool.workers() if worker.pid != victim] == ["idle"])  # noqa: B023


@pytest.mark.slow
async def test_a_stop_while_a_large_batch_is_on_its_way() -> None:
    """By force, at any moment, too."""
    for turns in (0, 1, 3, 10):
        pool = WorkerPool(1)
        await pool.start()
        call = asyncio.gather(pool.run(lambda one: one + 1, np.zeros(20 * MB, dtype=np.uint8)), return_exceptions=True)
        for _ in range(turns):
            await asyncio.sleep(0)
        await pool.stop(force=True)
        await call


# Without shared memory.


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:there is no shared memory:RuntimeWarning")
async def test_no_shared_memory_for_very_many(no_memory: WorkerPool) -> None:
    """Ten thousand buffers through the socket."""
    arrays = [np.full(MIN_BUFFER_SIZE, i % 251, dtype=np.uint8) for i in range(10_000)]
    back = await no_memory.run(lambda all_: all_, arrays)
    assert all(np.array_equal(new, old) for new, old in zip(back, arrays, strict=True))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:there is no shared memory:RuntimeWarning")
async def test_a_slow_transfer_is_no_hang(no_memory: WorkerPool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time of a batch runs from when it begins: not while its items are still on their way to a worker that takes them."""
    monkeypatch.setattr(worker_handle, "_EXIT_STATUS_TIMEOUT", 0.05)
    (worker,) = no_memory.workers()
    pid = worker.pid
    assert pid is not None

    (member,) = no_memory.dispatcher().staff.members

    async def hold_up() -> None:
        while member.begun_at() is None:
            os.kill(pid, signal.SIGSTOP)
            await asyncio.sleep(0.04)
            os.kill(pid, signal.SIGCONT)
            await asyncio.sleep(0.002)

    loop = asyncio.get_running_loop()
    start = loop.time()
    holding_up = asyncio.ensure_future(hold_up())
    array = np.zeros(80 * MB, dtype=np.uint8)
    assert await no_memory.run(lambda one: (os.getpid(), one.nbytes), array, timeout=0.3) == (pid, array.nbytes)
    await holding_up
    assert loop.time() - start > 0.3, "or it shows nothing"


@pytest.mark.slow
async def test_a_timeout_with_a_large_batch(pool: WorkerPool) -> None:
    """A batch that hangs is ended as any other, and its blocks go with it (conftest)."""
    data = bytes(50 * MB)
    for _ in range(2):
        assert await pool.run(len, data, timeout=5.0) == len(data)
        with pytest.raises(BatchTimeoutError):
            await pool.run(lambda _: signal.pause(), data, timeout=0.1)


# How long it holds up the loop.


@pytest.mark.slow
async def test_the_loop_goes_on_meanwhile(pool: WorkerPool) -> None:
    """While 100 MB go out and back, others are served: far more often than if the copies were made here."""
    array = np.zeros(100 * MB, dtype=np.uint8)
    await pool.run(lambda one: one, array)
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    counting = asyncio.ensure_future(count())
    await pool.run(lambda one: one, array)
    counting.cancel()
    assert turns > 20
