"""Systems that refuse something: descriptors, memory, threads, folders, system calls.

Starts that fail are in `test_start_failures`, fallbacks of system calls in `test_system`.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from async_batcher import WorkerPool
from async_batcher._eventloop.guarded_loop import GuardedLoop
from async_batcher._eventloop.offload import run_in_helper
from async_batcher._pool.cpu_count import cpu_count
from async_batcher._pool.processes.exit_status import probable_cause
from async_batcher._pool.state import supervisor
from async_batcher._transport import framing, shared_memory
from async_batcher._transport.shared_memory import SharedBlock
from async_batcher._worker import bootstrap
from async_batcher.exceptions import PoolBrokenError, WorkerDiedError
from tests.conftest import descendants
from tests.support import scripts
from tests.support import worker_functions as work
from tests.support.polling import wait_for_exit, wait_until
from tests.support.worker_pools import METHODS, may_warn_of_fork, pids_of

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="no event loop there watches sockets"),
    may_warn_of_fork,
]

needs_fork = pytest.mark.skipif("fork" not in METHODS, reason="no fork")
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="how Linux refuses")

PROGRAM = os.getpid()
LARGE = 1_000_000  # bytes; through shared memory


@pytest.fixture
def every_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Have each Python that is started run code first, as a `sitecustomize` does."""

    def write(code: str) -> None:
        folder = tmp_path / "site"
        folder.mkdir()
        (folder / "sitecustomize.py").write_text(code)
        path = filter(None, (str(folder), os.environ.get("PYTHONPATH")))
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))

    return write


def _try_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "_BACKOFF_DELAYS", ())


def _refuse(number: int) -> Callable[..., Any]:
    def refuse(*_: object, **__: object) -> Any:
        raise OSError(number, os.strerror(number))

    return refuse


# --- what the error says


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
async def test_an_interpreter_that_lacks_the_package(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], method: str
) -> None:
    """The error has what the interpreter raised, not only its exit code."""
    _try_once(monkeypatch)
    path = [entry for entry in sys.path if entry.startswith(sys.base_prefix)]
    monkeypatch.setattr("async_batcher._pool.processes.interpreter.search_path", lambda: path)
    pool = WorkerPool(1, mp_context=method)
    raised = f"{sys.executable!r} raised ModuleNotFoundError: No module named "
    with pytest.raises(PoolBrokenError) as caught:
        await pool.run(abs, -1)
    assert raised in str(caught.value)
    assert "exit code 70" in str(caught.value)
    assert "Traceback" in capfd.readouterr().err
    monkeypatch.undo()
    assert await pool.run(abs, -1) == 1
    await pool.stop()


