"""How workers get ready: initializers, crashes before they are ready, retries."""

from __future__ import annotations

import asyncio
import functools
import os
import sys
import threading
import traceback
from typing import TYPE_CHECKING, Any

import pytest

from async_batcher import WorkerPool, batched
from async_batcher._pool.state import supervisor
from async_batcher.exceptions import (
    BatcherStoppedError,
    PoolBrokenError,
    SerializationError,
    WorkerDiedError,
)
from tests.support import worker_functions as work
from tests.support.polling import wait_for_exit, wait_until
from tests.support.worker_pools import METHODS, may_warn_of_fork, no_backoff, numbers, pids_of

if TYPE_CHECKING:
    from pathlib import Path


pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="no event loop there watches sockets"),
    may_warn_of_fork,
]


@pytest.mark.parametrize("method", METHODS)
async def test_the_initializer(tmp_path: Path, method: str) -> None:
    """It runs once in each worker, with its arguments, before the first batch."""
    word = "well"

    def initialize(folder: Path, kind: str) -> None:
        os.environ["INITIALIZED"] = word
        work.note(folder, kind, str(os.getpid()))

    async with WorkerPool(
        2, mp_context=method, initializer=initialize, initargs=(tmp_path, "setup")
    ) as pool:
        assert sorted(numbers(tmp_path, "setup")) == sorted(pids_of(pool))
        assert (
            await asyncio.gather(*(pool.run(os.getenv, "INITIALIZED") for _ in range(10)))
            == ["well"] * 10
        )
    assert len(numbers(tmp_path, "setup")) == 2


@pytest.mark.parametrize("by_call", [False, True], ids=["start", "run"])
async def test_an_initializer_that_raises(tmp_path: Path, by_call: bool) -> None:
    """Every caller gets `PoolBrokenError`, caused by what was raised; a later call tries again."""
    pool = WorkerPool(1, initializer=functools.partial(work.fail_first, tmp_path))
    if by_call:
        errors: list[Any] = list(
            await asyncio.gather(*(pool.run(abs, -1) for _ in range(3)), return_exceptions=True)
        )
    else:
        errors = list(await asyncio.gather(pool.start(), return_exceptions=True))
    for error in errors:
        assert type(error) is PoolBrokenError
        assert "the model is not there yet" in str(error)
        assert type(error.__cause__) is LookupError
        assert "in fail_first" in "".join(traceback.format_exception(error.__cause__))
    assert len({id(error) for error in errors}) == len(errors)
    assert pool.workers() == [], "nothing is tried before the next call"
    assert await pool.run(abs, -1) == 1
    await pool.stop()


async def test_an_initializer_that_raises_is_counted_as_such(tmp_path: Path) -> None:
    """The counts of workers name the cause, rather than how the process exited."""
    pool = WorkerPool(1, initializer=functools.partial(work.fail_first, tmp_path))
    batcher = batched(work.same, executor=pool)
    with pytest.raises(PoolBrokenError):
        await batcher.start()
    assert batcher.stats().workers.crashed == {"initializer failed": 1}
    await batcher.stop()
    await pool.stop()


@pytest.mark.slow
async def test_an_initializer_that_raises_unusual_exceptions() -> None:
    """SystemExit and unpicklable exceptions break the pool as any other exception does."""
    for name, text in (("exit", "SystemExit"), ("picky", "PickyError"), ("own", "OwnSignal")):
        pool = WorkerPool(1, initializer=work.raise_named, initargs=([name],))
        with pytest.raises(PoolBrokenError, match=text):
            await pool.run(abs, -1)
        await pool.stop()


async def test_an_unpicklable_initializer() -> None:
    """The start fails with the culprit, and the pool can still be stopped."""
    pool = WorkerPool(1, initializer=id, initargs=(threading.Lock(),))
    for _ in range(2):
        with pytest.raises(SerializationError, match="lock"):
            await pool.start()
        with pytest.raises(SerializationError, match="lock"):
            await pool.run(abs, -1)
    await pool.stop()


