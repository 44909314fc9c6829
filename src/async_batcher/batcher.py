"""`AsyncBatcher` and `batched`: single items in, one result each out, batches in between.

::

    await process(item) --> _session.py: queue, timer, waiting futures --> runners/: where the batch runs --> process_batch

An `AsyncBatcher` holds its options and, while it runs, a session (`_session.py`), which is bound to one event loop. All of that
is in one slot, so that an instance's ``__dict__`` is what user code put there, and nothing else crosses to a worker.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import inspect
import logging
import os
import sys
import warnings
from abc import ABC, abstractmethod
from collections.abc import AsyncIterable, Awaitable, Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Self, TypeAlias, TypeVar, overload

from async_batcher._forming import Forming
from async_batcher._options import Options, limit
from async_batcher._session import Session, Submitted, stopped

if TYPE_CHECKING:
    from concurrent.futures import Executor
    from types import TracebackType

    from async_batcher.runners import Runner

__all__ = ["AsyncBatcher", "batched"]

T = TypeVar("T")
S = TypeVar("S")

Answers: TypeAlias = Iterable[S | BaseException] | None
BatchFunction: TypeAlias = Callable[[list[T]], Answers[S] | Awaitable[Answers[S]] | AsyncIterable[S | BaseException]]

_DEPRECATED = {
    "sleep_time": "The 'sleep_time' argument has no effect and will be removed: callers are woken when their result is there.",
    "buffering_time": "The 'buffering_time' argument has no effect and will be removed: 'max_queue_time' is the time that an item waits.",
    "batch_size": "The 'batch_size' argument is deprecated and will be removed. Use 'max_batch_size' instead.",
}  # fmt: skip


class _State:
    """What an `AsyncBatcher` holds in its one slot."""

    __slots__ = ("context", "options", "session", "stopped")

    def __init__(self, options: Options) -> None:
        self.options = options
        self.context = contextvars.copy_context()
        self.session: Session | None = None
        self.stopped = False


class AsyncBatcher(ABC, Generic[T, S]):
    """Collects single items into batches and gives every caller its own result.

    Subclass it and write `process_batch`; or decorate a function with `batched`.

    Args:
        max_batch_size: Items in a batch at most; -1 or None: no limit.
        max_queue_time: Seconds that an item waits at most for its batch to fill, counted from its arrival. A full batch does not
            wait. With 0 a batch leaves in the next turn of the loop.
        concurrency: Batches at a time; -1: no limit. None: as many as there are worker processes, or threads that we made;
            1 for coroutines, the loop's threads, a given thread pool, and an executor whose size is not known.
        max_queue_size: Items that wait at most, those in running batches not counted; -1 or None: no limit.
        executor: Where a sync `process_batch` runs. None: in the event loop's default threads. ``"thread"`` or ``"process"``: in
            a pool that we make and end. A `concurrent.futures.Executor`: there; it is left running.
        max_workers: Workers of the pool that we make; None: one for each usable core.
        **deprecated: ``batch_size``, ``sleep_time`` and ``buffering_time``, which warn as they did in 0.2.2.

    Raises:
        TypeError: An unknown option, a value of the wrong type, an ``executor`` for an async `process_batch`, or a
            `process_batch` that does not take one argument.
        ValueError: A value out of range.
    """

    __slots__ = ("__state", "__weakref__")

    logger: ClassVar[logging.Logger] = logging.getLogger("async_batcher")

    def __init__(
        self,
        *,
        max_batch_size: int | None = -1,
        max_queue_time: float = 0.01,
        concurrency: int | None = None,
        max_queue_size: int | None = -1,
        executor: Executor | str | None = None,
        max_workers: int | None = None,
        **deprecated: Any,
    ) -> None:
        super().__init__()
        for name, value in deprecated.items():
            if name not in _DEPRECATED:
                msg = f"{type(self).__name__}() got an unexpected keyword argument {name!r}"
                raise TypeError(msg)
            warnings.warn(_DEPRECATED[name], stacklevel=2)
            if name == "batch_size":
                max_batch_size = value
        options = Options(
            max_batch_size=max_batch_size,
            max_queue_time=max_queue_time,
            concurrency=concurrency,
            max_queue_size=max_queue_size,
            executor=executor,
            max_workers=max_workers,
        )
        self.__state = _State(options)
        _check_function(self.process_batch, options)
        if executor is not None and not isinstance(executor, str):
            from async_batcher.runners._places import warn_of_known_faults

            warn_of_known_faults(executor)

    @abstractmethod
    def process_batch(self, batch: list[T]) -> Answers[S] | Awaitable[Answers[S]] | AsyncIterable[S | BaseException]:
        """Process a batch; the user writes it, sync or async.

        Args:
            batch: The items, in the order of their arrival.

        Returns:
            One result per item, in order: a list, tuple, generator or array. None stands for as many Nones. An exception
            instance among the results is raised for its item alone.
        """

    def setup_worker(self) -> None:
        """Prepare a worker; optional.

        Runs once in each worker process before its first batch; with threads and coroutines once before the first batch. What
        it raises, the batch's callers get, and the next batch tries again.
        """

    async def process(self, item: T) -> S:
        """Have one item processed, in whichever batch it comes to be.

        Args:
            item: Anything; it must be picklable where batches run in processes.

        Returns:
            Its result.

        Raises:
            QueueFullException: ``max_queue_size`` items wait already.
            BatcherStoppedError: The batcher has been stopped, or was before the batch had ended.
            RuntimeError: The batcher runs on another event loop.
            Exception: What `process_batch` raised, or returned, for it; see `async_batcher.exceptions` for what else there is.
        """
        session = self.__state.session
        if session is None or session.loop is not asyncio.get_running_loop():
            session = self.__open()
        future = session.loop.create_future()
        ticket = session.add(item, future)
        try:
            return await future  # type: ignore[no-any-return]
        except (asyncio.CancelledError, GeneratorExit):
            session.leave(ticket)
            raise

    def submit(self, item: T) -> asyncio.Future[S]:
        """The same as `process` without a coroutine: the fast path for many items.

        Must be called where an event loop runs. Cancelling the future takes an item that still waits out of the queue.
        """
        session = self.__state.session
        if session is None or session.loop is not asyncio.get_running_loop():
            session = self.__open()
        future = Submitted(loop=session.loop)
        future.session = session
        future.ticket = session.add(item, future)
        return future

    async def start(self) -> None:
        """Start ahead of the first call: pickle what crosses, start the workers; after `stop`, reopen.

        Raises:
            SerializationError: `process_batch` cannot be pickled for the workers.
            Exception: What a worker met with when it started, or ``setup_worker`` raised.
        """
        state = self.__state
        state.stopped = False
        session = self.__open()
        await session.runner.start()

    async def stop(self, force: bool = False, timeout: float | None = None) -> None:  # noqa: ASYNC109, FBT001, FBT002 - as in 0.2.2
        """Accept no more, run what waits, and return when the last batch has ended and nothing that we made lives.

        Cancelling it forces it. A second stop is harmless.

        Args:
            force: Fail everything now, with `BatcherStoppedError`. Worker processes that we made are killed; a thread cannot be
                ended, and finishes its batch unseen.
            timeout: Seconds after which it is forced.

        Raises:
            TimeoutError: It was forced after ``timeout``.
            RuntimeError: The batcher runs on another event loop, or this is called by `process_batch` itself.
        """
        if timeout is not None:
            from async_batcher._options import check_seconds

            check_seconds("timeout", timeout)
        state = self.__state
        session = state.session
        if session is not None and session.loop.is_closed():
            session.abandon()
            session = state.session = None
        if session is None:
            state.stopped = True
            return
        _check_loop(session)
        if not force and _is_own_batch(session):
            msg = "process_batch cannot wait for its own end: call stop(force=True), or stop the batcher elsewhere"
            raise RuntimeError(msg)
        state.stopped = True
        await session.close(force=force, timeout=timeout)
        if state.session is session:
            state.session = None

    async def is_running(self) -> bool:
        """Whether it has started, by `start` or by the first call, and has not been stopped."""
        session = self.__state.session
        return session is not None and not session.closing and not session.loop.is_closed()

    async def __aenter__(self) -> Self:
        """Start; see `start`."""
        try:
            await self.start()
        except BaseException:
            await self.stop(force=True)
            raise
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Stop: by force if the block is left by an exception."""
        await self.stop(force=exc_type is not None)

    @property
    def max_batch_size(self) -> int | None:
        """Items in a batch at most. May be set; it then holds for the batches that have not left yet."""
        return self.__state.options.max_batch_size

    @max_batch_size.setter
    def max_batch_size(self, value: int | None) -> None:
        self.__change(max_batch_size=value)

    @property
    def max_queue_time(self) -> float:
        """Seconds that an item waits at most for its batch to fill. May be set, as `max_batch_size` may."""
        return self.__state.options.max_queue_time

    @max_queue_time.setter
    def max_queue_time(self, value: float) -> None:
        self.__change(max_queue_time=value)

    @property
    def concurrency(self) -> int:
        """Batches at a time; -1: no limit."""
        options = self.__state.options
        if options.concurrency is not None:
            return options.concurrency
        from async_batcher.runners._places import workers_for

        return workers_for(options.executor, options.max_workers)

    @property
    def executor(self) -> Executor | str | None:
        """Where batches run, as it was given."""
        return self.__state.options.executor

    def __change(self, **changes: Any) -> None:
        state = self.__state
        state.options = replace(state.options, **changes)
        if state.session is not None:
            state.session.resize(
                max_batch_size=limit(state.options.max_batch_size), max_queue_time=state.options.max_queue_time
            )

    def __open(self) -> Session:
        """The session on the running loop; a new one if there is none, or if its loop has closed."""
        loop = asyncio.get_running_loop()
        state = self.__state
        session = state.session
        if session is not None and session.loop.is_closed():
            session.abandon()
            session = state.session = None
        if state.stopped:
            raise stopped()
        if session is not None:
            _check_loop(session)
            if not session.closing:
                return session
        state.session = Session(
            loop,
            Forming(
                max_batch_size=limit(state.options.max_batch_size),
                max_queue_time=state.options.max_queue_time,
                concurrency=limit(self.concurrency),
                max_queue_size=limit(state.options.max_queue_size),
            ),
            self.__runner(loop),
            state.context,
        )
        return state.session

    def __runner(self, loop: asyncio.AbstractEventLoop) -> Runner:
        from async_batcher._program import Program

        function = self.process_batch
        setup = None if _is_default_setup(self) else self.setup_worker
        program = Program(function, by_keyword=_check_function(function, self.__state.options), setup=setup)
        if _is_async(function):
            from async_batcher.runners._coroutine import CoroutineRunner

            return CoroutineRunner(loop, program, self.__state.context)
        from async_batcher.runners._executor import ExecutorRunner
        from async_batcher.runners._places import place_for

        place = place_for(self.__state.options.executor, self.__state.options.max_workers, loop)
        return ExecutorRunner(loop, program, self.__state.context, place)

    # Pickled (for a worker, where process_batch is a method) or copied: the options and what user code put on the instance,
    # never the running state. An executor that was given stays behind.

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """A batcher of the same options that has not started."""
        options = self.__state.options
        if not isinstance(options.executor, str | None):
            options = replace(options, executor=None)
        return (_restored, (type(self), options), self.__getstate__())

    def __getstate__(self) -> Any:
        """What user code put on the instance."""
        state = super().__getstate__()
        if not isinstance(state, tuple):
            return state
        attributes, slots = state
        slots = {name: value for name, value in slots.items() if name != _SLOT}
        return (attributes, slots) if slots else attributes


