"""Programs with a `WorkerPool`: scripts without a guard, and how programs and workers end.

For ``executor="process"`` of a batcher see ``runners/test_fault_matrix.py`` and
``serialization/test_main_module.py``.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import zipapp
from typing import TYPE_CHECKING

import pytest

from tests.conftest import descendants
from tests.support import scripts
from tests.support import worker_functions as work
from tests.support.polling import wait_for_exit
from tests.support.worker_pools import METHODS

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="no event loop there watches sockets"),
    pytest.mark.slow,
]

_PROGRAM = """
    import asyncio, os, signal, sys, time, warnings
    from async_batcher import WorkerPool

    warnings.simplefilter("ignore")  # of the fork that the test asks for
    FOLDER = os.path.dirname(os.path.abspath(__file__))
    BEGUN = os.path.join(FOLDER, "begun")

    def busy():
        print("begun", os.getpid(), flush=True)
        open(BEGUN, "w").close()
        BUSY

    async def until_begun():
        while not os.path.exists(BEGUN):
            await asyncio.sleep(0.001)

    async def ticking():
        # A signal that comes just before the loop sleeps is handled when the loop wakes up.
        while True:
            await asyncio.sleep(0.1)

    async def main():
        pool = WorkerPool(2, mp_context="METHOD")
        MAIN

    asyncio.run(main())
"""


def _program(method: str, main: str, busy: str = "time.sleep(60)") -> str:
    text = _PROGRAM.replace("MAIN", main.replace("\n", "\n        ")).replace("BUSY", busy)
    return text.replace("METHOD", method)


def _numbers(text: str) -> list[int]:
    return [int(word) for word in text.split() if word.isdigit()]


_UNGUARDED = """
    import asyncio, os
    from async_batcher import WorkerPool, batched

    print("main", flush=True)
    FACTOR = 3

    class Point:
        def __init__(self, x):
            self.x = x

    def scale(point):
        return Point(point.x * FACTOR), os.getpid()

    @batched(executor="process", max_workers=1)
    def scale_all(batch):
        return [scale(point) for point in batch]

    async def main():
        async with WorkerPool(2, mp_context=METHOD) as pool:
            results = await asyncio.gather(*(pool.run(scale, Point(i)) for i in range(4)))
        async with scale_all:
            results += await asyncio.gather(*(scale_all(Point(i)) for i in range(4)))
        assert all(type(point) is Point for point, _ in results)
        assert os.getpid() not in [pid for _, pid in results]
        print([point.x for point, _ in results])

    asyncio.run(main())
"""


@pytest.mark.parametrize("how", ["file", "stdin", "command"])
@pytest.mark.parametrize("method", METHODS)
def test_a_script_without_a_guard(tmp_path: Path, method: str, how: str) -> None:
    """Its functions run in workers, and its main module runs once, from any source."""
    output = scripts.run_script(tmp_path, _UNGUARDED.replace("METHOD", repr(method)), how=how)
    assert output == "main\n[0, 3, 6, 9, 0, 3, 6, 9]\n"


def test_a_module_run_with_dash_m(tmp_path: Path) -> None:
    """Functions of the package and of its main module run in workers."""
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "other.py").write_text("def plus(a, b):\n    return a + b\n")
    (package / "__main__.py").write_text(
        "import asyncio, os\nfrom async_batcher import WorkerPool\nfrom package import other\n"
        "print('main', flush=True)\ndef minus(a, b):\n    return a - b\n"
        "async def main():\n    async with WorkerPool(1) as pool:\n"
        "        print(await pool.run(other.plus, 1, 2), await pool.run(minus, 1, 2))\n"
        "asyncio.run(main())\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "package"],
        cwd=tmp_path,
        env=scripts.environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=work.DEADLINE,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "main\n3 -1\n", "")


def test_a_zip_file(tmp_path: Path) -> None:
    """Functions of its main module and of its other modules run in workers."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "other.py").write_text("def plus(a, b):\n    return a + b\n")
    (source / "__main__.py").write_text(
        "import asyncio, other\nfrom async_batcher import WorkerPool\n"
        "print('main', flush=True)\ndef minus(a, b):\n    return a - b\n"
        "async def main():\n    async with WorkerPool(1) as pool:\n"
        "        print(await pool.run(other.plus, 1, 2), await pool.run(minus, 1, 2))\n"
        "asyncio.run(main())\n"
    )
    zipapp.create_archive(source, tmp_path / "program.pyz")
    done = subprocess.run(
        [sys.executable, "program.pyz"],
        cwd=tmp_path,
        env=scripts.environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=work.DEADLINE,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "main\n3 -1\n", "")


_SESSION = """
import asyncio
from async_batcher import WorkerPool, batched
FACTOR = 2
f = batched(lambda batch: [FACTOR * n for n in batch], executor="process", max_workers=1)
CALL
executor = WorkerPool(1).as_executor()
executor.submit(lambda: FACTOR + 1).result()
FACTOR = 5
executor.submit(lambda: FACTOR + 1).result()
executor.shutdown()
"""