@pytest.mark.slow
@pytest.mark.parametrize("way", work.EXIT_CODES)
@pytest.mark.parametrize("method", METHODS)
async def test_workers_that_crash_before_they_are_ready(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, method: str, way: str
) -> None:
    """They are started again after delays, then every caller gets the cause.

    When the cause is gone, a later call finds workers.
    """
    no_backoff(monkeypatch)
    pool = WorkerPool(
        1, mp_context=method, initializer=work.crash_until, initargs=(tmp_path, "mended", way)
    )
    for round_ in (1, 2):
        errors = await asyncio.gather(
            pool.start(), *(pool.run(abs, -1) for _ in range(2)), return_exceptions=True
        )
        pids = numbers(tmp_path, "pid")
        assert len(pids) == 4 * round_
        for error in errors:
            assert type(error) is PoolBrokenError
            cause = error.__cause__
            assert type(cause) is WorkerDiedError
            assert (cause.exit_code, cause.may_have_run) == (work.EXIT_CODES[way], False)
            assert cause.pid == pids[-1]
            assert "before it was ready" in str(error)
        assert pool.workers() == []
    (tmp_path / "mended").touch()
    assert await pool.run(abs, -1) == 1
    await pool.stop()


@pytest.mark.slow
async def test_restart_delays_grow(tmp_path: Path) -> None:
    """A pool whose workers crash at their start does not keep the machine busy."""
    pool = WorkerPool(1, initializer=work.crash_until, initargs=(tmp_path, "mended", "os._exit"))
    loop = asyncio.get_running_loop()
    start = loop.time()
    with pytest.raises(PoolBrokenError):
        await pool.start()
    assert loop.time() - start > 1.3
    await pool.stop()


async def test_one_worker_that_cannot_start_beside_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """While one worker lives, it runs the calls, whether the other one starts or not."""
    no_backoff(monkeypatch)
    pool = WorkerPool(2, initializer=work.exit_unless_first, initargs=(tmp_path,))
    pids = await asyncio.gather(*(pool.run(os.getpid) for _ in range(20)))
    assert len(set(pids)) == 1
    await wait_until(lambda: len(work.noted(tmp_path, "exited")) > 1)
    assert await pool.run(os.getpid) == pids[0]
    await pool.stop()


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
async def test_workers_that_are_not_ready_in_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, method: str
) -> None:
    """``start_timeout``: the workers are killed, and every caller gets the reason."""
    monkeypatch.setattr(supervisor, "_BACKOFF_DELAYS", ())  # no second try
    pool = WorkerPool(
        1,
        mp_context=method,
        initializer=work.note_pid_and_wait,
        initargs=(tmp_path, []),
        start_timeout=2.0,
    )
    with pytest.raises(PoolBrokenError, match="start_timeout") as caught:
        await pool.run(abs, -1)
    assert type(caught.value.__cause__) is TimeoutError
    await wait_for_exit(numbers(tmp_path, "pid"))
    monkeypatch.undo()
    (tmp_path / "go").touch()
    state = pool.dispatcher()._state.supervisor
    state.limits = state.limits._replace(start_timeout=work.DEADLINE)
    assert await pool.run(abs, -1) == 1
    await pool.stop()


@pytest.mark.slow
async def test_stop_during_the_start(tmp_path: Path) -> None:
    """After a forced stop at any point every caller has an outcome, and nothing is left."""
    for method in METHODS:
        for turns in (0, 1, 2, 5, 20):
            pool = WorkerPool(
                2, mp_context=method, initializer=work.note_setup, initargs=(tmp_path,)
            )
            waiting = asyncio.gather(pool.start(), pool.run(abs, -1), return_exceptions=True)
            for _ in range(turns):
                await asyncio.sleep(0)
            await pool.stop(force=True)
            assert {type(result) for result in await waiting} <= {
                BatcherStoppedError,
                type(None),
                int,
            }


async def test_a_cancelled_start() -> None:
    """Calls start the pool all the same."""
    pool = WorkerPool(2)
    start = asyncio.ensure_future(pool.start())
    await asyncio.sleep(0)
    start.cancel()
    with pytest.raises(asyncio.CancelledError):
        await start
    assert await pool.run(abs, -1) == 1
    await pool.stop()


@pytest.mark.parametrize("method", METHODS)
async def test_imports_of_a_worker(method: str) -> None:
    """A worker imports neither asyncio nor anything else that a batch does not need."""
    if method == "fork":
        pytest.skip("a fork has what its parent has")
    async with WorkerPool(1, mp_context=method) as pool:
        modules = set(await pool.run(lambda: [*sys.modules]))
    assert "async_batcher._worker.run_batch" in modules
    assert modules.isdisjoint(
        {"asyncio", "pytest", __name__, "numpy", "async_batcher.batcher", "async_batcher._pool"}
    )
