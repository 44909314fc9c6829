"""The questions to a pool of worker processes: each runs one round over a rival's `Pool` and says what it measured.

Every round begins with a new pool, all of whose workers have answered before anything is counted. A wrong answer is an error, not
a figure.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import threading
import time
from pathlib import Path
from statistics import mean, median
from typing import TYPE_CHECKING, Any

import _work

if TYPE_CHECKING:
    from collections.abc import Callable

    from _protocol import Pool

    Load = dict[str, Any]

_TICK = 0.001  # seconds between two looks at how late the loop is; the system's timers are no finer
_PATIENCE = 60.0  # seconds for a pool to get ready
_KILLS_BEFORE = 20  # after which everything that is made on demand has been made


async def round_trip(pool: Pool, load: Load) -> dict[str, float]:
    """One call at a time, there and back."""
    payloads = [PAYLOADS[load["payload"]](seed) for seed in (1, 2)]  # in turn, so that an answer of the call before shows
    await _get_ready(pool)
    seconds = []
    for number in range(-load["warm_up"], load["trips"]):
        payload = payloads[number % 2]
        began = time.perf_counter()
        answer = await pool.call(_work.same, payload)
        seconds.append(time.perf_counter() - began)
        _check(_are_equal(answer, payload))
        del answer
    seconds = seconds[load["warm_up"] :]
    return {"seconds": median(seconds), "mean_seconds": mean(seconds), "worst_seconds": max(seconds)}


async def cores_busy(pool: Pool, load: Load) -> dict[str, float]:
    """Batches that only keep a core busy, so many in flight at any time (a closed loop)."""
    batch, total = load["batch_ms"] / 1e3, load["batches"]
    await _get_ready(pool)
    for number in range(load["warm_up"]):
        await pool.call(_work.spin, number, batch)
    numbers = iter(range(total))
    answers: list[tuple[int, float]] = []

    async def client() -> None:
        for number in numbers:
            answers.append(await pool.call(_work.spin, number, batch))  # noqa: PERF401 - as a client does

    began = time.perf_counter()
    await asyncio.gather(*[client() for _ in range(load["in_flight"])])
    seconds = time.perf_counter() - began
    _check(sorted(number for number, _ in answers) == list(range(total)))
    cores = load["workers"] * seconds
    return {
        "seconds_per_batch": seconds / total,
        "busy": total * batch / cores,
        "processor": sum(processor for _, processor in answers) / cores,
    }


async def hold_up(pool: Pool, load: Load) -> dict[str, float]:
    """How late a timer of a millisecond is at worst while one large array is out and back."""
    payloads = [_array(load["megabytes"], seed) for seed in (1, 2)]
    await _get_ready(pool)
    worst, seconds, idle = [], [], []
    for number in range(1 + load["trips"]):
        ticker = _Ticker()
        await asyncio.sleep(10 * _TICK)
        ticker.worst = 0.0
        began = time.perf_counter()
        answer = await pool.call(_work.same, payloads[number % 2])
        seconds.append(time.perf_counter() - began)
        await asyncio.sleep(3 * _TICK)  # what it leaves to be done on the loop counts too
        worst.append(ticker.worst)
        ticker.worst = 0.0
        await asyncio.sleep(seconds[-1])  # the same with nothing to do: what the machine itself does to a timer
        idle.append(ticker.worst)
        ticker.stop()
        _check(_are_equal(answer, payloads[number % 2]))
        del answer
    return {
        "hold_up_seconds": median(worst[1:]),
        "first_hold_up_seconds": worst[0],
        "idle_seconds": median(idle[1:]),
        "trip_seconds": median(seconds[1:]),
    }


async def successor(pool: Pool, load: Load) -> dict[str, float]:
    """From an idle worker that is killed to a pool that is whole again."""
    assert pool.pids is not None
    assert pool.recover is not None
    await _get_ready(pool)
    seconds = []
    for _ in range(load["kills"]):
        pid = pool.pids()[0]
        began = time.perf_counter()
        os.kill(pid, signal.SIGKILL)
        await pool.recover(pid)
        seconds.append(time.perf_counter() - began)
        _check(pid not in pool.pids())
        _check(len(pool.pids()) == pool.workers)
        _check(await pool.call(_work.same, pid) == pid)
    return {"seconds": median(seconds), "worst_seconds": max(seconds)}


async def kills(pool: Pool, load: Load) -> dict[str, float]:
    """Workers killed one after the other, every second one while it runs a batch: what is left of them."""
    assert pool.pids is not None
    assert pool.recover is not None
    await _get_ready(pool)
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
        _check(await pool.call(_work.same, number) == number)
    more = await _more_than(before)
    if any(more.values()):
        msg = f"{load['kills']} killed workers have left something behind: {more}"
        raise ValueError(msg)
    return {"seconds": median(seconds[_KILLS_BEFORE:]), "worst_seconds": max(seconds[_KILLS_BEFORE:]), **more}


async def _die(pool: Pool) -> int:
    try:
        await pool.call(_work.die)
    except Exception as exc:  # noqa: BLE001 - each rival has its own
        return int(getattr(exc, "pid", 0))
    msg = "a call whose worker has been killed has returned"
    raise ValueError(msg)


async def _get_ready(pool: Pool) -> None:
    """Have every worker answer, and see that they are as many as they should be."""
    seen: set[int] = set()
    async with asyncio.timeout(_PATIENCE):
        while len(seen) < pool.workers:
            seen.update(await asyncio.gather(*[pool.call(_work.hold, 0.02) for _ in range(pool.workers)]))
    _check(len(seen) == pool.workers)


class _Ticker:
    """A timer on the loop that goes off again and again, and knows by how much it was late at worst."""

    def __init__(self) -> None:
        self.worst = 0.0  # seconds
        self._loop = asyncio.get_running_loop()
        self._wait(time.perf_counter())

    def stop(self) -> None:
        self._timer.cancel()

    def _wait(self, now: float) -> None:
        self._due = now + _TICK
        self._timer = self._loop.call_later(_TICK, self._tick)

    def _tick(self) -> None:
        now = time.perf_counter()
        self.worst = max(self.worst, now - self._due)
        self._wait(now)


# What is sent.


def _array(megabytes: float, seed: int) -> Any:
    import numpy as np

    return np.random.default_rng(seed).random(int(megabytes * 1e6) // 8)


PAYLOADS: dict[str, Callable[[int], Any]] = {
    "64 small ints": lambda seed: list(range(seed, seed + 64)),
    "1 MB array": lambda seed: _array(1, seed),
    "10 MB array": lambda seed: _array(10, seed),
    "64 x 100 kB of bytes": lambda seed: [random.Random(64 * seed + i).randbytes(100_000) for i in range(64)],  # noqa: S311
}


def _are_equal(answer: Any, expected: Any) -> bool:
    if isinstance(expected, list):
        return bool(answer == expected)
    return bool(type(answer) is type(expected) and answer.dtype == expected.dtype and (answer == expected).all())


def _check(is_right: bool) -> None:  # noqa: FBT001 - reads as a sentence
    if not is_right:
        msg = "a call got a wrong answer, or a pool has not the workers that it should have"
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
