"""What a `WorkerPool` needs of the system and of its program: a start that fails, the path, shared memory, signals."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from async_batcher import WorkerPool
from async_batcher._pool import interpreter, supervisor
from async_batcher._transport import shared_memory
from async_batcher.exceptions import PoolBrokenError, WorkerDiedError
from tests.conftest import descendants
from tests.support import scripts
from tests.support import worker_functions as work
from tests.support.polling import wait_for_exit, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="no event loop there watches sockets"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
]

METHODS = ["forkserver", "spawn", "fork"] if sys.platform == "linux" else ["forkserver", "spawn"]


class InjectedError(Exception):
    """Raised in place of what a step does."""


def _fail(*_: object, **__: object) -> Any:
    msg = "injected"
    raise InjectedError(msg)


# The steps of starting a worker: what is replaced, and with which start methods it is a step.
_STEPS: dict[str, tuple[str, list[str]]] = {
    "settings: the path": ("async_batcher._pool.worker_starter.search_path", METHODS),
    "settings: the arguments": ("async_batcher._pool.worker_starter.program_argv", METHODS),
    "settings: pickled": ("async_batcher._pool.worker_handle.pickle.dumps", METHODS),
    "status page": ("async_batcher._pool.worker_handle.shared_memory.create_anonymous", METHODS),
    "status page: mapped": ("async_batcher._transport.status_page.mmap.mmap", METHODS),
    "life pipe": ("async_batcher._pool.worker_handle.os.pipe", METHODS),
    "channel": ("async_batcher._pool.worker_handle.Channel", METHODS),
    "channel: socket": ("socket.socketpair", METHODS),
    "blocks": ("async_batcher._pool.worker_handle.BlockStager", METHODS),
    "introduction": ("async_batcher._pool.worker_handle.WorkerHandle.send_init", METHODS),
    "introduction: sent": ("async_batcher._pool.worker_handle.WorkerHandle._send_tracker", METHODS),
    "launch": ("async_batcher._pool.launchers.{launcher}.launch", METHODS),
    "helper": ("async_batcher._pool.{helper_of}.run_in_helper", ["forkserver", "spawn"]),
    "interpreter": ("async_batcher._pool.{helper_of}.spawn_python", ["forkserver", "spawn"]),
    "interpreter: payload": ("async_batcher._pool.interpreter.marshal.dumps", ["forkserver", "spawn"]),
    "interpreter: executable": ("async_batcher._pool.interpreter._executable", ["forkserver", "spawn"]),
    "interpreter: process": ("subprocess.Popen", ["forkserver", "spawn"]),
    "request": ("socket.send_fds", ["forkserver"]),
    "fork": ("os.fork", ["fork"]),
    "watch": ("async_batcher._pool.process_watcher._exit_fd", ["spawn", "fork"]),
}

_CASES = [(step, method) for step, (_, methods) in _STEPS.items() for method in METHODS if method in methods]


def _place(step: str, method: str) -> str:
    launcher = {"forkserver": "ForkServerLauncher", "spawn": "SpawnLauncher", "fork": "ForkLauncher"}[method]
    return _STEPS[step][0].format(launcher=launcher, helper_of="fork_server_client" if method == "forkserver" else "launchers")


def parent_of(pid: int) -> int:
    """The parent of a process, by /proc."""
    return int(Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()[1])


def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "_BACKOFF_DELAYS", (0.001,) * 3)


@pytest.mark.parametrize(("step", "method"), _CASES)
async def test_a_start_that_fails_at_any_step(monkeypatch: pytest.MonkeyPatch, step: str, method: str) -> None:
    """Any exception reaches the callers as the cause of their error; both kinds of stop end; a later call finds workers."""
    _no_pauses(monkeypatch)
    async with asyncio.timeout(work.DEADLINE):
        for force in (False, True):
            pool = WorkerPool(2, mp_context=method)
            with monkeypatch.context() as patched:
                patched.setattr(_place(step, method), _fail)
                for error in await asyncio.gather(*(pool.run(abs, -1) for _ in range(3)), return_exceptions=True):
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
async def test_a_replacement_that_fails_at_any_step(monkeypatch: pytest.MonkeyPatch, step: str, method: str) -> None:
    """A worker whose successor cannot be started leaves its callers with that error, and the pool with a way on."""
    _no_pauses(monkeypatch)
    async with asyncio.timeout(work.DEADLINE):
        pool = WorkerPool(1, mp_context=method, max_tasks_per_child=2)
        pid = await pool.run(os.getpid)
        with monkeypatch.context() as patched:
            patched.setattr(_place(step, method), _fail)
            if method == "forkserver" and _STEPS[step][1] != ["forkserver"]:  # one fork server starts many workers
                os.kill(parent_of(pid), signal.SIGKILL)
            os.kill(pid, signal.SIGKILL)
            await wait_for_exit([pid])
            with pytest.raises(PoolBrokenError) as caught:
                await pool.run(abs, -1)
            assert isinstance(caught.value.__cause__, InjectedError)
        assert [await pool.run(abs, -1) for _ in range(5)] == [1] * 5
        await pool.stop()


async def test_a_loop_that_watches_nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same where it is the loop that fails."""
    _no_pauses(monkeypatch)
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
async def test_odd_entries_of_the_path_and_of_the_arguments(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, method: str) -> None:
    """Import looks at strings only, and so a worker gets those; the arguments arrive as strings."""
    monkeypatch.setattr(sys, "path", [*sys.path, None, b"/bytes", Path("/path"), 7, Name(tmp_path)])
    monkeypatch.setattr(sys, "argv", ["program", Path("/path"), 7, Name("name"), threading.Lock])
    async with WorkerPool(1, mp_context=method) as pool:
        path, argv = await pool.run(eval, "(lambda sys: (sys.path, sys.argv))(__import__('sys'))")
    assert path == [*[entry or os.getcwd() for entry in sys.path[:-5]], str(tmp_path)]  # noqa: PTH109 - as the worker tells it
    assert argv == ["program", "/path", "7", "name", str(threading.Lock)]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("argv", [None, 7])