@needs_fork
async def test_a_worker_whose_own_code_fails_before_it_is_ready(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The error has what was raised."""
    _try_once(monkeypatch)
    pool = WorkerPool(1, mp_context="fork")
    with monkeypatch.context() as patched:
        patched.setattr(bootstrap, "reset_signals", _refuse(errno.EMFILE))
        with pytest.raises(PoolBrokenError, match=r"raised OSError: .*Too many open files"):
            await pool.run(abs, -1)
    assert "Traceback" in capfd.readouterr().err
    assert await pool.run(abs, -1) == 1
    await pool.stop()


@pytest.mark.parametrize("method", METHODS)
async def test_an_initializer_that_ends_its_process(
    monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """The error does not blame the interpreter."""
    _try_once(monkeypatch)
    pool = WorkerPool(1, mp_context=method, initializer=work.exit_now, initargs=(3,))
    with pytest.raises(PoolBrokenError, match=r"exit code 3 .* initializer") as caught:
        await pool.run(abs, -1)
    assert "interpreter" not in str(caught.value)
    await pool.stop()


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
async def test_an_executable_that_hangs(tmp_path: Path, method: str) -> None:
    """The error comes after one ``start_timeout``, and names the executable."""
    executable = tmp_path / "embedding_program"
    executable.write_text("#!/bin/sh\nexec sleep 600\n")
    executable.chmod(0o755)
    before = descendants()
    pool = WorkerPool(1, mp_context=method, start_timeout=0.3)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("multiprocessing.spawn._python_exe", str(executable))
        with pytest.raises(PoolBrokenError, match="embedding_program") as caught:
            await pool.run(abs, -1)
    assert isinstance(caught.value.__cause__, TimeoutError)
    assert pool.worker_counts().started == 1
    await pool.stop()
    await wait_for_exit(descendants() - before)


@pytest.mark.parametrize(
    ("name", "words"), [("SIGXCPU", "ulimit -t"), ("SIGXFSZ", "ulimit -f"), ("SIGSYS", "sandbox")]
)
def test_the_signal_of_a_limit(name: str, words: str) -> None:
    """The probable cause is the limit, not a manual kill or a crash in C code."""
    assert words in probable_cause([-getattr(signal, name)])


@needs_linux
async def test_a_worker_beyond_its_cpu_time() -> None:
    """The error names the limit."""
    async with WorkerPool(1) as pool:
        with pytest.raises(WorkerDiedError, match=r"SIGXCPU .*RLIMIT_CPU"):
            await pool.run(lambda: os.kill(os.getpid(), signal.SIGXCPU))
        assert await pool.run(abs, -1) == 1


# --- threads and forks


async def test_warnings_are_errors_in_a_fork_server_with_threads(
    every_python: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers start: the warning is raised when the child exists, from Python 3.15."""
    every_python("""
import os, threading, time, warnings
threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
fork = os.fork
def warning_fork():
    pid = fork()
    if pid:
        warnings.warn("forked", DeprecationWarning)
    return pid
os.fork = warning_fork
""")
    monkeypatch.setattr(sys, "warnoptions", ["error"])
    before = descendants()
    async with WorkerPool(2, mp_context="forkserver") as pool:
        assert await pool.run(abs, -1) == 1
        assert len(descendants() - before) == 3
        assert pool.worker_counts().started == 2


@needs_linux
def test_workers_end_with_their_program_where_the_kernel_does_not_help(
    every_python: Callable[[str], None], tmp_path: Path
) -> None:
    """A thread watches the parent where F_SETSIG is refused, even while a batch runs."""
    every_python("""
import fcntl
accepted = fcntl.fcntl
def refuse(fd, command, *args):
    if command == fcntl.F_SETSIG:
        raise PermissionError(1, "refused")
    return accepted(fd, command, *args)
fcntl.fcntl = refuse
""")
    text = f"""
        import asyncio, os, signal, time, warnings
        from async_batcher import WorkerPool
        warnings.simplefilter("ignore")
        async def main():
            for method in {METHODS!r}:
                pool = WorkerPool(1, mp_context=method)
                print(await pool.run(os.getpid), flush=True)
                asyncio.ensure_future(pool.run(time.sleep, 600))
            while any(worker.state != "busy" for worker in pool.workers()):
                await asyncio.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        asyncio.run(main())
    """
    done = scripts.run_any(tmp_path, text)
    assert (done.returncode, done.stderr) == (-signal.SIGKILL, "")
    pids = [int(line) for line in done.stdout.split()]
    assert len(pids) == len(METHODS)
    deadline = work.DEADLINE
    while any(map(scripts.is_alive, pids)) and deadline > 0:
        threading.Event().wait(0.05)
        deadline -= 0.05
    assert not any(map(scripts.is_alive, pids))


@needs_fork
@needs_linux
async def test_nothing_tells_a_worker_that_its_parent_exits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without F_SETSIG and without threads it works, and ends with its channel."""
    import fcntl

    def no_thread(_: threading.Thread) -> None:
        msg = "can't start new thread"
        raise RuntimeError(msg)

    def refuse_in_worker(*args: Any) -> Any:
        if os.getpid() == PROGRAM:
            return accepted(*args)
        monkeypatch.setattr(threading.Thread, "start", no_thread)
        raise PermissionError(errno.EPERM, "refused")

    accepted = fcntl.fcntl
    monkeypatch.setattr(fcntl, "fcntl", refuse_in_worker)
    async with WorkerPool(1, mp_context="fork") as pool:
        pids = pids_of(pool)
        assert await pool.run(abs, -1) == 1
    await wait_for_exit(pids)


_PROCESSES = """
    import asyncio, os, resource, subprocess, sys, warnings
    if os.geteuid() != 0:
        sys.exit("only root has a user without processes")
    os.setresuid(54321, 54321, 54321)
    try:
        from async_batcher import WorkerPool
        subprocess.run([sys.executable, "-c", "import async_batcher"], check=True)
    except (ImportError, OSError):
        sys.exit("this Python is not for other users")
    from async_batcher._pool.state import supervisor
    from async_batcher.exceptions import PoolBrokenError
    warnings.simplefilter("ignore")
    supervisor._BACKOFF_DELAYS = (0.001,) * 3

    async def main():
        _, most = resource.getrlimit(resource.RLIMIT_NPROC)
        for method in METHODS:
            outcomes = []
            for processes in (1, 2, 6):
                resource.setrlimit(resource.RLIMIT_NPROC, (processes, most))
                pool = WorkerPool(1, mp_context=method)
                try:
                    outcomes.append(await asyncio.wait_for(pool.run(len, bytes(2_000_000)), 20))
                except PoolBrokenError as error:
                    assert isinstance(error.__cause__, BlockingIOError), repr(error.__cause__)
                    outcomes.append("refused")
                resource.setrlimit(resource.RLIMIT_NPROC, (most, most))
                assert await asyncio.wait_for(pool.run(len, bytes(2_000_000)), 20) == 2_000_000
                await asyncio.wait_for(pool.stop(), 20)
            assert (outcomes[0], outcomes[-1]) == ("refused", 2_000_000), outcomes
        print("good")
    asyncio.run(main())
"""


@pytest.mark.slow
@needs_linux
def test_too_few_processes_and_threads(tmp_path: Path) -> None:
    """The call works, or gets the system's error; the pool works when there may be more."""
    tmp_path.chmod(0o755)
    done = scripts.run_any(tmp_path, _PROCESSES.replace("METHODS", repr(METHODS)))
    if done.returncode == 1 and "Traceback" not in done.stderr:
        pytest.skip(done.stderr.strip())
    assert (done.returncode, done.stdout) == (0, "good\n"), done.stderr


def test_a_sandbox_that_hides_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cores of the machine count where the process may not ask for its own."""
    for name in ("sched_getaffinity", "process_cpu_count"):
        monkeypatch.setattr(os, name, _refuse(errno.EPERM), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    assert cpu_count(Path("/nonexistent")) == 3
    assert WorkerPool().max_workers == cpu_count()


# --- descriptors


@needs_linux
async def test_a_fork_server_without_descriptors(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The error says so; when there are some, the next call works."""
    _try_once(monkeypatch)
    # It needs two for itself, and four for each worker.
    (tmp_path / "few_descriptors.py").write_text(f"""
import os, resource
if os.path.exists({str(tmp_path / "few")!r}):
    free = [os.dup(0) for _ in range(3)]
    for descriptor in free:
        os.close(descriptor)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(free) + 1, most))
""")
    (tmp_path / "few").touch()
    monkeypatch.syspath_prepend(tmp_path)
    pool = WorkerPool(1, mp_context="forkserver", preload=["few_descriptors"])
    with pytest.raises(PoolBrokenError, match="Too many open files in the fork server"):
        await pool.run(abs, -1)
    (tmp_path / "few").unlink()
    assert await pool.run(abs, -1) == 1
    await pool.stop()


async def test_a_worker_that_has_descriptors_again() -> None:
    """A large batch arrives again, although its block could not be received before."""

    def use_up() -> list[int]:
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, most))
        used = []
        with contextlib.suppress(OSError):
            while True:
                used.append(os.dup(0))
        return used

    def close(used: list[int]) -> None:
        for descriptor in used:
            os.close(descriptor)

    async with WorkerPool(1) as pool:
        used = await pool.run(use_up)
        for _ in range(2):
            with pytest.raises(OSError, match="no file descriptors left"):
                await pool.run(len, bytes(LARGE))
        await pool.run(close, used)
        assert await pool.run(len, bytes(LARGE)) == LARGE
        assert pool.worker_counts().started == 1


