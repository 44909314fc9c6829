"""A `concurrent.futures.Executor` over a `WorkerPool`, for programs that have no event loop: a thread hosts one.

::

    PoolExecutor.submit(fn, ...) --call_soon_threadsafe--> _Host: the thread, its loop --> WorkerPool --> a worker
        future <------------------------- set_result ----------'

Rules:

- A host does not know its executor: one that nobody holds any more is collected, and its host runs what was submitted, and ends.
- Every future that `submit` has handed out is settled, whatever the host ends by.
- A future is settled without raising: its exception would hold the frames that raised it, and they the future.
- Each host is joined before the program ends. One that belongs to the parent of a forked process is left alone.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import functools
import logging
import os
import threading
import weakref
from concurrent.futures import BrokenExecutor, Executor, Future
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

from async_batcher._serialization.caller_exceptions import of_call
from async_batcher._serialization.exception_text import is_exception
from async_batcher._worker.calls import call_chunk
from async_batcher.exceptions import PoolBrokenError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from async_batcher._pool.pool import WorkerPool
    from async_batcher._pool.work_item import WorkItem
    from async_batcher._worker.results import Outcome

R = TypeVar("R")

_log = logging.getLogger("async_batcher")


class BrokenWorkerPool(PoolBrokenError, BrokenExecutor):  # noqa: N818 - beside BrokenProcessPool and BrokenThreadPool
    """The pool behind an executor could not start a worker; the executor runs nothing more."""


class PoolExecutor(Executor):
    """What `WorkerPool.as_executor` returns.

    As with every executor, a program that ends waits for what has been submitted, and a call that runs cannot be cancelled. One
    that was lost with its worker raises `WorkerDiedError`, and the next ones run on.

    Args:
        pool: The pool, which this starts with the first call, and stops at `shutdown`, or when nobody holds this any more.
    """

    def __init__(self, pool: WorkerPool) -> None:
        self._pool = pool
        self._max_workers = pool.max_workers  # as in the standard executors
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._host: _LoopThread | None = None
        self._is_shut_down = False

    @property
    def _broken(self) -> str | None:  # as in the standard executors
        return self._host.broken if self._host is not None else None

    def submit(self, fn: Callable[..., R], /, *args: Any, **kwargs: Any) -> Future[R]:
        """Have ``fn(*args, **kwargs)`` run in a worker.

        Raises:
            BrokenExecutor: No worker could be started.
            RuntimeError: The executor has been shut down, the program is ending, or no thread can be started.
        """
        if self._pid != os.getpid():
            msg = "this executor was made before os.fork(), in the parent process; make a new one in the child"
            raise RuntimeError(msg)
        with self._lock:
            if self._is_shut_down:
                msg = "cannot schedule new futures after shutdown"
                raise RuntimeError(msg)
            if _hosts.are_ending:
                raise RuntimeError(_TOO_LATE)
            if self._broken is not None:
                raise BrokenWorkerPool(self._broken)
            return (self._host or self._start()).submit(fn, args, kwargs)

    def map(
        self,
        fn: Callable[..., R],
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int = 1,
        **options: Any,
    ) -> Iterator[R]:
        """Call ``fn`` with what the iterables give, in workers; give the results in order.

        Args:
            fn: As for `submit`.
            *iterables: As for `map`.
            timeout: Seconds from now until the last result must be here; None: as long as it takes.
            chunksize: Calls that travel together.
            **options: ``buffersize``, where `concurrent.futures.Executor.map` knows it (from Python 3.14).

        Raises:
            TimeoutError: It took longer than ``timeout``.
            ValueError: ``chunksize`` is less than 1.
        """
        if chunksize < 1:
            msg = f"chunksize={chunksize}: must be at least 1"
            raise ValueError(msg)
        if chunksize == 1:
            return super().map(fn, *iterables, timeout=timeout, **options)
        chunks = _chunks(zip(*iterables, strict=False), chunksize)
        return _one_by_one(super().map(functools.partial(call_chunk, fn), chunks, timeout=timeout, **options))

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:  # noqa: FBT001, FBT002 - as in the base class
        """Take no more; end the workers when all that was submitted has run.

        Args:
            wait: Whether to wait for that. In a callback of a future, which runs in the host's own thread, it does not.
            cancel_futures: Cancel what does not run yet; as many calls as there are workers that are being started run first.
        """
        if self._pid != os.getpid():
            return
        with self._lock:
            self._is_shut_down = True
            host = self._host
        if host is not None:
            host.end(cancel_futures=cancel_futures)
            if wait:
                host.join()

    def _start(self) -> _LoopThread:
        host = _LoopThread(self._pool)
        _hosts.add(host)
        self._host = host
        try:
            host.start()
        except Exception:  # no thread could be started; the next call tries anew
            self._host = None
            _hosts.discard(host)
            host.close()
            raise
        weakref.finalize(self, host.end).atexit = False
        return host


class _LoopThread:
    """The thread, the loop that it runs, and the pool on it.

    Attributes:
        broken: Why no more calls are taken; None: they are.
    """

    def __init__(self, pool: WorkerPool) -> None:
        self.broken: str | None = None
        self._pool = pool
        self._pid = os.getpid()
        self._loop = asyncio.new_event_loop()
        self._is_done = asyncio.Event()
        self._calls: dict[Future[Any], WorkItem | None] = {}  # that have not been settled; None: not handed to the pool yet
        self._thread = threading.Thread(target=self._run, name="async_batcher-executor", daemon=True)

    # From any thread.

    def start(self) -> None:
        self._thread.start()

    def submit(self, fn: Callable[..., R], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Future[R]:
        future: Future[R] = Future()
        self._calls[future] = None
        try:
            self._loop.call_soon_threadsafe(self._begin, future, fn, args, kwargs)
        except RuntimeError:
            self._calls.pop(future, None)
            raise
        future.add_done_callback(functools.partial(_on_done, weakref.ref(self)))
        return future

    def withdraw(self, future: Future[Any]) -> None:
        """A future has been cancelled."""
        with contextlib.suppress(RuntimeError):  # the loop has closed
            self._loop.call_soon_threadsafe(self._withdraw, future)

    def end(self, *, cancel_futures: bool = False) -> None:
        """Come to an end once all that was submitted has run."""
        if self._pid == os.getpid():
            with contextlib.suppress(RuntimeError):  # the loop has closed
                self._loop.call_soon_threadsafe(self._finish, cancel_futures)

    def join(self) -> None:
        if self._pid == os.getpid() and self._thread is not threading.current_thread():
            self._thread.join()

    def close(self) -> None:
        """Fail what was not settled."""
        self._loop.close()  # first, so that no call comes after those that are failed here
        for future in list(self._calls):
            error = BrokenWorkerPool("the thread that hosts the pool has ended before the call did")
            self._answered(future, error)

    # On the loop's thread.

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._serve())
        finally:
            self.broken = self.broken or "the thread that hosts the pool has ended"
            self.close()
            _hosts.discard(self)

    async def _serve(self) -> None:
        await self._is_done.wait()
        with contextlib.suppress(RuntimeError):  # the pool is in use elsewhere: nothing of it was ours
            await self._pool.stop()

    def _begin(self, future: Future[Any], fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if future not in self._calls or future.cancelled():
            return
        if self.broken is not None:
            self._answered(future, PoolBrokenError(self.broken))
            return
        done = functools.partial(self._answered, future, function=_of_chunk(fn))
        departs = functools.partial(self._departs, future)
        try:
            task = self._pool.work_item(fn, args, kwargs, done, departs=departs)
            if task is not None:
                self._pool.dispatcher().submit(task)
        except BaseException as exc:  # noqa: BLE001 - whatever it is, it is this call's
            done(exc)
            return
        if future in self._calls:
            self._calls[future] = task

    def _departs(self, future: Future[Any]) -> bool:
        """A worker is free for a call: does anybody still want it?"""
        if future in self._calls and future.set_running_or_notify_cancel():
            return True
        self._calls.pop(future, None)
        return False

    def _withdraw(self, future: Future[Any]) -> None:
        if future in self._calls:
            task = self._calls.pop(future)
            if task is not None:
                self._pool.withdraw(task)
            future.set_running_or_notify_cancel()  # tells those who wait for it

    def _answered(self, future: Future[Any], outcome: Outcome, function: Any = None) -> None:
        if future not in self._calls:
            return
        del self._calls[future]
        if not future.running() and not future.set_running_or_notify_cancel():
            return
        answer: Any = outcome if isinstance(outcome, BaseException) else outcome[0]
        try:
            if isinstance(answer, PoolBrokenError):
                future.set_exception(self._broke(answer))
            elif is_exception(answer):
                future.set_exception(of_call(answer, function))
            else:
                future.set_result(answer[0])
        except BaseException:  # noqa: BLE001 - user code
            # An Exception is logged by the future itself; none may end the thread.
            _log.exception("a callback of a future raised")

    def _broke(self, error: PoolBrokenError) -> BrokenWorkerPool:
        self.broken = self.broken or str(error)
        broken = BrokenWorkerPool(str(error))
        broken.__cause__ = error.__cause__
        return broken

    def _finish(self, cancel_futures: bool) -> None:  # noqa: FBT001 - by position, from another thread
        self._is_done.set()
        # The first ones run, or have a worker being started for them.
        for future in list(self._calls)[self._pool.max_workers :] if cancel_futures else ():
            try:
                future.cancel()
            except BaseException:  # noqa: BLE001 - user code
                _log.exception("a callback of a future raised")


def _on_done(host: weakref.ref[_LoopThread], future: Future[Any]) -> None:
    if future.cancelled():
        held = host()
        if held is not None:
            held.withdraw(future)


def _of_chunk(function: Callable[..., Any]) -> Callable[..., Any]:
    """The user's function in a chunk of `PoolExecutor.map`; else the function itself."""
    is_chunk = isinstance(function, functools.partial) and function.func is call_chunk
    return function.args[0] if is_chunk else function  # type: ignore[attr-defined]