async def test_arguments_that_are_no_list(monkeypatch: pytest.MonkeyPatch, method: str, argv: object) -> None:
    """Missing, as in an embedding program: none. What is no list is an error that says so."""
    _no_pauses(monkeypatch)
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
    "event", ["subprocess.Popen", "os.fork", "socket.sendmsg", "_thread.start_new_thread", "os.kill", "open"]
)
def test_an_audit_hook_that_refuses(tmp_path: Path, method: str, event: str) -> None:
    """At each refusal, calls and stops end, with what it raised where no worker could be started, and nothing is left."""
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
    output = scripts.run_script(tmp_path, text.replace("METHOD", repr(method)).replace("EVENT", repr(event)))
    assert output == "good\n"


@pytest.mark.skipif("fork" not in METHODS, reason="no fork")
async def test_a_fork_that_warns_with_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """From Python 3.15 a warning that is an error is raised when the child is there: it is shown, and the worker works."""
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


# The path.


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("flags", [[], ["-P"], ["-I"], ["-E"], ["-s"]])
def test_nothing_is_imported_from_the_current_folder(tmp_path: Path, method: str, flags: list[str]) -> None:
    """A program that does not import from there has workers that do not, even if modules lie there."""
    program, folder = tmp_path / "program", tmp_path / "folder"
    for one in (program, folder):
        one.mkdir()
    for name in (
        "pickle",
        "importlib",
        "marshal",
        "os",
        "socket",
        "struct",
        "cloudpickle",
        "json",
        "async_batcher",
        "sitecustomize",
    ):
        (folder / f"{name}.py").write_text("open('imported', 'a').write(__name__ + ' '); raise ImportError(__name__)")
    text = f"""
        import asyncio, os, sys, warnings
        warnings.simplefilter("ignore")
        sys.path[1:1] = {[str(scripts.ROOT), str(scripts.ROOT / "src"), *sys.path]!r}
        from async_batcher import WorkerPool
        os.chdir({str(folder)!r})

        async def main():
            async with WorkerPool(1, mp_context={method!r}) as pool:
                print(await pool.run(eval, "__import__('json').__name__"))
                print((await pool.run(eval, "__import__('sys').path")) == sys.path, sys.flags.safe_path)
        asyncio.run(main())
    """
    import subprocess

    done = subprocess.run(  # noqa: S603 - of ours
        [sys.executable, *flags, str(scripts.script(program, text))],
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        capture_output=True,
        text=True,
        check=False,
        timeout=work.DEADLINE,
    )
    assert (done.stdout.split()[:2], done.stderr) == (["json", "True"], "")
    assert not (folder / "imported").exists()


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_program_that_imports_from_the_current_folder(tmp_path: Path, method: str) -> None:
    """One that is given with ``-c`` has it on its path, and so have its workers, where it was then."""
    (tmp_path / "beside.py").write_text("def here():\n    import os\n    return os.getcwd()\n")
    text = f"""
import asyncio, os, warnings
warnings.simplefilter("ignore")
from async_batcher import WorkerPool
import beside
async def main():
    async with WorkerPool(1, mp_context={method!r}) as pool:
        print(await pool.run(beside.here))
asyncio.run(main())
"""
    assert scripts.run_script(tmp_path, text, how="command") == f"{os.path.realpath(tmp_path)}\n"


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_current_folder_that_has_been_removed(tmp_path: Path, method: str) -> None:
    """It is no obstacle: to the first workers, or to the next."""
    text = f"""
import asyncio, os, signal, tempfile, warnings
warnings.simplefilter("ignore")
from async_batcher import WorkerPool
from tests.support.polling import wait_for_exit
folder = tempfile.mkdtemp()
os.chdir(folder)
os.rmdir(folder)
async def main():
    async with WorkerPool(2, mp_context={method!r}) as pool:
        pid = await pool.run(os.getpid)
        assert len(await pool.run(bytes, 1_000_000)) == 1_000_000
        os.kill(pid, signal.SIGKILL)
        await wait_for_exit([pid])
        print(await asyncio.gather(*(pool.run(abs, -i) for i in range(4))))
asyncio.run(main())
"""
    assert scripts.run_script(tmp_path, text) == "[0, 1, 2, 3]\n"


