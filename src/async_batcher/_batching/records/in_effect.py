"""The options that a batcher's last batches ran with, for `explain`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from async_batcher._batching.option_checks import as_tuple
from async_batcher._batching.records.explain import explain
from async_batcher._batching.records.measured import OptionsInEffect
from async_batcher._pool.cpu_count import cpu_count
from async_batcher._runners.known_executors import has_threads, is_process_pool
from async_batcher._worker.user_function import is_async

if TYPE_CHECKING:
    from async_batcher._batching.lifecycle import BatcherLifecycle
    from async_batcher._batching.records.measured import RunsIn
    from async_batcher.batcher import AsyncBatcher
    from async_batcher.stats import Explanation


def explain_batcher(batcher: AsyncBatcher[Any, Any], lifecycle: BatcherLifecycle) -> Explanation:
    """See `AsyncBatcher.explain`."""
    options = options_in_effect(lifecycle, is_coroutine=is_async(batcher.process_batch))
    return explain(lifecycle.recorder.ended_batches(), options)


def options_in_effect(lifecycle: BatcherLifecycle, *, is_coroutine: bool) -> OptionsInEffect:
    """Return the options of a batcher, with those that are None by default as numbers."""
    options = lifecycle.options
    executor = options.executor
    runs_in: RunsIn = "processes"
    if is_coroutine:
        runs_in = "coroutines"
    elif executor in (None, "thread") or has_threads(executor):
        runs_in = "threads"
    workers = None if executor is None else _workers(executor, lifecycle.executor_workers())
    concurrency = options.concurrency
    if concurrency is None and workers is None:
        concurrency = lifecycle.concurrency
    return OptionsInEffect(
        max_batch_size=_limit(options.max_batch_size),
        max_queue_time=lifecycle.max_queue_time,
        max_queue_size=_limit(options.max_queue_size),
        concurrency=_limit(concurrency),
        workers=workers,
        runs_in=runs_in,
        cores=cpu_count(),
        limits_keys=options.key_concurrency is not None,
        limits_cost=any(limit.per_batch is not None for limit in as_tuple(options.limits)),
    )


def _workers(executor: object, workers: int) -> int | None:
    """Return ``workers`` unless it stands for a given executor of unknown size."""
    from concurrent.futures import Executor

    is_unknown = isinstance(executor, Executor) and workers == 1 and not is_process_pool(executor)
    return None if is_unknown else workers


def _limit(value: int | None) -> int | None:
    return None if value == -1 else value
