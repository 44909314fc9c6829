"""Modules that the fork server imports for all workers: ``preload`` of `WorkerPool`."""

from __future__ import annotations

import asyncio
import gc
import importlib
import os
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from async_batcher import WorkerPool, batched
from async_batcher._pool.state import supervisor
from async_batcher.exceptions import PoolBrokenError
from tests.support import worker_functions as work
from tests.support.polling import wait_until
from tests.support.scripts import run_script
from tests.support.worker_pools import no_backoff, parent_of, pids_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="no event loop there watches sockets"),
    pytest.mark.skipif(sys.platform != "linux", reason="/proc"),
]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Write the module ``preloaded``, which this process and its workers can import."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(text: str) -> None:
        (tmp_path / "preloaded.py").write_text(textwrap.dedent(text))
        importlib.invalidate_caches()

    yield write
    sys.modules.pop("preloaded", None)


FACTS = """
    import os, sys
    from async_batcher import worker_number

    IMPORTED = dict(
        pid=os.getpid(), folder=os.getcwd(), path=list(sys.path), argv=list(sys.argv),
        threads=os.environ["OPENBLAS_NUM_THREADS"], number=worker_number(),
        value=os.environ.get("PRELOAD_VALUE"),
    )
    def facts(key=None):
        return IMPORTED if key is None else IMPORTED[key]
    def where(batch):
        return [(os.getpid(), IMPORTED["pid"])] * len(batch)
"""


def read(name: str) -> Any:
    """Return what a function of the preloaded module returns; sent by its name."""
    return getattr(sys.modules["preloaded"], name)()


async def test_a_module_is_imported_once(write: Callable[[str], None], tmp_path: Path) -> None:
    """All workers share it; the import sees what workers see before their initializer."""
    write(FACTS)
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        patched.setattr(sys, "argv", ["program", "argument"])
        patched.setenv("PRELOAD_VALUE", "7")
        patched.setenv("OPENBLAS_NUM_THREADS", "5")
        async with WorkerPool(2, preload=["preloaded"]) as pool:
            facts = await pool.run(read, "facts")
            server = {parent_of(pid) for pid in pids_of(pool)}
            assert {facts["pid"]} == server
            assert facts["folder"] == str(folder)
            assert facts["argv"] == ["program", "argument"]
            assert str(tmp_path) in facts["path"]
            assert facts["value"] == "7"
            assert facts["threads"] == "1"
            assert await pool.run(os.getenv, "OPENBLAS_NUM_THREADS") == "5"
            assert facts["number"] is None
            # Functions of the module are sent by name, as ever.
            module = importlib.import_module("preloaded")
            assert {await pool.run(module.facts, "pid") for _ in range(4)} == server
            batcher = batched(module.where, executor=pool)
            pid, imported_in = await batcher(0)
            assert pid in pids_of(pool)
            assert {imported_in} == server
            await batcher.stop()


async def test_what_is_preloaded_is_frozen(write: Callable[[str], None]) -> None:
    """The collector of a worker does not write to the memory that it shares."""
    write("VALUES = [[] for _ in range(10_000)]")
    async with WorkerPool(1, preload=["preloaded"]) as pool:
        assert await pool.run(gc.get_freeze_count) > 10_000


async def test_threads_of_workers_with_a_preload(write: Callable[[str], None]) -> None:
    """What workers load later may use the threads that the pool gives them."""
    write(FACTS)
    with pytest.MonkeyPatch.context() as patched:
        patched.delenv("OPENBLAS_NUM_THREADS", raising=False)
        async with WorkerPool(1, preload=["preloaded"], threads_per_worker=3) as pool:
            assert (await pool.run(read, "facts"))["threads"] == "1"
            assert await pool.run(os.getenv, "OPENBLAS_NUM_THREADS") == "3"