_FROZEN = """
    import asyncio, multiprocessing, os, sys, warnings
    warnings.simplefilter("ignore")
    FOLDER = os.path.dirname(os.path.abspath(__file__))
    with open(os.path.join(FOLDER, "runs"), "a") as runs:
        runs.write("run ")
    sys.executable = os.path.join(FOLDER, "frozen")
    multiprocessing.set_executable(sys.executable)
    FROZEN
    from async_batcher import WorkerPool
    from async_batcher._pool import supervisor
    supervisor._BACKOFF_DELAYS = (0.001,) * 3

    async def main():
        async with WorkerPool(1, mp_context=METHOD) as pool:
            print(await pool.run(abs, -1), await pool.run(eval, "__import__('sys').argv[1:]"))

    if __name__ == "__main__":
        SUPPORT
        asyncio.run(main())
"""


def _frozen(folder: Path, method: str, *, is_frozen: bool, supported: bool) -> str:
    program = folder / "frozen"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {folder / "program.py"} "$@"\n')
    program.chmod(0o755)
    text = _FROZEN.replace("METHOD", repr(method)).replace("FROZEN\n", "sys.frozen = True\n" if is_frozen else "\n")
    return text.replace("SUPPORT", "multiprocessing.spawn.freeze_support()" if supported else "pass")


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_frozen_program(tmp_path: Path, method: str) -> None:
    """Its workers are runs of itself, which `freeze_support` turns into workers.

    CPython's own is for Windows only; freezers such as PyInstaller have it call that of `multiprocessing.spawn`.
    """
    assert scripts.run_script(tmp_path, _frozen(tmp_path, method, is_frozen=True, supported=True)) == "1 []\n"
    assert (tmp_path / "runs").read_text().split() == ["run"] * (1 if method == "fork" else 2)


