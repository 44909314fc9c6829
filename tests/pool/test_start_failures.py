"""A start of a worker that fails, at any step and for any reason."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, cast

import pytest

from async_batcher import WorkerPool, batched
from async_batcher._eventloop.guarded_loop import GuardedLoop
from async_batcher._pool.processes import process_watcher
from async_batcher.exceptions import PoolBrokenError, WorkerDiedError
from tests.conftest import descendants
from tests.support import scripts
from tests.support import worker_functions as work
from tests.support.polling import wait_for_exit, wait_until
from tests.support.worker_pools import METHODS, may_warn_of_fork, no_backoff, parent_of

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="no event loop there watches sockets"),
    may_warn_of_fork,
]


class InjectedError(Exception):
    """Raised in place of what a step does."""


def _fail(*_: object, **__: object) -> Any:
    msg = "injected"
    raise InjectedError(msg)


# The steps of starting a worker: what is replaced, and with which start methods it is a step.
_STEPS: dict[str, tuple[str, list[str]]] = {
    "settings: the path": ("async_batcher._pool.processes.worker_starter.search_path", METHODS),
    "settings: the arguments": (
        "async_batcher._pool.processes.worker_starter.program_argv",
        METHODS,
    ),
    "settings: pickled": ("async_batcher._pool.worker_handle.pickle.dumps", METHODS),
    "status page": ("async_batcher._pool.worker_handle.shared_memory.create_anonymous", METHODS),
    "status page: mapped": ("async_batcher._transport.status_page.mmap.mmap", METHODS),
    "life pipe": ("async_batcher._pool.worker_handle.os.pipe", METHODS),
    "channel": ("async_batcher._pool.worker_handle.Channel", METHODS),
    "channel: socket": ("socket.socketpair", METHODS),
    "blocks": ("async_batcher._pool.worker_handle.WorkerBlocks", METHODS),
    "introduction": ("async_batcher._pool.worker_handle.WorkerHandle.send_init", METHODS),
    "introduction: sent": ("async_batcher._pool.worker_handle.WorkerHandle._send_tracker", METHODS),
    "launch": ("async_batcher._pool.processes.launchers.{launcher}.launch", METHODS),
    "helper": ("async_batcher._pool.processes.{helper_of}.run_in_helper", ["forkserver", "spawn"]),
    "interpreter": (
        "async_batcher._pool.processes.{helper_of}.spawn_python",
        ["forkserver", "spawn"],
    ),
    "interpreter: payload": (
        "async_batcher._pool.processes.interpreter.marshal.dumps",
        ["forkserver", "spawn"],
    ),
    "interpreter: executable": (
        "async_batcher._pool.processes.interpreter._executable",
        ["forkserver", "spawn"],
    ),
    "interpreter: process": ("subprocess.Popen", ["forkserver", "spawn"]),
    "request": ("socket.send_fds", ["forkserver"]),
    "fork": ("os.fork", ["fork"]),
    "watch": ("async_batcher._pool.processes.process_watcher._exit_fd", ["spawn", "fork"]),
}

_CASES = [
    (step, method)
    for step, (_, methods) in _STEPS.items()
    for method in METHODS
    if method in methods
]


def _place(step: str, method: str) -> str:
    launcher = {
        "forkserver": "ForkServerLauncher",
        "spawn": "SpawnLauncher",
        "fork": "ForkLauncher",
    }[method]
    return _STEPS[step][0].format(
        launcher=launcher, helper_of="fork_server_client" if method == "forkserver" else "launchers"
    )


@pytest.mark.parametrize(("step", "method"), _CASES)
async def test_a_start_that_fails_at_any_step(
    monkeypatch: pytest.MonkeyPatch, step: str, method: str
) -> None:
    """Callers get the exception as the cause; both kinds of stop end; a later call works."""
    no_backoff(monkeypatch)
    async with asyncio.timeout(work.DEADLINE):
        for force in (False, True):
            pool = WorkerPool(2, mp_context=method)
            with monkeypatch.context() as patched:
                patched.setattr(_place(step, method), _fail)
                for error in await asyncio.gather(
                    *(pool.run(abs, -1) for _ in range(3)), return_exceptions=True
                ):
                    assert isinstance(error, PoolBrokenError)
                    assert isinstance(error.__cause__, InjectedError)
                with pytest.raises(PoolBrokenError, match="InjectedError: injected"):
                    await pool.start()
                if force:
                    call = asyncio.ensure_future(pool.run(abs, -1))
                    await asyncio.sleep(0)
                    await pool.stop(force=True)
                    with pytest.raises(Exception):  # noqa: B017, PT011 - stopped, or broken before
                        await call
            if not force:
                assert await pool.run(abs, -1) == 1
            await pool.stop()


@pytest.mark.slow
@pytest.mark.parametrize(("step", "method"), _CASES)
async def test_a_replacement_that_fails_at_any_step(
    monkeypatch: pytest.MonkeyPatch, step: str, method: str
) -> None:
    """Callers get the exception as the cause, and later calls find workers."""
    no_backoff(monkeypatch)
    async with asyncio.timeout(work.DEADLINE):
        pool = WorkerPool(1, mp_context=method, max_tasks_per_child=2)
        pid = await pool.run(os.getpid)
        with monkeypatch.context() as patched:
            patched.setattr(_place(step, method), _fail)
            if method == "forkserver" and _STEPS[step][1] != [
                "forkserver"
            ]:  # one fork server starts many workers
                os.kill(parent_of(pid), signal.SIGKILL)
            os.kill(pid, signal.SIGKILL)
            await wait_for_exit([pid])
            with pytest.raises(PoolBrokenError) as caught:
                await pool.run(abs, -1)
            assert isinstance(caught.value.__cause__, InjectedError)
        assert [await pool.run(abs, -1) for _ in range(5)] == [1] * 5
        await pool.stop()


async def test_a_loop_that_cannot_watch_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Callers get the exception of the loop as the cause; later calls find workers."""
    no_backoff(monkeypatch)
    for method in METHODS:
        pool = WorkerPool(1, mp_context=method)
        loop = asyncio.get_running_loop()
        try:
            with monkeypatch.context() as patched:
                patched.setattr(type(loop), "add_reader", _fail)
                with pytest.raises(PoolBrokenError) as caught:
                    await pool.run(abs, -1)
                assert isinstance(caught.value.__cause__, InjectedError)
        except TypeError:
            pytest.skip("the methods of this loop cannot be replaced")
        assert await pool.run(abs, -1) == 1
        await pool.stop()


