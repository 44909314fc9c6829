"""Unusual large buffers: odd arrays, views that are kept, crashes and slow transfers.

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
from async_batcher._pool.state import time_limits
from async_batcher._serialization.out_of_band import MIN_BUFFER_SIZE
from async_batcher._transport import shared_memory
from async_batcher._transport.shared_memory import SHM_THRESHOLD
from async_batcher._transport.status_page import SIZE as STATUS_SIZE
from async_batcher.exceptions import BatchTimeoutError, WorkerDiedError
from tests.support import worker_functions as work
from tests.support.polling import wait_until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

pytestmark = pytest.mark.skipif(
    sys.platform == "win32", reason="no event loop there watches sockets"
)

np = pytest.importorskip("numpy")

MB = 1 << 20


@pytest.fixture
async def pool() -> AsyncIterator[WorkerPool]:
    """Return a pool of one worker, which has no block of shared memory yet."""
    async with WorkerPool(1) as one:
        yield one


def blocks_in_worker() -> int:
    """Count the blocks of shared memory that the worker which runs this has open."""
    blocks = set()
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # the descriptor of the folder itself
            if (
                str(entry.readlink()).startswith("/memfd:async_batcher")
                and entry.stat().st_size > STATUS_SIZE
            ):
                blocks.add(entry.stat().st_ino)
    return len(blocks)


class Counter:
    """Counts the blocks that this process makes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[int] = []
        original = shared_memory.create_anonymous

        def counted(size: int) -> int:
            self.made.append(size)
            return original(size)

        monkeypatch.setattr(shared_memory, "create_anonymous", counted)


@pytest.fixture
async def no_memory(pool: WorkerPool, monkeypatch: pytest.MonkeyPatch) -> WorkerPool:
    """Return a running pool on a system that has run out of shared memory."""

    def fail(_: int) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shared_memory, "create_anonymous", fail)
    return pool


# Arrays.


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
    """Shape, type and content survive the trip to the worker and back."""
    for name, array in _arrays().items():
        shape, dtype, back = await pool.run(lambda one: (one.shape, str(one.dtype), one), array)
        assert (shape, dtype) == (array.shape, str(array.dtype)), name
        assert type(back) is type(array), name
        assert (back.shape, back.dtype) == (array.shape, array.dtype), name
        assert np.array_equal(np.asarray(back), np.asarray(array)), name
    arrays = _arrays()
    back = await pool.run(lambda all_: all_, arrays)
    assert all(np.array_equal(np.asarray(back[name]), np.asarray(arrays[name])) for name in arrays)


async def test_arrays_stay_writable_or_read_only(pool: WorkerPool) -> None:
    """An array of any size is writable in the worker exactly if it is writable here."""

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
    """One batch may hold thousands, small and large ones mixed."""
    arrays = [np.full(size, i % 250, dtype=np.uint8) for i in range(1500) for size in (10, 5000)]
    back = await pool.run(lambda all_: [one + 1 for one in all_], arrays)
    assert all((new == old + 1).all() for new, old in zip(back, arrays, strict=True))


async def test_the_same_array_twice(pool: WorkerPool) -> None:
    """One object here is one object in the worker."""
    array, data = np.zeros(100_000), bytes(100_000)
    assert await pool.run(lambda a, b, c, d: (a is b, c is d), array, array, data, data) == (
        True,
        True,
    )


async def test_a_failure_that_carries_an_array(pool: WorkerPool) -> None:
    """An exception carries it as a result does, alone or among the results of a batch."""

    def fail(size: int) -> None:
        raise work.FrankError("see inside", np.arange(size))  # noqa: EM101, TRY003 - what it carries is the point

    for size in (10, 10_000, MB):
        with pytest.raises(work.FrankError) as caught:
            await pool.run(fail, size)
        assert np.array_equal(np.asarray(caught.value.code), np.arange(size))

    def some_fail(batch: list[int]) -> list[Any]:
        return [
            work.FrankError("odd", np.arange(item)) if item % 2 else np.arange(item)
            for item in batch
        ]

    async with batched(some_fail, executor=pool) as batcher:
        results = await asyncio.gather(
            *(batcher(50_000 + i) for i in range(4)), return_exceptions=True
        )
    for i, result in enumerate(results):
        array = result.code if isinstance(result, work.FrankError) else result
        assert isinstance(result, work.FrankError) == bool(i % 2)
        assert np.array_equal(np.asarray(array), np.arange(50_000 + i))