@pytest.mark.slow
@pytest.mark.parametrize("keeps_arguments", [True, False])
@pytest.mark.parametrize("is_frozen", [True, False])
@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_a_program_that_is_its_own_interpreter(tmp_path: Path, method: str, *, is_frozen: bool, keeps_arguments: bool) -> None:
    """It does not start itself without end, even if it changes `sys.argv`, and the error says what to do; with fork it works."""
    text = _frozen(tmp_path, method, is_frozen=is_frozen, supported=False)
    limit = 'assert len(open(os.path.join(FOLDER, "runs")).read().split()) < 40'
    text = text.replace(
        "asyncio.run(main())",
        f"{limit}\n        {'pass' if keeps_arguments else 'del sys.argv[1:]'}\n        asyncio.run(main())",
    )
    done = scripts.run_any(tmp_path, text)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert "PoolBrokenError" in last
    assert ("freeze_support()" if is_frozen else "mp_context='fork'") in last
    assert "was started to be a worker of its own program" in done.stderr
    # The program, four attempts at a worker, and as many at a resource tracker; each asks for no process of its own.
    assert len((tmp_path / "runs").read_text().split()) < 16


@pytest.mark.skipif("fork" not in METHODS, reason="no fork")
@pytest.mark.slow
def test_a_program_that_is_its_own_interpreter_can_fork(tmp_path: Path) -> None:
    """With fork it is run once."""
    assert scripts.run_script(tmp_path, _frozen(tmp_path, "fork", is_frozen=False, supported=False)) == "1 []\n"
    assert (tmp_path / "runs").read_text().split() == ["run"]


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
@pytest.mark.parametrize("executable", ["/nonexistent/python", "", None])
async def test_an_executable_that_is_not_there(monkeypatch: pytest.MonkeyPatch, method: str, executable: str | None) -> None:
    """The error says so, with every start method."""
    _no_pauses(monkeypatch)
    monkeypatch.setattr("async_batcher._pool.resource_tracker.ensure_running", lambda: None)
    monkeypatch.setattr(sys, "executable", executable)
    monkeypatch.setattr("multiprocessing.spawn._python_exe", executable)
    pool = WorkerPool(1, mp_context=method)
    with pytest.raises(PoolBrokenError, match="No such file or directory" if executable else "sys.executable is empty"):
        await pool.run(abs, -1)
    await pool.stop()


def test_what_an_interpreter_is_told() -> None:
    """A worker's own arguments are never taken for those of an interpreter."""
    assert not interpreter._started_as_interpreter()
    assert "--multiprocessing-fork" not in sys.argv


# Shared memory.

