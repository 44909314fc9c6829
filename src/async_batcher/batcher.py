"""`AsyncBatcher`: single items in, one result each out, batches in between.

::

    await process(item) --> _batching: queue, timers, delivery --> _runners --> process_batch
"""

from __future__ import annotations

import asyncio
import importlib
import logging
from abc import ABC, abstractmethod
from asyncio import get_running_loop
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, TypeVar, Unpack, overload

from async_batcher._batching.instance import BatcherInstance
from async_batcher._batching.lifecycle import BatcherLifecycle
from async_batcher._batching.live_options import LiveOptions
from async_batcher._batching.options import (
    BatchedOptions,
    BatcherOptions,
    CheckedOptions,
    is_factory,
    signature_with_options,
    with_text_of,
)
from async_batcher._batching.user_code import check_functions
from async_batcher._pool.checks import check_int, check_positive_seconds, check_seconds

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Iterable
    from types import TracebackType
    from typing import Self

    from async_batcher._batching.user_code import Results
    from async_batcher.stats import Explanation, Stats

__all__ = ["AsyncBatcher"]

T = TypeVar("T")
S = TypeVar("S")


class AsyncBatcher(LiveOptions, BatcherInstance, ABC, Generic[T, S]):
    """Groups items of concurrent callers into batches; every caller gets its own result.

    Subclass it and write `process_batch`, or decorate a function with `batched`.

    See `BatcherOptions`.

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
        checked = CheckedOptions.of_keywords(options, f"{type(self).__name__}()")
        self.__lifecycle = BatcherLifecycle(checked)
        check_functions(self, checked)
        executor = checked.executor
        if executor is not None and not isinstance(executor, str) and not is_factory(executor):
            from async_batcher._runners.known_executors import warn_of_known_faults

            warn_of_known_faults(executor)

    __init__.__signature__ = signature_with_options()  # type: ignore[attr-defined]

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
            A generator, sync or async, resolves each caller when its result is yielded, unless the
            executor pickles the batch; if it fails, it does so for the others. Yielding costs some
            microseconds per item: return a list if an item takes less than 0.1 ms.
        """

    def setup_worker(self) -> Any:
        """Prepare a worker; optional.

        See `BatchedOptions`.
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

        Call it where an event loop runs. Cancelling the future removes an item that is queued. If
        the queue is full it raises `QueueFullException`, also with ``when_full="wait"``.
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
        of them; without that limit, in one for each batch that may start at that moment.

        Args:
            items: Any number; read at once. A str or bytes is refused.
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
        from async_batcher._batching.bulk.slices import gather

        scheduler = self.__lifecycle.scheduler(self)
        results = gather(scheduler, items, timeout, return_exceptions=return_exceptions)
        del items  # the traceback of an exception holds this frame
        return await results

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
            items: An iterable or async iterable, not a str or bytes; it may be endless.
            ordered: Whether results come in the order of their items; otherwise as they arrive.
            window: Items at most that have been read and whose results have not been consumed.
                None: three batches for each worker, of 64 items if ``max_batch_size`` is no limit.
            return_exceptions: Whether an item that fails has its exception among the results.
                Otherwise it is raised, in its place, and ends the loop.
            read_in_thread: Whether to read ``items`` in a thread of its own, where it may block: a
                pipe, a slow generator. A generator is closed there too.
            pairs: Whether to yield ``(item, result)``, or ``(item, exception)``, in place of the
                result alone, which does not say whose it is. Items are kept until then.

        Raises:
            TypeError: ``items`` is not iterable, or is async and to be read in a thread.
            ValueError: ``window`` is less than 1.
            Exception: In the loop, what `process` raises for the first item that fails; or what
                ``items`` raised, after all results before it.
        """
        from async_batcher._batching.bulk.sources import make_source
        from async_batcher._batching.bulk.stream import stream_results

        check_int("window", window, 1)
        source = make_source(items, in_thread=read_in_thread)
        return stream_results(
            self.__lifecycle,
            self,
            source,
            ordered=ordered,
            window=window,
            return_exceptions=return_exceptions,
            pairs=pairs,
        )

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
        """Start, and return when the batcher has stopped; a cancellation stops it by force.

        Kept from 0.2.2. Nothing needs it: the first call starts the batcher.
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

    async def flush(self) -> None:
        """Let all that waits leave now, as far as slots, rates and `Later` allow it.

        It returns when every item that was accepted before this call has its result. Errors are
        their callers'; this raises none of them.

        Raises:
            RuntimeError: `process_batch` itself calls this, or the batcher runs on another event
                loop.
        """
        scheduler = self.__lifecycle.current()
        if scheduler is not None:
            await scheduler.flush()

    def stats(self) -> Stats:
        """Return what the batcher does, and has done since it was made; see `stats.Stats`."""
        return self.__lifecycle.stats()

    def explain(self) -> Explanation:
        """Explain what limits throughput, and which option to change.

        ``print(batcher.explain())`` after some time of the usual load shows a paragraph;
        `stats.Explanation` has the numbers.
        """
        from async_batcher._batching.records.in_effect import explain_batcher

        return explain_batcher(self, self.__lifecycle)

    async def is_running(self) -> bool:
        """Return whether the batcher was started, also by a first call, and not stopped."""
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


# These texts are where the options are declared.
AsyncBatcher.__doc__ = with_text_of(BatcherOptions, AsyncBatcher.__doc__)
AsyncBatcher.setup_worker.__doc__ = with_text_of(BatchedOptions, AsyncBatcher.setup_worker.__doc__)


def __getattr__(name: str) -> Any:
    """`batched` can be imported from here too."""
    if name == "batched":
        return importlib.import_module("async_batcher.decorator").batched
    msg = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(msg)