_SLOT = "_AsyncBatcher__state"


def _restored(cls: type[AsyncBatcher[Any, Any]], options: Options) -> AsyncBatcher[Any, Any]:
    batcher: AsyncBatcher[Any, Any] = cls.__new__(cls)
    object.__setattr__(batcher, _SLOT, _State(options))
    return batcher


class _Batched(AsyncBatcher[T, S]):
    """What `batched` makes of a function: a batcher that is called with one item."""

    def __init__(
        self, function: BatchFunction[T, S], *, setup_worker: Callable[[], None] | None = None, **options: Any
    ) -> None:
        functools.update_wrapper(self, function)
        if setup_worker is not None and not callable(setup_worker):
            msg = f"setup_worker={setup_worker!r}: must be a function without arguments"
            raise TypeError(msg)
        if setup_worker is not None:
            self.setup_worker = setup_worker  # type: ignore[method-assign]
        super().__init__(**options)

    @property
    def process_batch(self) -> BatchFunction[T, S]:  # type: ignore[override] - the function itself, so that it alone crosses
        """The function that was decorated."""
        return self.__wrapped__  # type: ignore[no-any-return, attr-defined]

    async def __call__(self, item: T) -> S:
        """Have one item processed; see `AsyncBatcher.process`."""
        return await self.process(item)

    def __repr__(self) -> str:
        """The function's name."""
        return f"<batched {getattr(self, '__qualname__', '?')}>"

    def __reduce_ex__(self, protocol: Any) -> Any:
        """By reference where it can be imported, as a function is."""
        module = sys.modules.get(getattr(self, "__module__", None) or "")
        found: Any = module
        for part in getattr(self, "__qualname__", "").split("."):
            found = getattr(found, part, None)
        if found is self and self.__module__ not in ("__main__", "__mp_main__"):
            return self.__qualname__  # type: ignore[attr-defined]
        return super().__reduce_ex__(protocol)


