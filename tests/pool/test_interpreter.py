"""How workers are started: the path, frozen programs, executables."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import pytest

from async_batcher import WorkerPool
from async_batcher._pool.processes import interpreter
from async_batcher.exceptions import PoolBrokenError
from tests.support import scripts
from tests.support import worker_functions as work
from tests.support.worker_pools import METHODS, may_warn_of_fork, no_backoff

if TYPE_CHECKING:
    from pathlib import Path


pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="no event loop there watches sockets"),
    may_warn_of_fork,
]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("flags", [[], ["-P"], ["-I"], ["-E"], ["-s"]])
def test_nothing_is_imported_from_the_current_folder(
    tmp_path: Path, method: str, flags: list[str]
) -> None:
    """Workers import from there only if the program does."""
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
        (folder / f"{name}.py").write_text(
            "open('imported', 'a').write(__name__ + ' '); raise ImportError(__name__)"
        )
    text = f"""
        import asyncio, os, sys, warnings
        warnings.simplefilter("ignore")
        sys.path[1:1] = {[str(scripts.ROOT), str(scripts.ROOT / "src"), *sys.path]!r}
        from async_batcher import WorkerPool
        os.chdir({str(folder)!r})

        async def main():
            async with WorkerPool(1, mp_context={method!r}) as pool:
                print(await pool.run(eval, "__import__('json').__name__"))
                path = await pool.run(eval, "__import__('sys').path")
                print(path == sys.path, sys.flags.safe_path)
        asyncio.run(main())
    """
    import subprocess

    done = subprocess.run(
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
    """A ``-c`` program has the folder on its path, and so do its workers."""
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
    """Workers start all the same, the first ones and later ones."""
    text = f"""
import asyncio, logging, os, signal, tempfile, warnings
warnings.simplefilter("ignore")
logging.disable(logging.WARNING)  # of a worker that crashes while it is idle
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
    from async_batcher._pool.state import supervisor
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
    text = _FROZEN.replace("METHOD", repr(method)).replace(
        "FROZEN\n", "sys.frozen = True\n" if is_frozen else "\n"
    )
    return text.replace(
        "SUPPORT", "multiprocessing.spawn.freeze_support()" if supported else "pass"
    )


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_frozen_program(tmp_path: Path, method: str) -> None:
    """It starts itself as a worker, by means of `freeze_support`.

    CPython's own is for Windows only; freezers such as PyInstaller have it call that of
    `multiprocessing.spawn`.
    """
    assert (
        scripts.run_script(tmp_path, _frozen(tmp_path, method, is_frozen=True, supported=True))
        == "1 []\n"
    )
    assert (tmp_path / "runs").read_text().split() == ["run"] * (1 if method == "fork" else 2)


@pytest.mark.slow
@pytest.mark.parametrize("keeps_arguments", [True, False])
@pytest.mark.parametrize("is_frozen", [True, False])
@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_a_program_that_is_its_own_interpreter(
    tmp_path: Path, method: str, *, is_frozen: bool, keeps_arguments: bool
) -> None:
    """It does not start itself without end, and the error says what to do.

    That holds even if it changes `sys.argv`.
    """
    text = _frozen(tmp_path, method, is_frozen=is_frozen, supported=False)
    limit = 'assert len(open(os.path.join(FOLDER, "runs")).read().split()) < 40'
    text = text.replace(
        "asyncio.run(main())",
        f"{limit}\n        {'pass' if keeps_arguments else 'del sys.argv[1:]'}\n"
        "        asyncio.run(main())",
    )
    done = scripts.run_any(tmp_path, text)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert "PoolBrokenError" in last
    assert ("freeze_support()" if is_frozen else "mp_context='fork'") in last
    assert "was started to be a worker of its own program" in done.stderr
    # The program, and four attempts each at a worker and at a resource tracker, which start no
    # process of their own.
    assert len((tmp_path / "runs").read_text().split()) < 16


@pytest.mark.skipif("fork" not in METHODS, reason="no fork")
@pytest.mark.slow
def test_a_program_that_is_its_own_interpreter_can_fork(tmp_path: Path) -> None:
    """With the start method fork it runs once."""
    assert (
        scripts.run_script(tmp_path, _frozen(tmp_path, "fork", is_frozen=False, supported=False))
        == "1 []\n"
    )
    assert (tmp_path / "runs").read_text().split() == ["run"]


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
@pytest.mark.parametrize("executable", ["/nonexistent/python", "", None])
async def test_a_missing_executable(
    monkeypatch: pytest.MonkeyPatch, method: str, executable: str | None
) -> None:
    """The error says so."""
    no_backoff(monkeypatch)
    monkeypatch.setattr(
        "async_batcher._pool.processes.resource_tracker.ensure_running", lambda: None
    )
    monkeypatch.setattr(sys, "executable", executable)
    monkeypatch.setattr("multiprocessing.spawn._python_exe", executable)
    pool = WorkerPool(1, mp_context=method)
    with pytest.raises(
        PoolBrokenError,
        match="No such file or directory" if executable else "sys.executable is empty",
    ):
        await pool.run(abs, -1)
    await pool.stop()


def test_this_interpreter_is_not_a_worker() -> None:
    """The arguments of this program are not taken for those of a worker."""
    assert not interpreter._started_as_interpreter()
    assert "--multiprocessing-fork" not in sys.argv
