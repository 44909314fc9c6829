"""Overload: more items than can be processed, from clients who wait for so long and no longer."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from typing import TYPE_CHECKING, Any

from _memory import give_back, resident

if TYPE_CHECKING:
    from _protocol import Front

    Load = dict[str, Any]

_CLIENTS = 96  # at a time, to see what the batcher can do at most: three times as many items as two workers take
_PAYLOAD = 1000  # bytes of an item


async def overload(front: Front, load: Load) -> dict[str, float]:
    """Arrivals at so many times the capacity, planned ahead (an open loop): what comes in time, and what memory it takes.

    An answer counts if it is there within ``patience`` of the time that the item was planned to be sent at. A client who has
    had none by then has gone, which a batcher without deadlines is not told.
    """
    process: Any = front.process
    capacity = await _capacity(process, load["settle"])
    plan = random.Random(load["seed"])  # noqa: S311 - arrivals
    in_time = [0] * load["seconds"]
    memory: list[float] = []
    late = unanswered = 0
    give_back()
    began = time.perf_counter()
    before = resident()

    async def client(number: int, planned: float) -> None:
        nonlocal late, unanswered
        try:
            answer = await process((number, bytes(_PAYLOAD)))
        except Exception:  # noqa: BLE001 - a deadline, a full queue, the end
            unanswered += 1
            return
        if answer != number:
            msg = "a call got a wrong answer"
            raise ValueError(msg)
        second = int(time.perf_counter() - began)
        if time.perf_counter() - planned <= load["patience"] and second < load["seconds"]:
            in_time[second] += 1
        else:
            late += 1

    tasks: set[asyncio.Task[None]] = set()
    planned, number = began, 0
    while planned < began + load["seconds"]:
        wait = planned - time.perf_counter()
        if wait > 0:
            await asyncio.sleep(wait)
        while len(memory) < int(planned - began):
            memory.append((resident() - before) / 1e6)
        task = asyncio.create_task(client(number, planned))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        planned += plan.expovariate(load["times_capacity"] * capacity)
        number += 1
    memory.append((resident() - before) / 1e6)
    for task in tasks:
        task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await asyncio.gather(*tasks, return_exceptions=True)
    good = sum(in_time)
    return {
        "seconds_per_good_item": load["seconds"] / max(1, good),
        "capacity": capacity,
        "goodput": good / (capacity * load["seconds"]),
        "late": float(late),
        "unanswered": float(unanswered),
        "memory_growth": memory[-1] - memory[0],
        **{f"good_{second}": count / capacity for second, count in enumerate(in_time)},
        **{f"memory_{second}": grown for second, grown in enumerate(memory)},
    }


async def _capacity(process: Any, seconds: float) -> float:
    """Items that are processed in a second when there are always enough of them (a closed loop)."""
    done = 0
    end = time.perf_counter() + 2 * seconds
    middle = end - seconds

    async def client() -> None:
        nonlocal done
        while (now := time.perf_counter()) < end:
            with contextlib.suppress(TimeoutError):  # of the first ones, while the workers start
                await process((0, b""))
                done += now > middle

    await asyncio.gather(*[client() for _ in range(_CLIENTS)])
    return done / (time.perf_counter() - middle)
