"""Several pools, event loops, threads and processes in one program."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from typing import TYPE_CHECKING

import pytest

from async_batcher import WorkerPool, batched
from tests.support import scripts
from tests.support.worker_pools import METHODS, pids_of

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="no event loop there watches sockets"),
    pytest.mark.slow,
]

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="fork is not safe there")


def _same(batch: list[int]) -> list[int]:
    return batch


def test_a_pool_on_each_of_two_loops() -> None:
    """Each loop, in a thread of its own, has its workers and its results."""
    both_run = threading.Barrier(2)
    results: dict[int, list[int]] = {}
    workers: dict[int, set[int]] = {}

    async def use(number: int) -> None:
        pool = WorkerPool(2)
        async with pool, batched(_same, executor=pool, max_batch_size=3) as batcher:
            await asyncio.to_thread(both_run.wait)
            calls = (batcher(number * 100 + i) for i in range(100))
            results[number] = await asyncio.gather(*calls)
            workers[number] = {*pids_of(pool), await pool.run(os.getpid)}
            await asyncio.to_thread(both_run.wait)

    threads = [threading.Thread(target=asyncio.run, args=(use(number),)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {0: list(range(100)), 1: list(range(100, 200))}
    assert len(workers[0] | workers[1]) == 4


_IMPORTED = """
    import asyncio, multiprocessing, os, sys, warnings
    from async_batcher import WorkerPool, batched

    warnings.simplefilter("ignore")  # of the fork that the test asks for

    def twice(batch):
        return [2 * number for number in batch]

    async def use_own():
        async with WorkerPool(1, mp_context=METHOD) as pool:
            assert await pool.run(abs, -1) == 1
            async with batched(twice, executor=pool) as batcher:
                assert await batcher(2) == 4

    def child():
        asyncio.run(use_own())
        with WorkerPool(1, mp_context=METHOD).as_executor() as executor:
            assert executor.submit(twice, [2]).result() == [4]
"""

_CHILDREN = (
    _IMPORTED
    + """
    def run_child(how):
        process = multiprocessing.get_context(how).Process(target=child, daemon=DAEMON)
        process.start()
        process.join()
        return process.exitcode

    if __name__ == "__main__":
        with WorkerPool(1, mp_context=METHOD).as_executor() as executor:
            worker = executor.submit(os.getpid).result()
            for how in ("spawn", "forkserver", "fork"):
                assert run_child(how) == 0, how
                assert executor.submit(os.getpid).result() == worker
        print("good")
"""
)


@linux_only
@pytest.mark.parametrize(
    ("method", "daemon"), [("forkserver", False), ("forkserver", True), ("spawn", True)]
)
def test_processes_of_multiprocessing(tmp_path: Path, method: str, daemon: bool) -> None:
    """Each may use pools of its own, daemonic or not; the pool of the program is not affected."""
    text = _CHILDREN.replace("METHOD", repr(method)).replace("DAEMON", repr(daemon))
    assert scripts.run_script(tmp_path, text) == "good\n"


_PRELOADED = """
    import asyncio, os, signal, sys, warnings
    from async_batcher import WorkerPool, batched

    warnings.simplefilter("ignore")  # of the fork that the test asks for

    @batched(executor="process", max_workers=1)
    def twice(batch):
        return [2 * number for number in batch]

    pool = WorkerPool(2, mp_context=METHOD)
    executor = WorkerPool(1, mp_context=METHOD).as_executor()

    async def use():
        assert await asyncio.gather(*map(twice, range(5))) == [0, 2, 4, 6, 8]
        assert await pool.run(abs, -1) == 1
        STOP

    def serve():
        signal.alarm(30)
        asyncio.run(use())
        if not IS_USED_BEFORE:
            assert executor.submit(abs, -2).result() == 2

    if IS_USED_BEFORE:
        serve()
    children = []
    for _ in range(2):
        child = os.fork()
        if child == 0:
            serve()
            sys.exit(7)
        children.append(child)
    serve()
    for child in children:
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    print("good")
"""


@linux_only
@pytest.mark.parametrize(
    ("method", "is_used_before", "stop"),
    [
        *((method, False, "pass") for method in METHODS),
        ("forkserver", True, "pass"),
        ("forkserver", True, "await twice.stop(); await pool.stop()"),
    ],
)
def test_what_a_program_makes_before_it_forks(
    tmp_path: Path, method: str, is_used_before: bool, stop: str
) -> None:
    """Batchers, pools and executors of a module work in each server process of gunicorn."""
    if is_used_before and stop != "pass":
        stop += "; await twice.start(); await pool.start()"
    text = _PRELOADED.replace("METHOD", repr(method)).replace("STOP", stop)
    text = text.replace("IS_USED_BEFORE", repr(is_used_before))
    assert scripts.run_script(tmp_path, text) == "good\n"
