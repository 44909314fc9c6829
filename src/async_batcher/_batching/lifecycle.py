"""The lifecycle of a batcher: a scheduler on one event loop after another, or none.

::

    new --first call, start--> running --stop--> stopped --start--> running ...
                                  |
                                  `--its loop was closed--> the next call starts again, on its loop

Rules:

- There is one scheduler at a time, bound to the loop that ran when it was made. While that loop is
  open, no other may use it.
- A scheduler that was running when the process forked belongs to the parent.
- While a factory makes the executor, the scheduler holds its items. If the factory fails they fail,
  and the scheduler ends; the next call makes another.
"""

from __future__ import annotations

import asyncio
import contextvars
import dataclasses
import os
import sys
from concurrent.futures import Executor
from functools import partial
from typing import TYPE_CHECKING, Any

from async_batcher._batching.options import NO_LIMIT, CheckedOptions, is_factory, or_unlimited
from async_batcher._batching.recorder import StatsRecorder
from async_batcher._batching.user_code import PatchableFunction, check_functions
from async_batcher._serialization.caller_exceptions import name_of
from async_batcher._worker.user_function import is_async
from async_batcher.exceptions import BatcherStoppedError

if TYPE_CHECKING:
    from collections.abc import Callable

    from async_batcher._batching.scheduler import Scheduler
    from async_batcher._pool.pool import WorkerPool
    from async_batcher._runners.base import Runner
    from async_batcher._runners.factory import Factory, PendingRunner
    from async_batcher._worker.user_function import UserFunction
    from async_batcher.batcher import AsyncBatcher
    from async_batcher.integrations.opentelemetry import BatchTracer
    from async_batcher.stats import Stats, WorkerCounts

# Where an event loop can watch a socket. Elsewhere "process" means the standard pool.
SUPPORTS_WORKER_POOL = sys.platform != "win32"

_STREAM_BATCH_SIZE = 64  # items of a batch of `map` without max_batch_size
_BATCHES_AHEAD = 3  # of `map`, per worker: one runs, one waits, the results of one are consumed


