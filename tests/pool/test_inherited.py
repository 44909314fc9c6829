"""What a worker inherits: of the program as it is when the worker starts."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import pickle
import resource
import subprocess
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

from async_batcher import WorkerPool
from async_batcher._worker import inherited
from async_batcher.exceptions import WorkerDiedError
from tests.support import scripts
from tests.support import worker_functions as work
from tests.support.polling import wait_for_exit
from tests.support.worker_pools import METHODS, may_warn_of_fork

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="other systems have other attributes"),
    may_warn_of_fork,
]

PROGRAM: Any = "what the program has when the worker starts"
YES, NO = True, False
COPY = "A forked worker is a copy of the program."
GROUP = "A signal to the process group must not end a batch while the program drains."


@dataclass
class Row:
    """What workers have: a value, or `PROGRAM`.

    Attributes:
        forkserver, spawn, fork: By the start method of a `WorkerPool`.
        standard: A worker of ``ProcessPoolExecutor(mp_context=get_context("spawn"))``.
        why: Why workers of a `WorkerPool` differ from that one; empty if they do not.
        only_later: Whether it is about workers that start when the program has changed it.
    """

    forkserver: Any = PROGRAM
    spawn: Any = PROGRAM
    fork: Any = PROGRAM
    standard: Any = PROGRAM
    why: str = ""
    only_later: bool = False


TABLE = {
    "environment": Row(),
    "time zone": Row(),
    "current folder": Row(),
    "umask": Row(),
    "nice value": Row(),
    "resource limits": Row(),
    "CPU affinity": Row(),
    "process group and session": Row(),
    "user and groups": Row(),
    "blocked signals": Row(),
    "a signal that is ignored": Row(),
    "a signal that is handled": Row("default", "default", PROGRAM, "default", COPY),
    "SIGINT": Row("handled", "handled", "handled", "KeyboardInterrupt", GROUP),
    "SIGTERM": Row("handled", "handled", "handled", "default", GROUP),
    "SIGHUP": Row("handled", "handled", "handled", "default", GROUP),
    "SIGURG": Row("handled", "handled", "handled", "default", "It interrupts a batch."),
    "SIGPIPE": Row(),
    "process name": Row(
        "async_batcher worker ",
        "async_batcher worker ",
        "async_batcher worker ",
        "SpawnProcess-",
        "It says which worker of a WorkerPool it is, as the title in ps does.",
    ),
    "daemon flag": Row(NO, NO, NO, NO),
    "parent_process()": Row("the program", "the program", "the program", "the program"),
    "parent_process().is_alive()": Row(YES, YES, YES, YES),
    "os.getppid()": Row(
        "another",
        "the program",
        "the program",
        "the program",
        "The fork server is the parent of its workers; parent_process() is the program.",
    ),
    "start method": Row(
        standard="spawn",
        why="What user code starts is started as the program has chosen, not as the worker was.",
        only_later=True,
    ),
    "authkey": Row(),
    "resource tracker": Row(),
    "sys.flags": Row(),
    "-W": Row(),
    "PYTHONWARNINGS": Row(),
    "PYTHONWARNINGS set at run time": Row(
        NO,
        YES,
        NO,
        YES,
        "Python reads its variables when it starts, with forkserver in the fork server. " + COPY,
        only_later=True,
    ),
    "warnings.simplefilter": Row(NO, NO, PROGRAM, NO, COPY),
    "sys.path": Row(),
    "sys.argv": Row(),
    "sys.executable": Row(),
    "main module": Row(NO, NO, PROGRAM, YES, f"A worker does not run the program again. {COPY}"),
    "faulthandler": Row(YES, YES, YES, PROGRAM, "It shows where C code crashes."),
    "locale.setlocale": Row("C", "C", PROGRAM, "C", COPY),
    "recursion limit": Row(1000, 1000, PROGRAM, 1000, COPY),
    "switch interval": Row(0.005, 0.005, PROGRAM, 0.005, COPY),
    "socket timeout": Row(None, None, PROGRAM, None, COPY),
    "sys.stdin": Row("/dev/null", "/dev/null", "/dev/null", "/dev/null"),
    "descriptor 0": Row(
        "/dev/null",
        "/dev/null",
        PROGRAM,
        PROGRAM,
        "What the worker runs first is read from there, and then it must not be the terminal.",
    ),
    "standard output and error": Row(),
    "an inheritable descriptor": Row(NO, NO, PROGRAM, NO, COPY),
}


@functools.cache
def _seen(method: str, folder: Path) -> dict[str, dict[str, Any]]:
    """Run the program of `inherited_facts`, and return what it has seen."""
    from tests.support.inherited_facts import ENVIRONMENT, OPTIONS

    file = scripts.script(
        folder,
        f"""
        from pathlib import Path
        from tests.support import inherited_facts
        IS_PROGRAM = True
        if __name__ == "__main__":
            inherited_facts.main({method!r}, Path({str(folder)!r}))
        """,
    )
    given = folder / "input"
    given.write_text("input of the program\n")
    with given.open() as source:
        subprocess.run(
            [sys.executable, *OPTIONS, str(file), "argument"],
            stdin=source,
            check=True,
            cwd=folder,
            env={**scripts.environment(), **ENVIRONMENT},
            timeout=2 * work.DEADLINE,
        )
    seen: dict[str, dict[str, Any]] = pickle.loads(  # noqa: S301 - of this test
        (folder / "seen").read_bytes()
    )
    return seen


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """A folder for each start method, with what the program has seen there."""
    yield {method: tmp_path_factory.mktemp(method) for method in METHODS}
    _seen.cache_clear()


@pytest.mark.slow
@pytest.mark.parametrize("name", TABLE)
def test_the_table(folders: dict[str, Path], name: str) -> None:
    """The first worker, the one that replaces it, and a standard one have what the table says."""
    row = TABLE[name]
    for method in METHODS:
        seen = _seen(method, folders[method])
        wanted = {"first": getattr(row, method), "later": getattr(row, method)}
        wanted["standard"] = row.standard
        if row.only_later:
            del wanted["first"]
        for worker, value in wanted.items():
            program = seen[f"program, {worker}"][name]
            expected = program if value is PROGRAM else value
            assert seen[worker][name] == expected, (method, worker)


@pytest.mark.slow
def test_the_table_is_complete(folders: dict[str, Path]) -> None:
    """Each fact has a row, and each difference a reason."""
    assert list(TABLE) == list(_seen("spawn", folders["spawn"])["first"])
    for name, row in TABLE.items():
        own = {row.forkserver, row.spawn, row.fork}
        assert bool(row.why) == (own != {row.standard}), name


@pytest.mark.slow
def test_the_program_changes_what_it_can(folders: dict[str, Path]) -> None:
    """The program of the table does change what it says to be of the moment."""
    seen = _seen("spawn", folders["spawn"])
    first, later = seen["program, first"], seen["program, later"]
    changed = {name for name in TABLE if first[name] != later[name]}
    same = {"CPU affinity"} if len(first["CPU affinity"]) == 1 else set()
    same |= {"nice value"} if first["nice value"] == 19 else set()
    assert changed | same >= {
        "environment",
        "time zone",
        "current folder",
        "umask",
        "nice value",
        "resource limits",
        "CPU affinity",
        "blocked signals",
        "a signal that is ignored",
        "start method",
        "authkey",
        "warnings.simplefilter",
        "sys.path",
        "sys.argv",
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [["-I", "-OO"], ["-E", "-b", "-Xdev", "-Wignore::BytesWarning"]]
)
def test_options_of_python(tmp_path: Path, options: list[str]) -> None:
    """Workers have those of the program, as a standard one has."""
    text = f"""
        import sys
        sys.path[1:1] = {[str(scripts.ROOT), str(scripts.ROOT / "src"), *sys.path]!r}
        import asyncio, multiprocessing, warnings
        from concurrent.futures import ProcessPoolExecutor
        from async_batcher import WorkerPool
        warnings.simplefilter("ignore")
        OPTIONS = "(lambda m: (tuple(m.flags), m._xoptions, m.warnoptions))(__import__('sys'))"

        async def main():
            for method in {METHODS}:
                async with WorkerPool(1, mp_context=method) as pool:
                    assert await pool.run(eval, OPTIONS) == eval(OPTIONS), method
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(1, mp_context=context) as standard:
                assert standard.submit(eval, OPTIONS).result() == eval(OPTIONS)
            print("good")

        if __name__ == "__main__":
            asyncio.run(main())
    """
    done = subprocess.run(
        [sys.executable, *options, str(scripts.script(tmp_path, text))],
        capture_output=True,
        text=True,
        check=False,
        timeout=2 * work.DEADLINE,
    )
    assert done.stdout == "good\n", done.stderr  # in dev mode asyncio reports slow steps


async def test_variables_of_preloaded_modules(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A worker has what they have set, unless the program has changed it since."""
    (tmp_path / "sets_variables.py").write_text(
        "import os\n"
        "SEEN = os.environ.get('FACT_PROGRAM')\n"
        "for name in ('FACT_MODULE', 'FACT_BOTH', 'FACT_PROGRAM'):\n"
        "    os.environ[name] = 'module'\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    names = ("FACT_MODULE", "FACT_BOTH", "FACT_PROGRAM")
    for name in names:
        monkeypatch.setenv(name, "first")
    async with WorkerPool(1, preload=["sets_variables"]) as pool:
        assert [await pool.run(os.getenv, name) for name in names] == ["module"] * 3
        monkeypatch.setenv("FACT_BOTH", "later")
        monkeypatch.delenv("FACT_PROGRAM")
        await _replace_worker(pool)
        assert [await pool.run(os.getenv, name) for name in names] == ["module", "later", None]
        seen = await pool.run(eval, "__import__('sets_variables').SEEN")
        assert seen == "first"  # imported once, when the fork server started


@pytest.mark.parametrize("method", METHODS)
async def test_threads_per_worker_of_a_later_worker(
    monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """The environment of the moment decides whether the pool's number of threads holds."""
    name = "OPENBLAS_NUM_THREADS"
    monkeypatch.delenv(name, raising=False)
    async with WorkerPool(1, mp_context=method, threads_per_worker=3) as pool:
        assert await pool.run(os.getenv, name) == "3"
        monkeypatch.setenv(name, "7")
        await _replace_worker(pool)
        assert await pool.run(os.getenv, name) == "7"
        monkeypatch.delenv(name)
        await _replace_worker(pool)
        assert await pool.run(os.getenv, name) == "3"


@pytest.mark.skipif(os.getuid() != 0, reason="needs a user that may become another")
@pytest.mark.slow
@pytest.mark.parametrize("method", ["forkserver", "fork"])
def test_a_program_that_becomes_another_user(tmp_path: Path, method: str) -> None:
    """No later worker has the rights that the program has given up."""
    text = f"""
        import asyncio, os, warnings
        from async_batcher import WorkerPool
        from async_batcher.exceptions import WorkerDiedError
        warnings.simplefilter("ignore")

        async def main():
            async with WorkerPool(1, mp_context={method!r}) as pool:
                assert await pool.run(os.getresuid) == (0, 0, 0)
                os.setgroups([65533])
                os.setresgid(65534, 65534, 65534)
                os.setresuid(65534, 65534, 65534)
                try:
                    await pool.run(os._exit, 3)
                except WorkerDiedError:
                    pass
                print(await pool.run(os.getresuid), await pool.run(os.getresgid))
                print(await pool.run(os.getgroups))
        asyncio.run(main())
    """
    output = scripts.run_script(tmp_path, text)
    assert output == "(65534, 65534, 65534) (65534, 65534, 65534)\n[65533]\n"


@pytest.mark.parametrize("method", METHODS)
async def test_a_system_that_does_not_tell(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """What cannot be read is left alone; the rest is of the moment."""

    def refuse(*_: object) -> Any:
        raise PermissionError

    for name in ("getpriority", "sched_getaffinity", "getresuid", "getgroups"):
        monkeypatch.setattr(os, name, refuse)
    monkeypatch.setattr("resource.getrlimit", refuse)
    monkeypatch.setattr(inherited, "_status", refuse)
    async with WorkerPool(1, mp_context=method, threads_per_worker=1) as pool:
        assert await pool.run(abs, -1) == 1
        monkeypatch.setenv("FACT_ADDED", "later")
        await _replace_worker(pool)
        assert await pool.run(os.getenv, "FACT_ADDED") == "later"


def test_what_may_not_be_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """One value that the system refuses does not keep the others from being set."""

    def refuse(*_: object) -> None:
        raise PermissionError

    before = inherited.read_inherited()
    monkeypatch.setattr(os, "setpriority", refuse)
    limits = dict(before["limits"])
    limits[resource.RLIMIT_NOFILE] = (1, 0)  # the system refuses: the first is above the second
    soft, hard = limits[resource.RLIMIT_CORE]
    limits[resource.RLIMIT_CORE] = (0 if soft else hard, hard)
    wanted = {**before, "nice": before["nice"] - 1, "umask": 0o123, "limits": limits}
    try:
        inherited.set_inherited(wanted)
        after = inherited.read_inherited()
    finally:
        inherited.set_inherited(before)
    limits[resource.RLIMIT_NOFILE] = before["limits"][resource.RLIMIT_NOFILE]
    assert after == {**before, "umask": 0o123, "limits": limits}
    assert inherited.read_inherited() == before


@pytest.mark.parametrize("method", METHODS)
async def test_multiprocessing_and_logging_know_the_worker(method: str) -> None:
    """They tell workers from the main process, and from each other."""
    async with WorkerPool(1, mp_context=method) as pool:
        assert await pool.run(_names) == ("async_batcher worker 0", os.getpid(), True)


def _names() -> tuple[str | None, int | None, bool]:
    import logging

    record = logging.makeLogRecord({})
    parent = multiprocessing.parent_process()
    assert parent is not None
    return record.processName, parent.pid, parent.is_alive()


async def _replace_worker(pool: WorkerPool) -> None:
    (worker,) = pool.workers()
    assert worker.pid is not None
    with contextlib.suppress(WorkerDiedError):
        await pool.run(work.fail_by, "kill")
    await wait_for_exit([worker.pid])
