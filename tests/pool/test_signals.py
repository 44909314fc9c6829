"""Signals to a program with a `WorkerPool`, and in its workers."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from typing import TYPE_CHECKING

import pytest

from async_batcher import WorkerPool
from async_batcher.exceptions import WorkerDiedError
from tests.conftest import descendants
from tests.support import scripts
from tests.support import worker_functions as work
from tests.support.polling import wait_for_exit, wait_until
from tests.support.worker_pools import METHODS, may_warn_of_fork

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="no event loop there watches sockets"),
    may_warn_of_fork,
]


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


# Python handles SIGINT itself until a worker does, with every start method.
_DRAINS = [
    *((method, signal.SIGTERM, "asyncio") for method in METHODS),
    *((method, signal.SIGINT, "asyncio") for method in METHODS),
    ("forkserver", signal.SIGHUP, "asyncio"),
    ("forkserver", signal.SIGTERM, "uvloop"),
    ("forkserver", signal.SIGINT, "uvloop"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("method", "number", "loop"), _DRAINS)
@pytest.mark.parametrize("when", ["running", "starting"])
def test_a_program_that_drains(
    tmp_path: Path, method: str, number: signal.Signals, when: str, loop: str
) -> None:
    """A signal to the process group, as from a service manager, loses no item."""
    if loop == "uvloop":
        pytest.importorskip("uvloop")
    text = _DRAINING.replace("METHOD", repr(method)).replace("NUMBER", str(int(number)))
    with scripts.start(
        tmp_path, text.replace("WHEN", repr(when)).replace("LOOP", repr(loop))
    ) as program:
        assert program.stdout is not None
        assert program.stdout.readline() == "begun\n"
        for _ in range(5):
            os.killpg(program.pid, number)
        output, errors = program.communicate(timeout=work.DEADLINE)
    assert (program.returncode, output, errors) == (0, "good {}\n", "")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("method", METHODS)
def test_a_program_that_a_signal_to_its_group_ends(
    tmp_path: Path, method: str, number: signal.Signals
) -> None:
    """A program without a handler ends, and its workers, which have one, end with it."""
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
        asyncio.run(wait_for_exit(family))


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
    before = [
        callable(handler) and handler is not signal.default_int_handler
        for handler in _dispositions()
    ]
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
        "own in child": _in_forked_child(
            lambda: signal.getsignal(signal.SIGTERM) is _handler_of_user_code
        ),
        "blocked": sorted(mask),
    }


def _handler_of_user_code(number: int, frame: object) -> None:
    pass


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
@pytest.mark.parametrize("method", METHODS)
async def test_signals_in_a_worker(method: str) -> None:
    """They are handled, not ignored; forked children have the defaults; none is blocked."""
    async with WorkerPool(1, mp_context=method) as pool:
        seen = await pool.run(_signals_in_a_worker)
        assert await pool.run(abs, -1) == 1
    defaults = repr([signal.default_int_handler, signal.SIG_DFL, signal.SIG_DFL])
    nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    assert seen["handled"] == [True, True, not nohup]
    assert str(seen["in child"]).split(" at ")[0] == defaults.split(" at ")[0]
    assert [seen[name] for name in ("mask in child", "own", "own in child", "blocked")] == [
        "True",
        True,
        "True",
        [],
    ]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="forks")
@pytest.mark.parametrize("method", METHODS)
async def test_subprocesses_of_user_code_can_be_terminated(method: str) -> None:
    """Programs and multiprocessing processes, from their first moment."""
    async with WorkerPool(1, mp_context=method) as pool:
        assert set(await pool.run(_children_end_by_terminate)) == {-signal.SIGTERM}


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_ignored_signals(tmp_path: Path, method: str) -> None:
    """Under nohup, the subprocesses of user code ignore SIGHUP."""
    text = f"""
        import asyncio, signal, subprocess, sys, warnings
        from async_batcher import WorkerPool
        warnings.simplefilter("ignore")
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

        def ignored():
            code = "import signal; print(signal.getsignal(signal.SIGHUP) is signal.SIG_IGN)"
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
            return done.stdout.strip()

        async def main():
            async with WorkerPool(1, mp_context={method!r}) as pool:
                print(await pool.run(ignored), signal.getsignal(signal.SIGHUP) is signal.SIG_IGN)
        asyncio.run(main())
    """
    assert scripts.run_script(tmp_path, text) == "True True\n"


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("which", ["SIGCHLD", "all"])
async def test_blocked_signals(method: str, which: str) -> None:
    """They do not delay the report of a crash, and are blocked in workers, too."""
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
        theirs = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGURG}
        assert (
            set(blocked)
            == set(end_helpers)
            == signal.pthread_sigmask(signal.SIG_BLOCK, []) - theirs
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _blocked() -> list[int]:
    return sorted(signal.pthread_sigmask(signal.SIG_BLOCK, []))


def _leave_a_helper_behind() -> None:
    """Have a forked child hold the worker's channel open for a while."""
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
def test_signals_in_workers_of_a_standard_pool(tmp_path: Path) -> None:
    """They handle the same signals as our workers; the pool is killed, not terminated."""
    text = """
        import os, signal, time
        from async_batcher._worker import signals
        from async_batcher._runners.adapters import OwnedExecutorAdapter
        from async_batcher._runners.factory import standard_factory

        def pid():
            time.sleep(0.01)
            return os.getpid()

        def own():
            return [signal.getsignal(number) is signals._do_nothing for number in (2, 15, 1)]

        if __name__ == "__main__":
            factory = standard_factory("process", 2, has_worker_pool=False)
            place = OwnedExecutorAdapter(factory, factory())
            try:
                futures = [place.submit(own)[0] for _ in range(4)]
                assert all(future.result() == [True] * 3 for future in futures), futures
                ready = set()  # a signal may end a worker that is still starting
                while len(ready) < 2:
                    ready |= {future.result() for future in [place.submit(pid)[0] for _ in "12"]}
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
