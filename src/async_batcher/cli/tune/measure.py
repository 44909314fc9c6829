"""Measurements: the function alone, and batchers that some number of clients call.

::

    costs:   items --one batch at a time--> a worker process: the function alone
    trials:  clients, each with one item, again and again --> batcher --> Measurement

Rules:

- Every batch size is measured over the same items, in order and repeatedly: items may differ.
- Each of these items is processed alone first, in a worker process: one that fails, hangs or kills
  its process can be named.
- The batchers of worker processes are started once for each number of workers.
- Threads are tried inside a worker process: one that hangs there can be killed, and a crash seen.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from itertools import cycle
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from async_batcher import batched, run
from async_batcher._serialization.exception_text import one_line
from async_batcher.cli._errors import message_of, silenced_logger
from async_batcher.cli._worker_function import worker_setup
from async_batcher.cli.tune.alone import measure_alone, run_alone, set_up
from async_batcher.cli.tune.model import MAX_BATCH_SIZE, BatchSample, evaluate_trial
from async_batcher.cli.tune.plan import next_size
from async_batcher.exceptions import AsyncBatchException, PoolBrokenError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from async_batcher import AsyncBatcher, WorkerPool
    from async_batcher._batching.records.batch_cost import BatchCost
    from async_batcher.cli.tune.alone import MeasuredFunction
    from async_batcher.cli.tune.model import Config, Measurement, Trial
    from async_batcher.stats import BatchRecord

# The share of the time for costs that is for items alone. They take no longer in batches, and few
# sizes are as slow. A batch that would take more than this share is not measured.
_ALONE_SHARE = 1 / 6
_WARM_UP_CALLS = 4  # for each worker, so that each has run something


class ItemError(Exception):
    """An item, or a batch, failed; the message says in one line which one, and why."""


class FunctionCosts(NamedTuple):
    costs: list[BatchCost]  # of the function alone, by batch size, from 1
    items: int  # the first ones, which were used and have passed alone
    start_seconds: float  # until a worker process had started and run its first item


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
        why = message_of(exc) if isinstance(exc, AsyncBatchException) else one_line(exc)
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
    costs: list[BatchCost] = []
    size: int | None = 1
    while size is not None:
        now = time.perf_counter()
        share = (end - now) / (MAX_BATCH_SIZE // size).bit_length()  # as for each to come
        call = pool.run(measure_alone, function, items[:used], size, share)
        costs.append(await named(_failed_batch(f"of {size:,}"), call))
        size = next_size(costs, seconds * _ALONE_SHARE) if time.perf_counter() < end else None
        if size is not None:
            say(f"the function alone, batches of {size:,}")
    return FunctionCosts(costs, used, start_seconds)


class TrialBatchers:
    """The batchers with worker processes, one for each number of workers, that trials share.

    Args:
        function: The batch function.
        items: What clients call them with.
        pool: A worker in which the function is set up, for trials of threads.
        loop: The event loop of those trials.
    """

    def __init__(
        self,
        function: MeasuredFunction,
        items: Sequence[Any],
        pool: WorkerPool,
        loop: Literal["asyncio", "uvloop"],
    ) -> None:
        self._function = function
        self._items = items
        self._pool = pool
        self._loop = loop
        self._stack = contextlib.AsyncExitStack()
        self._started: dict[int, tuple[AsyncBatcher[Any, Any], list[BatchSample]]] = {}

    async def __aenter__(self) -> TrialBatchers:
        return self

    async def __aexit__(self, *exc_info: Any) -> None:
        await self._stack.__aexit__(*exc_info)

    def has_started(self, config: Config) -> bool:
        return config.mode == "threads" or config.workers in self._started

    async def start(self, workers: int) -> None:
        """Start a batcher with so many worker processes, unless it runs."""
        if workers in self._started:
            return
        setup = worker_setup(self._function.imported)
        batcher, samples = _new_batcher(self._function, "process", workers, setup)
        await self._stack.enter_async_context(batcher)
        await _warm_up(batcher, self._items, workers)
        self._started[workers] = batcher, samples

    async def measure(self, trial: Trial) -> Measurement:
        """Measure a trial, with a batcher of worker processes that runs already.

        Raises:
            ItemError: A batch failed.
        """
        if trial.config.mode == "threads":
            arguments = self._function, self._items, trial, self._loop
            result: Measurement = await self._pool.run(_measure_threads, *arguments)
            return result
        batcher, samples = self._started[trial.config.workers]
        return await run_clients(batcher, self._items, trial, samples)


def _measure_threads(
    function: MeasuredFunction,
    items: Sequence[Any],
    trial: Trial,
    loop: Literal["asyncio", "uvloop"],
) -> Measurement:
    """Measure threads in the worker process in which the function alone was measured."""

    async def measure() -> Measurement:
        # The set-up has been run in this process.
        batcher, samples = _new_batcher(function, "thread", trial.config.workers, None)
        async with batcher:
            await _warm_up(batcher, items, trial.config.workers)
            return await run_clients(batcher, items, trial, samples)

    with silenced_logger():
        return run(measure(), loop=loop)


def _new_batcher(
    function: MeasuredFunction,
    executor: Literal["thread", "process"],
    workers: int,
    setup: Callable[[], Any] | None,
) -> tuple[AsyncBatcher[Any, Any], list[BatchSample]]:
    samples: list[BatchSample] = []

    def on_batch(record: BatchRecord) -> None:
        # The clock of an event loop may count milliseconds (uvloop's does).
        samples.append(BatchSample(time.perf_counter(), record.size, record.run_time))

    batcher = batched(
        function,
        executor=executor,
        max_workers=workers,
        setup_worker=setup,
        max_batch_size=1,
        max_queue_time=0.0,
        on_batch=on_batch,
    )
    return batcher, samples


async def _warm_up(batcher: AsyncBatcher[Any, Any], items: Sequence[Any], workers: int) -> None:
    batcher.max_batch_size, batcher.max_queue_time = 1, 0.0
    source = cycle(items)
    calls = (batcher.process(next(source)) for _ in range(_WARM_UP_CALLS * workers))
    await named(_failed_batch("of 1"), asyncio.gather(*calls))


async def run_clients(
    batcher: AsyncBatcher[Any, Any],
    items: Sequence[Any],
    trial: Trial,
    samples: list[BatchSample],
) -> Measurement:
    """Have clients call a batcher, each again as soon as it has a result.

    Those that are in a batch at the end of the trial wait for its results.
    """
    config = trial.config
    batcher.max_batch_size, batcher.max_queue_time = config.batch_size, config.queue_time
    samples.clear()
    source = cycle(items)
    waits: list[float] = []
    began = time.perf_counter()
    until = began + trial.seconds

    async def client() -> None:
        called = began
        while called < until:
            await batcher.process(next(source))
            now = time.perf_counter()
            waits.append(now - called)
            called = now

    clients = asyncio.gather(*(client() for _ in range(trial.clients)))
    await named(_failed_batch(f"of up to {config.batch_size:,}"), clients)
    return evaluate_trial(began, until, samples, waits)


def _failed_batch(size: str) -> str:
    return f"a batch {size} items failed, though each of them had passed alone"
