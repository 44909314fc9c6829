"""`WorkerPool`: worker processes on the event loop, one private channel each.

::

    run(function, *args) --pickled--> PoolDispatcher: queue, workers --> a worker's socket --> main.py: function(*args)
             ^                                                                            |
             `---------- read by the event loop itself, no thread between <---------------'

One `PoolDispatcher` at a time, bound to the loop that was running when it was made; the next one when it has been stopped, or
its loop has closed.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import multiprocessing
import os
import sys
import weakref
from asyncio import get_running_loop
from collections import OrderedDict, deque
from dataclasses import dataclass
from functools import partial
from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from cloudpickle import list_registry_pickle_by_value

from async_batcher._eventloop.future import resolve, resolve_and_resume
from async_batcher._pool.checks import check_int, check_positive_seconds
from async_batcher._pool.cpu_count import cpu_count
from async_batcher._pool.dispatcher import PoolDispatcher
from async_batcher._pool.pickled_function import PickledFunction
from async_batcher._pool.supervisor import Supervisor
from async_batcher._pool.work_item import WorkItem, unwrap
from async_batcher._pool.worker_handle import WorkerState
from async_batcher._pool.worker_ledger import WorkerLedger
from async_batcher._serialization.codec import Codec
from async_batcher._serialization.diagnostics import pickling_error
from async_batcher._serialization.object_path import find_by_path, object_path
from async_batcher._transport.protocol import MAX_CACHED_FUNCTIONS
from async_batcher._worker.calls import SentFunction, call_chunk, call_function
from async_batcher._worker.user_function import UserFunction, is_async
from async_batcher.exceptions import BatcherStoppedError, SerializationError

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.context import BaseContext
    from types import TracebackType
    from typing import Self

    from async_batcher._pool.executor import PoolExecutor
    from async_batcher._serialization.codec import Payload
    from async_batcher._worker.results import Outcome
    from async_batcher.stats import WorkerCounts

R = TypeVar("R")

_METHODS = ("forkserver", "spawn", "fork")

_WRAPPERS = frozenset({partial, MethodType})
_CACHED = type(functools.lru_cache(len))
_PLACEHOLDER = getattr(functools, "Placeholder", object())  # of a partial function, from Python 3.14


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """What is known of one worker process.

    Attributes:
        pid: Its process id; None while it is being started.
        state: ``"starting"`` (set-ups included), ``"idle"``, ``"busy"`` with a batch, ``"leaving"`` (it ends by itself) or
            ``"dying"`` (killed).
        batches: Batches that it has answered.
        memory: Bytes of private resident memory; its peak where the system tells no better, 0 where it tells nothing.
    """

    pid: int | None
    state: Literal["starting", "idle", "busy", "leaving", "dying"]
    batches: int
    memory: int


class WorkerPool:
    """Worker processes that the event loop itself looks after.

    Give it to batchers as ``executor=``, one pool to several if you like, or use it alone::

        async with WorkerPool(max_workers=4) as pool:
            text = await pool.run(extract_text, page, timeout=30.0)

    A script needs no ``if __name__ == "__main__":`` around it: no worker runs the main module.

    Args:
        max_workers: Worker processes; None: one for each usable core.
        mp_context: How they are started: ``"forkserver"``, ``"spawn"`` or ``"fork"``, or a context of multiprocessing, of which
            only its start method counts. None: forkserver on Linux, spawn elsewhere.
        initializer: Called in each worker before its first batch.
        initargs: What it is called with.
        max_tasks_per_child: Batches after which a worker is replaced; None: never. Its successor is ready before it leaves, for
            which it has 30 seconds: its exit handlers run then. If batchers with a ``setup_worker`` run here, it goes on until
            its successor has been set up too; but with 1, no worker runs a second batch.
        max_memory_per_child: Bytes of private resident memory after which a worker is replaced; None: never.
        threads_per_worker: What BLAS and OpenMP may use in each worker, unless the environment says already; None: usable cores
            divided by workers; 0: leaves the environment alone.
        start_timeout: Seconds for a worker to get ready, and at most for a set-up whose callers are gone; see
            `AsyncBatcher.setup_worker`.

    Raises:
        TypeError: A value of the wrong type.
        ValueError: A value out of range, or a start method that this system does not have.
    """

    def __init__(
        self,
        max_workers: int | None = None,
        *,
        mp_context: BaseContext | str | None = None,
        initializer: Callable[..., Any] | None = None,
        initargs: tuple[Any, ...] = (),
        max_tasks_per_child: int | None = None,
        max_memory_per_child: int | None = None,
        threads_per_worker: int | None = None,
        start_timeout: float = 60.0,
    ) -> None:
        """Check the options; nothing starts before the first call or `start`."""
        for name, value, least in (
            ("max_workers", max_workers, 1),
            ("max_tasks_per_child", max_tasks_per_child, 1),
            ("max_memory_per_child", max_memory_per_child, 1),
            ("threads_per_worker", threads_per_worker, 0),
        ):
            check_int(name, value, least)
        check_positive_seconds("start_timeout", start_timeout)
        given: Any = initializer
        if given is not None and not callable(given):
            msg = f"initializer={given!r}: must be a function, or None"
            raise TypeError(msg)
        if given is not None and is_async(given):
            msg = f"initializer={given!r}: is async, and a worker has no event loop; give a function that is not"
            raise TypeError(msg)
        arguments: Any = initargs
        if not isinstance(arguments, list | tuple):
            msg = (
                f"initargs={arguments!r}: must be a tuple of what the initializer is called with, not {type(arguments).__name__}"
            )
            raise TypeError(msg)
        self._workers = max_workers if max_workers is not None else cpu_count()
        self._method = _start_method(mp_context)
        self._initializer = initializer
        self._initargs = tuple(initargs)
        self._max_tasks = max_tasks_per_child
        self._max_memory = max_memory_per_child
        self._threads = max(1, cpu_count() // self._workers) if threads_per_worker is None else threads_per_worker
        self._start_timeout = start_timeout
        self._context = contextvars.copy_context()
        self._ledger = WorkerLedger()
        self.spent: deque[float] = deque()  # see `runners.Runner`
        self._dispatcher: PoolDispatcher | None = None
        self._finalizer: weakref.finalize[..., Any] | None = None
        self._is_stopped = False
        self._source = object()  # not the pool itself: what a worker still runs shall not keep a pool that nobody holds
        self._calls = PickledFunction(UserFunction(call_function, by_keyword=False, setup=None), out_of_band=True)
        self._sent: OrderedDict[int, tuple[Callable[..., Any], PickledFunction]] = (
            OrderedDict()
        )  # functions by value, by their ids
        self._latest: tuple[Callable[..., Any] | None, PickledFunction, Any] = (None, self._calls, None)  # see `_way_of`

    @property
    def max_workers(self) -> int:
        """Worker processes."""
        return self._workers

    async def start(self) -> None:
        """Start every worker, and wait until all are ready; after `stop`, reopen.

        Raises:
            PoolBrokenError: No worker can be started; its cause says why, with the traceback of an ``initializer`` that raised.
            SerializationError: The ``initializer`` cannot be pickled.
        """
        self._is_stopped = False
        await self.dispatcher().start()

    async def run(self, function: Callable[..., R], /, *args: Any, timeout: float | None = None) -> R:  # noqa: ASYNC109 - of the worker's time
        """Call a function in a worker; starts the pool if need be.

        Args:
            function: A sync function. Lambdas, closures, methods, and what the main module holds, will do.
            *args: What it is called with.
            timeout: Seconds that it may run, from when it begins, before its worker is ended; None: as long as it likes.

        Returns:
            What it returns.

        Raises:
            BatchTimeoutError: It ran for longer than ``timeout``.
            WorkerDiedError: Its worker ended while it ran.
            PoolBrokenError: No worker can be started.
            SerializationError: The function, an argument or the result cannot be pickled or unpickled.
            BatcherStoppedError: The pool has been stopped, or was meanwhile.
            Exception: What the function raised. The worker's traceback is the cause of the last exception in its chain of
                causes; a note names the function and the worker.
        """
        if function is not self._latest[0] and is_async(function):
            msg = f"{function!r} is async; a worker has no event loop: run it with asyncio, or give a function that is not"
            raise TypeError(msg)
        if timeout is not None:
            check_positive_seconds("timeout", timeout)
        crew = self.dispatcher()
        returned = crew.new_waiter()
        task = self.work_item(
            function, args, {}, partial(resolve, returned), timeout=timeout, answered=partial(resolve_and_resume, returned)
        )
        if task is not None:
            crew.submit(task)
        try:
            outcome: Outcome = await returned
        except (asyncio.CancelledError, GeneratorExit):
            if task is not None:
                crew.withdraw(task)
            raise
        try:
            return unwrap(outcome, function)  # type: ignore[no-any-return]
        finally:
            del outcome, returned  # an exception's traceback holds this frame

    async def stop(self, force: bool = False, timeout: float | None = None) -> None:  # noqa: ASYNC109, FBT001, FBT002 - as of AsyncBatcher
        """Take no more, run what waits, and return when every worker has ended.

        Cancelling it forces it. A second stop is harmless.

        Args:
            force: Fail everything now, with `BatcherStoppedError`, and kill the workers; idle ones that have tear-downs to run
                get up to 2 seconds for them.
            timeout: Seconds after which it is forced.

        Raises:
            TimeoutError: It was forced after ``timeout``.
            RuntimeError: The pool runs on another event loop.
        """
        self._drop_dead_dispatcher()
        crew = self._dispatcher
        if crew is not None:
            _check_loop(crew)
        self._is_stopped = True
        if crew is None:
            return
        try:
            await crew.close(force=force, timeout=timeout)
        finally:
            if self._dispatcher is crew:
                self._release_dispatcher()

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

    def workers(self) -> list[WorkerInfo]:
        """Its worker processes, those that are starting or leaving too."""
        crew = self._dispatcher
        if crew is None or crew.pid != os.getpid():
            return []
        supervisor = crew.staff
        return [
            WorkerInfo(member.pid, state.value, member.batches, supervisor.memory_of(member))
            for member in supervisor.members
            if (state := supervisor.state_of(member)) is not WorkerState.GONE
        ]

    def as_executor(self) -> PoolExecutor:
        """A `concurrent.futures.Executor` over this pool, which must not be in use: it hosts the pool on a thread's own loop.

        A pool that has been stopped is reopened.

        Raises:
            RuntimeError: The pool is in use on an event loop.
        """
        from async_batcher._pool.executor import PoolExecutor

        self._drop_dead_dispatcher()
        if self._dispatcher is not None:
            msg = "the pool is in use on an event loop; make another one for the executor"
            raise RuntimeError(msg)
        self._is_stopped = False
        return PoolExecutor(self)

    # For the runner of batches, and for the executor.

    def dispatcher(self) -> PoolDispatcher:
        """The workers on the running loop; new ones if there are none.

        Raises:
            BatcherStoppedError: The pool has been stopped.
            RuntimeError: They are on another loop, or in the parent process.
        """
        crew = self._dispatcher
        if crew is not None and not crew.closing and crew.loop is get_running_loop() and not self._is_stopped:
            return crew  # as nearly always
        self._drop_dead_dispatcher()
        if self._is_stopped:
            msg = "the pool has been stopped; start() reopens it"
            raise BatcherStoppedError(msg)
        if self._dispatcher is not None:
            _check_loop(self._dispatcher)
            if not self._dispatcher.closing:
                return self._dispatcher
        if sys.platform == "win32":
            msg = "WorkerPool needs an event loop that can watch sockets, which Windows lacks; use a ProcessPoolExecutor"
            raise RuntimeError(msg)
        loop = asyncio.get_running_loop()
        self.spent.clear()  # another loop may have another clock
        make_staff = partial(
            Supervisor,
            workers=self._workers,
            method=self._method,
            threads=self._threads,
            start_timeout=self._start_timeout,
            initializer=self._pickled_initializer(),
            max_tasks=self._max_tasks,
            max_memory=self._max_memory,
            ledger=self._ledger,
        )
        self._dispatcher = self._context.run(PoolDispatcher, loop, self._context, make_staff)
        self._finalizer = weakref.finalize(self, _close_orphaned, self._dispatcher)
        self._finalizer.atexit = False  # then the system ends them
        return self._dispatcher

    def work_item(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        done: Callable[[Outcome], None],
        *,
        timeout: float | None = None,
        answered: Callable[[Outcome], None] | None = None,
        departs: Callable[[], bool] | None = None,
    ) -> WorkItem | None:
        """A call, for the crew; see `WorkItem`, and `unwrap` for what ``done`` gets.

        Returns:
            None when it could not be pickled, and ``done`` has been called.
        """
        try:
            if type(function) in _WRAPPERS:
                function, args, kwargs = _unwrapped(function, args, kwargs)
            cargo, name = self._way_of(function)
            item = WorkItem(cargo, [(name, args, kwargs)], self._source, timeout, done, answered, departs)
        except SerializationError as exc:
            done(exc)
            return None
        if item.outcome is not None:
            done(item.outcome)
            return None
        return item

    def _way_of(self, function: Callable[..., Any]) -> tuple[PickledFunction, Any]:
        """Decide how a function is sent: where any process finds it, once to each worker, or with the call.

        Returns:
            The program that is sent, and what stands for the function in a call: see `calls.call_function` and `SentFunction`.
        """
        latest, cargo, name = self._latest
        if function is latest and not list_registry_pickle_by_value() and cargo.is_current():
            return cargo, name
        place = object_path(function)
        if place is not None:
            cargo, name = self._calls, place
        elif _is_lasting(function):
            cargo, name = self._sent_once(function), False
        elif type(function) is partial and function.func is call_chunk and _is_lasting(function.args[0]):
            return self._sent_once(function.args[0]), True
        else:
            return self._calls, function
        if not is_async(function):
            self._latest = (function, cargo, name)
        return cargo, name

    def _sent_once(self, function: Callable[..., Any]) -> PickledFunction:
        known, cargo = self._sent.pop(id(function), (None, None))
        if known is None or cargo is None or not cargo.is_current():
            cargo = PickledFunction(
                UserFunction(SentFunction(function), by_keyword=False, setup=None), out_of_band=True, what="the function"
            )
            cargo.pickle()
        self._sent[id(function)] = (function, cargo)
        if len(self._sent) > MAX_CACHED_FUNCTIONS:
            self._sent.popitem(last=False)
        return cargo

    def worker_counts(self) -> WorkerCounts:
        """How many workers it has started, and how they ended."""
        return self._ledger.record()

    def withdraw(self, task: WorkItem) -> None:
        """Take a task back if no worker has it yet."""
        if self._dispatcher is not None:
            self._dispatcher.withdraw(task)

    def close_without_loop(self) -> None:
        """End the workers without their loop, which has closed."""
        if self._dispatcher is not None:
            self._dispatcher.abandon()
            self._release_dispatcher()

    def _pickled_initializer(self) -> Payload | None:
        if self._initializer is None:
            return None
        try:
            return Codec().dumps_checked((self._initializer, self._initargs), define=True)[0]
        except BaseException as exc:
            raise pickling_error("initializer", (self._initializer, self._initargs), exc) from exc  # noqa: EM101 - the name of a thing

    def _drop_dead_dispatcher(self) -> None:
        if self._dispatcher is not None and self._dispatcher.loop.is_closed():
            self.close_without_loop()

    def _release_dispatcher(self) -> None:
        self._dispatcher = None
        if self._finalizer is not None:
            self._finalizer.detach()

    def __reduce__(self) -> Any:
        """Refuse: its processes cannot cross."""
        msg = "a WorkerPool cannot be pickled; make one where it is used"
        raise TypeError(msg)


def _is_lasting(function: Any) -> bool:
    """Tell whether a function that is sent by value is worth keeping in workers: it belongs to a module, not to one call."""
    if type(function) is _CACHED:
        return find_by_path(function) is function
    if type(function) is not FunctionType:
        return False
    return find_by_path(function) is function or (function.__closure__ is None and "<locals>" not in function.__qualname__)


def _unwrapped(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """Take a partial function or a method apart, so that what it wraps is sent once, and the rest with each call."""
    if type(function) is partial:
        if function.func is not call_chunk and not any(arg is _PLACEHOLDER for arg in function.args):
            return _unwrapped(function.func, (*function.args, *args), {**function.keywords, **kwargs})
    elif type(function) is MethodType and _is_lasting(function.__func__):
        return function.__func__, (function.__self__, *args), kwargs
    return function, args, kwargs


def _start_method(context: BaseContext | str | None) -> str:
    if context is None:
        # Not fork: under an event loop, with threads about, a forked child may hang on a lock that nobody will release.
        return "forkserver" if sys.platform == "linux" else "spawn"
    method: Any = context if isinstance(context, str) else getattr(context, "get_start_method", lambda: context)()
    allowed = f"{', '.join(map(repr, _METHODS))}, a context of multiprocessing, or None"
    if not isinstance(method, str):
        msg = f"mp_context={context!r}: must be {allowed}"
        raise TypeError(msg)
    if method not in _METHODS or method not in multiprocessing.get_all_start_methods():
        msg = f"mp_context={context!r}: must be {allowed}, as far as this system has it"
        raise ValueError(msg)
    return method


def _close_orphaned(crew: PoolDispatcher) -> None:
    """The pool has been dropped without a stop."""
    if crew.closing or crew.pid != os.getpid():
        return
    try:
        crew.loop.call_soon_threadsafe(crew.drop)
    except RuntimeError:  # the loop has closed
        crew.abandon()


def _check_loop(crew: PoolDispatcher) -> None:
    if crew.loop is asyncio.get_running_loop():
        return
    if crew.pid != os.getpid():
        msg = "this pool was started before os.fork(), in the parent process; make a new one in the child"
    else:
        msg = "this pool runs on another event loop, which is still open; use one pool for each loop, or stop it there first"
    raise RuntimeError(msg)