@pytest.mark.parametrize(
    ("options", "call"),
    [(["-i"], "asyncio.run(f.process(21))"), (["-m", "asyncio"], "await f(21)")],
)
def test_an_interactive_session(options: list[str], call: str) -> None:
    """Functions that are typed in run in workers, and see later changes of their globals."""
    done = subprocess.run(
        [sys.executable, *options],
        input=_SESSION.replace("CALL", call),
        env={**scripts.environment(), "TERM": "dumb"},
        capture_output=True,
        text=True,
        check=False,
        timeout=work.DEADLINE,
    )
    shown = [line for line in done.stdout.replace(">>> ", "").splitlines() if line.isdigit()]
    assert (done.returncode, shown) == (0, ["42", "3", "6"]), done.stdout + done.stderr
    assert "Error" not in done.stderr


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("busy", ["idle", "busy", "starting"])
def test_a_program_that_exits_without_stop(tmp_path: Path, method: str, busy: str) -> None:
    """It exits at once, without output, and leaves no worker."""
    main = "print(await pool.run(os.getpid), flush=True)"
    if busy == "busy":
        main += "\ntask = asyncio.ensure_future(pool.run(busy))\nawait until_begun()"
    elif busy == "starting":
        main = "task = asyncio.ensure_future(pool.run(busy))\nawait asyncio.sleep(0)"
    pids = _numbers(scripts.run_script(tmp_path, _program(method, main)))
    assert len(pids) in {"idle": [1], "busy": [2], "starting": [0, 1]}[busy]
    asyncio.run(wait_for_exit(pids))


@pytest.mark.parametrize("method", METHODS)
def test_a_program_that_an_exception_ends(tmp_path: Path, method: str) -> None:
    """Only that traceback is printed; busy workers end with the program."""
    main = (
        "async with pool:\n    call = asyncio.gather(pool.run(busy), return_exceptions=True)\n"
        "    await until_begun()\n    1 / 0"
    )
    done = scripts.run_any(tmp_path, _program(method, main))
    assert done.returncode == 1
    assert done.stderr.count("Traceback") == 1
    assert "ZeroDivisionError" in done.stderr
    asyncio.run(wait_for_exit(_numbers(done.stdout)))


_BUSY = {
    "idle": "",
    "sleeping": "time.sleep(60)",
    "computing": "while True: pass",
    "in_c": "sum(range(10**12))",
    "halted": "os.kill(os.getpid(), signal.SIGSTOP)",
    "deaf": "[signal.signal(n, signal.SIG_IGN) for n in (1, 2, 15)]; time.sleep(60)",
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("busy", _BUSY)
def test_a_program_that_is_killed(tmp_path: Path, method: str, busy: str) -> None:
    """No worker and no fork server is left, long before a busy one would end by itself."""
    if sys.platform != "linux" and busy in ("in_c", "halted"):
        pytest.skip("needs the kernel's help")
    main = (
        "print('begun', await pool.run(os.getpid), flush=True)\nawait asyncio.sleep(60)"
        if busy == "idle"
        else "await pool.run(busy)"
    )
    with scripts.start(tmp_path, _program(method, main, _BUSY[busy] or "pass")) as program:
        assert program.stdout is not None
        word, pid = program.stdout.readline().split()
        assert word == "begun"
        family = {*descendants(program.pid), int(pid)}
        assert len(family) >= 2
        program.kill()
        program.wait(work.DEADLINE)
        asyncio.run(wait_for_exit(family))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGABRT])
def test_a_program_that_a_signal_ends(tmp_path: Path, number: signal.Signals) -> None:
    """Signals that leave no time for a cleanup leave no worker either."""
    # The signal is ignored where the tests run under nohup.
    main = f"signal.signal({int(number)}, signal.SIG_DFL)\nawait pool.run(busy)"
    with scripts.start(tmp_path, _program("forkserver", main)) as program:
        assert program.stdout is not None
        program.stdout.readline()
        family = descendants(program.pid)
        program.send_signal(number)
        program.wait(work.DEADLINE)
        asyncio.run(wait_for_exit(family))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("when", ["busy", "idle", "starting"])
def test_ctrl_c(tmp_path: Path, method: str, when: str) -> None:
    """The process group gets SIGINT; only the program prints a KeyboardInterrupt."""
    main = {
        "busy": "async with pool:\n    await pool.run(busy)",
        "idle": (
            "async with pool:\n    print('begun', await pool.run(os.getpid), flush=True)\n"
            "    await ticking()"
        ),
        "starting": "print('begun 0', flush=True)\nawait pool.start()\nawait ticking()",
    }[when]
    with scripts.start(tmp_path, _program(method, main)) as program:
        assert program.stdout is not None
        pids = _numbers(program.stdout.readline())
        os.killpg(program.pid, signal.SIGINT)
        _, errors = program.communicate(timeout=work.DEADLINE)
        assert program.returncode in (-signal.SIGINT, 128 + signal.SIGINT)
        assert errors.count("Traceback") in (1, 2)  # asyncio.run raises it from a CancelledError
        assert errors.rstrip().endswith("KeyboardInterrupt")
        assert "fork_server.py" not in errors
        assert "main.py" not in errors
        asyncio.run(wait_for_exit(pid for pid in pids if pid))


