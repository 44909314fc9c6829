"""The questions to a pool whose workers are killed: who is hurt, for how long, and what is left behind."""

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

import _work
from _ready import get_ready
from _rival import NotAvailableError, check

if TYPE_CHECKING:
    from _rival import Pool

    Load = dict[str, Any]

_PATIENCE = 10.0  # seconds after the time of a round for a pool to be whole again, and for its calls to end
_KILLS_BEFORE = 20  # after which everything that is made on demand has been made


async def successor(pool: Pool, load: Load) -> dict[str, float]:
    """From an idle worker that is killed to a pool that is whole again."""
    assert pool.pids is not None
    assert pool.recover is not None
    await get_ready(pool)
    seconds = []
    for _ in range(load["kills"]):
        pid = pool.pids()[0]
        began = time.perf_counter()
        os.kill(pid, signal.SIGKILL)
        await pool.recover(pid)
        seconds.append(time.perf_counter() - began)
        check(pid not in pool.pids())
        check(len(pool.pids()) == pool.workers)
        check(await pool.call(_work.same, pid) == pid)
    return {"seconds": median(seconds), "worst_seconds": max(seconds)}


async def kills(pool: Pool, load: Load) -> dict[str, float]:
    """Workers killed one after the other, every second one while it runs a batch: what is left of them."""
    assert pool.pids is not None
    assert pool.recover is not None
    await get_ready(pool)
    seconds = []
    before: dict[str, int] = {}
    for number in range(-_KILLS_BEFORE, load["kills"]):
        if number == 0:
            before = _possessions()
        began = time.perf_counter()
        if number % 2:
            pid = pool.pids()[number // 2 % 2]
            os.kill(pid, signal.SIGKILL)
        else:
            pid = await _die(pool)
        await pool.recover(pid)
        seconds.append(time.perf_counter() - began)
        check(await pool.call(_work.same, number) == number)
    more = await _more_than(before)
    if any(more.values()):
        msg = f"{load['kills']} killed workers have left something behind: {more}"
        raise ValueError(msg)
    return {"seconds": median(seconds[_KILLS_BEFORE:]), "worst_seconds": max(seconds[_KILLS_BEFORE:]), **more}


async def killed(pool: Pool, load: Load) -> dict[str, float]:
    """A worker is killed in the middle of a batch, while clients call without a pause (a closed loop); at a third of the time.

    A client whose call fails goes on with another. The round goes on until the pool is whole again.

    Returns:
        ``failed_calls``: those that got an error, that of the killed batch with them; ``lost_seconds``: the longest time from the
        kill on in which no call was answered; ``back_seconds``: from the kill until each of as many workers as before has
        answered, be they new or old.

    Raises:
        NotAvailableError: A call never ends, or the pool never is whole again.
    """
    if pool.pids is None:
        msg = "it has no worker that can be killed"
        raise NotAvailableError(msg)
    await get_ready(pool)
    with tempfile.TemporaryDirectory() as folder:
        clients = _Clients(pool, load["batch_ms"] / 1e3, load["clients"], Path(folder, "killed"))
        await asyncio.sleep(load["seconds"] / 3)
        clients.kill()
        await asyncio.sleep(load["seconds"] * 2 / 3)
        return await clients.end()


class _Clients:
    """Callers that each await one batch after another, and know what became of their calls.

    Args:
        pool: Whom they call.
        batch: Seconds that a batch takes.
        count: How many they are.
        note: The file in which a worker says that it is killed.
    """

    def __init__(self, pool: Pool, batch: float, count: int, note: Path) -> None:
        self._pool, self._batch, self._note = pool, batch, note
        self._numbers = itertools.count()
        self._failed = self._victim = 0
        self._answering: set[int] = set()  # who has answered since the kill
        self._killed = self._last = self._longest = self._back = 0.0
        self._whole = asyncio.Event()
        self._is_to_kill = self._is_over = False
        self._tasks = [asyncio.create_task(self._client()) for _ in range(count)]

    def kill(self) -> None:
        """Have the next batch be one that its worker does not outlive."""
        self._is_to_kill = True

    async def end(self) -> dict[str, float]:
        """Stop when the pool is whole again, and say how it was."""
        try:
            async with asyncio.timeout(_PATIENCE):
                await self._whole.wait()
                self._is_over = True
                await asyncio.gather(*self._tasks)
        except TimeoutError:
            for task in self._tasks:
                task.cancel()
            check(not any(isinstance(end, ValueError) for end in await asyncio.gather(*self._tasks, return_exceptions=True)))
            what = "a call never ends" if self._whole.is_set() else "the pool never is whole again"
            msg = f"hangs: {what} after one of its workers has been killed"
            raise NotAvailableError(msg) from None
        return {"failed_calls": float(self._failed), "lost_seconds": self._longest, "back_seconds": self._back}

    async def _client(self) -> None:
        while not self._is_over:
            number = next(self._numbers)
            try:
                if self._is_to_kill:
                    self._is_to_kill = False
                    await self._pool.call(_work.die_at_work, self._batch / 2, str(self._note))
                answer, pid = await self._pool.call(_work.serve, number, self._batch)
            except Exception:  # noqa: BLE001 - each rival has its own
                self._failed += 1
                await asyncio.sleep(0)  # a call that fails at once must not keep the others from theirs
                continue
            check(answer == number)
            if self._victim or self._has_been_killed():
                self._answered(pid)

    def _has_been_killed(self) -> bool:
        if not self._note.exists():
            return False
        pid, _, now = self._note.read_text(encoding="ascii").partition(" ")
        self._victim = int(pid or 0)  # it may not have been written yet
        self._killed = self._last = float(now or 0)
        return bool(self._victim)

    def _answered(self, pid: int) -> None:
        now = time.perf_counter()
        self._longest = max(self._longest, now - self._last)
        self._last = now
        self._answering.add(pid)
        if not self._whole.is_set():
            assert self._pool.pids is not None
            pids = self._pool.pids()
            if len(pids) == self._pool.workers and self._victim not in pids and self._answering.issuperset(pids):
                self._whole.set()
                self._back = now - self._killed


async def _die(pool: Pool) -> int:
    try:
        await pool.call(_work.die)
    except Exception as exc:  # noqa: BLE001 - each rival has its own
        return int(getattr(exc, "pid", 0))
    msg = "a call whose worker has been killed has returned"
    raise ValueError(msg)


# What a program holds: its own descriptors, threads and processes, and those of every process under it.


def _possessions() -> dict[str, int]:
    pids = _family()
    return {
        "descriptors": sum(_entries(pid, "fd") for pid in pids),
        "threads": sum(_entries(pid, "task") for pid in pids),
        "python_threads": threading.active_count(),
        "processes": len(pids),
    }


async def _more_than(before: dict[str, int]) -> dict[str, float]:
    """What there is more than before; given a moment, since the system takes one to clear up after a process."""
    for _ in range(100):
        now = _possessions()
        if all(now[name] <= count for name, count in before.items()):
            break
        await asyncio.sleep(0.02)
    return {f"more_{name}": float(max(0, now[name] - count)) for name, count in before.items()}


def _family() -> list[int]:
    parents = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:  # it has just ended
                continue
    family = [os.getpid()]
    for member in family:
        family.extend(pid for pid, parent in parents.items() if parent == member)
    return family


def _entries(pid: int, folder: str) -> int:
    try:
        return len(list(Path("/proc", str(pid), folder).iterdir()))
    except OSError:
        return 0
