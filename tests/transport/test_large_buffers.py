"""Large buffers between a `WorkerPool` and its workers: uncopied where possible, and complete."""

from __future__ import annotations

import errno
import os
import random
import sys
import warnings
from typing import TYPE_CHECKING, Any

import pytest

from async_batcher import WorkerPool, batched
from async_batcher._transport import shared_memory
from tests.support import worker_functions as work

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="WorkerPool")

MB = 1 << 20


@pytest.fixture(scope="module", autouse=True)
def np(numpy: Any) -> Any:
    """Return numpy, without which no test of this module runs."""
    return numpy


@pytest.fixture
async def pool() -> AsyncIterator[WorkerPool]:
    """Return a pool of one worker, which runs all batches."""
    async with WorkerPool(1) as one:
        yield one


def same(value: Any) -> Any:
    """Return the argument."""
    return value


def blocks_of(pool: WorkerPool) -> dict[int, int]:
    """Return the sizes of the blocks of its one worker, by their ids."""
    (member,) = pool.dispatcher().workers()
    return {block_id: block.size for block_id, block in member._blocks.blocks.items()}


async def test_arrays_reach_the_batch_writable_and_uncopied(np: Any, pool: WorkerPool) -> None:
    """A batch sees a large array in shared memory; changes there do not reach the caller's."""

    def look(array: Any) -> tuple[bool, bool]:
        array += 1
        return bool(array.flags.writeable), bool(array.flags.owndata)

    array = np.zeros(MB)
    assert await pool.run(look, array) == (True, False)
    assert not array.any()


