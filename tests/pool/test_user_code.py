"""What user code may do to its worker process."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING

import pytest

from async_batcher import WorkerPool
from async_batcher.exceptions import (
    WorkerDiedError,
)
from tests.support import scripts
from tests.support import worker_functions as work
from tests.support.polling import wait_for_exit, wait_until
from tests.support.worker_pools import METHODS, may_warn_of_fork, numbers, pids_of

if TYPE_CHECKING:
    from pathlib import Path


pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="no event loop there watches sockets"),
    may_warn_of_fork,
]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
async def test_a_helper_that_a_batch_forked(tmp_path: Path, method: str) -> None:
    """It holds the worker's channel open; the worker's crash is seen all the same."""

    def fork_and_die(folder: Path) -> None:
        pid = os.fork()
        if pid == 0:
            try:
                work.wait_for(folder / "go")
            finally:
                os._exit(0)
        work.note(folder, "helper", str(pid))
        os._exit(3)

    async with WorkerPool(1, mp_context=method) as pool:
        (pid,) = pids_of(pool)
        async with asyncio.timeout(work.DEADLINE / 2):
            with pytest.raises(WorkerDiedError) as caught:
                await pool.run(fork_and_die, tmp_path)
        assert (caught.value.pid, caught.value.exit_code) == (pid, 3)
        (helper,) = numbers(tmp_path, "helper")
        assert scripts.is_alive(helper)
        assert await pool.run(abs, -1) == 1
    (tmp_path / "go").touch()
    await wait_for_exit([helper])


@pytest.mark.parametrize("method", METHODS)
async def test_user_code_that_closes_all_descriptors(
    method: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """The batch fails, and nothing else does."""
    async with WorkerPool(1, mp_context=method) as pool:
        (pid,) = pids_of(pool)
        with pytest.raises(WorkerDiedError) as caught:
            await pool.run(os.closerange, 3, 1000)
        assert caught.value.pid == pid
        assert await pool.run(abs, -1) == 1
    capfd.readouterr()  # what the worker may have had to say


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
async def test_user_code_that_closes_the_channel_and_goes_on(method: str) -> None:
    """The error names that as the cause, and not a lack of memory."""

    def close_and_go_on() -> None:
        import time

        os.closerange(3, 1000)
        time.sleep(60)

    async with WorkerPool(1, mp_context=method) as pool:
        with pytest.raises(
            WorkerDiedError, match=r"It had closed its channel to the pool, and was killed"
        ):
            await pool.run(close_and_go_on)
        assert await pool.run(abs, -1) == 1


@pytest.mark.parametrize("method", METHODS)
async def test_user_code_that_becomes_another_program(method: str) -> None:
    """That is a crash of the worker, even if the other program keeps its descriptors open."""
    async with WorkerPool(1, mp_context=method) as pool:
        with pytest.raises(WorkerDiedError, match="has replaced the process by another program"):
            await pool.run(
                os.execv, sys.executable, [sys.executable, "-c", "import time; time.sleep(60)"]
            )
        assert await pool.run(abs, -1) == 1


@pytest.mark.parametrize("method", METHODS)
async def test_user_code_that_returns_in_a_forked_child(method: str) -> None:
    """Only the worker replies."""

    def fork() -> int:
        pid = os.fork()
        if pid == 0:
            sys.exit(0)
        os.waitpid(pid, 0)
        return os.getpid()

    async with WorkerPool(1, mp_context=method) as pool:
        (worker,) = pids_of(pool)
        for _ in range(5):
            assert await pool.run(fork) == worker


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
@pytest.mark.parametrize("method", METHODS)
async def test_subprocesses_of_user_code_inherit_nothing(method: str) -> None:
    """Neither the channel nor shared memory, which would outlive the pool."""

    def others(_: bytes) -> list[str]:
        listing = subprocess.run(
            ["/bin/ls", "-l", "/proc/self/fd"],
            capture_output=True,
            text=True,
            check=True,
            close_fds=False,
        )
        return [
            line for line in listing.stdout.splitlines() if "socket:" in line or "memfd:" in line
        ]

    large = bytes(10_000_000)
    async with WorkerPool(1, mp_context=method) as pool:
        await pool.run(len, large)
        assert await pool.run(others, large) == []


async def test_user_code_that_uses_up_the_descriptors() -> None:
    """A large result arrives all the same; a large batch fails with the reason."""

    def use_up() -> bytes:
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, most))
        with contextlib.suppress(OSError):
            while True:
                os.dup(0)
        return bytes(1_000_000)

    async with WorkerPool(1) as pool:
        pids = pids_of(pool)
        assert await pool.run(use_up) == bytes(1_000_000)
        with pytest.raises(OSError, match="no file descriptors left"):
            await pool.run(len, bytes(1_000_000))
        assert await pool.run(abs, -1) == 1
        assert pids_of(pool) == pids


@pytest.mark.usefixtures("long_graces")
async def test_a_worker_whose_own_code_fails(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Standard error has the traceback, and the counts have its exit code."""

    def leave_an_alarm(folder: Path) -> None:
        def ring(*_: object) -> None:
            msg = "an unexpected alarm"
            raise TimeoutError(msg)

        def send_alarm() -> None:
            work.wait_for(folder / "go")
            os.kill(os.getpid(), signal.SIGALRM)

        signal.signal(signal.SIGALRM, ring)
        threading.Thread(target=send_alarm, daemon=True).start()

    async with WorkerPool(1) as pool:
        (pid,) = pids_of(pool)
        await pool.run(leave_an_alarm, tmp_path)
        (tmp_path / "go").touch()
        await wait_for_exit([pid])
        assert await pool.run(abs, -1) == 1
        assert pool.worker_counts().crashed == {"exit code 70": 1}
    assert "an unexpected alarm" in capfd.readouterr().err


