"""`worker_number`, and which worker has which number."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import sys
from typing import TYPE_CHECKING, Any

import pytest

from async_batcher import WorkerPool, batched, worker_number
from async_batcher._pool.state.ledger import WorkerLedger
from async_batcher._pool.state.pool_state import PoolState
from async_batcher._pool.state.supervisor import PoolLimits
from async_batcher._pool.state.worker import Progress, StartFailure, Worker, WorkerState
from tests.support import worker_functions as work
from tests.support.polling import wait_for_exit
from tests.support.worker_pools import METHODS, FakeFunction, may_warn_of_fork, numbers, pids_of

if TYPE_CHECKING:
    from pathlib import Path

needs_pool = pytest.mark.skipif(
    sys.platform == "win32", reason="no event loop there watches sockets"
)
pytestmark = [may_warn_of_fork]


def number_of(pool: WorkerPool, pid: int) -> int:
    """Return the number of a worker, from what the pool shows of it."""
    (text,) = [text for text in pool.debug_state()["workers"] if f"pid={pid} " in text]
    return int(text.partition("number=")[2].split()[0])


# --- in processes


@needs_pool
@pytest.mark.parametrize("method", METHODS)
async def test_each_worker_has_a_number(tmp_path: Path, method: str) -> None:
    """It is below ``max_workers``, and known in the initializer, a set-up and its thread."""

    def initialize(folder: Path) -> None:
        work.note(folder, "initializer", str(worker_number()))

    def set_up(folder: Path = tmp_path) -> None:
        work.note(folder, "setup", str(worker_number()))

    def number() -> tuple[int, int | None]:
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(1) as threads:
            assert threads.submit(worker_number).result() == worker_number()
        return os.getpid(), worker_number()

    async with WorkerPool(
        3, mp_context=method, initializer=initialize, initargs=(tmp_path,)
    ) as pool:
        batcher = batched(work.same, executor=pool, setup_worker=set_up)
        async with batcher:
            assert sorted(numbers(tmp_path, "initializer")) == [0, 1, 2]
            assert sorted(numbers(tmp_path, "setup")) == [0, 1, 2]
        pid, mine = await pool.run(number)
        assert mine == number_of(pool, pid)
        assert sorted(number_of(pool, pid) for pid in pids_of(pool)) == [0, 1, 2]


@needs_pool
async def test_a_successor_takes_the_number_over() -> None:
    """The worker in place of one that crashed has its number."""
    async with WorkerPool(3) as pool:
        victim = pids_of(pool)[1]
        number = number_of(pool, victim)
        os.kill(victim, signal.SIGKILL)
        await wait_for_exit([victim])
        await pool.run(abs, -1)
        await pool.start()
        assert victim not in pids_of(pool)
        assert sorted(number_of(pool, pid) for pid in pids_of(pool)) == [0, 1, 2]
        assert number in [number_of(pool, pid) for pid in pids_of(pool)]


@needs_pool
async def test_processes_of_a_worker() -> None:
    """A forked one sees the worker's number, another one none."""

    def numbers_of_children() -> list[object]:
        found: list[object] = []
        for method in ("fork", "spawn"):
            pool = multiprocessing.get_context(method).Pool(1)
            found.append(pool.apply(worker_number))
            pool.close()  # not by a signal, which a measurement of coverage handles
            pool.join()
        return found

    async with WorkerPool(1) as pool:
        assert await pool.run(numbers_of_children) == [0, None]


async def test_outside_of_a_worker() -> None:
    """There is no number in this process, and in its threads."""
    assert worker_number() is None
    assert await asyncio.to_thread(worker_number) is None


# --- decisions


class Rig:
    """The state of a pool whose processes do at once what it commands."""

    def __init__(self, size: int, max_tasks: int | None = None) -> None:
        self.now = 0.0
        self.state = PoolState(PoolLimits(size, 10.0, max_tasks), WorkerLedger())
        self.state.started(self.now)

    @property
    def workers(self) -> list[Worker]:
        """All workers."""
        return self.state.supervisor.workers

    def numbers(self, state: WorkerState) -> list[int]:
        """Return the numbers of the workers in a state."""
        return [worker.number for worker in self.workers if worker.state is state]

    def ready(self, *workers: Worker) -> None:
        """Have workers get ready."""
        for worker in workers or tuple(self.workers):
            self.state.worker_events.ready(worker, self.now)

    def exit(self, worker: Worker, why: str = "") -> None:
        """Have a worker exit."""
        worker.exit_code = 1
        if why:
            worker.start_failure = StartFailure(RuntimeError("no"), why)
        self.state.worker_events.exited(worker, Progress(), self.now)

    def busy(self, worker: Worker) -> None:
        """Note that a worker runs a batch."""
        self.state.supervisor.idle.remove(worker)
        worker.state = WorkerState.BUSY

    def wait(self, seconds: float) -> None:
        """Let time pass."""
        self.now += seconds
        self.state.time_limits.tick(self.now)


