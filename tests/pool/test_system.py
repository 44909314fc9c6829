"""What a pool needs of the system: named shared memory, system calls that are refused."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from async_batcher import WorkerPool
from async_batcher._transport import shared_memory
from async_batcher.exceptions import WorkerDiedError
from tests.support import scripts
from tests.support import worker_functions as work
from tests.support.worker_pools import METHODS, may_warn_of_fork

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="no event loop there watches sockets"),
    may_warn_of_fork,
]


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

        spawn, fork = map(multiprocessing.get_context, ("spawn", "fork"))
        with spawn.Lock(), fork.Semaphore():
            return os.getpid()

    def crash():
        os.kill(os.getpid(), signal.SIGKILL)

    async def main():
        memory = None if WHEN == "later" else shared_memory.SharedMemory(create=True, size=100)
        most = 2 if HOW == "recycling" else None
        async with WorkerPool(1, mp_context=METHOD, max_tasks_per_child=most) as pool:
            seen = {await pool.run(os.getpid)}
            if memory is None:
                memory = shared_memory.SharedMemory(create=True, size=100)
            count = 0
            for _ in range(4):
                seen.add(await pool.run(attach, memory.name))
                count += 1
                if HOW != "recycling":
                    worker = pool.workers()[0].pid
                    await asyncio.gather(pool.run(crash), return_exceptions=True)
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
@pytest.mark.parametrize("how", ["recycling", "kill"])
@pytest.mark.parametrize("when", ["before", "later"])
def test_named_shared_memory_outlives_workers(
    tmp_path: Path, method: str, how: str, when: str
) -> None:
    """A worker that exits unlinks nothing, and the resource tracker prints nothing.

    That also holds for memory that the program makes after the workers have started and, where the
    resource tracker always runs, for memory that a worker makes.
    """
    text = _SHARED.replace("METHOD", repr(method)).replace("HOW", repr(how))
    assert scripts.run_script(tmp_path, text.replace("WHEN", repr(when))) == "good\n"


@pytest.mark.slow
@pytest.mark.parametrize(("method", "count"), [("forkserver", 1), ("spawn", 1), ("fork", 0)])
def test_a_resource_tracker_only_where_the_standard_pool_starts_one(
    tmp_path: Path, method: str, count: int
) -> None:
    """The program has one tracker, or none with fork; workers use it; SIGHUP does not end it."""
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
                    check = "(lambda m: m._resource_tracker._check_alive())"
                    module = "__import__('multiprocessing.resource_tracker', fromlist=['x'])"
                    assert await pool.run(eval, f"{{check}}({{module}})")
                    assert descendants() == before
            print("good")
        asyncio.run(main())
    """
    assert scripts.run_script(tmp_path, text) == "good\n"


@pytest.mark.parametrize("refusal", [errno.ENOSYS, errno.EPERM, errno.EINVAL])
@pytest.mark.parametrize("method", METHODS)
async def test_a_system_that_refuses_system_calls(
    monkeypatch: pytest.MonkeyPatch, method: str, refusal: int
) -> None:
    """System calls that fail have the fallback of those that Python lacks."""

    def refuse(*_: object) -> Any:
        raise OSError(refusal, os.strerror(refusal))

    for name in ("memfd_create", "pidfd_open", "posix_fallocate"):
        monkeypatch.setattr(os, name, refuse, raising=False)
    async with WorkerPool(1, mp_context=method) as pool:
        assert len(await pool.run(bytes, 3_000_000)) == 3_000_000
        assert await pool.run(len, bytes(3_000_000)) == 3_000_000
        with pytest.raises(WorkerDiedError, match="exit code 3"):
            await pool.run(work.exit_now, 3)
        assert await pool.run(abs, -1) == 1


def test_exhausted_resources_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without descriptors or memory there is no fallback, which would fail later."""

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
def test_the_folder_of_unlinked_files(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, folder: str
) -> None:
    """In memory where the system has such a folder, else with temporary files."""
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


# A sandbox that refuses system calls, by their numbers on x86-64, with some error number.
_SANDBOX = """
    import ctypes, struct, sys

    def refuse(calls, error):
        # Load the number of the call; jump to the return of the error if it is refused, else allow.
        code = [struct.pack("HBBI", 0x20, 0, 0, 0)]
        for at, call in enumerate(calls):
            code.append(struct.pack("HBBI", 0x15, len(calls) - at, 0, call))
        code.append(struct.pack("HBBI", 0x06, 0, 0, 0x7FFF0000))
        code.append(struct.pack("HBBI", 0x06, 0, 0, 0x00050000 | error))
        program = ctypes.create_string_buffer(b"".join(code))
        head = struct.pack("HxxxxxxP", len(code), ctypes.addressof(program))
        filter = ctypes.create_string_buffer(head)
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
@pytest.mark.skipif(
    sys.platform != "linux" or os.uname().machine != "x86_64", reason="numbers of system calls"
)
@pytest.mark.parametrize("refusal", [errno.ENOSYS, errno.EPERM, errno.EINVAL])
@pytest.mark.parametrize("method", METHODS)
def test_a_sandbox_that_refuses_system_calls(tmp_path: Path, method: str, refusal: int) -> None:
    """The fallbacks work in the program and its workers when the kernel refuses."""
    output = scripts.run_script(
        tmp_path, _SANDBOX.replace("METHOD", repr(method)).replace("ERROR", str(refusal))
    )
    if output == "no sandbox\n":
        pytest.skip("no seccomp here")
    assert output == "3\n3000000\n"