@pytest.mark.parametrize(
    ("number", "advice"),
    [(errno.EMFILE, "ulimit -n"), (errno.EFBIG, "ulimit -f"), (errno.ENOSPC, "more memory")],
)
async def test_the_warning_for_a_large_batch(
    monkeypatch: pytest.MonkeyPatch, number: int, advice: str
) -> None:
    """It says which limit to raise; the batch is sent all the same."""
    async with WorkerPool(1) as pool:
        monkeypatch.setattr(shared_memory, "create_anonymous", _refuse(number))
        with pytest.warns(RuntimeWarning, match=f"no shared memory .*{advice}"):
            assert await pool.run(len, bytes(LARGE)) == LARGE


_STEPS = """
    import asyncio, errno, os, resource, sys, warnings
    from async_batcher import WorkerPool, batched
    from async_batcher._pool.state import supervisor
    from async_batcher.exceptions import PoolBrokenError
    from tests.conftest import descendants
    warnings.simplefilter("ignore")
    supervisor._BACKOFF_DELAYS = (0.001,) * 3
    _, MOST = resource.getrlimit(resource.RLIMIT_NOFILE)

    def count():
        return len(os.listdir("/proc/self/fd"))

    async def attempt(pool):
        try:
            assert await asyncio.wait_for(pool.run(len, bytes(1_000_000)), 20) == 1_000_000
        except TimeoutError:
            raise
        except (PoolBrokenError, OSError) as error:
            assert "Too many open files" in str(error), error
            return False
        return True

    async def main():
        async with WorkerPool(1, mp_context=METHOD) as pool:  # what is imported once
            await attempt(pool)
        tracker = descendants()
        for left in range(0, 30, 2):
            before = count()
            free = [os.dup(0) for _ in range(left + 1)]
            for descriptor in free:
                os.close(descriptor)
            resource.setrlimit(resource.RLIMIT_NOFILE, (free[-1], MOST))
            pool = WorkerPool(1, mp_context=METHOD)
            works = await attempt(pool)
            resource.setrlimit(resource.RLIMIT_NOFILE, (MOST, MOST))
            assert await attempt(pool)
            await asyncio.wait_for(pool.stop(), 20)
            while descendants() - tracker:
                await asyncio.sleep(0.001)
            assert count() == before, left
            if works and left > 12:
                break
        print("good" if works else "never")
    asyncio.run(main())
"""