class Odd:
    """Has a buffer of another kind than bytes."""

    def __init__(self, content: Any) -> None:
        self.content = content

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Put the buffer beside the pickle."""
        return (Odd, (pickle.PickleBuffer(self.content),))


async def test_buffers_of_other_kinds(pool: WorkerPool) -> None:
    """Buffers of larger items, of several dimensions, or empty ones arrive with their bytes."""
    import array

    for content in (
        array.array("d", range(20_000)),
        memoryview(bytes(60_000)).cast("B", (200, 300)),
        np.arange(12_000, dtype="f4").reshape(3, 4, 1000),
        b"",
    ):
        expected = bytes(memoryview(content).cast("B")) if len(content) else b""
        assert await pool.run(lambda one: bytes(one.content), Odd(content)) == expected


# Blocks of shared memory: in use, reused, freed.


@pytest.mark.slow
async def test_a_larger_block_replaces_one_that_is_too_small(
    pool: WorkerPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches that grow do not pile blocks up."""
    counter = Counter(monkeypatch)
    for power in range(17, 24):
        data = bytes(1 << power)
        assert await pool.run(len, data) == len(data)
    assert len(counter.made) > 3
    if sys.platform == "linux":
        assert await pool.run(blocks_in_worker) <= 2


@pytest.mark.parametrize("size", [SHM_THRESHOLD, MB, 5 * MB])
async def test_memory_that_user_code_keeps_is_not_overwritten(
    pool: WorkerPool, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A view of any kind that a batch keeps stays valid; once released, its block is reused."""
    counter = Counter(monkeypatch)

    def keep(one: Any, how: str) -> None:
        import builtins

        held = {
            "array": one,
            "slice": one[10:20],
            "view": memoryview(one)[5:],
            "read_only": memoryview(one).toreadonly(),
        }[how]
        builtins.held = held  # type: ignore[attr-defined]

    def held_still() -> tuple[int, int]:
        import builtins

        return int(np.asarray(builtins.held).min()), int(np.asarray(builtins.held).max())  # type: ignore[attr-defined]

    def release() -> None:
        import builtins

        del builtins.held  # type: ignore[attr-defined]

    for how in ("array", "slice", "view", "read_only"):
        await pool.run(keep, np.full(size, 77, dtype=np.uint8), how)
        for number in range(4):
            back = await pool.run(lambda one: one + 1, np.full(size, number, dtype=np.uint8))
            assert (back == number + 1).all()
        assert await pool.run(held_still) == (77, 77)
        await pool.run(release)
    made = len(counter.made)
    for number in range(4):
        await pool.run(lambda one: one + 1, np.full(size, number, dtype=np.uint8))
    assert len(counter.made) == made
    assert made <= 4, "released blocks are leased again"


async def test_an_array_that_a_thread_keeps(pool: WorkerPool, tmp_path: Path) -> None:
    """A thread that outlives its batch may go on reading the array."""

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


async def test_results_that_are_views_of_the_batch(pool: WorkerPool) -> None:
    """They may be reversed, and overlap in several results."""

    def views(one: Any) -> list[Any]:
        return [one, one[::-1], one[1000:], one.reshape(2, -1), one[:10]]

    for size in (SHM_THRESHOLD, 2 * MB):
        array = (np.arange(size) % 251).astype(np.uint8)
        back = await pool.run(views, array)
        for new, old in zip(back, views(array), strict=True):
            assert np.array_equal(new, old)


async def test_results_changed_in_place(pool: WorkerPool, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are read in place, or from another block if they changed or user code keeps them."""
    counter = Counter(monkeypatch)

    def double(arrays: list[Any], how: str) -> list[Any]:
        import builtins

        for array in arrays:
            array *= 2  # noqa: PLW2901 - in place
        if how == "kept":
            builtins.kept = arrays  # type: ignore[attr-defined]
        return {
            "turned": arrays[::-1],
            "fewer": arrays[:1],
            "copied": [array.copy() for array in arrays],
        }.get(how, arrays)

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
        assert len(counter.made) == 1, "one block for both directions"
        for how, numbers in (
            ("turned", [6, 4, 2]),
            ("fewer", [2]),
            ("copied", [2, 4, 6]),
            ("kept", [2, 4, 6]),
        ):
            back = await pool.run(double, arrays, how)
            assert [(array.min(), array.max()) for array in back] == [
                (number, number) for number in numbers
            ]
        await pool.run(change_what_is_kept)
        assert [array.max() for array in back] == [2, 4, 6]
        again = await pool.run(double, arrays, "in place")
        assert [array.max() for array in again] == [2, 4, 6]
        await pool.run(change_what_is_kept)
        assert [array.max() for array in again] == [2, 4, 6]
        counter.made.clear()


async def test_large_bytes_come_back_as_bytes(pool: WorkerPool) -> None:
    """Alone, many, empty, beside bytearrays and arrays: value and type are the same."""
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
@pytest.mark.usefixtures("long_graces")
async def test_a_crash_while_a_large_batch_is_sent() -> None:
    """At any moment, the result or the error is right, and nothing is left (conftest)."""
    array = np.arange(3 * MB, dtype=np.uint8)
    async with WorkerPool(1) as pool:
        for turns in (0, 1, 2, 3, 5, 8, 13, 30):
            (victim,) = [worker.pid for worker in pool.workers() if worker.state == "idle"]
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
            # A result may come before the crash is seen; until then the worker is listed as idle.

            def is_replaced(victim: int = victim) -> bool:
                others = [worker.state for worker in pool.workers() if worker.pid != victim]
                return others == ["idle"]

            await wait_until(is_replaced)


@pytest.mark.slow
async def test_a_forced_stop_while_a_large_batch_is_sent() -> None:
    """At any moment, nothing is left (conftest)."""
    for turns in (0, 1, 3, 10):
        pool = WorkerPool(1)
        await pool.start()
        call = asyncio.gather(
            pool.run(lambda one: one + 1, np.zeros(20 * MB, dtype=np.uint8)), return_exceptions=True
        )
        for _ in range(turns):
            await asyncio.sleep(0)
        await pool.stop(force=True)
        await call


# Without shared memory.


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:there is no shared memory:RuntimeWarning")
async def test_very_many_buffers_without_shared_memory(no_memory: WorkerPool) -> None:
    """Ten thousand buffers go through the socket."""
    arrays = [np.full(MIN_BUFFER_SIZE, i % 251, dtype=np.uint8) for i in range(10_000)]
    back = await no_memory.run(lambda all_: all_, arrays)
    assert all(np.array_equal(new, old) for new, old in zip(back, arrays, strict=True))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:there is no shared memory:RuntimeWarning")
async def test_a_slow_transfer_does_not_time_out(
    no_memory: WorkerPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A timeout runs from when the batch begins, not while its items are sent to the worker."""
    monkeypatch.setattr(time_limits, "MIN_BEGIN_TIMEOUT", 0.05)
    (worker,) = no_memory.workers()
    pid = worker.pid
    assert pid is not None

    (member,) = no_memory.dispatcher().workers()

    async def slow_down() -> None:
        while member.progress(member.worker.trip).started_at is None:
            os.kill(pid, signal.SIGSTOP)
            await asyncio.sleep(0.04)
            os.kill(pid, signal.SIGCONT)
            await asyncio.sleep(0.002)

    loop = asyncio.get_running_loop()
    start = loop.time()
    slowing_down = asyncio.ensure_future(slow_down())
    array = np.zeros(80 * MB, dtype=np.uint8)
    assert await no_memory.run(lambda one: (os.getpid(), one.nbytes), array, timeout=1.0) == (
        pid,
        array.nbytes,
    )
    await slowing_down
    assert loop.time() - start > 1.0, "else the test shows nothing"


@pytest.mark.slow
async def test_a_timeout_with_a_large_batch(pool: WorkerPool) -> None:
    """Its worker is killed, and its blocks are closed (conftest)."""
    data = bytes(50 * MB)
    for _ in range(2):
        assert await pool.run(len, data, timeout=work.DEADLINE) == len(data)
        with pytest.raises(BatchTimeoutError):
            await pool.run(lambda _: signal.pause(), data, timeout=0.1)


# The event loop.


@pytest.mark.slow
async def test_large_copies_do_not_block_the_loop(pool: WorkerPool) -> None:
    """While 100 MB are sent and come back, the loop runs other tasks many times."""
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