def test_the_lowest_free_number() -> None:
    """New workers get the numbers that are free, even if others exit later."""
    rig = Rig(3)
    rig.ready()
    first, second, _ = list(rig.workers)
    rig.exit(second)
    assert rig.numbers(WorkerState.STARTING) == [1]
    rig.exit(first)
    assert rig.numbers(WorkerState.STARTING) == [1, 0]


def test_a_worker_that_exits_keeps_its_number_until_it_has() -> None:
    """Its successor has the same: no other number is free."""
    rig = Rig(2)
    rig.ready()
    first = rig.workers[0]
    rig.state.supervisor.kill(first, "timeout", rig.now)
    rig.wait(0.0)
    assert rig.numbers(WorkerState.STARTING) == [0]
    assert first in rig.workers


def test_a_replacement_takes_no_place_of_another_number() -> None:
    """While its predecessor works, it leaves the place of a crashed worker to another one."""
    rig = Rig(2)
    rig.ready()
    first, second = list(rig.workers)
    rig.busy(first)
    rig.busy(second)
    rig.state.restarted(rig.now)
    replacement = rig.workers[-1]
    replaced = first if first.has_replacement else second
    other = second if replaced is first else first
    assert replacement.number == replaced.number
    rig.exit(other)
    rig.ready(replacement)
    assert replacement.state is WorkerState.SPARE
    rig.ready(rig.workers[-1])
    active = rig.state.supervisor.active()
    assert sorted(worker.number for worker in active) == [0, 1]
    assert replacement not in active


def test_a_worker_is_not_retired_for_the_replacement_of_another_one() -> None:
    """After its last batch it works until its own is ready, where functions have set-ups."""
    rig = Rig(2, max_tasks=5)
    rig.ready()
    first, second = list(rig.workers)
    supervisor = rig.state.supervisor
    function: Any = FakeFunction(b"key", has_setup=True)
    rig.state.setups.add(function)
    for worker in (first, second):
        rig.busy(worker)
        worker.batches = 4
        supervisor.plan_replacement(worker)
    supervisor.start_missing(rig.now)
    replacement = next(worker for worker in rig.workers[2:] if worker.number == second.number)
    replacement.ever_ready = True
    supervisor.make_spare(replacement)
    first.batches = second.batches = 5
    assert not supervisor.must_retire(first)
    assert supervisor.must_retire(second)


# --- a restart


def test_a_failed_restart_leaves_replacements_that_come() -> None:
    """When another worker cannot be started, one that is being replaced still is."""
    rig = Rig(2)
    rig.ready()
    first, second = list(rig.workers)
    rig.state.restarted(rig.now)
    replacement = rig.workers[-1]
    replaced = first if first.has_replacement else second
    other = second if replaced is first else first
    rig.exit(other)
    rig.exit(rig.workers[-1], why="the initializer raised")
    assert "the initializer raised" in str(rig.state.supervisor.restart.error)
    rig.ready(replacement)
    assert replaced.state is WorkerState.STOPPING
    rig.exit(replaced)
    rig.wait(1.0)
    rig.ready(rig.workers[-1])
    assert rig.numbers(WorkerState.IDLE) == [replacement.number, other.number]


def test_a_failed_restart_leaves_the_others() -> None:
    """They are not replaced later, and the next restart tries again."""
    rig = Rig(2)
    rig.ready()
    old = list(rig.workers)
    rig.state.restarted(rig.now)
    rig.exit(rig.workers[-1], why="the initializer raised")
    rig.wait(5.0)
    assert rig.workers == old
    assert rig.numbers(WorkerState.IDLE) == [0, 1]
    rig.state.restarted(rig.now)
    assert rig.state.supervisor.restart.error is None
    rig.ready(rig.workers[-1])
    assert len(rig.numbers(WorkerState.STOPPING)) == 1
    assert sorted(rig.numbers(WorkerState.IDLE)) == [0, 1]


def test_a_restart_that_fails_again_and_again() -> None:
    """It ends after some failures in a row, if none of them says that another one follows."""
    rig = Rig(1)
    rig.ready()
    (old,) = rig.workers
    rig.state.restarted(rig.now)
    for _ in range(10):
        if rig.state.supervisor.restart.error is not None:
            break
        rig.exit(rig.workers[-1])
        rig.wait(5.0)
    assert "exit before they are ready" in str(rig.state.supervisor.restart.error)
    assert rig.workers == [old]


def test_workers_are_replaced_one_after_another() -> None:
    """One more process exists than usual; the next one starts when the last one has exited."""
    rig = Rig(3)
    rig.ready()
    old = rig.state.restarted(rig.now)
    for count in (3, 2, 1):
        assert len(rig.workers) == 4
        rig.ready(rig.workers[-1])
        (stopping,) = [worker for worker in old if worker.state is WorkerState.STOPPING]
        assert len(rig.state.supervisor.active()) == 3
        assert len(rig.workers) == 4
        rig.exit(stopping)
        assert len([worker for worker in old if worker.state is not WorkerState.EXITED]) < count
    assert len(rig.workers) == 3
    assert not set(old) & set(rig.workers)
