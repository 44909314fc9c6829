"""Pools whose workers are killed: which calls fail, for how long, and what is left behind."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import tempfile
import threading
import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from benchmarks.libraries.base import NotAvailableError, check
from benchmarks.scenarios import worker_functions
from benchmarks.scenarios.readiness import wait_ready

if TYPE_CHECKING:
    from benchmarks.libraries.base import PoolAdapter

    Load = dict[str, Any]

RECOVERY_TIMEOUT = 10.0  # seconds after the round for the pool to be complete
KILLS_BEFORE_COUNTING = 20  # by then the pool has made all that it makes lazily


async def replacement(pool: PoolAdapter, load: Load) -> dict[str, float]:
    """Kill idle workers one after another, each time until the pool is complete again."""
    assert pool.pids is not None
    assert pool.recover is not None
    await wait_ready(pool)
    seconds = []
    for _ in range(load["kills"]):
        pid = pool.pids()[0]
        began = time.perf_counter()
        os.kill(pid, signal.SIGKILL)
        await pool.recover(pid)
        seconds.append(time.perf_counter() - began)
        check(pid not in pool.pids())
        check(len(pool.pids()) == pool.workers)
        check(await pool.call(worker_functions.same, pid) == pid)
    return {"seconds": median(seconds), "worst_seconds": max(seconds)}


async def kills(pool: PoolAdapter, load: Load) -> dict[str, float]:
    """Kill idle and busy workers in turn, and count what is left of them."""
    assert pool.pids is not None
    assert pool.recover is not None
    await wait_ready(pool)
    seconds = []
    before: dict[str, int] = {}
    for number in range(-KILLS_BEFORE_COUNTING, load["kills"]):
        if number == 0:
            before = _resources()
        began = time.perf_counter()
        if number % 2:
            pid = pool.pids()[number // 2 % 2]
            os.kill(pid, signal.SIGKILL)
        else:
            pid = await _crash(pool)
        await pool.recover(pid)
        seconds.append(time.perf_counter() - began)
        check(await pool.call(worker_functions.same, number) == number)
    leaked = await _leaked_since(before)
    if any(leaked.values()):
        msg = f"{load['kills']} killed workers have left something behind: {leaked}"
        raise ValueError(msg)
    counted = seconds[KILLS_BEFORE_COUNTING:]
    return {"seconds": median(counted), "worst_seconds": max(counted), **leaked}


async def killed_under_load(pool: PoolAdapter, load: Load) -> dict[str, float]:
    """Kill a worker in the middle of a batch while clients call (a closed loop).

    The kill happens after a third of the time. A client whose call fails goes on with another.
    The round ends when the pool is complete again.

    Returns:
        ``failed_calls``: calls that failed, including that of the killed batch; ``lost_seconds``:
        the longest time since the kill without a result; ``back_seconds``: from the kill until as
        many workers as before have each returned a result.

    Raises:
        NotAvailableError: A call never returns, or the pool never is complete again.
    """
    if pool.pids is None:
        msg = "it has no worker that can be killed"
        raise NotAvailableError(msg)
    await wait_ready(pool)
    with tempfile.TemporaryDirectory() as folder:
        clients = _Clients(pool, load["batch_ms"] / 1e3, load["clients"], Path(folder, "killed"))
        await asyncio.sleep(load["seconds"] / 3)
        clients.kill()
        await asyncio.sleep(load["seconds"] * 2 / 3)
        return await clients.finish()


class _Clients:
    """Clients that each await one call after another, and count what happens to their calls.

    Args:
        pool: The pool that they call.
        batch: Seconds that a batch takes.
        count: Number of clients.
        note: The file in which the worker records that it is killed.
    """

    def __init__(self, pool: PoolAdapter, batch: float, count: int, note: Path) -> None:
        self._pool, self._batch, self._note = pool, batch, note
        self._numbers = itertools.count()
        self._failed = self._killed_pid = 0
        self._seen_pids: set[int] = set()  # since the kill
        self._killed_at = self._last_result = self._longest_gap = self._recovered_after = 0.0
        self._recovered = asyncio.Event()
        self._kill_next = self._stopped = False
        self._tasks = [asyncio.create_task(self._client()) for _ in range(count)]

    def kill(self) -> None:
        """Make the next batch one that kills its worker."""
        self._kill_next = True

    async def finish(self) -> dict[str, float]:
        """Stop when the pool is complete again, and return the measures."""
        try:
            async with asyncio.timeout(RECOVERY_TIMEOUT):
                await self._recovered.wait()
                self._stopped = True
                await asyncio.gather(*self._tasks)
        except TimeoutError:
            for task in self._tasks:
                task.cancel()
            ends = await asyncio.gather(*self._tasks, return_exceptions=True)
            check(not any(isinstance(end, ValueError) for end in ends))
            is_call = self._recovered.is_set()
            what = "a call never returns" if is_call else "the pool never is complete again"
            msg = f"hangs: {what} after one of its workers has been killed"
            raise NotAvailableError(msg) from None
        return {
            "failed_calls": float(self._failed),
            "lost_seconds": self._longest_gap,
            "back_seconds": self._recovered_after,
        }

    async def _client(self) -> None:
        while not self._stopped:
            number = next(self._numbers)
            try:
                if self._kill_next:
                    self._kill_next = False
                    await self._pool.call(
                        worker_functions.spin_and_crash, self._batch / 2, str(self._note)
                    )
                result, pid = await self._pool.call(
                    worker_functions.spin_and_name, number, self._batch
                )
            except Exception:  # noqa: BLE001 - each library has its own
                self._failed += 1
                # A call that fails at once must not starve the other clients.
                await asyncio.sleep(0)
                continue
            check(result == number)
            if self._killed_pid or self._has_been_killed():
                self._on_result(pid)

    def _has_been_killed(self) -> bool:
        if not self._note.exists():
            return False
        pid, _, now = self._note.read_text(encoding="ascii").partition(" ")
        self._killed_pid = int(pid or 0)  # the file may still be empty
        self._killed_at = self._last_result = float(now or 0)
        return bool(self._killed_pid)

    def _on_result(self, pid: int) -> None:
        now = time.perf_counter()
        self._longest_gap = max(self._longest_gap, now - self._last_result)
        self._last_result = now
        self._seen_pids.add(pid)
        if not self._recovered.is_set():
            assert self._pool.pids is not None
            pids = self._pool.pids()
            is_complete = len(pids) == self._pool.workers and self._killed_pid not in pids
            if is_complete and self._seen_pids.issuperset(pids):
                self._recovered.set()
                self._recovered_after = now - self._killed_at


async def _crash(pool: PoolAdapter) -> int:
    try:
        await pool.call(worker_functions.crash)
    except Exception as exc:  # noqa: BLE001 - each library has its own
        return int(getattr(exc, "pid", 0))
    msg = "a call whose worker has been killed has returned"
    raise ValueError(msg)


# Descriptors, threads and processes, of the program and all of its descendants.


def _resources() -> dict[str, int]:
    pids = _descendants()
    return {
        "descriptors": sum(_count_entries(pid, "fd") for pid in pids),
        "threads": sum(_count_entries(pid, "task") for pid in pids),
        "python_threads": threading.active_count(),
        "processes": len(pids),
    }


async def _leaked_since(before: dict[str, int]) -> dict[str, float]:
    """Return the growth since ``before``, after up to 2 s in which the system cleans up."""
    for _ in range(100):
        now = _resources()
        if all(now[name] <= count for name, count in before.items()):
            break
        await asyncio.sleep(0.02)
    return {f"more_{name}": float(max(0, now[name] - count)) for name, count in before.items()}


def _descendants() -> list[int]:
    parents = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                stat = (folder / "stat").read_text()
            except OSError:  # it has just exited
                continue
            parents[int(folder.name)] = int(stat.rpartition(")")[2].split()[1])
    family = [os.getpid()]
    for member in family:
        family.extend(pid for pid, parent in parents.items() if parent == member)
    return family


def _count_entries(pid: int, folder: str) -> int:
    try:
        return len(list(Path("/proc", str(pid), folder).iterdir()))
    except OSError:
        return 0