_SHARED = """
    import asyncio, os, signal, sys, warnings
    from multiprocessing import resource_tracker, shared_memory
    from async_batcher import WorkerPool
    from tests.support.polling import wait_for_exit
    warnings.simplefilter("ignore")

    def attach(name):
        from multiprocessing import shared_memory

        memory = shared_memory.SharedMemory(name)
        memory.buf[0] += 1
        memory.close()
        return os.getpid()

    def make():
        from multiprocessing import shared_memory

        memory = shared_memory.SharedMemory(create=True, size=100)
        memory.buf[0] = 7
        memory.close()
        return memory.name, os.getpid()

    def lock():
        import multiprocessing

        with multiprocessing.get_context("spawn").Lock(), multiprocessing.get_context("fork").Semaphore():
            return os.getpid()

    def leave(how):
        if how == "crash":
            os._exit(3)
        os.kill(os.getpid(), signal.SIGKILL)

    async def main():
        memory = None if WHEN == "later" else shared_memory.SharedMemory(create=True, size=100)
        async with WorkerPool(1, mp_context=METHOD, max_tasks_per_child=2 if HOW == "recycling" else None) as pool:
            seen = {await pool.run(os.getpid)}
            if memory is None:
                memory = shared_memory.SharedMemory(create=True, size=100)
            count = 0
            for _ in range(4):
                seen.add(await pool.run(attach, memory.name))
                count += 1
                if HOW != "recycling":
                    worker = pool.workers()[0].pid
                    await asyncio.gather(pool.run(leave, HOW), return_exceptions=True)
                    await wait_for_exit([worker])
            seen.add(await pool.run(lock))
            made, pid = (await pool.run(make)) if METHOD != "fork" else (None, None)
        await wait_for_exit(seen)
        assert len(seen) > 2, seen
        twin = shared_memory.SharedMemory(memory.name)  # it is there still
        assert twin.buf[0] == count, twin.buf[0]
        twin.close()
        memory.close()
        memory.unlink()
        if made is not None:
            twin = shared_memory.SharedMemory(made)
            assert twin.buf[0] == 7
            twin.close()
            twin.unlink()
        print("good")

    asyncio.run(main())
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("how", ["recycling", "crash", "kill"])
@pytest.mark.parametrize("when", ["before", "later"])
def test_named_shared_memory_outlives_workers(tmp_path: Path, method: str, how: str, when: str) -> None:
    """A worker that leaves, however, unlinks nothing; what the program unlinks is unlinked; the tracker has no complaint.

    So too when the program makes its first after the workers have started, and, where the resource tracker always runs, for
    memory that a worker makes.
    """
    text = _SHARED.replace("METHOD", repr(method)).replace("HOW", repr(how))
    assert scripts.run_script(tmp_path, text.replace("WHEN", repr(when))) == "good\n"


@pytest.mark.slow
@pytest.mark.parametrize(("method", "count"), [("forkserver", 1), ("spawn", 1), ("fork", 0)])
def test_a_resource_tracker_only_where_the_standard_pool_starts_one(tmp_path: Path, method: str, count: int) -> None:
    """One for the program; none for fork. No worker has one of its own, also if it uses shared memory; SIGHUP does not end it."""
    text = f"""
        import asyncio, os, signal, sys, warnings
        from async_batcher import WorkerPool
        from tests.conftest import descendants
        warnings.simplefilter("ignore")

        def trackers():
            names = [open(f"/proc/{{pid}}/cmdline").read().split("\\0") for pid in descendants()]
            return names

        async def main():
            async with WorkerPool(2, mp_context={method!r}) as pool:
                await asyncio.gather(*(pool.run(abs, -1) for _ in range(4)))
                tracker = sys.modules.get("multiprocessing.resource_tracker")
                pid = tracker and tracker._resource_tracker._pid
                assert (pid is not None) == {bool(count)}, pid
                before = descendants()
                assert len(before) == 2 + {count} + ({method!r} == "forkserver")
                if pid:
                    os.kill(pid, signal.SIGHUP)
                    tracker.ensure_running()  # it warns when it has to start another
                    assert tracker._resource_tracker._pid == pid
                    assert await pool.run(eval, "(lambda m: m._resource_tracker._check_alive())(__import__("
                        "'multiprocessing.resource_tracker', fromlist=['x']))")
                    assert descendants() == before
            print("good")
        asyncio.run(main())
    """
    assert scripts.run_script(tmp_path, text) == "good\n"


# Systems that refuse.


@pytest.mark.parametrize("refusal", [errno.ENOSYS, errno.EPERM, errno.EINVAL])
@pytest.mark.parametrize("method", METHODS)
async def test_a_system_that_refuses(monkeypatch: pytest.MonkeyPatch, method: str, refusal: int) -> None:
    """Calls that fail by error number have a fallback, as calls that Python lacks have."""

    def refuse(*_: object) -> Any:
        raise OSError(refusal, os.strerror(refusal))

    for name in ("memfd_create", "pidfd_open", "posix_fallocate"):
        monkeypatch.setattr(os, name, refuse, raising=False)
    async with WorkerPool(1, mp_context=method) as pool:
        assert len(await pool.run(bytes, 3_000_000)) == 3_000_000
        assert await pool.run(len, bytes(3_000_000)) == 3_000_000
        with pytest.raises(WorkerDiedError, match="exit code 3"):
            await pool.run(work.end_now, 3)
        assert await pool.run(abs, -1) == 1


def test_memory_that_is_not_to_be_had_is_no_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a system without descriptors nor a full one gets a fallback, which would fail later."""

    def fail(number: int) -> Callable[..., Any]:
        def raiser(*_: object) -> Any:
            raise OSError(number, os.strerror(number))

        return raiser

    if hasattr(os, "memfd_create"):
        with monkeypatch.context() as patched:
            patched.setattr(os, "memfd_create", fail(errno.EMFILE))
            with pytest.raises(OSError, match="Too many open files"):
                shared_memory.create_anonymous(100)
    monkeypatch.setattr(os, "posix_fallocate", fail(errno.ENOSPC), raising=False)
    with pytest.raises(OSError, match="No space left"):
        shared_memory.create_anonymous(100)


