"""A `concurrent.futures.Executor` over a `WorkerPool`, on an event loop in a thread of its own.

::

    PoolExecutor.submit(fn, ...) --call_soon_threadsafe--> LoopThread --> WorkerPool --> a worker
        future <------------------- set_result ----------------'
"""

from __future__ import annotations

import functools
import os
import threading
import weakref
from concurrent.futures import Executor, Future
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

from async_batcher._pool.loop_thread import EXITING_MSG, BrokenWorkerPool, LoopThread, loop_threads
from async_batcher._worker.calls import call_chunk
from async_batcher._worker.imports import check_not_importing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from async_batcher._pool.pool import WorkerPool

R = TypeVar("R")


class PoolExecutor(Executor):
    """The executor that `WorkerPool.as_executor` returns.

    As with every executor, a program waits for the submitted calls when it exits, and a call that
    runs cannot be cancelled. A call whose worker crashed raises `WorkerDiedError`; the next calls
    run.

    Args:
        pool: The pool, which starts with the first call, and stops at `shutdown` or when the
            executor is garbage-collected.
    """

    def __init__(self, pool: WorkerPool) -> None:
        self._pool = pool
        self._max_workers = pool.max_workers  # as in the standard executors
        self._pid: int | None = None  # of the process that made the first call
        self._lock = threading.Lock()
        self._thread: LoopThread | None = None
        self._is_shut_down = False

    @property
    def _broken(self) -> str | None:  # as in the standard executors
        return self._thread.broken if self._thread is not None else None

    @property
    def _is_inherited(self) -> bool:
        return self._pid not in (None, os.getpid())

    def submit(self, fn: Callable[..., R], /, *args: Any, **kwargs: Any) -> Future[R]:
        """Call ``fn(*args, **kwargs)`` in a worker.

        Raises:
            BrokenExecutor: No worker could be started.
            RuntimeError: The executor has been shut down, the program is exiting, or no thread can
                be started.
        """
        if self._is_inherited:
            msg = (
                "this executor was used in the parent process, before os.fork(); make a new "
                "executor in the child"
            )
            raise RuntimeError(msg)
        with self._lock:
            if self._is_shut_down:
                msg = "cannot schedule new futures after shutdown"
                raise RuntimeError(msg)
            if loop_threads.exiting:
                raise RuntimeError(EXITING_MSG)
            if self._broken is not None:
                raise BrokenWorkerPool(self._broken)
            return (self._thread or self._start()).submit(fn, args, kwargs)

    def map(
        self,
        fn: Callable[..., R],
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int = 1,
        **options: Any,
    ) -> Iterator[R]:
        """Call ``fn`` in workers with arguments from the iterables; yield the results in order.

        Args:
            fn: Function to call.
            *iterables: Its arguments, as for `map`.
            timeout: Timeout in seconds from this call to the last result. None disables it.
            chunksize: Number of calls that travel together.
            **options: ``buffersize``, as in `concurrent.futures.Executor.map` of Python 3.14.

        Raises:
            TimeoutError: The last result did not come within ``timeout``.
            ValueError: ``chunksize`` is less than 1.
        """
        if chunksize < 1:
            msg = f"chunksize={chunksize}: must be at least 1"
            raise ValueError(msg)
        if chunksize == 1:
            return super().map(fn, *iterables, timeout=timeout, **options)
        chunks = _chunks(zip(*iterables, strict=False), chunksize)
        call = functools.partial(call_chunk, fn)
        return _flatten(super().map(call, chunks, timeout=timeout, **options))

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:  # noqa: FBT001, FBT002 - as in the base class
        """Refuse new calls; stop the workers when the submitted calls have finished.

        Args:
            wait: Whether to wait for that. A callback of a future, which runs in the executor's own
                thread, never waits.
            cancel_futures: Whether to cancel the calls that do not run yet, except as many as there
                are workers being started.
        """
        if self._is_inherited:
            return
        with self._lock:
            self._is_shut_down = True
            thread = self._thread
        if thread is not None:
            thread.stop(cancel_futures=cancel_futures)
            if wait:
                thread.join()

    def _start(self) -> LoopThread:
        check_not_importing()  # here: the loop's thread may start workers after the import
        self._pid = os.getpid()
        thread = LoopThread(self._pool)
        loop_threads.add(thread)
        self._thread = thread
        try:
            thread.start()
        except Exception:  # no thread could be started; the next call tries again
            self._thread = None
            loop_threads.discard(thread)
            thread.close()
            raise
        weakref.finalize(self, thread.stop).atexit = False
        return thread


def _chunks(arguments: Iterator[tuple[Any, ...]], size: int) -> Iterator[list[tuple[Any, ...]]]:
    while chunk := list(islice(arguments, size)):
        yield chunk


def _flatten(lists: Iterator[list[R]]) -> Iterator[R]:
    for results in lists:
        results.reverse()
        while results:
            yield results.pop()