class Name(str):
    """A string of a class that a worker cannot import."""

    __slots__ = ()
    __reduce_ex__ = _fail


@pytest.mark.parametrize("method", METHODS)
async def test_sys_path_and_argv_of_a_worker(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, method: str
) -> None:
    """A worker gets the strings of ``sys.path``, and ``sys.argv`` as strings."""
    monkeypatch.setattr(sys, "path", [*sys.path, None, b"/bytes", Path("/path"), 7, Name(tmp_path)])
    monkeypatch.setattr(sys, "argv", ["program", Path("/path"), 7, Name("name"), threading.Lock])
    async with WorkerPool(1, mp_context=method) as pool:
        path, argv = await pool.run(eval, "(lambda sys: (sys.path, sys.argv))(__import__('sys'))")
    assert path == [*[entry or os.getcwd() for entry in sys.path[:-5]], str(tmp_path)]  # noqa: PTH109 - as the worker tells it
    assert argv == ["program", "/path", "7", "name", str(threading.Lock)]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("argv", [None, 7])
async def test_a_missing_or_invalid_argv(
    monkeypatch: pytest.MonkeyPatch, method: str, argv: object
) -> None:
    """A missing ``sys.argv`` is empty in a worker; one that is not a list is an error."""
    no_backoff(monkeypatch)
    pool = WorkerPool(1, mp_context=method)
    if argv is None:
        monkeypatch.delattr(sys, "argv")
        assert await pool.run(eval, "__import__('sys').argv") == []
    else:
        monkeypatch.setattr(sys, "argv", argv)
        with pytest.raises(PoolBrokenError, match="TypeError"):
            await pool.run(abs, -1)
    await pool.stop()


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "event",
    [
        "subprocess.Popen",
        "os.fork",
        "socket.sendmsg",
        "_thread.start_new_thread",
        "os.kill",
        "open",
    ],
)
def test_an_audit_hook_that_raises(tmp_path: Path, method: str, event: str) -> None:
    """Calls and stops end, with the exception as the cause, and nothing is left."""
    text = """
        import asyncio, os, sys, warnings
        from async_batcher import WorkerPool
        from async_batcher.exceptions import PoolBrokenError
        from tests.conftest import descendants
        warnings.simplefilter("ignore")

        class Refused(Exception):
            pass

        PROGRAM = os.getpid()
        busy = False
        def hook(event, args):
            if busy and event == EVENT and os.getpid() == PROGRAM:  # not in a forked worker
                raise Refused
        sys.addaudithook(hook)

        async def main():
            global busy
            import multiprocessing.resource_tracker as tracker
            tracker.ensure_running()
            standing = descendants()
            for force in (False, True):
                pool = WorkerPool(1, mp_context=METHOD)
                busy = True
                try:
                    assert await asyncio.wait_for(pool.run(abs, -1), 20) == 1
                except PoolBrokenError as error:
                    assert isinstance(error.__cause__, Refused), repr(error.__cause__)
                await asyncio.wait_for(pool.stop(force=force), 20)
                busy = False
                while descendants() - standing:
                    await asyncio.sleep(0.01)
            print("good")
        asyncio.run(main())
    """
    output = scripts.run_script(
        tmp_path, text.replace("METHOD", repr(method)).replace("EVENT", repr(event))
    )
    assert output == "good\n"