async def test_memory_that_workers_share_does_not_recycle_them(
    write: Callable[[str], None],
) -> None:
    """``max_memory_per_child`` counts what a worker has for itself."""
    write("""
        import os
        MODEL = os.urandom(1 << 20) * 80
        def pid():
            return os.getpid()
        def grow():
            global MORE
            MORE = os.urandom(1 << 20) * 80
    """)
    limit = 60 << 20
    async with WorkerPool(1, preload=["preloaded"], max_memory_per_child=limit) as pool:
        module = importlib.import_module("preloaded")
        assert len({await pool.run(module.pid) for _ in range(3)}) == 1
        assert pool.workers()[0].memory < limit
        first = await pool.run(module.pid)
        await pool.run(module.grow)
        await wait_until(lambda: first not in pids_of(pool))


async def test_a_restart_imports_the_modules_again(write: Callable[[str], None]) -> None:
    """New workers see the module as it is then."""
    write("def value(): return 1")
    async with WorkerPool(2, preload=["preloaded"]) as pool:
        assert await pool.run(read, "value") == 1
        write("def value(): return 'another'")
        await pool.restart_workers()
        values = await asyncio.gather(*(pool.run(read, "value") for _ in range(4)))
        assert values == ["another"] * 4


async def test_a_restart_whose_modules_fail(write: Callable[[str], None]) -> None:
    """The workers work on, and those that crash are replaced by ones with the old modules."""
    write("def value(): return 1")
    async with WorkerPool(2, preload=["preloaded"]) as pool:
        old = pids_of(pool)
        write("raise LookupError('no model')")
        with pytest.raises(PoolBrokenError, match=r"'preloaded' for preload failed.*no model"):
            await pool.restart_workers()
        assert pids_of(pool) == old
        os.kill(old[0], 9)
        await wait_until(lambda: old[0] not in pids_of(pool) and len(pids_of(pool)) == 2)
        await pool.start()
        assert {parent_of(pid) for pid in pids_of(pool)} == {parent_of(old[1])}
        assert await asyncio.gather(*(pool.run(read, "value") for _ in range(4))) == [1] * 4
        write("def value(): return 'the third'")
        await pool.restart_workers()
        assert await pool.run(read, "value") == "the third"


@pytest.mark.slow
@pytest.mark.parametrize("how", ["hangs", "crashes"])
async def test_a_restart_whose_modules_hang_or_crash(
    write: Callable[[str], None], tmp_path: Path, how: str
) -> None:
    """Its error has the cause; no worker with the old modules replaces another one."""
    write("def value(): return 1")
    begun = tmp_path / "begun"
    async with WorkerPool(1, preload=["preloaded"], start_timeout=8.0) as pool:
        old = pids_of(pool)
        write(f"""
            import os, pathlib, time
            pathlib.Path({str(begun)!r}).touch()
            time.sleep(600) if {how == "hangs"} else os._exit(7)
        """)
        match = "'preloaded' for preload" if how == "hangs" else "exit code 7 while it imported"
        with pytest.raises(PoolBrokenError, match=f"could not be restarted.*{match}"):
            await asyncio.wait_for(pool.restart_workers(), work.DEADLINE)
        assert begun.exists()
        assert pids_of(pool) == old
        assert await pool.run(read, "value") == 1
        write("def value(): return 2")
        await pool.restart_workers()
        assert await pool.run(read, "value") == 2


@pytest.mark.slow
async def test_a_second_restart_while_the_modules_of_the_first_hang(
    write: Callable[[str], None], tmp_path: Path
) -> None:
    """It imports the modules as they are by then."""
    write("def value(): return 1")
    begun = tmp_path / "begun"
    async with WorkerPool(1, preload=["preloaded"], start_timeout=8.0) as pool:
        write(f"""
            import pathlib, time
            pathlib.Path({str(begun)!r}).touch()
            time.sleep(600)
        """)
        first = asyncio.ensure_future(pool.restart_workers())
        await wait_until(begun.exists)
        write("def value(): return 2")
        await asyncio.wait_for(pool.restart_workers(), work.DEADLINE)
        assert await pool.run(read, "value") == 2
        await first


