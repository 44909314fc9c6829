"""Trials: what a batch costs by itself, and what a real batcher makes of it.

::

    costs:   items --one batch at a time--> batcher --> one worker process: Timed --> seconds, taken there
    trials:  clients, each with a batch of items, again and again --> batcher, always busy --> Ended --> _tuning.point

Rules:

- Every size of batch is measured over the same items, in their order, round and round: items may differ by as much as they like.
- Each of these items has gone through the function alone, in a worker process, before any other use is made of it: what fails,
  hangs or kills its process is known by its place.
- A batch leaves only when it is full (the window is an hour), so that all batches of a trial are of one size.
- Threads are tried inside a worker process: one that hangs there can be ended, and a crash is told.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from itertools import count, cycle, islice
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from async_batcher._formats import Setup
from async_batcher._plan import BATCHES_PER_WORKER
from async_batcher._serialization.exception_text import one_line
from async_batcher._timed import Timed
from async_batcher._tuning import MAX_BATCH_SIZE, Cost, Ended, Point, next_size, point, way
from async_batcher._worker.results import normalize_results
from async_batcher.batcher import batched
from async_batcher.exceptions import AsyncBatchException, PoolBrokenError
from async_batcher.loops import run

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import Literal

    from async_batcher._plan import Plan
    from async_batcher._pool.pool import WorkerPool
    from async_batcher._timed import Called
    from async_batcher.batcher import AsyncBatcher
    from async_batcher.stats import BatchRecord

A = TypeVar("A")

_WHEN_FULL = 3600.0  # seconds; the window of batches that are to leave only when they are full
_ROUNDS = 5  # over the same items; the median of five bears two that were disturbed
_MOST_BATCHES = 10_000  # inline, where a batch may take no time at all: enough for any quantile
_ALONE = 6  # a part of the time for costs, 1 / 6, is for items alone; they take no longer in batches, and few sizes are as slow


class ItemError(Exception):
    """An item, or a batch, failed; the message says why, in one line.

    Attributes:
        place: Of the item in the input; None: a batch of items that had passed alone.
        size: Items in the batch.
    """

    def __init__(self, why: str, *, place: str | None, size: int) -> None:
        """Keep what is known."""
        super().__init__(why)
        self.place = place
        self.size = size


class Costs(NamedTuple):
    """What the function takes by itself.

    Attributes:
        costs: By the size of the batch, from 1.
        items: So many, the first ones, were used, and have passed alone.
        start_seconds: Until a worker process had started and run its first item.
    """

    costs: list[Cost]
    items: int
    start_seconds: float


async def measure_costs(
    called: Called, items: Sequence[Any], places: Sequence[str], pool: WorkerPool, *, seconds: float, say: Callable[[str], None]
) -> Costs:
    """Measure what a batch costs, in sizes that double for as long as there is something to learn.

    Args:
        called: The user's function.
        items: At least one.
        places: How each is called in messages.
        pool: Of one worker.
        seconds: That it may take, as far as one item lets it.
        say: Told what is measured, before it is.

    Raises:
        ItemError: An item or a batch failed.
        AsyncBatchException: The worker cannot be started.
    """
    began = time.perf_counter()
    say(f"{places[0]}, for the first time")
    batcher: AsyncBatcher[Any, float] = batched(
        Timed(called), executor=pool, setup_worker=Setup(called.target), max_batch_size=1, max_queue_time=_WHEN_FULL
    )
    async with batcher:
        await _one(batcher, items[:1], place=places[0])  # so what is imported or cached with the first call counts for no batch
        start_seconds = time.perf_counter() - began
        end = time.perf_counter() + seconds
        alone: list[float] = []
        until = time.perf_counter() + seconds / _ALONE
        for place, item in zip(places, items, strict=True):
            say(f"{place}, alone")
            alone += await _one(batcher, [item], place=place)
            if time.perf_counter() > until:
                break
        used = items[: len(alone)]
        rounds = [sum(alone) / len(alone)]
        costs: list[Cost] = []
        size: int | None = 1
        while size is not None:
            batcher.max_batch_size = size
            now = time.perf_counter()
            until = now + (end - now) / (MAX_BATCH_SIZE // size).bit_length()  # as much as for each size to come
            while not rounds or (len(rounds) < _ROUNDS and time.perf_counter() < until):
                rounds.append(await _round(batcher, used, size))
            costs.append(Cost(size, max(1e-9, median(rounds))))
            rounds = []
            size = next_size(costs, seconds / _ALONE) if time.perf_counter() < end else None
            if size is not None:
                say(f"the function alone, batches of {size:,}")
    return Costs(costs, len(used), start_seconds)


async def _round(batcher: AsyncBatcher[Any, float], items: Sequence[Any], size: int) -> float:
    """The mean cost of the batches that hold all items."""
    batches = -(-len(items) // size)
    source = cycle(items)
    return sum([(await _one(batcher, list(islice(source, size))))[0] for _ in range(batches)]) / batches


async def _one(batcher: AsyncBatcher[Any, A], batch: Sequence[Any], *, place: str | None = None) -> list[A]:
    """The answers of a batch.

    Raises:
        ItemError: An item failed, or all of them.
    """
    waiting = [batcher.submit(item) for item in batch]
    try:
        await waiting[-1]  # which ends together with the others
        return [future.result() for future in waiting]
    except PoolBrokenError:  # no item is to be blamed
        raise
    except Exception as exc:
        raise ItemError(_why(exc), place=place, size=len(batch)) from exc
    finally:
        for future in waiting:
            if not future.done():
                future.cancel()
            elif not future.cancelled():
                future.exception()  # seen, or asyncio complains


def _why(exc: Exception) -> str:
    return str(exc) if isinstance(exc, AsyncBatchException) else one_line(exc)


async def try_out(called: Called, items: Sequence[Any], plan: Plan, say: Callable[[str], None]) -> list[Point]:
    """What a batcher does whose workers always have something to do; a point for each size.

    Raises:
        ItemError: A batch failed.
    """
    slots_freed: list[float] = []

    def note(_: BatchRecord) -> None:
        slots_freed.append(time.perf_counter())

    batcher = batched(
        called,
        executor="thread" if plan.mode == "threads" else "process",
        max_workers=plan.workers,
        setup_worker=Setup(called.target) if plan.mode == "processes" else None,  # threads are tried where it has been run
        max_batch_size=1,
        max_queue_time=_WHEN_FULL,
        on_batch=note,
    )
    points = []
    async with batcher:
        await _keep_busy(batcher, items, 1, plan.workers, 0.0, slots_freed)  # so each worker has run something
        for size, seconds in plan.sizes.items():
            say(f"{way(plan.mode, plan.workers)}, batches of {size:,}")
            batcher.max_batch_size = size
            slots_freed.clear()
            began = time.perf_counter()
            ended = await _keep_busy(batcher, items, size, plan.workers, began + seconds, slots_freed)
            points.append(point(plan.mode, plan.workers, size, began, began + seconds, ended))
    return points


async def _keep_busy(
    batcher: AsyncBatcher[Any, Any], items: Sequence[Any], size: int, workers: int, until: float, slots_freed: Sequence[float]
) -> list[Ended]:
    """Run batches until then; what they took.

    A batch leaves when a slot is free: the first ones at once, each later one when another has ended, in their order. That is
    noted here, by a finer clock than that of an event loop, which may know milliseconds only (uvloop's does).
    """
    source = cycle(items)
    ended: list[Ended] = []
    began = time.perf_counter()
    places = count()

    async def client() -> None:
        now = began
        while now < until or now == began:
            place = next(places)
            await _one(batcher, list(islice(source, size)))
            left = began if place < workers else slots_freed[place - workers]
            now = time.perf_counter()
            ended.append(Ended(now, size, now - left))

    await asyncio.gather(*(client() for _ in range(BATCHES_PER_WORKER * workers)))
    return ended


async def try_in_worker(
    called: Called, items: Sequence[Any], plan: Plan, pool: WorkerPool, loop: Literal["asyncio", "uvloop"]
) -> list[Point]:
    """The same with threads, or without a batcher, in the worker process in which costs were measured.

    Raises:
        ItemError: A batch failed.
        WorkerDiedError: The process ended.
    """
    found = await pool.run(_try_here, called, items, plan, loop)
    if not isinstance(found, list):
        why, size = found
        raise ItemError(why, place=None, size=size)
    return found


def _try_here(
    called: Called, items: Sequence[Any], plan: Plan, loop: Literal["asyncio", "uvloop"]
) -> list[Point] | tuple[str, int]:
    """Points, or why a batch of how many items failed."""
    try:
        with quiet():
            if plan.mode == "inline":
                return [_try_inline(called, items, size, seconds) for size, seconds in plan.sizes.items()]
            return run(try_out(called, items, plan, _say_nothing), loop=loop)
    except ItemError as exc:
        return str(exc), exc.size


def _try_inline(called: Called, items: Sequence[Any], size: int, seconds: float) -> Point:
    """What the function does, called with one batch after the other."""
    source = cycle(items)
    ended: list[Ended] = []
    began = now = time.perf_counter()
    until = began + seconds
    while now < until and len(ended) < _MOST_BATCHES:
        batch = list(islice(source, size))
        before = time.perf_counter()
        try:
            normalize_results(called(batch), size)
        except Exception as exc:
            raise ItemError(_why(exc), place=None, size=size) from exc
        now = time.perf_counter()
        ended.append(Ended(now, size, now - before))
    return point("inline", 1, size, began, min(now, until), ended)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """What fails is told by the command, in its one line, and not by the logger."""
    logger = logging.getLogger("async_batcher")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)


def _say_nothing(_: str) -> None:
    pass