@pytest.mark.skipif("fork" not in METHODS, reason="no fork")
async def test_a_fork_whose_warning_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """The warning is reported, and the worker works.

    From Python 3.15 it is raised when the child exists.
    """
    fork = os.fork

    def warning_fork() -> int:
        import warnings

        pid = fork()
        if pid:
            warnings.warn("forked", DeprecationWarning, stacklevel=2)
        return pid

    problems: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, problem: problems.append(problem))
    before = descendants()
    with monkeypatch.context() as patched:
        patched.setattr(os, "fork", warning_fork)
        async with WorkerPool(1, mp_context="fork") as pool:
            assert await pool.run(abs, -1) == 1
            assert len(descendants() - before) == 1
    assert [str(problem["exception"]) for problem in problems] == ["forked"]


async def test_a_python_that_cannot_fork_while_it_exits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some versions raise RuntimeError; the call fails, and the pool can be stopped."""
    if "fork" not in METHODS:
        pytest.skip("no fork")
    no_backoff(monkeypatch)

    def fork() -> int:
        msg = "can't fork at interpreter shutdown"
        raise RuntimeError(msg)

    pool = WorkerPool(1, mp_context="fork")
    with monkeypatch.context() as patched:
        patched.setattr(os, "fork", fork)
        with pytest.raises(PoolBrokenError, match="can't fork at interpreter shutdown"):
            await pool.run(abs, -1)
    assert await pool.run(abs, -1) == 1
    await pool.stop()


@pytest.mark.parametrize("failing", ["nameless", "pipe", "socketpair", "fork"])
async def test_a_start_without_descriptors_or_processes(
    monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    """After delays the error says so, and a later call finds workers."""
    no_backoff(monkeypatch)
    method = "fork" if failing == "fork" else "forkserver"
    if method not in METHODS:
        pytest.skip("no fork")
    pool = WorkerPool(2, mp_context=method)

    def fail(*_: object, **__: object) -> None:
        raise OSError(24, "Too many open files")

    place = {
        "nameless": "async_batcher._transport.shared_memory.create_anonymous",
        "pipe": "async_batcher._pool.worker_handle.os.pipe",
        "socketpair": "socket.socketpair",
        "fork": "os.fork",
    }[failing]
    assert asyncio.get_running_loop().time() > 0
    with monkeypatch.context() as patched:
        patched.setattr(place, fail)
        with pytest.raises(PoolBrokenError, match="Too many open files") as caught:
            await pool.run(abs, -1)
    assert isinstance(caught.value.__cause__, OSError)
    assert await pool.run(abs, -1) == 1
    await pool.stop()


async def test_batches_that_fail_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each batch gets the error: a caller that gets one may submit the next batch."""
    no_backoff(monkeypatch)

    def fail(*_: object, **__: object) -> None:
        raise OSError(24, "Too many open files")

    async with asyncio.timeout(work.DEADLINE):
        batcher = batched(work.same, executor="process", max_workers=1, max_batch_size=1)
        with monkeypatch.context() as patched:
            patched.setattr("async_batcher._transport.shared_memory.create_anonymous", fail)
            errors = await asyncio.gather(*map(batcher, range(4)), return_exceptions=True)
        assert [type(error) for error in errors] == [PoolBrokenError] * 4
        assert await batcher(4) == 4
        await batcher.stop()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere there is a kqueue")
@pytest.mark.parametrize("lack", ["of Python", "of the system"])
@pytest.mark.parametrize("method", ["spawn", "fork"])
async def test_a_system_without_pidfd(
    monkeypatch: pytest.MonkeyPatch, method: str, lack: str
) -> None:
    """A worker's exit is seen with its exit code, and nothing is left."""

    def refuse(pid: int) -> int:
        raise OSError(errno.ENOSYS, "Function not implemented", pid)

    if lack == "of Python":
        monkeypatch.delattr(os, "pidfd_open")
    else:
        monkeypatch.setattr(os, "pidfd_open", refuse)
    async with WorkerPool(1, mp_context=method) as pool:
        with pytest.raises(WorkerDiedError, match=r"exit code 3"):
            await pool.run(work.exit_now, 3)
        pid = await pool.run(os.getpid)
    assert not scripts.is_alive(pid)


async def test_a_process_that_exits_before_it_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some systems refuse to watch it; its exit is reported all the same."""

    def refuse(pid: int) -> Any:
        raise ProcessLookupError(pid)

    monkeypatch.setattr(process_watcher, "_exit_fd", refuse)
    ended_with: list[int | None] = []

    class Owner:
        def on_exit(self, exit_code: int | None) -> None:
            ended_with.append(exit_code)

    process = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])  # noqa: ASYNC220 - asyncio would watch it
    loop = GuardedLoop(asyncio.get_running_loop(), lambda exc: pytest.fail(str(exc)))
    watched = process_watcher.ProcessWatcher(loop)
    watched.watch(process.pid, cast("Any", Owner()))
    await wait_until(lambda: ended_with)
    assert ended_with == [3]
    process.returncode = 3