@pytest.mark.parametrize("method", METHODS)
async def test_socket_default_timeout(method: str) -> None:
    """An idle worker waits for as long as there is nothing to do."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(0.05)
    try:
        async with WorkerPool(2, mp_context=method) as pool:
            await pool.run(time.sleep, 0.2)  # the other one has nothing to do meanwhile
            assert await pool.run(abs, -1) == 1
            assert pool.worker_counts().started == 2
    finally:
        socket.setdefaulttimeout(before)


@pytest.mark.parametrize("method", METHODS)
async def test_a_program_with_very_many_descriptors(method: str) -> None:
    """Workers start although descriptors are larger than `select` allows."""
    resource = pytest.importorskip("resource")
    least, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most < 2500:
        pytest.skip("the system does not allow for them")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(least, 2500), most))
    many = [os.dup(0) for _ in range(1100)]
    try:
        async with WorkerPool(1, mp_context=method) as pool:
            assert await pool.run(abs, -1) == 1
    finally:
        for descriptor in many:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (least, most))


async def test_standard_streams_of_a_worker(capfd: pytest.CaptureFixture[str]) -> None:
    """Standard input is empty; output goes where the parent's output goes."""

    def talk() -> str:
        print("spoken")
        print("complained", file=sys.stderr)
        return sys.stdin.read()

    async with WorkerPool(1) as pool:
        assert await pool.run(talk) == ""
    output, errors = capfd.readouterr()
    assert output == "spoken\n"
    assert errors == "complained\n"


async def test_user_code_that_changes_the_process(pool: WorkerPool, tmp_path: Path) -> None:
    """After changes of signals, folder and threads the worker goes on.

    Later workers start in the folder of the parent.
    """

    def change(folder: str) -> int:
        os.chdir(folder)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        threading.Thread(target=threading.Event().wait, daemon=True).start()
        return os.getpid()

    pid = await pool.run(change, str(tmp_path))
    assert await pool.run(os.getpid) == pid
    os.kill(pid, signal.SIGKILL)
    await wait_for_exit([pid])
    await wait_until(
        lambda: len(pids_of(pool)) == 2 and all(worker.state == "idle" for worker in pool.workers())
    )
    here = os.getcwd()  # noqa: PTH109 - as the worker tells it
    assert await asyncio.gather(*(pool.run(os.getcwd) for _ in range(6))) == [here] * 6
