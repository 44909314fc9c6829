"""`WorkerPool.stop` with force: it waits for the exits of processes, and for nothing else."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import textwrap
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from async_batcher import WorkerPool, batched
from async_batcher._pool.processes import launchers, resource_tracker
from async_batcher._pool.state import pool_state, supervisor, worker_events
from async_batcher.exceptions import BatcherStoppedError
from tests.support import scripts
from tests.support import worker_functions as work
from tests.support.polling import wait_until
from tests.support.worker_pools import METHODS, may_warn_of_fork, numbers, parent_of, pids_of

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="no event loop there watches sockets"),
    may_warn_of_fork,
]

HOURS = 7200.0  # seconds


@pytest.fixture(autouse=True)
def _no_time_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a stop that waits for a timer wait for hours."""
    monkeypatch.setattr(supervisor, "EXIT_STATUS_TIMEOUT", HOURS)
    monkeypatch.setattr(worker_events, "_EOF_TO_EXIT_TIMEOUT", HOURS)
    monkeypatch.setattr(worker_events, "SHUTDOWN_GRACE", HOURS)
    monkeypatch.setattr(pool_state, "SHUTDOWN_GRACE", HOURS)


async def stop(stopped: Any, pids: list[int], *calls: asyncio.Future[Any]) -> None:
    """Stop by force; all calls fail, and the processes have exited when it returns."""
    async with asyncio.timeout(work.DEADLINE):
        await stopped.stop(force=True)
    assert not any(map(scripts.is_alive, pids))
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [BatcherStoppedError] * len(calls)


def hold_the_gil(folder: Path) -> None:
    """Hang in C code that holds the GIL."""
    import ctypes

    work.note(folder, "pid", str(os.getpid()))
    ctypes.PyDLL(None).sleep(60)


def hang(folder: Path) -> None:
    """Hang where Python code can be interrupted."""
    work.note(folder, "pid", str(os.getpid()))
    time.sleep(60)


def hang_in_setup(folder: Path) -> Any:
    """Return a set-up that hangs."""
    return lambda: hang(folder)


@pytest.mark.parametrize("method", METHODS)
async def test_workers_that_hang(tmp_path: Path, method: str) -> None:
    """One sleeps, one holds the GIL, one is halted, and one is idle."""
    pool = WorkerPool(4, mp_context=method)
    await pool.start()
    functions = [hang, hold_the_gil, hang]
    calls = [asyncio.ensure_future(pool.run(function, tmp_path)) for function in functions]
    await wait_until(lambda: len(numbers(tmp_path, "pid")) == len(calls))
    os.kill(numbers(tmp_path, "pid")[-1], signal.SIGSTOP)
    await stop(pool, pids_of(pool), *calls)


@pytest.mark.parametrize("method", METHODS)
async def test_a_set_up_that_hangs(tmp_path: Path, method: str) -> None:
    """The batcher's pool is stopped with it."""
    pool = WorkerPool(1, mp_context=method)
    batcher = batched(work.same, executor=lambda: pool, setup_worker=hang_in_setup(tmp_path))
    call = asyncio.ensure_future(batcher.process(1))
    await wait_until(lambda: numbers(tmp_path, "pid"))
    await stop(batcher, pids_of(pool), call)


@pytest.mark.parametrize("method", METHODS)
async def test_workers_that_do_not_get_ready(tmp_path: Path, method: str) -> None:
    """Their initializer hangs."""
    pool = WorkerPool(2, mp_context=method, initializer=hang, initargs=(tmp_path,))
    start = asyncio.ensure_future(pool.start())
    await wait_until(lambda: len(numbers(tmp_path, "pid")) == 2)
    await stop(pool, numbers(tmp_path, "pid"), start)


async def test_a_fork_server_that_does_not_get_ready(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It imports a module that hangs; no worker has been requested yet."""
    text = f"""
        import os, time
        from pathlib import Path

        Path({str(tmp_path / "pid-0")!r}).write_text(str(os.getpid()))
        time.sleep(60)
    """
    (tmp_path / "hangs_at_import.py").write_text(textwrap.dedent(text))
    monkeypatch.syspath_prepend(tmp_path)
    pool = WorkerPool(2, mp_context="forkserver", preload=["hangs_at_import"])
    start = asyncio.ensure_future(pool.start())
    await wait_until(lambda: numbers(tmp_path, "pid"))
    await stop(pool, numbers(tmp_path, "pid"), start)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
async def test_a_fork_server_that_is_halted(tmp_path: Path) -> None:
    """It goes on, to reap its workers."""
    pool = WorkerPool(2, mp_context="forkserver")
    await pool.start()
    call = asyncio.ensure_future(pool.run(hang, tmp_path))
    await wait_until(lambda: numbers(tmp_path, "pid"))
    pids = pids_of(pool)
    server = parent_of(pids[0])
    os.kill(server, signal.SIGSTOP)
    await stop(pool, [*pids, server], call)


async def test_processes_that_are_about_to_be_spawned(monkeypatch: pytest.MonkeyPatch) -> None:
    """None is spawned after the stop."""
    go_on = threading.Event()
    spawned: list[Any] = []
    monkeypatch.setattr(resource_tracker, "ensure_running", lambda: go_on.wait(work.DEADLINE))
    monkeypatch.setattr(launchers, "spawn_python", lambda *args: spawned.append(args))
    pool = WorkerPool(3, mp_context="spawn")
    start = asyncio.ensure_future(pool.start())
    await asyncio.sleep(0)
    asyncio.get_running_loop().call_soon(go_on.set)
    await stop(pool, [], start)
    assert spawned == []