async def test_a_module_that_raises(write: Callable[[str], None]) -> None:
    """Callers get its exception as the cause, with its traceback; a later call tries again."""
    write("""
        def load():
            raise LookupError("no model")
        load()
    """)
    pool = WorkerPool(2, preload=["os.path", "preloaded"])
    with pytest.raises(PoolBrokenError, match="importing 'preloaded' for preload failed") as caught:
        await asyncio.wait_for(pool.start(), work.DEADLINE)
    cause = caught.value.__cause__
    assert isinstance(cause, LookupError)
    assert cause.args == ("no model",)
    assert "in load" in str(cause.__cause__)
    errors = await asyncio.gather(*(pool.run(abs, -1) for _ in range(3)), return_exceptions=True)
    assert [type(error.__cause__) for error in errors] == [LookupError] * 3
    write("def value(): return 1")
    assert await pool.run(read, "value") == 1
    await pool.stop()


@pytest.mark.parametrize("way", ["missing", "exits"])
async def test_a_module_that_cannot_be_imported(write: Callable[[str], None], way: str) -> None:
    """The error names it."""
    write("raise SystemExit(3)")
    name = "preloaded" if way == "exits" else "preloaded_too"
    pool = WorkerPool(1, preload=[name])
    batcher = batched(work.same, executor=pool)
    with pytest.raises(PoolBrokenError, match=f"'{name}' for preload failed") as caught:
        await batcher.start()
    assert batcher.stats().workers.crashed == {"preload failed": 1}
    await batcher.stop()
    if way == "missing":
        assert isinstance(caught.value.__cause__, ModuleNotFoundError)
    await pool.stop()


async def test_a_module_that_crashes(
    write: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After some tries, the error says what the fork server was doing."""
    no_backoff(monkeypatch)
    write("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    pool = WorkerPool(1, preload=["preloaded"])
    with pytest.raises(PoolBrokenError, match="SIGKILL while it imported 'preloaded' for preload"):
        await asyncio.wait_for(pool.run(abs, -1), work.DEADLINE)
    await pool.stop()


async def test_a_module_that_takes_too_long(
    write: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """``start_timeout`` counts for the imports."""
    no_backoff(monkeypatch)
    write("import time; time.sleep(100)")
    pool = WorkerPool(1, preload=["preloaded"], start_timeout=0.1)
    with pytest.raises(PoolBrokenError, match="start_timeout"):
        await asyncio.wait_for(pool.run(abs, -1), work.DEADLINE)
    await pool.stop()


@pytest.mark.slow
async def test_a_module_that_takes_too_long_is_named(
    write: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error says which module was being imported."""
    monkeypatch.setattr(supervisor, "_BACKOFF_DELAYS", ())
    write("import time; time.sleep(100)")
    # Long enough for a busy machine to get as far as the import.
    pool = WorkerPool(1, preload=["json", "preloaded"], start_timeout=5.0)
    reason = "importing 'preloaded' for preload took longer than start_timeout"
    with pytest.raises(PoolBrokenError, match=reason):
        await asyncio.wait_for(pool.run(abs, -1), work.DEADLINE)
    await pool.stop()


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (
            """
            import threading, time
            threading.Thread(target=time.sleep, args=(100,), daemon=True, name="poller").start()
            """,
            "'poller'",
        ),
        (
            """
            import ctypes
            sleep = ctypes.CDLL(None).sleep
            number = ctypes.c_ulong()
            ctypes.CDLL(None).pthread_create(ctypes.byref(number), None, sleep, 100)
            """,
            "1 of C code",
        ),
    ],
    ids=["Python", "native"],
)
async def test_a_module_that_leaves_a_thread(
    write: Callable[[str], None], text: str, what: str
) -> None:
    """It is refused; the error names the module and the threads, and says what to do."""
    write(text)
    pool = WorkerPool(1, preload=["preloaded"])
    with pytest.raises(PoolBrokenError) as caught:
        await pool.run(abs, -1)
    for part in ("importing 'preloaded' left threads running", what, "setup_worker"):
        assert part in str(caught.value)
    await pool.stop()