async def test_results_are_the_callers_own(np: Any, pool: WorkerPool) -> None:
    """Results are writable, and no later batch changes them, whether made in place or new."""

    def doubled(array: Any) -> Any:
        array *= 2
        return array

    kept = [await pool.run(doubled, np.full(MB // 8, float(n))) for n in range(5)]
    for n, array in enumerate(kept):
        assert array.flags.writeable
        assert (array == 2 * n).all()
        array[:] = -1


async def test_a_view_that_user_code_keeps_is_not_overwritten(np: Any, pool: WorkerPool) -> None:
    """Its block is reused only when the view is released; a read-only view counts too."""

    def keep(array: Any, how: str) -> None:
        import builtins

        builtins.kept = array[:10] if how == "view" else memoryview(array).toreadonly()  # type: ignore[attr-defined]

    def look() -> list[float]:
        import builtins

        return [float(x) for x in builtins.kept[:3]]  # type: ignore[attr-defined]

    def release() -> None:
        import builtins

        del builtins.kept  # type: ignore[attr-defined]

    for how in ("view", "readonly"):
        await pool.run(keep, np.full(MB // 8, 7.0), how)
        for n in range(4):
            await pool.run(len, np.full(MB // 8, float(n)))
        assert await pool.run(look) == [7.0, 7.0, 7.0]
        await pool.run(release)
        before = blocks_of(pool)
        for n in range(4):
            await pool.run(len, np.full(MB // 8, float(n)))
        assert blocks_of(pool) == before


async def test_no_block_is_made_in_the_steady_state(np: Any, pool: WorkerPool) -> None:
    """After a few batches the same blocks are reused; a slightly larger batch fits too."""
    for _ in range(3):
        await pool.run(same, np.ones(MB))
    before = blocks_of(pool)
    assert 1 <= len(before) <= 3
    for n in range(20):
        size = MB + n * MB // 200
        assert len(await pool.run(same, np.ones(size))) == size
    assert blocks_of(pool) == before


async def test_blocks_that_are_far_too_large_are_freed(np: Any, pool: WorkerPool) -> None:
    """One very large batch does not keep its memory."""
    await pool.run(same, np.ones(4 * MB))
    assert max(blocks_of(pool).values()) > 32 * MB
    for n in range(200):
        assert await pool.run(abs, -n) == n
    assert not blocks_of(pool)


def _payloads(np: Any) -> list[Any]:
    rng = random.Random(5)  # noqa: S311 - no secrets
    sizes = [0, 1, 4095, 4096, 4097, 65_535, 65_536, 65_537, MB - 1, MB, MB + 1, 5 * MB]
    arrays = [np.frombuffer(rng.randbytes(size), dtype="u1").copy() for size in sizes]
    square = np.arange(90_000.0).reshape(300, 300)
    readonly = np.arange(100_000)
    readonly.flags.writeable = False
    return [
        *arrays,
        *(array.tobytes() for array in arrays),
        *(bytearray(array.tobytes()) for array in arrays),
        square.T,
        square[::2, ::3],
        np.asfortranarray(square),
        readonly,
        np.array(["text", None], dtype=object),
        np.zeros((0, 5)),
        [square, square, {"deep": [square, bytes(100_000)]}],
        [np.full(10_000, n) for n in range(200)],
        [bytes([n % 256]) * 10_000 for n in range(2000)],
        "x" * (2 * MB),
        list(range(200_000)),
    ]


def equal(np: Any, one: Any, other: Any) -> bool:
    """Tell whether values and types are equal, at every depth."""
    if type(one) is not type(other):
        return False
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and one.shape == other.shape and bool((one == other).all())
    if isinstance(one, list):
        return len(one) == len(other) and all(
            equal(np, a, b) for a, b in zip(one, other, strict=True)
        )
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(np, one[key], other[key]) for key in one)
    return bool(one == other)


@pytest.mark.slow
@pytest.mark.parametrize("shared", [True, False], ids=["shared memory", "socket"])
async def test_every_kind_of_payload_comes_back(
    np: Any,
    shared: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Arrays, bytes and objects around the limits: alone, in batches, and two batches at a time."""
    payloads = _payloads(np)
    async with WorkerPool(2) as pool:
        if not shared:
            monkeypatch.setattr(
                "async_batcher._transport.shared_memory.create_anonymous", _nothing_left
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            for payload in payloads:
                assert equal(np, await pool.run(same, payload), payload)
            batcher = batched(work.same, executor=pool, max_batch_size=7, concurrency=2)
            results = [batcher.submit(payload) for payload in payloads * 2]
            for result, payload in zip(results, payloads * 2, strict=True):
                assert equal(np, await result, payload)
            await batcher.stop()


def _nothing_left(_: int) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


async def test_without_shared_memory_buffers_go_through_the_socket(
    np: Any, pool: WorkerPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In both directions, with one warning. Shared memory is used again once there is some."""
    array = np.arange(MB, dtype="f8")
    with monkeypatch.context() as patched:
        patched.setattr("async_batcher._transport.shared_memory.create_anonymous", _nothing_left)
        with pytest.warns(RuntimeWarning, match="no shared memory.*No space left") as caught:  # noqa: PT031 - one for all three
            for _ in range(3):
                assert (await pool.run(same, array) == array).all()
        assert len(caught) == 1
        assert not blocks_of(pool)
    assert (await pool.run(same, array) == array).all()
    assert blocks_of(pool)


async def test_a_block_that_cannot_be_mapped(
    pool: WorkerPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To map one takes a descriptor; without any, buffers go through the socket."""

    def fail(_: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    data = bytes(100_000)
    assert await pool.run(len, data) == len(data)
    before = blocks_of(pool)
    assert before
    with monkeypatch.context() as patched:
        patched.setattr(shared_memory.SharedBlock, "_mapped", fail)
        with pytest.warns(RuntimeWarning, match="no shared memory.*Too many open files"):
            assert await pool.run(len, data) == len(data)
    assert await pool.run(len, data) == len(data)
    assert blocks_of(pool) == before
    assert not pool.worker_counts().crashed


async def test_any_error_while_a_block_is_made(
    np: Any, pool: WorkerPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large results go through the socket after any error; the worker does not wait for it."""

    def fail(_: int) -> int:
        raise MemoryError

    monkeypatch.setattr("async_batcher._transport.shared_memory.create_anonymous", fail)
    assert (await pool.run(np.ones, MB) == 1).all()
    assert not blocks_of(pool)


async def test_a_warning_that_is_an_error_fails_no_batch(
    np: Any, pool: WorkerPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where warnings are errors, the batch gets its results all the same."""
    monkeypatch.setattr("async_batcher._transport.shared_memory.create_anonymous", _nothing_left)
    seen: list[Any] = []
    loop = pool.dispatcher().loop
    loop.set_exception_handler(lambda _, context: seen.append(context["exception"]))
    array = np.ones(MB)
    assert (await pool.run(same, array) == array).all()
    assert [type(error) for error in seen] == [RuntimeWarning]


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="nothing reserves space here")
async def test_memory_that_runs_out_while_it_is_reserved(np: Any, pool: WorkerPool) -> None:
    """The system's own error, such as a limit on file sizes, is handled alike; nothing is left."""
    import resource

    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4 * MB, limit[1]))
    try:
        with pytest.warns(RuntimeWarning, match="no shared memory"):
            assert (await pool.run(same, np.ones(MB)) == 1).all()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)


async def test_a_buffer_in_several_pieces_fails_alone(pool: WorkerPool) -> None:
    """A buffer that is not contiguous fails its item; the other items get their results."""
    batcher = batched(work.same, executor=pool, max_queue_time=0)
    pieces = memoryview(bytearray(20_000))[::2]
    fine, bad, good = batcher.submit(1), batcher.submit(work.Buffer(pieces)), batcher.submit(3)
    assert await fine == 1
    with pytest.raises(TypeError, match="cannot be pickled"):
        await bad
    assert await good == 3
    await batcher.stop()


async def test_an_exception_with_a_large_array(np: Any, pool: WorkerPool) -> None:
    """The array in its arguments arrives, too."""

    def fail(array: Any) -> None:
        raise ValueError("too large", array)  # noqa: EM101, TRY003 - what it carries is the point

    array = np.arange(MB)
    with pytest.raises(ValueError, match="too large") as caught:
        await pool.run(fail, array)
    assert (caught.value.args[1] == array).all()


async def test_the_blocks_of_a_worker_that_crashes_are_closed(np: Any, pool: WorkerPool) -> None:
    """Even during a copy (conftest counts descriptors); the batch goes to the replacement."""
    import asyncio
    import signal

    array = np.ones(4 * MB)
    for _ in range(3):
        pid = await pool.run(os.getpid)
        call = asyncio.ensure_future(pool.run(len, array))
        await asyncio.sleep(0)
        os.kill(pid, signal.SIGKILL)
        assert await call == len(array)


def test_a_block_is_a_quarter_larger_than_needed() -> None:
    """So that the next batch may be a little larger."""
    assert shared_memory.block_size(4 * MB) == 5 * MB
