"""`AsyncBatcher`: single items in, one result each out, batches in between.

::

    await process(item) --> _batching: queue, timers, delivery --> _runners --> process_batch

Everything that belongs to the library is in one slot, a `BatcherLifecycle`, so that the
``__dict__`` of an instance holds what user code put there, and nothing else is pickled for a
worker.
"""

from __future__ import annotations

import asyncio
import dataclasses
import importlib
import logging
from abc import ABC, abstractmethod
from asyncio import get_running_loop
from inspect import Parameter
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, TypeVar, Unpack, overload

from async_batcher._batching.lifecycle import BatcherLifecycle
from async_batcher._batching.options import (
    BatcherOptions,
    CheckedOptions,
    is_factory,
    signature_with_options,
)
from async_batcher._batching.user_code import check_functions
from async_batcher._pool.checks import check_int, check_positive_seconds, check_seconds
from async_batcher._serialization.exception_text import is_exception

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable, Iterable
    from types import TracebackType
    from typing import Self, TypeAlias

    from async_batcher._batching.bulk.sources import Source
    from async_batcher._batching.options import ExecutorOption
    from async_batcher.stats import Stats

__all__ = ["AsyncBatcher"]

_LIFECYCLE_ATTR = "_AsyncBatcher__lifecycle"

T = TypeVar("T")
S = TypeVar("S")

if TYPE_CHECKING:
    Results: TypeAlias = Iterable[S | BaseException] | None
    BatchFunction: TypeAlias = Callable[
        [list[T]], Results[S] | Awaitable[Results[S]] | AsyncIterable[S | BaseException]
    ]


