"""A thread with an event loop and a pool on it, for `PoolExecutor`.

Rules:

- A loop thread does not refer to its executor. So an executor without references is collected, and
  its thread finishes the submitted calls and ends.
- Every future of `submit` is resolved, however the thread ends.
- A future is resolved without raising: the exception would hold the frames that raised it, and
  these the future.
- Each thread is joined before the program exits. A forked child leaves its parent's threads alone.
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
from concurrent.futures import BrokenExecutor, Future
from typing import TYPE_CHECKING, Any, TypeVar

from async_batcher._serialization.caller_exceptions import of_call
from async_batcher._serialization.exception_text import is_exception
from async_batcher._worker.calls import call_chunk
from async_batcher.exceptions import PoolBrokenError

if TYPE_CHECKING:
    from collections.abc import Callable

    from async_batcher._pool.pool import WorkerPool
    from async_batcher._pool.work_item import WorkItem
    from async_batcher._worker.results import Outcome

R = TypeVar("R")

logger = logging.getLogger("async_batcher")

EXITING_MSG = "cannot schedule new futures after interpreter shutdown"


class BrokenWorkerPool(PoolBrokenError, BrokenExecutor):  # noqa: N818 - beside BrokenProcessPool
    """The pool behind an executor could not start a worker; the executor accepts no more calls."""


class LoopThread:
    """A thread, its event loop, and the pool on that loop.

    Attributes:
        broken: Why it accepts no more calls. None while it does.
    """

    def __init__(self, pool: WorkerPool) -> None:
        self.broken: str | None = None
        self._pool = pool
        self._pid = os.getpid()
        self._loop = asyncio.new_event_loop()
        self._stop_requested = asyncio.Event()
        # Calls that are not resolved; None until the pool has them. Other threads add to it, before
        # they call the loop: what they add is seen there, or by `close` if the loop has closed.
        self._calls: dict[Future[Any], WorkItem | None] = {}
        name = "async_batcher-executor"
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    # --- from any thread

    def start(self) -> None:
        self._thread.start()

    def submit(
        self, fn: Callable[..., R], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Future[R]:
        future: Future[R] = Future()
        self._calls[future] = None
        try:
            self._loop.call_soon_threadsafe(self._submit, future, fn, args, kwargs)
        except RuntimeError:
            self._calls.pop(future, None)
            raise
        future.add_done_callback(functools.partial(_on_done, weakref.ref(self)))
        return future

    def on_cancelled(self, future: Future[Any]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has closed
            self._loop.call_soon_threadsafe(self._withdraw, future)

    def stop(self, *, cancel_futures: bool = False) -> None:
        """End the thread when the submitted calls have finished."""
        if self._pid == os.getpid():
            with contextlib.suppress(RuntimeError):  # the loop has closed
                self._loop.call_soon_threadsafe(self._request_stop, cancel_futures)

    def join(self) -> None:
        if self._pid == os.getpid() and self._thread is not threading.current_thread():
            self._thread.join()

    def close(self) -> None:
        """Fail the calls that are not resolved."""
        self._loop.close()  # first, so that no call comes later
        for future in list(self._calls):
            error = BrokenWorkerPool("the executor's thread ended before the call was finished")
            self._on_outcome(future, error)

    # --- on the loop's thread

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._serve())
        finally:
            self.broken = self.broken or "the executor's thread has ended"
            self.close()
            loop_threads.discard(self)

    async def _serve(self) -> None:
        await self._stop_requested.wait()
        with contextlib.suppress(RuntimeError):  # the pool is in use elsewhere, and not ours
            await self._pool.stop()

    def _submit(
        self,
        future: Future[Any],
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        if future not in self._calls or future.cancelled():
            return
        if self.broken is not None:
            self._on_outcome(future, PoolBrokenError(self.broken))
            return
        on_outcome = functools.partial(self._on_outcome, future, function=_function_of_chunk(fn))
        claim = functools.partial(self._claim, future)
        try:
            work_item = self._pool.calls.work_item(fn, args, kwargs, on_outcome, claim=claim)
            if work_item is not None:
                self._pool.dispatcher().submit(work_item)
        except BaseException as exc:  # noqa: BLE001 - it fails this call alone
            on_outcome(exc)
            return
        if future in self._calls:
            self._calls[future] = work_item

    def _claim(self, future: Future[Any]) -> bool:
        """Mark a call as running when a worker is free; return whether it is still wanted."""
        if future in self._calls and future.set_running_or_notify_cancel():
            return True
        self._calls.pop(future, None)
        return False

    def _withdraw(self, future: Future[Any]) -> None:
        if future in self._calls:
            work_item = self._calls.pop(future)
            if work_item is not None:
                self._pool.withdraw(work_item)
            future.set_running_or_notify_cancel()  # notifies `wait` and `as_completed`

    def _on_outcome(self, future: Future[Any], outcome: Outcome, function: Any = None) -> None:
        if future not in self._calls:
            return
        del self._calls[future]
        if not future.running() and not future.set_running_or_notify_cancel():
            return
        result: Any = outcome if isinstance(outcome, BaseException) else outcome[0]
        try:
            if isinstance(result, PoolBrokenError):
                future.set_exception(self._broken_error(result))
            elif is_exception(result):
                future.set_exception(of_call(result, function))
            else:
                future.set_result(result[0])
        except BaseException:
            # The future itself logs an Exception of a callback; the others must not end the thread.
            logger.exception("a callback of a future of a PoolExecutor raised")

    def _broken_error(self, error: PoolBrokenError) -> BrokenWorkerPool:
        self.broken = self.broken or str(error)
        broken = BrokenWorkerPool(str(error))
        broken.__cause__ = error.__cause__
        return broken

    def _request_stop(self, cancel_futures: bool) -> None:  # noqa: FBT001 - from another thread
        self._stop_requested.set()
        # The first ones run, or have a worker being started for them.
        for future in list(self._calls)[self._pool.max_workers :] if cancel_futures else ():
            try:
                future.cancel()
            except BaseException:
                logger.exception("a callback of a future of a PoolExecutor raised")


def _on_done(thread: weakref.ref[LoopThread], future: Future[Any]) -> None:
    if future.cancelled():
        alive = thread()
        if alive is not None:
            alive.on_cancelled(future)


def _function_of_chunk(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the user's function of a chunk of `PoolExecutor.map`, or the function itself."""
    is_chunk = isinstance(function, functools.partial) and function.func is call_chunk
    return function.args[0] if is_chunk else function  # type: ignore[attr-defined]


class LoopThreadRegistry:
    """The loop threads that run; the program joins them when it exits."""

    def __init__(self) -> None:
        self.exiting = False
        self._running: set[LoopThread] = set()
        self._hook_registered = threading.Lock()  # acquired once, and never released

    def add(self, thread: LoopThread) -> None:
        """Add a thread before its start; raise RuntimeError if the program is exiting."""
        if self._hook_registered.acquire(blocking=False):
            try:
                getattr(threading, "_register_atexit", atexit.register)(self._stop_all)
            except RuntimeError:
                self.exiting = True
        self._running.add(thread)
        if self.exiting:
            self._running.discard(thread)
            thread.close()
            raise RuntimeError(EXITING_MSG)

    def discard(self, thread: LoopThread) -> None:
        self._running.discard(thread)

    def _stop_all(self) -> None:
        self.exiting = True
        threads = list(self._running)
        for thread in threads:
            thread.stop()
        for thread in threads:
            with contextlib.suppress(RuntimeError):  # its thread is only just being started
                thread.join()


loop_threads = LoopThreadRegistry()