@overload
def batched(
    function: BatchFunction[T, S],
    *,
    max_batch_size: int | None = ...,
    max_queue_time: float = ...,
    concurrency: int | None = ...,
    max_queue_size: int | None = ...,
    executor: Executor | str | None = ...,
    max_workers: int | None = ...,
    setup_worker: Callable[[], None] | None = ...,
) -> _Batched[T, S]: ...
@overload
def batched(
    function: None = None,
    *,
    max_batch_size: int | None = ...,
    max_queue_time: float = ...,
    concurrency: int | None = ...,
    max_queue_size: int | None = ...,
    executor: Executor | str | None = ...,
    max_workers: int | None = ...,
    setup_worker: Callable[[], None] | None = ...,
) -> Callable[[BatchFunction[T, S]], _Batched[T, S]]: ...
def batched(
    function: BatchFunction[T, S] | None = None, **options: Any
) -> _Batched[T, S] | Callable[[BatchFunction[T, S]], _Batched[T, S]]:
    """Make an `AsyncBatcher` of a function over a batch; a decorator, with or without options, or called with the function.

    ::

        @batched(max_batch_size=64, executor="process")
        def lengths(batch: list[str]) -> list[int]:
            return [len(text) for text in batch]

        await lengths("one item")

    Args:
        function: As `AsyncBatcher.process_batch`: from a list of items to one result each, sync or async.
        **options: Those of `AsyncBatcher`, and ``setup_worker``: a function without arguments, which runs once in each worker
            before its first batch.

    Returns:
        The batcher, which is called with one item; without ``function``, a decorator that makes it.

    Raises:
        TypeError: See `AsyncBatcher`; or ``function`` cannot be called.
        ValueError: See `AsyncBatcher`.
    """
    if function is None:
        return functools.partial(batched, **options)
    return _Batched(function, **options)


