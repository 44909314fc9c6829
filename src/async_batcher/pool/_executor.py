"""A `concurrent.futures.Executor` over a `WorkerPool`, for programs that have no event loop: a thread hosts one.

::

    submit(fn, ...) --call_soon_threadsafe--> the thread's loop --> WorkerPool --> a worker
        future <------------------------------- set_result ---------'
"""

from __future__ import annotations

import asyncio
import atexit
import functools
import os
import threading
import weakref
from concurrent.futures import BrokenExecutor, Executor, Future
from typing import TYPE_CHECKING, Any, TypeVar

from async_batcher.exceptions import PoolBrokenError
from async_batcher.pool._task import result_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from async_batcher._outcome import Outcome
    from async_batcher.pool._pool import WorkerPool
    from async_batcher.pool._task import Task

R = TypeVar("R")


class BrokenWorkerPool(PoolBrokenError, BrokenExecutor):  # noqa: N818 - beside BrokenProcessPool and BrokenThreadPool
    """The pool behind an executor could not start a worker; the executor runs nothing more."""


class PoolExecutor(Executor):
    """What `WorkerPool.as_executor` returns.

    As with every executor, a program that ends waits for what has been submitted; a call that runs cannot be cancelled; one that
    was lost with its worker raises `WorkerDiedError`, and the next ones run on.

    Args:
        pool: The pool, which this starts with the first call, and stops at `shutdown`.
    """

    def __init__(self, pool: WorkerPool) -> None:
        self._pool = pool
        self._max_workers = pool.max_workers  # as in the standard executors
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: dict[Future[Any], Task | None] = {}  # on the loop's thread; None: not handed over yet
        self._is_shut_down = False
        self._broken: str | None = None

    def submit(self, fn: Callable[..., R], /, *args: Any, **kwargs: Any) -> Future[R]:
        """Have ``fn(*args, **kwargs)`` run in a worker.

        Raises:
            BrokenExecutor: No worker could be started.
            RuntimeError: The executor has been shut down.
        """
        if self._pid != os.getpid():
            msg = "this executor was made before os.fork(), in the parent process; make a new one in the child"
            raise RuntimeError(msg)
        with self._lock:
            if self._broken is not None:
                raise BrokenWorkerPool(self._broken)
            if self._is_shut_down:
                msg = "cannot schedule new futures after shutdown"
                raise RuntimeError(msg)
            loop = self._loop or self._start()
            future: Future[R] = Future()
            loop.call_soon_threadsafe(self._begin, future, fn, args, kwargs)
            return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:  # noqa: FBT001, FBT002 - as in the base class
        """Take no more; end the workers when all that was submitted has run.

        Args:
            wait: Whether to wait for that.
            cancel_futures: Cancel what does not run yet.
        """
        with self._lock:
            self._is_shut_down = True
            loop, thread = self._loop, self._thread
            if loop is not None and not loop.is_closed():
                loop.call_soon_threadsafe(self._finish, cancel_futures)
        if wait and thread is not None and thread is not threading.current_thread():
            thread.join()

    def _start(self) -> asyncio.AbstractEventLoop:
        """Start the thread and its loop."""
        loop = self._loop = asyncio.new_event_loop()
        self._done = asyncio.Event()
        # Not by a bound method: an executor that nobody holds any more shall end its workers.
        self._thread = threading.Thread(
            target=_host, args=(loop, self._pool, self._done), name="async_batcher-executor", daemon=True
        )
        self._thread.start()
        _shut_down_at_exit(self)
        weakref.finalize(self, _end, loop, self._done).atexit = False
        return loop

    # On the thread's loop.

    def _begin(self, future: Future[Any], fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._tasks[future] = None
        done = functools.partial(self._answered, future)
        try:
            task = self._pool.submit_call(fn, args, kwargs, done, departs=functools.partial(self._departs, future))
        except BaseException as exc:  # noqa: BLE001 - whatever it is, it is this call's
            done(exc)
            return
        if future in self._tasks:
            self._tasks[future] = task

    def _departs(self, future: Future[Any]) -> bool:
        if future.set_running_or_notify_cancel():
            return True
        self._tasks.pop(future, None)
        return False

    def _answered(self, future: Future[Any], outcome: Outcome) -> None:
        self._tasks.pop(future, None)
        if not future.running() and not future.set_running_or_notify_cancel():
            return
        try:
            result = result_of(outcome)
        except PoolBrokenError as exc:
            with self._lock:
                self._broken = str(exc)
            broken = BrokenWorkerPool(str(exc))
            broken.__cause__ = exc.__cause__
            future.set_exception(broken)
        except BaseException as exc:  # noqa: BLE001 - what the call raised
            future.set_exception(exc)
        else:
            future.set_result(result)

    def _finish(self, cancel_futures: bool) -> None:  # noqa: FBT001 - by position, from another thread
        if cancel_futures:
            for future, task in list(self._tasks.items()):
                if task is not None and future.cancel():
                    self._pool.crew().withdraw(task)
                    self._departs(future)
        self._done.set()


def _host(loop: asyncio.AbstractEventLoop, pool: WorkerPool, done: asyncio.Event) -> None:
    """Run the loop until the executor is done with it."""

    async def serve() -> None:
        await done.wait()
        await pool.stop()

    asyncio.set_event_loop(loop)
    try:
        loop.run_until_complete(serve())
    finally:
        asyncio.set_event_loop(None)
        loop.close()


def _end(loop: asyncio.AbstractEventLoop, done: asyncio.Event) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(done.set)


_in_use: weakref.WeakSet[PoolExecutor] = weakref.WeakSet()
_exit_hook = threading.Lock()  # taken once, by whoever registers the hook


def _shut_down_at_exit(executor: PoolExecutor) -> None:
    """See to it that a program which ends waits for what it has submitted, as with every executor."""
    _in_use.add(executor)
    if _exit_hook.acquire(blocking=False):
        getattr(threading, "_register_atexit", atexit.register)(_shut_down_all)


def _shut_down_all() -> None:
    for executor in list(_in_use):
        executor.shutdown()
