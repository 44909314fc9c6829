"""The lifecycle of a batcher, and what its schedulers and runners are made from.

::

    options --> make_runner --> PendingRunner (while a factory is called) --> Runner
       |                             |                                           |
       `------> BatchQueue --> Scheduler <---------------------------------------'

While a factory makes the executor, the scheduler holds its items. If the factory fails they fail,
and the scheduler ends; the next call makes another.
"""

from __future__ import annotations

import asyncio
import dataclasses
import sys
from concurrent.futures import Executor
from functools import partial
from typing import TYPE_CHECKING, Any

from async_batcher._batching.option_checks import as_tuple
from async_batcher._batching.options import CheckedOptions, is_factory, or_unlimited
from async_batcher._batching.records.recorder import StatsRecorder
from async_batcher._batching.user_code import PatchableFunction, check_functions
from async_batcher._eventloop.lifecycle import Lifecycle
from async_batcher._pool.checks import is_worker_pool
from async_batcher._serialization.caller_exceptions import name_of
from async_batcher._worker.user_function import is_async
from async_batcher.current import context_outside_of_batches

if TYPE_CHECKING:
    from contextvars import Context

    from async_batcher._batching.scheduler import Scheduler
    from async_batcher._pool.pool import WorkerPool
    from async_batcher._runners.base import Runner
    from async_batcher._runners.factory import Factory
    from async_batcher._worker.user_function import UserFunction
    from async_batcher.batcher import AsyncBatcher
    from async_batcher.stats import Stats, WorkerCounts

# Where an event loop can watch a socket. Elsewhere "process" means the standard pool.
SUPPORTS_WORKER_POOL = sys.platform != "win32"

DEFAULT_QUEUE_TIME = 0.01  # seconds, as in 0.2.2; not where batches run in a `WorkerPool`