class Lifecycle:
    """Everything that a batcher holds.

    Attributes:
        options: Its options; `update_options` replaces them.
        scheduler: The running scheduler; None before the first call and after a stop.
        recorder: The counts of all its schedulers.
        runner_factory: Makes the runner instead of the options; for tests.
    """

    __slots__ = (
        "_context", "_is_stopped", "_made_workers", "_pending", "_workers", "options", "recorder",
        "runner_factory", "scheduler",
    )  # fmt: skip

    def __init__(self, options: CheckedOptions) -> None:
        self.options = options
        self.scheduler: Scheduler | None = None
        self._context = contextvars.copy_context()
        self._is_stopped = False
        self.recorder = StatsRecorder(options.on_batch)
        self._workers: WorkerCounts | None = None  # of the last scheduler
        self._made_workers = 1  # of what the user's factory returned last
        self._pending: PendingRunner | None = None  # while it is called
        self.runner_factory: Callable[..., Runner] | None = None

    def __str__(self) -> str:
        """The state and the numbers of items, for the batcher's ``repr``."""
        scheduler = self.scheduler
        if scheduler is None:
            return "stopped" if self._is_stopped else "not started"
        stats = self.stats()
        state = "running" if self.is_running else "stopping"
        return f"{state}, {stats.queued} queued, {stats.running} running"

    def stats(self) -> Stats:
        scheduler = self.scheduler
        if scheduler is not None:
            return scheduler.stats()
        return self.recorder.stats(queued=0, blocked=0, running=0, workers=self._workers)

    @property
    def is_running(self) -> bool:
        """Whether it accepts items, in this process."""
        scheduler = self.scheduler
        if scheduler is None or scheduler.closing:
            return False
        return not scheduler.loop.is_closed() and scheduler.pid == os.getpid()

    @property
    def concurrency(self) -> int:
        """Batches at a time; -1: no limit."""
        concurrency = self.options.concurrency
        return self._executor_workers() if concurrency is None else concurrency

    @property
    def workers(self) -> int:
        """Batches that run at a time, even if ``concurrency`` is no limit."""
        return self._executor_workers() if self.concurrency == -1 else self.concurrency

    @property
    def stream_geometry(self) -> tuple[int, int]:
        """Items that make a batch of `map`, and the default of its window."""
        size = or_unlimited(self.options.max_batch_size)
        size = _STREAM_BATCH_SIZE if size == NO_LIMIT else size
        return size, _BATCHES_AHEAD * self.workers * size

    def _executor_workers(self) -> int:
        """Batches that the executor runs at a time; 1 until the user's factory was called."""
        from async_batcher._runners.adapters import default_concurrency

        executor: Any = self.options.executor
        return (
            self._made_workers
            if is_factory(executor)
            else default_concurrency(executor, self.options.max_workers)
        )

    def update_options(self, **changes: Any) -> None:
        """Change options.

        Raises:
            RuntimeError: The batcher runs, and these cannot change meanwhile.
        """
        options = dataclasses.replace(self.options, **changes)
        self._drop_dead_scheduler()
        if self.scheduler is not None:
            if not changes.keys() <= {"max_batch_size", "max_queue_time"}:
                names = ", ".join(changes)
                msg = f"{names} cannot be changed while the batcher is running; stop it first"
                raise RuntimeError(msg)
            self.scheduler.resize(
                max_batch_size=or_unlimited(options.max_batch_size),
                max_queue_time=options.max_queue_time,
            )
        if options.executor is not self.options.executor:
            self._made_workers = 1
        self.options = options

    def reopen(self) -> None:
        """Allow new sessions after a stop."""
        self._is_stopped = False

    def get_scheduler(self, batcher: AsyncBatcher[Any, Any]) -> Scheduler:
        """Return the scheduler on the running loop, and make it if there is none.

        Raises:
            BatcherStoppedError: The batcher has been stopped.
            RuntimeError: There is one on another loop, or in the parent process.
        """
        self._drop_dead_scheduler()
        if self._is_stopped:
            msg = "the batcher has been stopped; start() reopens it"
            raise BatcherStoppedError(msg)
        if self.scheduler is not None:
            _check_loop(self.scheduler)
            if not self.scheduler.closing:
                return self.scheduler
        # Imported here, because many programs import the batcher and never start one.
        from async_batcher._batching.queue.batch_queue import BatchQueue
        from async_batcher._batching.scheduler import Scheduler

        loop = asyncio.get_running_loop()
        runner = (self.runner_factory or self._runner)(batcher, loop)
        queue: BatchQueue[Any, Any] = BatchQueue(
            max_batch_size=or_unlimited(self.options.max_batch_size),
            max_queue_time=self.options.max_queue_time,
            concurrency=or_unlimited(self.concurrency),
            max_queue_size=or_unlimited(self.options.max_queue_size),
            workers=self.workers,
        )
        scheduler = Scheduler(
            loop,
            queue,
            runner,
            self._context,
            self.recorder,
            item_timeout=self.options.item_timeout,
            waits_when_full=self.options.when_full == "wait",
            isolates_failures=self.options.isolate_failures,
            cancels_abandoned=self.options.cancel_abandoned,
            tracer=_tracer_of(batcher) if self.options.trace else None,
            function=name_of(batcher.process_batch),
        )
        if self._pending is not None:
            queue.set_concurrency(1, workers=1)
            queue.acquire_slot()
            try:
                self._pending.begin()
            except RuntimeError:  # no thread can be started; the next call tries again
                self._pending = None
                raise
        self.scheduler = scheduler
        return scheduler

    async def ready(self, batcher: AsyncBatcher[Any, Any]) -> None:
        """Make a scheduler if there is none, and wait until its workers are known.

        Raises:
            PoolBrokenError: The user's factory failed.
        """
        self.get_scheduler(batcher)
        if self._pending is not None:
            await self._pending.ready()

    async def stop(self, *, force: bool, timeout: float | None) -> None:  # noqa: ASYNC109 - it bounds one stage of several
        """See `AsyncBatcher.stop`."""
        self._drop_dead_scheduler()
        scheduler = self.scheduler
        if scheduler is None:
            self._is_stopped = True
            return
        _check_loop(scheduler)
        if not force and scheduler.inflight.runner.owns_task(asyncio.current_task()):
            msg = (
                "process_batch cannot wait for its own end: call stop(force=True), or stop the "
                "batcher elsewhere"
            )
            raise RuntimeError(msg)
        self._is_stopped = True
        try:
            await scheduler.shutdown.close(force=force, timeout=timeout)
        finally:
            if self.scheduler is scheduler:
                self._pending = None
                self._workers = scheduler.inflight.runner.workers()
                self.scheduler = None

    def _drop_dead_scheduler(self) -> None:
        if self.scheduler is not None and self.scheduler.loop.is_closed():
            self.scheduler.close_without_loop()
            self.scheduler = self._pending = None

    def _runner(self, batcher: AsyncBatcher[Any, Any], loop: asyncio.AbstractEventLoop) -> Runner:
        by_keyword = check_functions(batcher, self.options)
        function = PatchableFunction(batcher, by_keyword=by_keyword)
        timeout = self.options.batch_timeout
        if is_async(function.function):
            from async_batcher._runners.coroutine import CoroutineRunner

            return CoroutineRunner(loop, function, self._context, timeout)
        executor: Any = self.options.executor
        runner_in = partial(_runner_in, loop, function, self._context, timeout)
        if not isinstance(executor, str) and not is_factory(executor):
            return runner_in(None, executor)
        factory: Factory
        if not isinstance(executor, str):
            factory = executor
        else:
            from async_batcher._runners.owned_executor import standard_factory

            factory = standard_factory(
                executor, self._executor_workers(), has_worker_pool=SUPPORTS_WORKER_POOL
            )
            # These cost nothing until the first batch.
            if executor == "thread" or SUPPORTS_WORKER_POOL:
                return runner_in(factory, self._context.run(factory))
        from async_batcher._runners.factory import PendingRunner, call_factory

        factory = partial(
            self._context.copy().run, call_factory, factory, f"executor={executor!r:.200}"
        )
        self._pending = PendingRunner(
            loop,
            factory,
            partial(runner_in, factory),
            self._use,
            self._drop,
            name_of(function.function),
        )
        return self._pending

    def _use(self, runner: Runner, made: Executor | WorkerPool) -> None:
        """Use what the factory returned."""
        from async_batcher._runners.adapters import workers_of

        self._pending = None
        if is_factory(self.options.executor):
            self._made_workers = workers_of(made, is_ours=True)
        if self.scheduler is not None:
            self.scheduler.use(
                runner, concurrency=or_unlimited(self.concurrency), workers=self.workers
            )

    def _drop(self, error: BaseException) -> None:
        """Fail what was held for the factory, which failed."""
        scheduler, self.scheduler, self._pending = self.scheduler, None, None
        if scheduler is not None:
            scheduler.reject_all(error)


