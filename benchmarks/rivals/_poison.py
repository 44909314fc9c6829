"""A bad item in a batch: who is told what, and how soon."""

from __future__ import annotations

import asyncio
import time
from statistics import median
from typing import TYPE_CHECKING, Any

import _jobs
from _front_end import warm_up
from _rival import check

if TYPE_CHECKING:
    from _rival import Front

    Load = dict[str, Any]

_DEADLINE = 5.0  # seconds after which a caller counts as one that is never told


async def poison(front: Front, load: Load) -> dict[str, float]:
    """One batch after another without a bad item, and with one: what each of its callers is told, and how soon all know."""
    job, size, trips = _jobs.find(load), load["clients"], load["trips"]
    await warm_up(front, load)
    healthy, seconds, hurt, never_told = [], [], 0, 0
    for trip in range(trips):
        numbers = list(range(size))
        taken, errors, waiting = await _told(front, job, numbers)
        if errors or waiting:
            msg = "a batch without a bad item has failed"
            raise ValueError(msg)
        healthy.append(taken)
        guilty = trip * size // trips  # each time elsewhere in the batch
        numbers[guilty] = -1
        taken, errors, waiting = await _told(front, job, numbers)
        seconds.append(taken)
        error = errors.pop(guilty, None)
        if guilty not in waiting and not isinstance(error, ValueError):
            msg = f"the bad item's caller got {error!r}"
            raise ValueError(msg)
        hurt, never_told = hurt + len(errors), never_told + len(waiting)
    return {
        "seconds": median(seconds),
        "healthy_seconds": median(healthy),
        "hurt": hurt / trips,
        "never_told": never_told / trips,
    }


async def _told(front: Front, job: _jobs.Job, numbers: list[int]) -> tuple[float, dict[int, BaseException], set[int]]:
    """Give one batch; seconds until all of its callers know, the errors by their place in it, and who waits in vain."""
    items = [job.item(number) for number in numbers]
    began = time.perf_counter()
    callers = [asyncio.ensure_future(front.process(item)) for item in items]
    _, late = await asyncio.wait(callers, timeout=_DEADLINE)
    seconds = time.perf_counter() - began
    waiting = {place for place, caller in enumerate(callers) if caller in late}
    for caller in late:
        caller.cancel()
    told = [place for place in range(len(items)) if place not in waiting]
    errors = {place: error for place in told if (error := callers[place].exception()) is not None}
    answered = [place for place in told if place not in errors]
    check([callers[place].result() for place in answered] == [job.answer(items[place]) for place in answered])
    return seconds, errors, waiting
