"""Measurements: what a batch costs by itself, and what a real batcher makes of it.

::

    costs:   items --one batch at a time--> batcher --> a worker process: TimedFunction --> seconds
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
from statistics import median
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from async_batcher import batched, run
from async_batcher.cli._errors import message_of, one_line, silenced_logger
from async_batcher.cli._item_processor import call_batch, worker_setup
from async_batcher.cli.tune.model import (
    MAX_BATCH_SIZE,
    BatchCost,
    BatchSample,
    config_label,
    measurement,
    next_size,
)
from async_batcher.cli.tune.plan import BATCHES_PER_WORKER
from async_batcher.cli.tune.timed import TimedFunction
from async_batcher.exceptions import AsyncBatchException, PoolBrokenError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from async_batcher import AsyncBatcher, WorkerPool
    from async_batcher.cli.tune.model import Measurement
    from async_batcher.cli.tune.plan import TrialPlan
    from async_batcher.cli.tune.timed import MeasuredFunction

_WHEN_FULL = 3600.0  # seconds of max_queue_time, for batches that are dispatched only when full
_ROUNDS = 5  # over the same items; the median of five tolerates two that were disturbed
_MAX_INLINE_BATCHES = 10_000  # where a batch may take no time: enough for any quantile
# A part of the time for costs, 1 / 6, is for items alone. They take no longer in batches, and few
# sizes are as slow.
_ALONE = 6


class ItemError(Exception):
    """An item, or a batch of ``size`` items, failed; the message says why, in one line.

    ``label`` names the item. None: all items of the batch had been processed alone without failure.
    """

    def __init__(self, why: str, *, label: str | None, size: int) -> None:
        super().__init__(why)
        self.label = label
        self.size = size


class FunctionCosts(NamedTuple):
    """What the function takes by itself."""

    costs: list[BatchCost]  # by batch size, from 1
    items: int  # the first ones, which were used and have passed alone
    start_seconds: float  # until a worker process had started and run its first item


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
    batcher: AsyncBatcher[Any, float] = batched(
        TimedFunction(function),
        executor=pool,
        setup_worker=worker_setup(function.imported),
        max_batch_size=1,
        max_queue_time=_WHEN_FULL,
    )
    async with batcher:
        # What is imported or cached with the first call counts for no batch.
        await _run_batch(batcher, items[:1], label=labels[0])
        now = time.perf_counter()
        start_seconds, end, until = now - began, now + seconds, now + seconds / _ALONE
        alone: list[float] = []
        for label, item in zip(labels, items, strict=True):
            say(f"{label}, alone")
            alone += await _run_batch(batcher, [item], label=label)
            if time.perf_counter() > until:
                break
        used = items[: len(alone)]
        rounds = [sum(alone) / len(alone)]
        costs: list[BatchCost] = []
        size: int | None = 1
        while size is not None:
            batcher.max_batch_size = size
            now = time.perf_counter()
            until = now + (end - now) / (MAX_BATCH_SIZE // size).bit_length()  # as for each to come
            while not rounds or (len(rounds) < _ROUNDS and time.perf_counter() < until):
                rounds.append(await _mean_seconds(batcher, used, size))
            costs.append(BatchCost(size, max(1e-9, median(rounds))))
            rounds = []
            size = next_size(costs, seconds / _ALONE) if time.perf_counter() < end else None
            if size is not None:
                say(f"the function alone, batches of {size:,}")
    return FunctionCosts(costs, len(used), start_seconds)


async def _mean_seconds(
    batcher: AsyncBatcher[Any, float], items: Sequence[Any], size: int
) -> float:
    """Return the mean cost of the batches that hold all items."""
    batches = -(-len(items) // size)
    source = cycle(items)
    seconds = 0.0
    for _ in range(batches):
        seconds += (await _run_batch(batcher, _next(source, size)))[0]
    return seconds / batches


def _next(source: Iterator[Any], size: int) -> list[Any]:
    return list(islice(source, size))


async def _run_batch(
    batcher: AsyncBatcher[Any, Any], batch: Sequence[Any], *, label: str | None = None
) -> list[Any]:
    """Return the results of a full batch.

    Raises:
        ItemError: An item failed, or all of them.
    """
    futures = [batcher.submit(item) for item in batch]
    try:
        await futures[-1]  # all of a batch are resolved together
        return [future.result() for future in futures]
    except PoolBrokenError:  # no item is the cause
        raise
    except Exception as exc:
        raise ItemError(_why(exc), label=label, size=len(batch)) from exc
    finally:
        for future in futures:
            if not future.cancel() and not future.cancelled():
                future.exception()  # retrieved, so that asyncio does not log it


def _why(exc: Exception) -> str:
    if isinstance(exc, AsyncBatchException):
        return message_of(exc)
    return one_line(exc)


async def measure_batcher(
    function: MeasuredFunction, items: Sequence[Any], plan: TrialPlan, say: Callable[[str], None]
) -> list[Measurement]:
    """Measure a batcher whose workers always have something to do, for each size.

    Raises:
        ItemError: A batch failed.
    """
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
            points.append(measurement(plan.mode, plan.workers, size, began, until, batches))
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
            await _run_batch(batcher, _next(source, size))
            dispatched = began if number < workers else slots_freed[number - workers]
            now = time.perf_counter()
            samples.append(BatchSample(now, size, now - dispatched))

    await asyncio.gather(*(client() for _ in range(BATCHES_PER_WORKER * workers)))
    return samples


def measure_here(
    function: MeasuredFunction,
    items: Sequence[Any],
    plan: TrialPlan,
    loop: Literal["asyncio", "uvloop"],
) -> list[Measurement]:
    """Measure threads, or no batcher, in the worker process in which costs were measured.

    Raises:
        ItemError: A batch failed.
    """
    with silenced_logger():
        if plan.mode != "inline":
            return run(measure_batcher(function, items, plan, lambda _: None), loop=loop)
        return [_measure_inline(function, items, *size) for size in plan.sizes.items()]


def _measure_inline(
    function: MeasuredFunction, items: Sequence[Any], size: int, seconds: float
) -> Measurement:
    source = cycle(items)
    samples: list[BatchSample] = []
    began = now = time.perf_counter()
    until = began + seconds
    while now < until and len(samples) < _MAX_INLINE_BATCHES:
        batch = _next(source, size)
        before = time.perf_counter()
        try:
            call_batch(function, batch)
        except Exception as exc:
            raise ItemError(_why(exc), label=None, size=size) from exc
        now = time.perf_counter()
        samples.append(BatchSample(now, size, now - before))
    return measurement("inline", 1, size, began, min(now, until), samples)