def _chunks(arguments: Iterator[tuple[Any, ...]], size: int) -> Iterator[list[tuple[Any, ...]]]:
    while chunk := list(islice(arguments, size)):
        yield chunk


def _one_by_one(lists: Iterator[list[R]]) -> Iterator[R]:
    for results in lists:
        results.reverse()
        while results:
            yield results.pop()


_TOO_LATE = "cannot schedule new futures after interpreter shutdown"


class _LoopThreadRegistry:
    """Every host that runs; sees to it that a program which ends waits for what it has submitted, as with every executor."""

    def __init__(self) -> None:
        self.are_ending = False
        self._running: set[_LoopThread] = set()
        self._hook = threading.Lock()  # taken once, by whoever registers the hook

    def add(self, host: _LoopThread) -> None:
        """Note one that is to start.

        Raises:
            RuntimeError: The program is ending.
        """
        if self._hook.acquire(blocking=False):
            try:
                getattr(threading, "_register_atexit", atexit.register)(self._end)
            except RuntimeError:
                self.are_ending = True
        self._running.add(host)
        if self.are_ending:
            self._running.discard(host)
            host.close()
            raise RuntimeError(_TOO_LATE)

    def discard(self, host: _LoopThread) -> None:
        """One has ended."""
        self._running.discard(host)

    def _end(self) -> None:
        self.are_ending = True
        hosts = list(self._running)
        for host in hosts:
            host.end()
        for host in hosts:
            with contextlib.suppress(RuntimeError):  # its thread is only just being started
                host.join()


_hosts = _LoopThreadRegistry()