@pytest.mark.slow
@needs_linux
@pytest.mark.parametrize("method", METHODS)
def test_too_few_descriptors_at_each_step(tmp_path: Path, method: str) -> None:
    """The call works or says so, nothing is left, and the pool works when there are more."""
    assert scripts.run_script(tmp_path, _STEPS.replace("METHOD", repr(method))) == "good\n"


# --- memory


@needs_fork
async def test_an_optimisation_without_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker does without it."""
    monkeypatch.setattr(bootstrap, "_MALLOC_THRESHOLD", sys.maxsize // 2)
    async with WorkerPool(1, mp_context="fork") as pool:
        assert await pool.run(abs, -1) == 1


@pytest.mark.parametrize("error", [MemoryError, OSError])
async def test_no_memory_for_a_reply(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    """The call gets the error, and its worker is replaced."""

    def refuse(_: int) -> Any:
        raise error(errno.ENOMEM, "no memory")

    async with WorkerPool(2, mp_context="forkserver") as pool:
        with monkeypatch.context() as patched:
            patched.setattr(shared_memory, "create_anonymous", _refuse(errno.ENOMEM))
            patched.setattr(framing, "allocate", refuse)
            any_kind = (MemoryError, OSError)
            with pytest.raises(any_kind, match="no memory"), pytest.warns(RuntimeWarning):
                await pool.run(bytes, LARGE)
            assert await pool.run(abs, -1) == 1
        assert await pool.run(bytes, LARGE) == bytes(LARGE)
        await wait_until(lambda: sum(pool.worker_counts().crashed.values()) == 1)


_MEMORY = """
    import asyncio, gc, os, resource, warnings
    from async_batcher import WorkerPool
    from async_batcher.exceptions import PoolBrokenError, WorkerDiedError
    from tests.conftest import descendants
    warnings.simplefilter("ignore")

    async def main():
        _, most = resource.getrlimit(resource.RLIMIT_AS)
        async with WorkerPool(1, mp_context=METHOD) as pool:  # what is started once
            await pool.run(len, bytes(20_000_000))  # imports what copies large buffers
        tracker, files = descendants(), len(os.listdir("/proc/self/fd"))
        arguments = {size: bytes(size) for size in (1, 1_000_000, 20_000_000)}
        for room in (12, 25):  # MB
            pool = WorkerPool(1, mp_context=METHOD)
            pages = int(open("/proc/self/statm").read().split()[0])
            limit = pages * resource.getpagesize() + room * 1_000_000
            resource.setrlimit(resource.RLIMIT_AS, (limit, most))
            for size in arguments:
                for function, argument in ((len, arguments[size]), (bytes, size)):
                    try:
                        result = await asyncio.wait_for(pool.run(function, argument), 20)
                        assert result == size or len(result) == size
                    except TimeoutError:
                        raise
                    except (OSError, MemoryError) as error:
                        assert "memory" in str(error) or not str(error), error
                    except (WorkerDiedError, PoolBrokenError) as error:
                        assert "memory" in str(error), error
            resource.setrlimit(resource.RLIMIT_AS, (most, most))
            await asyncio.wait_for(pool.stop(), 20)
            pool = argument = result = None
            async with WorkerPool(1, mp_context=METHOD) as other:
                assert await other.run(len, bytes(20_000_000)) == 20_000_000
        while descendants() - tracker:
            await asyncio.sleep(0.001)
        gc.collect()
        assert len(os.listdir("/proc/self/fd")) == files
        print("good")
    asyncio.run(main())
