"""A bad item in a batch: which callers get an error, and when every caller is notified."""

from __future__ import annotations

import asyncio
import time
from statistics import median
from typing import TYPE_CHECKING, Any

from benchmarks.libraries.base import check
from benchmarks.scenarios import workloads
from benchmarks.scenarios.front_end import warm_up

if TYPE_CHECKING:
    from benchmarks.libraries.base import BatcherAdapter

    Load = dict[str, Any]

_TIMEOUT = 5.0  # seconds until a caller counts as never notified


async def bad_item(batcher: BatcherAdapter, load: Load) -> dict[str, float]:
    """Run batches in turn without and with a bad item, each time at another position.

    Returns:
        ``seconds``: until every caller of a batch with a bad item has a result or an error;
        ``healthy_seconds``: for a batch without one; ``hurt``: other callers per batch that got
        an error; ``never_told``: callers per batch that got neither.
    """
    workload, size, trips = workloads.find(load), load["clients"], load["trips"]
    await warm_up(batcher, load)
    healthy, seconds, hurt, never_notified = [], [], 0, 0
    for trip in range(trips):
        numbers = list(range(size))
        taken, errors, pending = await _run_batch(batcher, workload, numbers)
        if errors or pending:
            msg = "a batch without a bad item has failed"
            raise ValueError(msg)
        healthy.append(taken)
        position = trip * size // trips
        numbers[position] = -1
        taken, errors, pending = await _run_batch(batcher, workload, numbers)
        seconds.append(taken)
        error = errors.pop(position, None)
        if position not in pending and not isinstance(error, ValueError):
            msg = f"the bad item's caller got {error!r}"
            raise ValueError(msg)
        hurt, never_notified = hurt + len(errors), never_notified + len(pending)
    return {
        "seconds": median(seconds),
        "healthy_seconds": median(healthy),
        "hurt": hurt / trips,
        "never_told": never_notified / trips,
    }


async def _run_batch(
    batcher: BatcherAdapter, workload: workloads.Workload, numbers: list[int]
) -> tuple[float, dict[int, BaseException], set[int]]:
    """Run one batch.

    Returns:
        Seconds until every caller is notified, the errors by position, and the positions of
        callers that are still pending.
    """
    items = [workload.item(number) for number in numbers]
    began = time.perf_counter()
    callers = [asyncio.ensure_future(batcher.process(item)) for item in items]
    _, late = await asyncio.wait(callers, timeout=_TIMEOUT)
    seconds = time.perf_counter() - began
    pending = {position for position, caller in enumerate(callers) if caller in late}
    for caller in late:
        caller.cancel()
    errors = {}
    for position, (item, caller) in enumerate(zip(items, callers, strict=True)):
        if position in pending:
            continue
        error = caller.exception()
        if error is None:
            check(caller.result() == workload.result(item))
        else:
            errors[position] = error
    return seconds, errors, pending