@pytest.mark.parametrize("folder", ["/dev/shm", "/nonexistent"])  # noqa: S108 - where files in memory are
def test_where_unlinked_files_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, folder: str) -> None:
    """In memory where the system has such a folder, else where temporary files are."""
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(shared_memory, "_SHM_DIR", folder)
    monkeypatch.delattr(os, "memfd_create", raising=False)
    fd = shared_memory.create_anonymous(5000)
    try:
        status = os.fstat(fd)
        assert (status.st_nlink, status.st_size) == (0, 5000)
        assert not os.get_inheritable(fd)
        where = Path(folder) if Path(folder).is_dir() else tmp_path
        assert status.st_dev == where.stat().st_dev
        assert list(tmp_path.iterdir()) == []
    finally:
        os.close(fd)


# System calls that a sandbox refuses with the error number that it likes, by their numbers on x86-64.
_SANDBOX = """
    import ctypes, struct, sys

    def refuse(calls, error):
        # Load the number of the call; for each that is refused: jump to the return of the error; else allow.
        code = [struct.pack("HBBI", 0x20, 0, 0, 0)]
        for at, call in enumerate(calls):
            code.append(struct.pack("HBBI", 0x15, len(calls) - at, 0, call))
        code.append(struct.pack("HBBI", 0x06, 0, 0, 0x7FFF0000))
        code.append(struct.pack("HBBI", 0x06, 0, 0, 0x00050000 | error))
        program = ctypes.create_string_buffer(b"".join(code))
        filter = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(code), ctypes.addressof(program)))
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.prctl(38, 1, 0, 0, 0) == 0
        if libc.prctl(22, 2, filter, 0, 0) != 0:
            print("no sandbox")
            sys.exit()

    refuse([319, 434, 285], ERROR)  # memfd_create, pidfd_open, fallocate
    import asyncio, os, warnings
    from async_batcher import WorkerPool
    warnings.simplefilter("ignore")

    async def main():
        async with WorkerPool(1, mp_context=METHOD) as pool:
            assert len(await pool.run(bytes, 3_000_000)) == 3_000_000
            try:
                await pool.run(os._exit, 3)
            except Exception as error:
                print(error.exit_code)
            print(await pool.run(len, bytes(3_000_000)))
    asyncio.run(main())
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or os.uname().machine != "x86_64", reason="numbers of system calls")
@pytest.mark.parametrize("refusal", [errno.ENOSYS, errno.EPERM, errno.EINVAL])
@pytest.mark.parametrize("method", METHODS)
def test_a_sandbox_that_refuses(tmp_path: Path, method: str, refusal: int) -> None:
    """The same in the program and its workers at once, refused by the kernel."""
    output = scripts.run_script(tmp_path, _SANDBOX.replace("METHOD", repr(method)).replace("ERROR", str(refusal)))
    if output == "no sandbox\n":
        pytest.skip("no seccomp here")
    assert output == "3\n3000000\n"


# Signals.

_DRAINING = """
    import asyncio, os, signal, sys, time, warnings
    from concurrent.futures import ProcessPoolExecutor
    from async_batcher import WorkerPool, batched
    from async_batcher.loops import run
    warnings.simplefilter("ignore")
    number = signal.Signals(int(sys.argv[1]) if sys.argv[1:] else NUMBER)

    def slow(batch):
        time.sleep(0.05)
        return [2 * item for item in batch]

    async def main():
        pool = WorkerPool(2, mp_context=METHOD)
        batcher = batched(slow, executor=pool, max_batch_size=2)
        stop = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
        if WHEN == "running":
            await batcher.start()
        calls = [asyncio.ensure_future(batcher(item)) for item in range(40)]
        if WHEN == "running":
            await calls[0]
        else:
            await asyncio.sleep(0)
        print("begun", flush=True)
        await stop.wait()
        await batcher.stop()
        assert await asyncio.gather(*calls) == [2 * item for item in range(40)]
        counts = pool.worker_counts()
        await pool.stop()
        print("good", counts.crashed)

    run(main(), loop=LOOP)