"""


@pytest.mark.slow
@needs_linux
@pytest.mark.parametrize("method", METHODS)
def test_too_little_memory(tmp_path: Path, method: str) -> None:
    """Each call works or says so, and no worker, descriptor or call is left."""
    done = scripts.run_any(tmp_path, _MEMORY.replace("METHOD", repr(method)))
    assert (done.returncode, done.stdout) == (0, "good\n"), done.stderr  # which has tracebacks


@needs_fork
async def test_a_block_that_a_worker_cannot_map(monkeypatch: pytest.MonkeyPatch) -> None:
    """The call gets the system's error, and the worker goes on."""

    def views(block: SharedBlock, sizes: list[int]) -> Any:
        return (mapped if os.getpid() == PROGRAM else _refuse(errno.ENOMEM))(block, sizes)

    mapped: Any = SharedBlock.views
    monkeypatch.setattr(SharedBlock, "views", views)
    async with WorkerPool(1, mp_context="fork") as pool:
        with pytest.raises(OSError, match=r"could not be received: .*Cannot allocate memory"):
            await pool.run(len, bytes(LARGE))
        assert await pool.run(abs, -1) == 1
        assert pool.worker_counts().started == 1


def test_a_failure_in_a_helper_keeps_nothing() -> None:
    """What its frames refer to, such as a descriptor, is freed with the exception."""
    import weakref

    class Resource:
        pass

    def fail() -> None:
        resource = Resource()
        kept.append(weakref.ref(resource))
        raise MemoryError

    async def main() -> None:
        loop = GuardedLoop(asyncio.get_running_loop(), lambda exc: pytest.fail(str(exc)))
        with ThreadPoolExecutor(1) as helpers, pytest.raises(MemoryError):
            await run_in_helper(loop, helpers, fail)

    kept: list[weakref.ref[Resource]] = []
    gc.disable()
    try:
        asyncio.run(main())
        assert kept[0]() is None
    finally:
        gc.enable()