class AsyncBatcher(ABC, Generic[T, S]):
    """Groups items of concurrent callers into batches, and gives every caller its own result.

    Subclass it and write `process_batch`, or decorate a function with `batched`.

    Args:
        max_batch_size: Items of a batch at most. -1 or None: no limit.
        max_queue_time: Seconds that an item is queued at most for its batch to fill, from its
            arrival. A full batch does not wait. With 0 a batch leaves in the next iteration of the
            event loop.
        concurrency: Batches that run at a time. -1: no limit. None: as many as there are worker
            processes or interpreters, or threads that the batcher made; 1 for coroutines, the
            loop's threads, a given thread pool, and an executor of unknown size.
        max_queue_size: Items that are queued at most, without those in running batches. -1 or None:
            no limit.
        executor: Where a sync `process_batch` runs. None: the event loop's default threads.
            ``"thread"`` or ``"process"``: a pool that the batcher makes and shuts down. A
            `WorkerPool` or a `concurrent.futures.Executor`: there; the batcher leaves it running. A
            factory, which is a callable without arguments that returns one of these
            (``partial(ProcessPoolExecutor, 4, initializer=load)``): the batcher calls it in a
            thread, at the first call or `start`, shuts down what it returned at `stop`, and calls
            it again after that broke. It must make a new one each time.
        max_workers: Workers of the pool that ``"thread"`` or ``"process"`` makes. None: one for
            each usable core.
        batch_timeout: Seconds that a batch may run, from its start. None: no timeout. Then its
            callers get `BatchTimeoutError`. A worker of a `WorkerPool` is killed and replaced, a
            coroutine is cancelled; a call in a thread or a standard pool runs on and keeps its
            slot.
        item_timeout: Seconds from the call until an item must have its result. None: no timeout.
            Then its caller gets `ItemTimeoutError`; an item that is still queued never runs.
            `process` takes a ``timeout`` of its own.
        when_full: What a call does if the queue is full. ``"raise"``: it raises
            `QueueFullException`. ``"wait"``: it waits for capacity, first come, first served;
            `submit`, which cannot wait, raises.
        isolate_failures: Whether a batch that raises, crashes its worker or exceeds
            ``batch_timeout`` runs again in halves until the failing items stand alone: they get the
            error, all others their results. Items then run more than once. A batch that exceeds
            ``batch_timeout`` in a thread or a standard pool does not run again.
        cancel_abandoned: Whether a running batch is cancelled when all its callers were: its worker
            of a `WorkerPool` is killed and replaced, or its coroutine cancelled. Otherwise it runs
            to its end.
        on_batch: Called on the event loop with a `stats.BatchRecord` for each finished batch. An
            exception of it is logged once and has no other effect.
        trace: Whether to make an OpenTelemetry span for each batch, linked to the spans of its
            callers; needs the extra ``[opentelemetry]``.
        **options: Also ``batch_size``, ``sleep_time`` and ``buffering_time``, which are deprecated
            since 0.2.2.

    Raises:
        TypeError: An option is unknown or has the wrong type; an async `process_batch` has an
            ``executor``; a factory is async or takes arguments; or `process_batch` does not take
            one argument.
        ValueError: A value is out of range.
    """

    __slots__ = ("__lifecycle", "__weakref__")

    logger: ClassVar[logging.Logger] = logging.getLogger("async_batcher")

    def __init__(self, **options: Unpack[BatcherOptions]) -> None:
        """Check the options; nothing starts before the first call or `start`."""
        super().__init__()
        checked = CheckedOptions.of_keywords(options, f"{type(self).__name__}()", 2)
        if checked.trace:
            import async_batcher.integrations.opentelemetry  # noqa: F401 - raises here if it is not installed
        self.__lifecycle = BatcherLifecycle(checked)
        check_functions(self, checked)
        executor = checked.executor
        if executor is not None and not isinstance(executor, str) and not is_factory(executor):
            from async_batcher._runners.adapters import warn_of_known_faults

            warn_of_known_faults(executor)

    __init__.__signature__ = signature_with_options(  # type: ignore[attr-defined]
        Parameter("self", Parameter.POSITIONAL_ONLY)
    )

    @abstractmethod
    def process_batch(
        self, batch: list[T]
    ) -> Results[S] | Awaitable[Results[S]] | AsyncIterable[S | BaseException]:
        """Process a batch; written by the user, sync or async.

        Args:
            batch: The items, in the order of their arrival.

        Returns:
            One result for each item, in order: a list, tuple, generator or array. None stands for
            as many Nones. An exception instance among the results is raised for its item alone.
        """

    def setup_worker(self) -> Any:
        """Prepare a worker; optional.

        It runs before a worker's first batch: once in each worker process, in each thread of
        ``executor="thread"``, and on the event loop for an async `process_batch`; with other
        executors in this process once for each batch that may run at a time. In threads, attributes
        that it assigns (``self.db = ...``) and each `functools.cached_property` that it is the
        first to read belong to that thread. All other attributes are shared, also what it writes to
        ``self.__dict__`` itself. Its time does not count against ``batch_timeout``.

        A generator function tears down in what follows its one ``yield``, when the worker, the
        thread or the batcher ends; for an async `process_batch` it may be an async generator
        function. An exception of the tear-down is logged. It runs at `stop` and when a worker is
        replaced, but not in a worker process that is killed; in a process of a given executor it
        runs when that process exits.

        If it raises, the callers of the batch get the exception, and the next batch tries again.

        It may take longer than ``item_timeout`` and ``batch_timeout``: it runs for as long as a
        caller without a timeout, or `start`, waits for it. When all callers of the batch that
        started it have timed out or were cancelled, it is ended after 2 seconds, or 4 times as long
        as it took before: its worker process is killed, or its coroutine cancelled, and the next
        batch starts another. Each set-up that was ended doubles the time of the next, up to
        ``start_timeout`` of the `WorkerPool` (60 seconds), so that a slow set-up finishes even if
        every caller has a short timeout. A batch with a ``batch_timeout`` waits for
        ``start_timeout``; its callers then get `WorkerDiedError`. In a thread nothing can end a
        set-up.
        """

    setup_worker.does_nothing = True  # type: ignore[attr-defined]  # so that no worker calls it

    async def process(self, item: T, *, timeout: float | None = None) -> S:  # noqa: ASYNC109 - of the item, not of this task
        """Process one item in a batch with others.

        Args:
            item: Anything; it must be picklable where batches run in processes.
            timeout: Seconds within which there must be a result, including the wait for capacity.
                None: ``item_timeout``.

        Returns:
            Its result.

        Raises:
            QueueFullException: ``max_queue_size`` items are queued.
            ItemTimeoutError: There was no result in time. An item that was still queued never runs.
            BatcherStoppedError: The batcher is stopped, or was before the batch had finished.
            RuntimeError: The batcher runs on another event loop.
            Exception: What `process_batch` raised, or returned, for the item.
                `async_batcher.exceptions` says when it is a copy, and what else there is.
        """
        if timeout is not None:
            check_positive_seconds("timeout", timeout)
        scheduler = self.__lifecycle.session
        if scheduler is None or scheduler.loop is not get_running_loop():
            scheduler = self.__lifecycle.scheduler(self)
        future: asyncio.Future[S] = scheduler.new_future()
        handle = scheduler.callers.enqueue(item, future, timeout)
        try:
            return await future
        except (asyncio.CancelledError, GeneratorExit):
            scheduler.callers.discard(handle, future)
            raise
        finally:
            del future  # the traceback of its exception holds this frame

    def submit(self, item: T, *, timeout: float | None = None) -> asyncio.Future[S]:
        """Do the same as `process` without a coroutine: the fast path for many items.

        It must be called where an event loop runs. Cancelling the future removes an item that is
        still queued. It cannot wait for capacity: if the queue is full it raises
        `QueueFullException`, also with ``when_full="wait"``.
        """
        if timeout is not None:
            check_positive_seconds("timeout", timeout)
        scheduler = self.__lifecycle.session
        if scheduler is None or scheduler.loop is not get_running_loop():
            scheduler = self.__lifecycle.scheduler(self)
        return scheduler.callers.submit(item, timeout)

    @overload
    async def process_many(
        self,
        items: Iterable[T],
        *,
        return_exceptions: Literal[False] = ...,
        timeout: float | None = ...,  # noqa: ASYNC109
    ) -> list[S]: ...
    @overload
    async def process_many(
        self,
        items: Iterable[T],
        *,
        return_exceptions: bool,
        timeout: float | None = ...,  # noqa: ASYNC109
    ) -> list[S | BaseException]: ...
    async def process_many(
        self,
        items: Iterable[T],
        *,
        return_exceptions: bool = False,
        timeout: float | None = None,  # noqa: ASYNC109 - as `process`
    ) -> Any:
        """Process many items with one call.

        They are queued together, and leave the queue in as many batches as ``max_batch_size`` makes
        of them; without that limit, in one for each worker.

        Args:
            items: Any number; read at once.
            return_exceptions: Whether an item that fails has its exception among the results.
                Otherwise the first failure is raised; items of the call that have not started then
                never run.
            timeout: Seconds for all of them, as for `process`.

        Returns:
            Their results, in order.

        Raises:
            QueueFullException: The queue has no capacity for all of them; none is processed. With
                ``when_full="wait"`` they enter the queue as it has capacity.
            Exception: What `process` raises, for the first item that fails.
        """
        if timeout is not None:
            check_positive_seconds("timeout", timeout)
        scheduler = self.__lifecycle.session
        if scheduler is None or scheduler.loop is not get_running_loop():
            scheduler = self.__lifecycle.scheduler(self)
        items = list(items)
        if not items:
            return []
        from async_batcher._batching.bulk.slices import GatherFuture

        future = scheduler.new_future()
        bulk = GatherFuture(len(items), future, is_strict=not return_exceptions)
        scheduler.callers.enqueue_many(items, bulk, timeout)
        try:
            return await future
        except (asyncio.CancelledError, GeneratorExit):
            scheduler.callers.discard_many([bulk])
            raise
        finally:
            del bulk, items, future  # the traceback of an exception holds this frame

    @overload
    def map(
        self,
        items: Iterable[T] | AsyncIterable[T],
        *,
        ordered: bool = ...,
        window: int | None = ...,
        return_exceptions: Literal[False] = ...,
        read_in_thread: bool = ...,
        pairs: Literal[False] = ...,
    ) -> AsyncGenerator[S, None]: ...
    @overload
    def map(
        self,
        items: Iterable[T] | AsyncIterable[T],
        *,
        ordered: bool = ...,
        window: int | None = ...,
        return_exceptions: bool,
        read_in_thread: bool = ...,
        pairs: Literal[False] = ...,
    ) -> AsyncGenerator[S | BaseException, None]: ...
    @overload
    def map(
        self,
        items: Iterable[T] | AsyncIterable[T],
        *,
        ordered: bool = ...,
        window: int | None = ...,
        return_exceptions: Literal[False] = ...,
        read_in_thread: bool = ...,
        pairs: Literal[True],
    ) -> AsyncGenerator[tuple[T, S], None]: ...
    @overload
    def map(
        self,
        items: Iterable[T] | AsyncIterable[T],
        *,
        ordered: bool = ...,
        window: int | None = ...,
        return_exceptions: bool,
        read_in_thread: bool = ...,
        pairs: Literal[True],
    ) -> AsyncGenerator[tuple[T, S | BaseException], None]: ...
    def map(
        self,
        items: Iterable[T] | AsyncIterable[T],
        *,
        ordered: bool = True,
        window: int | None = None,
        return_exceptions: bool = False,
        read_in_thread: bool = False,
        pairs: bool = False,
    ) -> AsyncGenerator[Any, None]:
        """Process any number of items in bounded memory.

        ``async for result in batcher.map(items)``.
        Items are read as fast as batches take them, and no faster; a slow consumer slows the
        source. They wait for capacity in the queue with any ``when_full``. Leaving the loop
        early closes the source (at once if this generator is closed: `contextlib.aclosing`), and
        queued items never run.

        Args:
            items: An iterable or async iterable; it may be endless.
            ordered: Whether results come in the order of their items; otherwise as they arrive.
            window: Items at most that have been read and whose results have not been consumed.
                None: three batches for each worker, of 64 items if ``max_batch_size`` is no limit.
            return_exceptions: Whether an item that fails has its exception among the results.
                Otherwise it is raised, in its place, and ends the loop.
            read_in_thread: Whether to read ``items`` in a thread of its own, where it may block: a
                pipe, a slow generator. A generator is closed there too.
            pairs: Whether to yield ``(item, result)``. With ``ordered=False`` nothing else says
                which item a result, or an exception, belongs to.

        Raises:
            TypeError: ``items`` is not iterable, or is async and to be read in a thread.
            ValueError: ``window`` is less than 1.
            Exception: In the loop, what `process` raises for the first item that fails; or what
                ``items`` raised, after all results before it.
        """
        from async_batcher._batching.bulk.sources import make_source

        check_int("window", window, 1)
        source = make_source(items, in_thread=read_in_thread)
        return self.__map(
            source,
            ordered=ordered,
            window=window,
            return_exceptions=return_exceptions,
            pairs=pairs,
        )

    async def __map(
        self,
        source: Source,
        *,
        ordered: bool,
        window: int | None,
        return_exceptions: bool,
        pairs: bool,
    ) -> AsyncGenerator[Any, None]:
        from async_batcher._batching.bulk.stream import ResultStream

        # The default window depends on the number of workers.
        scheduler = await self.__lifecycle.ready(self)
        size, default_window = self.__lifecycle.stream_geometry
        async with ResultStream(
            scheduler,
            source,
            ordered=ordered,
            window=window or default_window,
            batch_size=size,
            keep_items=pairs,
        ) as stream:
            while results := await stream.wait_ready():
                results.reverse()
                while results:
                    stream.release()
                    if not return_exceptions and is_exception(results[-1][1]):
                        try:
                            raise results.pop()[1]
                        finally:
                            del results  # the exception's traceback holds this frame
                    # Without a name here: it would be kept until the next one is wanted.
                    yield results.pop() if pairs else results.pop()[1]

    async def start(self) -> None:
        """Start before the first call, or again after `stop`.

        Pickles the function, starts the workers, and runs their set-up.

        Raises:
            SerializationError: `process_batch` cannot be pickled for the workers.
            PoolBrokenError: The factory given as ``executor`` failed, or no worker can be started.
            Exception: What happened to a worker when it started, or what ``setup_worker`` raised.
        """
        self.__lifecycle.is_stopped = False
        await self.__lifecycle.scheduler(self).start()

    async def run(self) -> None:
        """Start, and return when the batcher has stopped; cancelling it stops the batcher by force.

        Kept from 0.2.2, where this was the batcher's own task. Nothing needs it: the first call
        starts the batcher.
        """
        try:
            await AsyncBatcher.start(self)
            await asyncio.shield(self.__lifecycle.scheduler(self).ended)
        except asyncio.CancelledError:
            await AsyncBatcher.stop(self, force=True)
            raise

    async def stop(self, force: bool = False, timeout: float | None = None) -> None:  # noqa: ASYNC109, FBT001, FBT002 - as in 0.2.2
        """Stop: accept no more items, and run what is queued.

        It returns when nothing that the batcher made is left. Cancelling it forces it. A second
        stop is harmless.

        Args:
            force: Fail everything now with `BatcherStoppedError`. Worker processes that the batcher
                made are killed; a thread cannot be killed, and finishes its batch.
            timeout: Seconds after which the stop is forced. None: no timeout.

        Raises:
            TimeoutError: The stop was forced after ``timeout``.
            RuntimeError: The batcher runs on another event loop, or `process_batch` itself calls
                this.
        """
        if timeout is not None:
            check_seconds("timeout", timeout)
        await self.__lifecycle.stop(force=force, timeout=timeout)

    def stats(self) -> Stats:
        """Return what the batcher does, and has done since it was made; see `stats.Stats`."""
        return self.__lifecycle.stats()

    async def is_running(self) -> bool:
        """Return whether the batcher was started, by `start` or the first call, and not stopped."""
        return self.__lifecycle.is_running

    async def __aenter__(self) -> Self:
        """Start; see `start`."""
        try:
            await AsyncBatcher.start(self)
        except BaseException:
            await AsyncBatcher.stop(self, force=True)
            raise
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop; by force if an exception leaves the block."""
        await AsyncBatcher.stop(self, force=exc_type is not None)

    def __repr__(self) -> str:
        """The class or function, the state, and the numbers of queued and running items."""
        name = getattr(self, "__qualname__", None)
        kind = type(self).__qualname__ if name is None else f"batched {name}"
        try:
            state = str(object.__getattribute__(self, _LIFECYCLE_ATTR))
        except AttributeError:  # a repr in a debugger never raises
            state = "not initialised"
        return f"<{kind} {state}>"

    @property
    def max_batch_size(self) -> int | None:
        """Items of a batch at most. It may be set, for batches that have not left the queue."""
        return self.__lifecycle.options.max_batch_size

    @max_batch_size.setter
    def max_batch_size(self, value: int | None) -> None:
        self.__lifecycle.update_options(max_batch_size=value)

    @property
    def max_queue_time(self) -> float:
        """Seconds that an item is queued at most for its batch to fill. It may be set."""
        return self.__lifecycle.options.max_queue_time

    @max_queue_time.setter
    def max_queue_time(self, value: float) -> None:
        self.__lifecycle.update_options(max_queue_time=value)

    @property
    def concurrency(self) -> int:
        """Batches that run at a time; -1: no limit. It may be set while the batcher is not running.

        If ``executor`` is a factory and no ``concurrency`` was given: 1 until the factory has been
        called.
        """
        return self.__lifecycle.concurrency

    @concurrency.setter
    def concurrency(self, value: int | None) -> None:
        self.__lifecycle.update_options(concurrency=value)

    @property
    def executor(self) -> ExecutorOption:
        """Where batches run, as it was given. It may be set while the batcher is not running."""
        return self.__lifecycle.options.executor

    @executor.setter
    def executor(self, value: ExecutorOption) -> None:
        check_functions(self, dataclasses.replace(self.__lifecycle.options, executor=value))
        self.__lifecycle.update_options(executor=value)

    if not TYPE_CHECKING:  # to a type checker it would mean that every name exists

        def __getattr__(self, name: str) -> Any:
            """Explain why an attribute is missing, if the class or a thread is the reason."""
            if name == _LIFECYCLE_ATTR:
                msg = (
                    f"{type(self).__name__}.__init__() must call super().__init__(), with the "
                    "options of AsyncBatcher"
                )
                raise RuntimeError(msg)
            from async_batcher._runners.slot_attributes import is_per_slot

            where = ""
            if is_per_slot(type(self), name):
                where = " here: setup_worker binds it for each thread that runs batches"
            msg = f"{type(self).__name__!r} object has no attribute {name!r}{where}"
            raise AttributeError(msg, name=name, obj=self)

    # Pickled (for a worker, if process_batch is a method) or copied are the options and what user
    # code put on the instance, never the running state. A given executor or factory and
    # ``on_batch`` stay behind.

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Make a batcher of the same options that has not started.

        A ``__reduce__`` of the user's class is respected.
        """
        if type(self).__reduce__ is not object.__reduce__:
            return self.__reduce__()  # type: ignore[return-value]
        options = self.__lifecycle.options
        if options.on_batch is not None or not isinstance(options.executor, str | None):
            executor = options.executor if isinstance(options.executor, str | None) else None
            options = dataclasses.replace(options, executor=executor, on_batch=None)
        return (_unpickle, (type(self), options), self.__getstate__())

    def __getstate__(self) -> Any:
        """Return what user code put on the instance."""
        state = super().__getstate__()
        if not isinstance(state, tuple):
            return state
        attributes, slots = state
        slots = {name: value for name, value in slots.items() if name != _LIFECYCLE_ATTR}
        return (attributes, slots) if slots else attributes


def _unpickle(cls: type[AsyncBatcher[Any, Any]], options: CheckedOptions) -> AsyncBatcher[Any, Any]:
    batcher: AsyncBatcher[Any, Any] = cls.__new__(cls)
    object.__setattr__(batcher, _LIFECYCLE_ATTR, BatcherLifecycle(options))
    return batcher


def __getattr__(name: str) -> Any:
    """`batched` can be imported from here too."""
    if name == "batched":
        return importlib.import_module("async_batcher.decorator").batched
    msg = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(msg)