"""


@pytest.mark.slow
@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
@pytest.mark.parametrize("when", ["running", "starting"])
def test_a_program_that_drains(tmp_path: Path, method: str, number: signal.Signals, when: str, loop: str) -> None:
    """A signal to the whole process group, as service managers send it, loses no item, also while workers start."""
    if loop == "uvloop":
        pytest.importorskip("uvloop")
    text = _DRAINING.replace("METHOD", repr(method)).replace("NUMBER", str(int(number)))
    with scripts.start(tmp_path, text.replace("WHEN", repr(when)).replace("LOOP", repr(loop))) as program:
        assert program.stdout is not None
        assert program.stdout.readline() == "begun\n"
        for _ in range(5):
            os.killpg(program.pid, number)
        output, errors = program.communicate(timeout=work.DEADLINE)
    assert (program.returncode, output, errors) == (0, "good {}\n", "")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("method", METHODS)
def test_a_program_that_a_signal_to_its_group_ends(tmp_path: Path, method: str, number: signal.Signals) -> None:
    """One that does not handle it ends, and its workers, which handle it, end with it."""
    text = f"""
        import asyncio, signal, time, warnings
        from async_batcher import WorkerPool
        warnings.simplefilter("ignore")
        signal.signal({int(number)}, signal.SIG_DFL)

        async def main():
            async with WorkerPool(2, mp_context={method!r}) as pool:
                calls = [pool.run(time.sleep, 60) for _ in range(2)]
                print("begun", flush=True)
                await asyncio.gather(*calls)
        asyncio.run(main())
    """
    with scripts.start(tmp_path, text) as program:
        assert program.stdout is not None
        program.stdout.readline()
        family = descendants(program.pid)
        os.killpg(program.pid, number)
        assert program.wait(work.DEADLINE) == -number
        asyncio.run(wait_for_exit(family, seconds=2.0))


def _dispositions() -> list[object]:
    return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]


def _in_forked_child(function: Callable[[], object]) -> str:
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(writing, repr(function()).encode())
        os._exit(0)
    os.close(writing)
    with open(reading) as file:  # noqa: PTH123 - a descriptor
        text = file.read()
    os.waitpid(pid, 0)
    return text


def _children_end_by_terminate() -> list[object]:
    import multiprocessing
    import subprocess

    ends: list[object] = []
    for _ in range(5):
        program = subprocess.Popen(["sleep", "60"])  # noqa: S607 - of the system
        program.terminate()
        ends.append(program.wait(work.DEADLINE))
        for method in ("fork", "spawn"):
            if method == "spawn" and len(ends) > 3:
                continue
            process = multiprocessing.get_context(method).Process(target=_sleep)  # type: ignore[attr-defined]
            process.start()
            process.terminate()
            process.join(work.DEADLINE)
            ends.append(process.exitcode)
    return ends


def _sleep() -> None:
    import time

    time.sleep(60)


def _signals_in_a_worker() -> dict[str, object]:
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    before = [callable(handler) and handler is not signal.default_int_handler for handler in _dispositions()]
    in_child = _in_forked_child(_dispositions)
    mask_in_child = _in_forked_child(lambda: signal.pthread_sigmask(signal.SIG_BLOCK, []) == mask)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(os.getpid(), number)  # nothing happens
    signal.signal(signal.SIGTERM, _handler_of_user_code)
    return {
        "handled": before,
        "in child": in_child,
        "mask in child": mask_in_child,
        "own": signal.getsignal(signal.SIGTERM) is _handler_of_user_code,
        "own in child": _in_forked_child(lambda: signal.getsignal(signal.SIGTERM) is _handler_of_user_code),
        "blocked": sorted(mask),
    }


def _handler_of_user_code(number: int, frame: object) -> None:
    pass


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
@pytest.mark.parametrize("method", METHODS)
async def test_signals_in_a_worker(method: str) -> None:
    """Handled, not ignored; a forked child has the defaults; what user code sets stays; nothing is blocked."""
    async with WorkerPool(1, mp_context=method) as pool:
        seen = await pool.run(_signals_in_a_worker)
        assert await pool.run(abs, -1) == 1
    defaults = repr([signal.default_int_handler, signal.SIG_DFL, signal.SIG_DFL])
    nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    assert seen["handled"] == [True, True, not nohup]
    assert str(seen["in child"]).split(" at ")[0] == defaults.split(" at ")[0]
    assert [seen[name] for name in ("mask in child", "own", "own in child", "blocked")] == ["True", True, "True", []]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="forks")
@pytest.mark.parametrize("method", METHODS)
async def test_what_user_code_starts_can_be_terminated(method: str) -> None:
    """A program, and a process of multiprocessing, from its first moment on."""
    async with WorkerPool(1, mp_context=method) as pool:
        assert set(await pool.run(_children_end_by_terminate)) == {-signal.SIGTERM}


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_what_a_program_ignores(tmp_path: Path, method: str) -> None:
    """Under nohup, what user code starts ignores SIGHUP, as what the program starts does."""
    text = f"""
        import asyncio, signal, subprocess, sys, warnings
        from async_batcher import WorkerPool
        warnings.simplefilter("ignore")
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

        def ignored():
            code = "import signal; print(signal.getsignal(signal.SIGHUP) is signal.SIG_IGN)"
            return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip()

        async def main():
            async with WorkerPool(1, mp_context={method!r}) as pool:
                print(await pool.run(ignored), signal.getsignal(signal.SIGHUP) is signal.SIG_IGN)
        asyncio.run(main())
    """
    assert scripts.run_script(tmp_path, text) == "True True\n"


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("which", ["SIGCHLD", "all"])
async def test_signals_that_are_blocked(method: str, which: str) -> None:
    """They delay no news of a crash, and a worker has them blocked too, as one of the standard pool has."""
    numbers = [signal.SIGCHLD] if which == "SIGCHLD" else list(signal.valid_signals())
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        async with WorkerPool(1, mp_context=method) as pool:
            blocked = await pool.run(_blocked)
            pid = await pool.run(os.getpid)
            with pytest.raises(WorkerDiedError) as caught:
                await asyncio.gather(pool.run(_leave_a_helper_behind), _kill_when_busy(pool))
            assert (caught.value.pid, caught.value.exit_code) == (pid, -signal.SIGKILL)
            assert await pool.run(abs, -1) == 1
            end_helpers = await pool.run(_blocked)
        theirs = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
        assert set(blocked) == set(end_helpers) == signal.pthread_sigmask(signal.SIG_BLOCK, []) - theirs
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _blocked() -> list[int]:
    return sorted(signal.pthread_sigmask(signal.SIG_BLOCK, []))


def _leave_a_helper_behind() -> None:
    """Have a forked child hold the worker's channel open for a while, so that only the end of the process tells."""
    import time

    if os.fork() == 0:
        time.sleep(1)
        os._exit(0)
    time.sleep(60)