async def test_a_block_that_the_program_cannot_map(monkeypatch: pytest.MonkeyPatch) -> None:
    """The batch goes through the socket, with a warning."""
    async with WorkerPool(1) as pool:
        assert await pool.run(len, bytes(LARGE)) == LARGE
        monkeypatch.setattr(SharedBlock, "write", _refuse(errno.ENOMEM))
        with pytest.warns(RuntimeWarning, match="Cannot allocate memory"):
            assert await pool.run(len, bytes(LARGE)) == LARGE
        assert pool.worker_counts().started == 1


# --- folders


@pytest.mark.parametrize("size", [100, LARGE])
@pytest.mark.parametrize("folder", ["full", "missing"])
def test_the_folder_for_shared_memory_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, folder: str, size: int
) -> None:
    """Files go to the folder of temporary files then; large ones only if there is no other."""
    import tempfile

    reserve, sizes = shared_memory._reserve, []

    def full_at_first(fd: int, size: int) -> None:
        sizes.append(size)
        if len(sizes) == 1 and folder == "full":
            raise OSError(errno.ENOSPC, "full")
        reserve(fd, size)

    monkeypatch.delattr(os, "memfd_create", raising=False)
    monkeypatch.setattr(shared_memory, "_reserve", full_at_first)
    monkeypatch.setattr(
        shared_memory, "_SHM_DIR", str(tmp_path if folder == "full" else tmp_path / "missing")
    )
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    if folder == "full" and size == LARGE:
        with pytest.raises(OSError, match="full"):
            shared_memory.create_anonymous(size)
        return
    os.close(shared_memory.create_anonymous(size))
    assert len(sizes) == (2 if folder == "full" else 1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", METHODS)
async def test_no_folder_for_shared_memory_at_all(
    monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """The error says so, and a later call works."""
    import tempfile

    _try_once(monkeypatch)
    pool = WorkerPool(1, mp_context=method)
    with monkeypatch.context() as patched:
        patched.delattr(os, "memfd_create", raising=False)
        patched.setattr(shared_memory, "_SHM_DIR", "/nonexistent")
        patched.setattr(tempfile, "tempdir", None)
        patched.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/nonexistent"])
        with pytest.raises(
            PoolBrokenError,
            match=r"no worker process can be started.*No usable temporary directory",
        ):
            await pool.run(abs, -1)
    assert await pool.run(abs, -1) == 1
    await pool.stop()


_PROGRAM = """
    import asyncio, os, sys, warnings
    from async_batcher import WorkerPool
    from async_batcher._pool.state import supervisor
    from async_batcher.exceptions import PoolBrokenError, WorkerDiedError
    supervisor._BACKOFF_DELAYS = (0.001,) * 3
    warnings.filterwarnings("ignore", ".*use of fork", DeprecationWarning)

    async def use(pool):
        assert await pool.run(len, bytes(1_000_000)) == 1_000_000
        assert len(await pool.run(bytes, 1_000_000)) == 1_000_000
        try:
            await pool.run(os._exit, 3)
        except WorkerDiedError as error:
            assert error.exit_code == 3, error
        return await pool.run(os.getpid)

    async def main():
        for method in METHODS:
            pool = WorkerPool(1, mp_context=method, max_memory_per_child=1 << 40)
            try:
                pid = await asyncio.wait_for(use(pool), 20)
            except PoolBrokenError as error:
                print(error.__cause__)
                pid = None
            await asyncio.wait_for(pool.stop(), 20)
            try:
                while pid is not None:
                    os.kill(pid, 0)
                    await asyncio.sleep(0.001)
            except ProcessLookupError:
                pass
        print("good")
"""


def _run_with_mounts(folder: Path, mounts: list[str], text: str) -> list[str]:
    """Run a program with file systems of its own; return its standard output and error.

    Args:
        folder: Its folder for temporary files.
        mounts: Commands of a shell.
        text: The program, after `_PROGRAM`.
    """
    unshare = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "-Urm"]
    command = [*unshare, "sh", "-ec", "\n".join([*mounts, '[ -z "$1" ] || exec "$@"']), "sh"]
    if shutil.which("unshare") is None:
        pytest.skip("no unshare(1), which makes mount namespaces")
    options: Any = {"capture_output": True, "text": True, "cwd": scripts.ROOT}
    tried = subprocess.run([*command, ""], check=False, **options)
    if tried.returncode != 0:
        pytest.skip(f"no mount namespaces here: {tried.stderr.strip()}")
    program = textwrap.dedent(_PROGRAM.replace("METHODS", repr(METHODS))) + textwrap.dedent(text)
    done = subprocess.run(
        [*command, sys.executable, "-c", program],
        check=False,
        stdin=subprocess.DEVNULL,
        env={**scripts.environment(), "TMPDIR": str(folder)},
        timeout=4 * work.DEADLINE,
        **options,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [*done.stdout.splitlines(), *done.stderr.splitlines()]


@pytest.mark.slow
@needs_linux
@pytest.mark.parametrize(
    "mounts",
    [
        ["mount -t tmpfs none /proc"],
        ["mount -t tmpfs none /dev"],
        ["mount -t tmpfs none /proc", "mount -t tmpfs -o ro none /dev"],
    ],
)
def test_a_sandbox_without(mounts: list[str]) -> None:
    """A pool needs neither /proc nor /dev, nor a folder for temporary files."""
    run = "asyncio.run(main())"
    assert _run_with_mounts(Path("/nonexistent"), mounts, run) == ["good"]


@pytest.mark.slow
@needs_linux
def test_a_full_folder_for_shared_memory() -> None:
    """Large batches take the socket, with one warning for each pool."""
    mounts = ["mount -t tmpfs -o size=4k none /dev/shm", "head -c 4096 /dev/zero > /dev/shm/full"]
    text = """
        warnings.filterwarnings("always", "no shared memory")
        del os.memfd_create
        asyncio.run(main())
    """
    lines = _run_with_mounts(Path("/nonexistent"), mounts, text)
    assert len([line for line in lines if "[Errno 28] No space left" in line]) == len(METHODS)
    assert lines[0] == "good"


@pytest.mark.slow
@needs_linux
def test_a_root_folder_with_python_alone(tmp_path: Path) -> None:
    """Nothing else of the file system is needed."""
    wanted = {"/usr", "/lib", "/lib64", sys.prefix, sys.base_prefix, str(scripts.ROOT)}
    mounts = [f"mount -t tmpfs none '{tmp_path}'"]
    for folder in sorted(filter(os.path.isdir, wanted)):
        place = f"{tmp_path}{folder}"
        mounts += [f"mkdir -p '{place}'", f"mount --rbind '{folder}' '{place}'"]
    text = f"""
        os.chroot({str(tmp_path)!r})
        os.chdir("/")
        asyncio.run(main())
    """
    assert _run_with_mounts(Path("/nonexistent"), mounts, text) == ["good"]
