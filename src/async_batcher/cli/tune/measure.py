"""Measurements: the function alone, and batchers that are always busy.

::

    costs:   items --one batch at a time--> a worker process: the function alone
    trials:  clients, each with a batch, again and again --> batcher, always busy --> BatchSample

Rules:

- Every batch size is measured over the same items, in order and repeatedly: items may differ.
- Each of these items is processed alone first, in a worker process: one that fails, hangs or kills
  its process can be named.
- A batch is dispatched only when it is full, so that all batches of a trial are of one size.
- Threads are tried inside a worker process: one that hangs there can be killed, and a crash seen.
"""

from __future__ import annotations

import asyncio
import time
from itertools import count, cycle, islice
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from async_batcher import batched, run
from async_batcher.cli._errors import message_of, silenced_logger, summary_of
from async_batcher.cli._worker_function import worker_setup
from async_batcher.cli.tune.alone import measure_alone, run_alone, set_up
from async_batcher.cli.tune.model import (
    MAX_BATCH_SIZE,
    BatchSample,
    config_label,
    measure_trial,
)
from async_batcher.cli.tune.plan import BATCHES_PER_WORKER, next_size
from async_batcher.exceptions import AsyncBatchException, PoolBrokenError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from async_batcher import AsyncBatcher, WorkerPool
    from async_batcher.cli.tune.alone import MeasuredFunction
    from async_batcher.cli.tune.model import BatchCost, Measurement
    from async_batcher.cli.tune.plan import TrialPlan

_WHEN_FULL = 3600.0  # seconds of max_queue_time, for batches that are dispatched only when full
# The share of the time for costs that is for items alone. They take no longer in batches, and few
# sizes are as slow. A batch that would take more than this share is not measured.
_ALONE_SHARE = 1 / 6


class ItemError(Exception):
    """An item, or a batch, failed; the message says in one line which one, and why."""


class FunctionCosts(NamedTuple):
    points: list[Measurement]  # of the function alone, by batch size, from 1
    items: int  # the first ones, which were used and have passed alone
    start_seconds: float  # until a worker process had started and run its first item

    @property
    def costs(self) -> list[BatchCost]:
        return [point.cost for point in self.points]


async def named(label: str, call: Awaitable[Any]) -> Any:
    """Await a call of the user's function.

    Raises:
        ItemError: It failed; ``label`` names the item.
    """
    try:
        return await call
    except (PoolBrokenError, ItemError):  # no item is the cause; or it has been named
        raise
    except Exception as exc:
        why = message_of(exc) if isinstance(exc, AsyncBatchException) else summary_of(exc)
        msg = f"{label}: {why}"
        raise ItemError(msg) from exc


async def measure_costs(
    function: MeasuredFunction,
    items: Sequence[Any],
    labels: Sequence[str],
    pool: WorkerPool,
    *,
    seconds: float,
    say: Callable[[str], None],
) -> FunctionCosts:
    """Measure what a batch costs, in sizes that double as long as there is something to learn.

    It takes ``seconds``, as far as a single item lets it. ``labels`` name the items in messages,
    and ``say`` is called with what is measured next.

    Raises:
        ItemError: An item or a batch failed.
        AsyncBatchException: The worker of ``pool`` cannot be started.
    """
    began = time.perf_counter()
    say(f"{labels[0]}, for the first time")
    # What is imported or cached with the first call counts for no batch.
    await named(labels[0], pool.run(set_up, function.imported))
    await named(labels[0], pool.run(run_alone, function, items[0]))
    now = time.perf_counter()
    start_seconds, end, until = now - began, now + seconds, now + seconds * _ALONE_SHARE
    used = 0
    while used < len(items) and (not used or time.perf_counter() < until):
        say(f"{labels[used]}, alone")
        await named(labels[used], pool.run(run_alone, function, items[used]))
        used += 1
    points: list[Measurement] = []
    size: int | None = 1
    while size is not None:
        now = time.perf_counter()
        share = (end - now) / (MAX_BATCH_SIZE // size).bit_length()  # as for each to come
        call = pool.run(measure_alone, function, items[:used], size, share)
        points.append(await named(_failed_batch(size), call))
        costs = [point.cost for point in points]
        size = next_size(costs, seconds * _ALONE_SHARE) if time.perf_counter() < end else None
        if size is not None:
            say(f"the function alone, batches of {size:,}")
    return FunctionCosts(points, used, start_seconds)


async def measure_batcher(
    function: MeasuredFunction, items: Sequence[Any], plan: TrialPlan, say: Callable[[str], None]
) -> list[Measurement]:
    """Measure a batcher whose workers always have something to do, for each size."""
    slots_freed: list[float] = []
    # Threads are tried in a process in which the set-up has been run.
    has_processes = plan.mode == "processes"
    batcher = batched(
        function,
        executor="process" if has_processes else "thread",
        max_workers=plan.workers,
        setup_worker=worker_setup(function.imported) if has_processes else None,
        max_batch_size=1,
        max_queue_time=_WHEN_FULL,
        on_batch=lambda _: slots_freed.append(time.perf_counter()),
    )
    points = []
    async with batcher:
        # So that each worker has run something.
        await _keep_busy(batcher, items, 1, plan.workers, 0.0, slots_freed)
        for size, seconds in plan.sizes.items():
            say(f"{config_label(plan.mode, plan.workers)}, batches of {size:,}")
            batcher.max_batch_size = size
            slots_freed.clear()
            began = time.perf_counter()
            until = began + seconds
            batches = await _keep_busy(batcher, items, size, plan.workers, until, slots_freed)
            points.append(measure_trial(plan.mode, plan.workers, size, began, until, batches))
    return points


async def _keep_busy(
    batcher: AsyncBatcher[Any, Any],
    items: Sequence[Any],
    size: int,
    workers: int,
    until: float,
    slots_freed: Sequence[float],
) -> list[BatchSample]:
    """Run batches until then.

    A batch is dispatched when a slot is free: the first ones at once, each later one when another
    has ended, in order. ``slots_freed`` has these times by a finer clock than that of an event
    loop, which may count milliseconds (uvloop's does).
    """
    source = cycle(items)
    samples: list[BatchSample] = []
    began = time.perf_counter()
    numbers = count()

    async def client() -> None:
        now = began
        while now < until or now == began:
            number = next(numbers)
            await named(_failed_batch(size), _run_batch(batcher, list(islice(source, size))))
            dispatched = began if number < workers else slots_freed[number - workers]
            now = time.perf_counter()
            samples.append(BatchSample(now, size, now - dispatched))

    await asyncio.gather(*(client() for _ in range(BATCHES_PER_WORKER * workers)))
    return samples


async def _run_batch(batcher: AsyncBatcher[Any, Any], batch: Sequence[Any]) -> None:
    """Run a full batch, as single calls give it."""
    futures = [batcher.submit(item) for item in batch]
    try:
        await futures[-1]  # all of a batch are resolved together
        for future in futures:
            future.result()
    finally:
        for future in futures:
            if not future.cancel() and not future.cancelled():
                future.exception()  # retrieved, so that asyncio does not log it


def measure_threads(
    function: MeasuredFunction,
    items: Sequence[Any],
    plan: TrialPlan,
    loop: Literal["asyncio", "uvloop"],
) -> list[Measurement]:
    """Measure threads in the worker process in which the function alone was measured."""
    with silenced_logger():
        return run(measure_batcher(function, items, plan, lambda _: None), loop=loop)


def _failed_batch(size: int) -> str:
    return f"a batch of {size:,} items failed, though each of them had passed alone"