async def _kill_when_busy(pool: WorkerPool) -> None:
    worker = pool.workers()[0]
    assert worker.pid is not None
    await wait_until(lambda: descendants(worker.pid))
    os.kill(worker.pid, signal.SIGKILL)


@pytest.mark.slow
def test_workers_of_a_standard_pool_of_ours(tmp_path: Path) -> None:
    """The initializer of such a pool has them leave the same signals to the program; the pool is killed, not terminated."""
    text = """
        import os, signal
        from async_batcher._worker import signals
        from async_batcher._runners.owned_executor import OwnedExecutorAdapter, standard_factory

        def own():
            return [signal.getsignal(number) is signals._do_nothing for number in (2, 15, 1)]

        if __name__ == "__main__":
            factory = standard_factory("process", 2, has_worker_pool=False)
            place = OwnedExecutorAdapter(factory, factory())
            try:
                futures = [place.submit(own)[0] for _ in range(4)]
                assert all(future.result() == [True] * 3 for future in futures), futures
                pids = list(place._executor._processes)
                for pid in pids:
                    os.kill(pid, signal.SIGTERM)
                assert place.submit(own)[0].result() == [True] * 3
                processes = list(place._executor._processes.values())
                os.kill(pids[0], signal.SIGKILL)
                for process in processes:  # by itself, as it breaks
                    process.join()
            finally:
                place.shut_down()
            print("good")
    """
    assert scripts.run_script(tmp_path, text) == "good\n"
