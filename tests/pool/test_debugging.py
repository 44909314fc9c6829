"""What a debugger and the log show of a pool: reprs, and `logging.debug` at changes of state."""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import re
import signal
import sys
from typing import TYPE_CHECKING, Any

import pytest

from async_batcher import WorkerPool, batched
from async_batcher._pool.state import time_limits
from async_batcher._pool.worker_handle import WorkerHandle
from async_batcher.exceptions import BatchTimeoutError, PoolBrokenError, WorkerDiedError
from tests.support import hanging_functions as hanging
from tests.support import worker_functions as work
from tests.support.polling import wait_until
from tests.support.worker_pools import no_backoff, numbers, pids_of

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.skipif(
    sys.platform == "win32", reason="no event loop there watches sockets"
)


wait_lambda = lambda folder: work.note_pid_and_wait(folder, [])  # noqa: E731 - has no path


def _handles(pool: WorkerPool) -> list[Any]:
    return pool.dispatcher().workers()


async def test_the_repr_of_a_pool(tmp_path: Path) -> None:
    """It has the pool's state, its workers by their states, and how much work there is."""
    pool = WorkerPool(2)
    assert re.fullmatch(r"<WorkerPool-\d+ not started max_workers=2>", repr(pool))
    async with pool:
        assert re.fullmatch(
            r"<WorkerPool-\d+ running workers=\[2 idle\] queued=0 unresolved=0>", repr(pool)
        )
        calls = [
            asyncio.ensure_future(pool.run(work.note_pid_and_wait, tmp_path, [i])) for i in range(3)
        ]
        await wait_until(lambda: len(numbers(tmp_path, "pid")) == 2)
        assert repr(pool).endswith(" running workers=[2 busy] queued=1 unresolved=3>")
        (tmp_path / "go").touch()
        assert await asyncio.gather(*calls) == [[0], [1], [2]]
    assert repr(pool).endswith(" stopped max_workers=2>")
    assert repr(WorkerPool(1)) != repr(WorkerPool(1)), "each pool has a name of its own"


async def test_the_repr_of_a_worker_handle(tmp_path: Path) -> None:
    """It has the process id, the state, the batches so far, and what the worker runs."""

    def wait(batch: list[int]) -> list[int]:
        work.note_pid_and_wait(tmp_path, [])
        return batch

    async with WorkerPool(1) as pool, batched(wait, executor=pool, max_queue_time=0) as batcher:
        (pid,) = pids_of(pool)
        (handle,) = _handles(pool)
        assert repr(handle) == f"<WorkerHandle number=0 pid={pid} idle batches=0>"
        call = asyncio.ensure_future(batcher(1))
        await wait_until(lambda: numbers(tmp_path, "pid"))
        assert re.fullmatch(
            rf"<WorkerHandle number=0 pid={pid} busy batches=0 running .*wait.*>", repr(handle)
        )
        (tmp_path / "go").touch()
        assert await call == 1
        assert repr(handle) == f"<WorkerHandle number=0 pid={pid} idle batches=1>"
        with pytest.raises(BatchTimeoutError):
            await pool.run(signal.pause, timeout=0.05)
        assert repr(handle).endswith(" batches=1 running pause interrupted (timeout)>")


@pytest.mark.parametrize("how", ["imported", "sent once", "with each call", "partial"])
async def test_the_repr_of_a_call(tmp_path: Path, how: str) -> None:
    """It has the name of the function that was passed, however that travels."""

    def local(folder: Path) -> None:
        work.note_pid_and_wait(folder, [])

    args: tuple[Any, ...] = (tmp_path, []) if how == "imported" else (tmp_path,)
    function: Any = {
        "imported": work.note_pid_and_wait,
        "sent once": wait_lambda,
        "with each call": local,
        "partial": functools.partial(work.note_pid_and_wait, batch=[]),
    }[how]
    name = {"sent once": "<lambda>", "with each call": local.__qualname__}
    async with WorkerPool(1) as pool:
        (handle,) = _handles(pool)
        call = asyncio.ensure_future(pool.run(function, *args))
        await wait_until(lambda: numbers(tmp_path, "pid"))
        assert repr(handle).endswith(f" running {name.get(how, 'note_pid_and_wait')}>")
        assert name.get(how, "note_pid_and_wait") in repr(handle.worker.trip.item)
        (tmp_path / "go").touch()
        await call


async def test_changes_of_state_are_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Each line names the pool and the process; a batch logs nothing."""
    monkeypatch.setattr(time_limits, "INTERRUPT_GRACE", 0.0)
    with caplog.at_level(logging.DEBUG, "async_batcher"):
        async with WorkerPool(1) as pool:
            name = repr(pool)[1:].split()[0]
            (first,) = pids_of(pool)
            started = [record.getMessage() for record in caplog.records]
            caplog.clear()
            assert await pool.run(abs, -1) == 1
            assert caplog.records == []
            with pytest.raises(BatchTimeoutError):
                await pool.run(hanging.suppress_interrupts, tmp_path, timeout=0.05)
            await wait_until(lambda: [worker.state for worker in pool.workers()] == ["idle"])
            (second,) = pids_of(pool)
            with pytest.raises(WorkerDiedError):
                await pool.run(eval, "__import__('os')._exit(3)")
            await wait_until(lambda: [worker.state for worker in pool.workers()] == ["idle"])
            (third,) = pids_of(pool)
    messages = [record.getMessage() for record in caplog.records if record.name == "async_batcher"]
    assert {record.levelno for record in caplog.records} == {logging.DEBUG}
    assert started[0] == f"{name}: worker {first} started"
    assert re.fullmatch(rf"{name}: worker {first} ready after \d+\.\d+ s", started[1])
    for line in (
        f"interrupting worker {first} (timeout)",
        f"killing worker {first} (timeout)",
        f"worker {first} exited with status -9",
        f"worker {second} exited with status 3",
        f"stopping worker {third}",
        f"worker {third} exited with status 0",
    ):
        assert f"{name}: {line}" in messages


@pytest.mark.usefixtures("long_graces")
async def test_the_crash_of_an_idle_worker_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """No caller gets it as an error. A crash that a caller gets is not logged, nor is an end."""
    async with WorkerPool(1, max_tasks_per_child=2) as pool:
        name = repr(pool)[1:].split()[0]
        (pid,) = pids_of(pool)
        os.kill(pid, signal.SIGKILL)
        await wait_until(lambda: pool.worker_counts().crashed)
        with pytest.raises(WorkerDiedError):
            await pool.run(work.exit_now, 3)
        for _ in range(3):  # the worker is recycled
            await pool.run(abs, -1)
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert record.levelno == logging.WARNING
    assert record.getMessage() == (
        f"{name}: worker process {pid} was killed by SIGKILL while it was idle, and is replaced. "
        "Likely cause: the kernel's OOM killer, or a manual kill."
    )


async def test_a_failed_start_is_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The line has the exception."""
    no_backoff(monkeypatch)

    def fail() -> None:
        msg = "no pipes left"
        raise OSError(msg)

    pool = WorkerPool(1)
    with monkeypatch.context() as patched, caplog.at_level(logging.DEBUG, "async_batcher"):
        name = repr(pool)[1:].split()[0]
        patched.setattr(WorkerHandle, "send_init", lambda *_: fail())
        with pytest.raises(PoolBrokenError, match="no pipes left"):
            await pool.start()
    messages = [record.getMessage() for record in caplog.records if record.name == "async_batcher"]
    line = f"{name}: a worker could not be started: OSError('no pipes left')"
    assert messages == [line] * 4
    await pool.stop()