@pytest.mark.skipif(sys.platform != "linux", reason="fork is not safe there")
@pytest.mark.parametrize("method", METHODS)
def test_a_forked_child_cannot_use_the_pool(tmp_path: Path, method: str) -> None:
    """Calls and stops fail in the child, and the parent's pool goes on.

    The child may make a pool of its own.
    """
    main = """
async with pool:
    first = await pool.run(os.getpid)
    for _ in range(2):
        child = os.fork()
        if child == 0:
            signal.alarm(20)
            async def use():
                for one in (pool.run(abs, -1), pool.start(), pool.stop(), pool.stop(force=True)):
                    try:
                        await one
                    except RuntimeError as error:
                        if "fork" not in str(error):
                            raise
                    else:
                        raise AssertionError
                assert pool.workers() == []
                async with WorkerPool(1, mp_context="METHOD") as own:
                    assert await own.run(abs, -1) == 1
            try:
                asyncio._set_running_loop(None)
                asyncio.new_event_loop().run_until_complete(use())
            except BaseException as error:
                print(repr(error), flush=True)
                os._exit(8)
            os._exit(7)
        _, status = await asyncio.to_thread(os.waitpid, child, 0)
        assert os.waitstatus_to_exitcode(status) == 7
    assert await pool.run(os.getpid) == first
print("good")"""
    done = scripts.run_any(tmp_path, _program(method, main))
    assert (done.returncode, done.stdout) == (0, "good\n"), done.stdout + done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="fork is not safe there")
def test_a_forked_child_keeps_no_worker_alive(tmp_path: Path) -> None:
    """The workers of a killed program exit, even if a child that it forked lives on."""
    main = """
async with pool:
    pid = await pool.run(os.getpid)
    child = os.fork()
    if child == 0:
        time.sleep(60)
        os._exit(0)
    print("begun", child, *(worker.pid for worker in pool.workers()), flush=True)
    await asyncio.sleep(60)"""
    with scripts.start(tmp_path, _program("forkserver", main)) as program:
        assert program.stdout is not None
        child, *pids = _numbers(program.stdout.readline())
        program.kill()
        program.wait(work.DEADLINE)
        try:
            asyncio.run(wait_for_exit(pids))
            assert scripts.is_alive(child)
        finally:
            os.kill(child, signal.SIGKILL)


@pytest.mark.skipif(sys.platform != "linux", reason="fork is not safe there")
@pytest.mark.parametrize("method", METHODS)
def test_a_child_of_a_forked_child_keeps_its_files(tmp_path: Path, method: str) -> None:
    """What the first child opened has the numbers of descriptors that were closed there."""
    main = """
async with pool:
    await pool.run(abs, -1)
    child = os.fork()
    if child == 0:
        files = [os.open("/dev/null", os.O_RDONLY) for _ in range(40)]
        grandchild = os.fork()
        if grandchild == 0:
            try:
                for fd in files:
                    os.fstat(fd)
            except OSError:
                os._exit(8)
            os._exit(7)
        os._exit(os.waitstatus_to_exitcode(os.waitpid(grandchild, 0)[1]))
    _, status = await asyncio.to_thread(os.waitpid, child, 0)
    print(os.waitstatus_to_exitcode(status))"""
    done = scripts.run_any(tmp_path, _program(method, main))
    assert (done.returncode, done.stdout) == (0, "7\n"), done.stdout + done.stderr


@pytest.mark.parametrize("method", METHODS)
def test_buffered_output_is_printed_once(tmp_path: Path, method: str) -> None:
    """A worker does not print the output that its parent had in a buffer."""
    main = (
        "sys.stdout.write('once ')\nasync with pool:\n    await pool.run(print, 'there')\n"
        "sys.stdout.write('twice')"
    )
    file = scripts.script(tmp_path, _program(method, main))
    environment = {
        name: value for name, value in scripts.environment().items() if name != "PYTHONUNBUFFERED"
    }
    done = subprocess.run(
        [sys.executable, str(file)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=work.DEADLINE,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(done.stdout.split()) == ["once", "there", "twice"]


def test_a_program_without_standard_streams(tmp_path: Path) -> None:
    """Workers start although the program has no standard streams, as daemons do."""
    file = scripts.script(
        tmp_path,
        _program(
            "forkserver",
            "async with pool:\n    open(BEGUN, 'w').write(str(await pool.run(abs, -5)))",
        ),
    )
    program = subprocess.Popen(
        ["/bin/sh", "-c", 'exec "$0" "$1" <&- >&- 2>&-', sys.executable, str(file)],
        env=scripts.environment(),
    )
    assert program.wait(work.DEADLINE) == 0
    assert (tmp_path / "begun").read_text() == "5"