async def test_a_module_whose_threads_end(write: Callable[[str], None]) -> None:
    """Threads that end with the import do no harm."""
    write("""
        import threading
        for _ in range(20):
            thread = threading.Thread(target=int)
            thread.start()
            thread.join()
        def value(): return 1
    """)
    async with WorkerPool(1, preload=["preloaded"]) as pool:
        assert await pool.run(read, "value") == 1


async def test_a_module_that_starts_a_process(write: Callable[[str], None]) -> None:
    """The fork server reaps it, and goes on."""
    write("""
        import subprocess
        subprocess.run(["true"], check=True)
        process = subprocess.Popen(["sleep", "0.2"])
        def value(): return process.pid
    """)
    async with WorkerPool(2, preload=["preloaded"]) as pool:
        pid = await pool.run(read, "value")
        await wait_until(lambda: not Path("/proc", str(pid)).exists())
        victim = pids_of(pool)[0]
        os.kill(victim, 9)
        await wait_until(lambda: victim not in pids_of(pool))
        await pool.start()
        assert len(pids_of(pool)) == 2


@pytest.mark.usefixtures("numpy")
async def test_random_numbers_of_numpy() -> None:
    """The global generators of numpy and of `random` differ from worker to worker."""
    async with WorkerPool(3, preload=["numpy.random", "random"]) as pool:
        pids = pids_of(pool)
        for name in ("numpy.random", "random"):
            values: dict[int, float] = {}
            while len(values) < 3:
                calls = [pool.run(_random_number, name) for _ in range(3)]
                values.update(await asyncio.gather(*calls))
            assert set(values) == set(pids)
            assert len(set(values.values())) == 3


def _random_number(name: str) -> tuple[int, float]:
    return os.getpid(), sys.modules[name].random()


@pytest.mark.slow
def test_what_a_module_prints(tmp_path: Path) -> None:
    """It is printed once; the main module does not run, and is not needed."""
    (tmp_path / "preloaded.py").write_text("print('imported')\ndef value(): return 1\n")
    text = """
        import asyncio
        from async_batcher import WorkerPool
        import os, sys
        sys.path.insert(0, FOLDER)
        os.environ.pop("PYTHONUNBUFFERED", None)  # so that there are buffers
        print("main", flush=True)

        async def main():
            async with WorkerPool(2, preload=["preloaded"]) as pool:
                await asyncio.gather(*(pool.run(abs, -1) for _ in range(10)))

        asyncio.run(main())
    """
    output = run_script(tmp_path, text.replace("FOLDER", repr(str(tmp_path))))
    assert sorted(output.split()) == ["imported", "main"]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="an old Linux")
@pytest.mark.usefixtures("numpy")
async def test_workers_share_the_memory_of_a_model(write: Callable[[str], None]) -> None:
    """After many batches, all processes together have at most 1.3 times the memory of one."""
    write("""
        import numpy
        WEIGHTS = numpy.ones(25 << 20)
        def total(batch):
            return [float(WEIGHTS.sum()) + item for item in batch]
    """)
    module = importlib.import_module("preloaded")
    del module.WEIGHTS  # this process needs none
    expected = float(25 << 20)

    async def memory(pool: WorkerPool, calls: int) -> int:
        results = await asyncio.gather(*(pool.run(module.total, [n]) for n in range(calls)))
        assert results == [[expected + n] for n in range(calls)]
        pids = pids_of(pool)
        return sum(_pss(pid) for pid in {*pids, *map(parent_of, pids)} - {os.getpid()})

    async with WorkerPool(1, mp_context="spawn") as pool:
        alone = await memory(pool, 5)
    async with WorkerPool(4, preload=["preloaded"]) as pool:
        together = await memory(pool, 200)
    assert alone > 200 << 10
    assert together <= 1.3 * alone


def _pss(pid: int) -> int:
    """Return the proportional set size of a process in kB."""
    (line,) = [
        line
        for line in Path("/proc", str(pid), "smaps_rollup").read_text().splitlines()
        if line.startswith("Pss:")
    ]
    return int(line.split()[1])