class BatcherLifecycle(Lifecycle["Scheduler"]):
    """Everything that a batcher holds.

    Attributes:
        options: Its options; `update_options` replaces them.
        recorder: The counts of all its schedulers.
    """

    __slots__ = (
        "_context", "_made_worker_pool", "_made_workers", "_workers", "options", "recorder",
    )  # fmt: skip

    def __init__(self, options: CheckedOptions) -> None:
        super().__init__("batcher")
        self.options = options
        self.recorder = StatsRecorder(options.on_batch)
        self._context = context_outside_of_batches()
        self._workers: WorkerCounts | None = None  # of the last scheduler
        # Of what the user's factory returned last.
        self._made_workers = 1
        self._made_worker_pool = False

    def __str__(self) -> str:
        """The name, the state and the numbers of items, for the batcher's ``repr``."""
        name = f"{self.options.name!r} " if self.options.name else ""
        session = self.session
        if session is None:
            return f"{name}{self.state}"
        pending = session.pending()
        return f"{name}{self.state}, {pending['queued']} queued, {pending['running']} running"

    def display_name(self, batcher: AsyncBatcher[Any, Any]) -> str:
        """The name of a batcher: its option ``name``, its function or its class."""
        own: str | None = self.options.name or getattr(batcher, "__qualname__", None)
        return own or type(batcher).__qualname__

    def stats(self) -> Stats:
        session = self.session  # once: other threads may ask
        if session is not None:
            return session.stats()
        return self.recorder.stats(queued=0, blocked=0, running=0, workers=self._workers)

    @property
    def concurrency(self) -> int:
        """Batches at a time; -1: no limit."""
        concurrency = self.options.concurrency
        return self.executor_workers() if concurrency is None else concurrency

    @property
    def workers(self) -> int:
        """Batches that run at a time, even if ``concurrency`` allows more."""
        concurrency, workers = self.concurrency, self.executor_workers()
        if concurrency == -1 or 1 < workers < concurrency:
            return workers
        return concurrency

    @property
    def max_queue_time(self) -> float:
        """Seconds; the default depends on where batches run."""
        if self.options.max_queue_time is not None:
            return self.options.max_queue_time
        executor: Any = self.options.executor
        if is_factory(executor):
            in_worker_pool = self._made_worker_pool
        elif isinstance(executor, str):
            in_worker_pool = executor == "process" and SUPPORTS_WORKER_POOL
        else:
            in_worker_pool = is_worker_pool(executor)
        return 0.0 if in_worker_pool else DEFAULT_QUEUE_TIME

    @property
    def divides_single_calls(self) -> bool:
        """Whether slots are workers: one batch of all that is due would use only one of them.

        Otherwise batches are those of 0.2.2.
        """
        return self.executor_workers() > 1

    def executor_workers(self) -> int:
        """Batches that the executor runs at a time; 1 until the user's factory was called."""
        from async_batcher._runners.known_executors import default_concurrency

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
        self.discard_closed_loop()
        if self.session is not None and not changes.keys() <= {"max_batch_size", "max_queue_time"}:
            names = ", ".join(changes)
            msg = f"{names} cannot be changed while the batcher is running; stop it first"
            raise RuntimeError(msg)
        self.recorder.options_changed()
        if options.executor is not self.options.executor:
            self._made_workers, self._made_worker_pool = 1, False
        self.options = options
        if self.session is not None:
            self._resize(self.session)

    def _resize(self, scheduler: Scheduler) -> None:
        scheduler.resize(
            max_batch_size=or_unlimited(self.options.max_batch_size),
            max_queue_time=self.max_queue_time,
        )

    def scheduler(self, batcher: AsyncBatcher[Any, Any]) -> Scheduler:
        """Return the scheduler on the running loop, and make it if there is none.

        Raises:
            BatcherStoppedError: The batcher has been stopped.
            RuntimeError: There is one on another loop, or in the parent process.
        """
        return self.get(partial(self._make, batcher))

    async def ready(self, batcher: AsyncBatcher[Any, Any]) -> Scheduler:
        """Return the scheduler when its workers are known.

        Raises:
            PoolBrokenError: The user's factory failed.
        """
        from async_batcher._runners.factory import PendingRunner

        runner = self.scheduler(batcher).inflight.runner
        if isinstance(runner, PendingRunner):
            await runner.ready()
        return self.scheduler(batcher)

    async def stop(self, *, force: bool, timeout: float | None) -> None:  # noqa: ASYNC109 - see `Session.close`
        """See `AsyncBatcher.stop`."""
        scheduler = self.current()
        task = asyncio.current_task()
        if scheduler is not None and scheduler.inflight.runner.owns_task(task):
            if not force:
                msg = (
                    "process_batch cannot wait for its own end: call stop(force=True), or stop the "
                    "batcher elsewhere"
                )
                raise RuntimeError(msg)
            scheduler.inflight.runner.exclude_task(task)
        try:
            await super().stop(force=force, timeout=timeout)
        finally:
            if scheduler is not None:
                self._workers = scheduler.inflight.runner.workers()

    def _make(self, batcher: AsyncBatcher[Any, Any]) -> Scheduler:
        # Imported here, because many programs import the batcher and never start one.
        from async_batcher._batching.queue.batch_queue import BatchQueue
        from async_batcher._batching.queue.lane_queue import LaneQueue
        from async_batcher._batching.scheduler import Scheduler
        from async_batcher._runners.factory import PendingRunner

        loop = asyncio.get_running_loop()
        runner = self.make_runner(batcher, loop)
        concurrency = or_unlimited(self.concurrency)
        settings: dict[str, Any] = {
            "max_batch_size": or_unlimited(self.options.max_batch_size),
            "max_queue_time": self.max_queue_time,
            "concurrency": concurrency,
            "max_queue_size": or_unlimited(self.options.max_queue_size),
            "workers": self.workers,
            "divides_single_calls": self.divides_single_calls,
            "ahead": runner.full_batches_ahead(concurrency),
        }
        queue: BatchQueue[Any, Any] | LaneQueue
        limits = as_tuple(self.options.limits)
        if limits or self.options.key is not None:
            queue = LaneQueue(
                **settings,
                limits=limits,
                key=self.options.key,
                key_concurrency=self.options.key_concurrency,
                counts=self.recorder,
            )
        else:
            queue = BatchQueue(**settings)
        name = self.recorder.name = self.options.name or name_of(batcher.process_batch)
        if (observers := self.recorder.observers) is not None:
            observers.log_name, observers.batcher = name, self.display_name(batcher)
        scheduler = Scheduler(
            loop,
            queue,
            runner,
            self._context,
            self.recorder,
            item_timeout=self.options.item_timeout,
            waits_when_full=self.options.when_full == "wait",
            on_failure=self.options.policies,
            cancels_abandoned=self.options.cancel_abandoned,
            name=name,
        )
        if isinstance(runner, PendingRunner):
            # The only slot is taken until there is an executor, so that no batch leaves before;
            # `Scheduler.use` gives it back.
            queue.set_concurrency(1, workers=1)
            queue.acquire_slot()
            runner.begin(partial(self._use, scheduler), partial(self._reject, scheduler))
        if self.recorder.exporter is not None:
            self.recorder.exporter.session_started(scheduler)
        return scheduler

    def make_runner(
        self, batcher: AsyncBatcher[Any, Any], loop: asyncio.AbstractEventLoop
    ) -> Runner:
        """Return where the batches run, as the options say."""
        by_keyword = check_functions(batcher, self.options)
        function = PatchableFunction(batcher, by_keyword=by_keyword)
        timeout, per_key = self.options.batch_timeout, self.options.key_concurrency
        if is_async(function.function):
            from async_batcher._runners.coroutine import CoroutineRunner

            return CoroutineRunner(loop, function, self._context, timeout)
        executor: Any = self.options.executor
        runner_in = partial(_runner_in, loop, function, self._context, timeout, per_key)
        if not isinstance(executor, str) and not is_factory(executor):
            return runner_in(None, executor)
        factory: Factory
        if not isinstance(executor, str):
            factory = executor
        else:
            from async_batcher._runners.factory import standard_factory

            factory = standard_factory(
                executor, self.executor_workers(), has_worker_pool=SUPPORTS_WORKER_POOL
            )
            # These cost nothing until the first batch.
            if executor == "thread" or SUPPORTS_WORKER_POOL:
                return runner_in(factory, self._context.run(factory))
        from async_batcher._runners.factory import PendingRunner, call_factory

        name = self.options.name or name_of(function.function)
        factory = partial(
            self._context.copy().run, call_factory, factory, f"executor={executor!r:.200}"
        )
        return PendingRunner(loop, factory, partial(runner_in, factory), name)

    def _use(self, scheduler: Scheduler, runner: Runner, made: Executor | WorkerPool) -> None:
        """Use what the factory returned."""
        from async_batcher._runners.known_executors import workers_of

        if is_factory(self.options.executor):
            self._made_workers = workers_of(made, is_ours=True)
            self._made_worker_pool = is_worker_pool(made)
            self._resize(scheduler)
        scheduler.use(
            runner,
            concurrency=or_unlimited(self.concurrency),
            workers=self.workers,
            divides_single_calls=self.divides_single_calls,
        )

    def _reject(self, scheduler: Scheduler, error: BaseException) -> None:
        """Fail what was held for the factory, which failed."""
        self.release(scheduler)
        scheduler.reject_all(error)


def _runner_in(
    loop: asyncio.AbstractEventLoop,
    function: UserFunction,
    context: Context,
    timeout: float | None,
    key_concurrency: int | None,
    factory: Factory | None,
    executor: Executor | WorkerPool | None,
) -> Runner:
    """Return the runner for an executor, which a factory made or the user gave."""
    if executor is not None and not isinstance(executor, Executor):
        from async_batcher._runners.worker_pool import WorkerPoolRunner

        return WorkerPoolRunner(
            loop,
            function,
            executor,
            is_ours=factory is not None,
            batch_timeout=timeout,
            counts_until_end=key_concurrency is not None,
        )
    from async_batcher._runners.adapters import make_adapter
    from async_batcher._runners.executor import ExecutorRunner
    from async_batcher._runners.known_executors import warn_of_known_faults

    if factory is not None:  # a given one had its warning when it was given
        warn_of_known_faults(executor)
    return ExecutorRunner(loop, function, context, make_adapter(factory, executor, loop), timeout)