def _check_function(function: Any, options: Options) -> bool:
    """Check a ``process_batch`` as far as it can be before it is called.

    Returns:
        Whether it takes the batch by its keyword.
    """
    if not callable(function):
        msg = f"process_batch={function!r}: must be a function of one argument, the batch"
        raise TypeError(msg)
    if options.executor is not None and _is_async(function):
        msg = (
            f"executor={options.executor!r}: process_batch is async, and runs on the event loop; "
            "declare it with 'def' to run it in an executor, or leave out executor"
        )
        raise TypeError(msg)
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some builtins have none
        return False
    for by_keyword, arguments in ((True, ((), {"batch": []})), (False, (([],), {}))):
        try:
            signature.bind(*arguments[0], **arguments[1])  # type: ignore[arg-type]
        except TypeError:
            continue
        return by_keyword
    name = getattr(function, "__qualname__", repr(function))
    msg = f"{name}{signature} must take one argument, the batch"
    raise TypeError(msg)


def _is_async(function: Any) -> bool:
    call = getattr(function, "__call__", None)  # noqa: B004 - the method itself, for an object with an async __call__
    return any(inspect.iscoroutinefunction(f) or inspect.isasyncgenfunction(f) for f in (function, call))


def _is_default_setup(batcher: AsyncBatcher[Any, Any]) -> bool:
    return getattr(batcher.setup_worker, "__func__", None) is AsyncBatcher.setup_worker


def _is_own_batch(session: Session) -> bool:
    is_running = getattr(session.runner, "is_running", None)
    return is_running is not None and is_running(asyncio.current_task())


def _check_loop(session: Session) -> None:
    """Raise unless the running loop is the session's."""
    if session.loop is asyncio.get_running_loop():
        return
    if session.pid != os.getpid():
        msg = "this batcher was started before os.fork(), in the parent process; make a new one in the child"
    else:
        msg = (
            "this batcher runs on another event loop, which is still open; use one batcher for each loop, "
            "or stop it there before it is used here"
        )
    raise RuntimeError(msg)