def _runner_in(
    loop: asyncio.AbstractEventLoop,
    function: UserFunction,
    context: contextvars.Context,
    timeout: float | None,
    factory: Factory | None,
    executor: Executor | WorkerPool | None,
) -> Runner:
    """Return the runner for an executor, which a factory made or the user gave."""
    if executor is not None and not isinstance(executor, Executor):
        from async_batcher._runners.worker_pool import WorkerPoolRunner

        return WorkerPoolRunner(
            loop, function, executor, is_ours=factory is not None, batch_timeout=timeout
        )
    from async_batcher._runners.adapters import warn_of_known_faults
    from async_batcher._runners.executor import ExecutorRunner
    from async_batcher._runners.owned_executor import make_adapter

    if factory is not None:  # a given one had its warning when it was given
        warn_of_known_faults(executor)
    return ExecutorRunner(loop, function, context, make_adapter(factory, executor, loop), timeout)


def _tracer_of(batcher: AsyncBatcher[Any, Any]) -> BatchTracer:
    from async_batcher.integrations.opentelemetry import BatchTracer

    return BatchTracer(f"batch of {getattr(batcher, '__qualname__', type(batcher).__qualname__)}")


def _check_loop(scheduler: Scheduler) -> None:
    """Raise unless the running loop is the scheduler's."""
    if scheduler.loop is asyncio.get_running_loop():
        return
    if scheduler.pid != os.getpid():
        msg = (
            "this batcher was started before os.fork(), in the parent process; make a new one in "
            "the child"
        )
    else:
        msg = (
            "this batcher runs on another event loop, which is still open; use one batcher for "
            "each loop, or stop it there before it is used here"
        )
    raise RuntimeError(msg)
