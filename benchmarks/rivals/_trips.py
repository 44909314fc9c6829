"""The questions about trips to a pool of worker processes: what they cost, and what they leave of the cores and the loop.

Each runs one round over a rival's `Pool` and says what it measured. Every round begins with a new pool, all of whose workers have
answered before anything is counted. A wrong answer is an error, not a figure.
"""

from __future__ import annotations

import asyncio
import time
from statistics import mean, median
from typing import TYPE_CHECKING, Any

import _work
from _payloads import ANEW, PAYLOADS, are_equal, array
from _ready import get_ready
from _rival import check

if TYPE_CHECKING:
    from _rival import Pool

    Load = dict[str, Any]

_IDLE = 0.2  # seconds at most of a look at the loop with nothing to do
_TICK = 0.001  # seconds between two looks at how late the loop is; the system's timers are no finer


async def round_trip(pool: Pool, load: Load) -> dict[str, float]:
    """One call at a time, there and back."""
    function = _work.anew if load["payload"] == ANEW else _work.same
    payloads = [PAYLOADS[load["payload"]](seed) for seed in (1, 2)]  # in turn, so that an answer of the call before shows
    await get_ready(pool)
    seconds = []
    for number in range(-load["warm_up"], load["trips"]):
        payload = payloads[number % 2]
        began = time.perf_counter()
        answer = await pool.call(function, payload)
        seconds.append(time.perf_counter() - began)
        check(are_equal(answer, payload))
        del answer
    seconds = seconds[load["warm_up"] :]
    return {"seconds": median(seconds), "mean_seconds": mean(seconds), "worst_seconds": max(seconds)}


async def cores_busy(pool: Pool, load: Load) -> dict[str, float]:
    """Batches that only keep a core busy, so many in flight at any time (a closed loop), until all or the time are spent.

    ``busy`` is the efficiency against perfect scaling: the batches' own time, of the time of all workers; 1.0 is as if nothing
    but the batches took any time, on as many cores as there are workers. ``processor`` is what the system gave the batches of it.
    """
    batch, numbers = load["batch_ms"] / 1e3, iter(range(load["batches"]))
    await get_ready(pool)
    for number in range(load["warm_up"]):
        await pool.call(_work.spin, number, batch)
    answers: list[tuple[int, float]] = []

    async def client() -> None:
        while time.perf_counter() < until and (number := next(numbers, None)) is not None:
            answers.append(await pool.call(_work.spin, number, batch))

    began = time.perf_counter()
    until = began + load["seconds"]
    await asyncio.gather(*[client() for _ in range(load["in_flight"])])
    seconds = time.perf_counter() - began
    total = next(numbers, load["batches"])
    check(sorted(number for number, _ in answers) == list(range(total)))
    cores = load["workers"] * seconds
    return {
        "seconds_per_batch": seconds / total,
        "busy": total * batch / cores,
        "processor": sum(processor for _, processor in answers) / cores,
    }


async def hold_up(pool: Pool, load: Load) -> dict[str, float]:
    """How late a timer of a millisecond is at worst while one large array is out and back."""
    payloads = [array(load["megabytes"], seed) for seed in (1, 2)]
    await get_ready(pool)
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
        await asyncio.sleep(min(_IDLE, seconds[-1]))  # the same with nothing to do: what the machine itself does to a timer
        idle.append(ticker.worst)
        ticker.stop()
        check(are_equal(answer, payloads[number % 2]))
        del answer
    return {
        "hold_up_seconds": median(worst[1:]),
        "first_hold_up_seconds": worst[0],
        "idle_seconds": median(idle[1:]),
        "trip_seconds": median(seconds[1:]),
    }


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
