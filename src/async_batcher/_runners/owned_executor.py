"""Executors that a factory makes, and makes again after they broke or were shut down.

::

    submit --> executor --> BrokenExecutor, or it is over: discard it --> factory() --> submit again
                     `-> a future --> to_error(): which worker crashed; discard it

Rules:

- A call that was refused has not run, and goes to the next executor. A call that was taken and then
  failed never runs again.
- The workers of a standard pool that broke are killed: the pool waits forever for a stopped one.
- If a program exits without stopping its batcher, the workers are killed before the standard
  library waits for them.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
import weakref
from concurrent.futures import BrokenExecutor, Executor, ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

from async_batcher._pool.cpu_count import cpu_count
from async_batcher._pool.processes import exit_status
from async_batcher._runners.adapters import (
    DefaultExecutorAdapter,
    ExecutorAdapter,
    ExternalExecutorAdapter,
    broken_executor_error,
    is_process_pool,
)
from async_batcher._runners.factory import discard, is_over, log_failed_shutdown
from async_batcher.exceptions import AsyncBatchException, PoolBrokenError, WorkerDiedError

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable
    from concurrent.futures import Future

    from async_batcher._runners.factory import Factory

_EXIT_GRACE = 2.0  # seconds; a pool whose workers were killed ends in hundredths


class OwnedExecutorAdapter(ExecutorAdapter):
    """An executor that a factory made, and makes again in the thread of `submit`."""

    owned = True

    def __init__(self, factory: Factory, executor: Executor) -> None:
        self._factory = factory
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._closed = False
        self._killed = False
        self._last_crash: tuple[object, list[exit_status.ExitedProcess]] = (None, [])
        self._ending: list[threading.Thread] = []  # of pools that broke, until workers are reaped
        self._unused: list[Executor] = []  # shut down later: they may hold a lock of theirs now
        self._adopt(executor)

    @property
    def submit_may_block(self) -> bool:  # type: ignore[override]  # only read
        executor = self._executor
        return type(executor) is not ThreadPoolExecutor or bool(is_over(executor))

    def submit(self, call: Callable[[], Any]) -> tuple[Future[Any], object]:
        for attempt in (1, 2):
            executor = self._get()
            try:
                future = executor.submit(call)
            except Exception as exc:
                is_broken = isinstance(exc, BrokenExecutor) or is_over(executor)
                if is_broken is not False or isinstance(exc, OSError | EOFError):
                    self._discard(executor)
                if is_broken and attempt == 1:  # it broke while idle; this call has not run
                    continue
                if is_broken and not isinstance(executor, ThreadPoolExecutor):
                    msg = f"the process pool broke twice before the batch was submitted: {exc}"
                    raise WorkerDiedError(msg, may_have_run=False) from exc
                # No process can be started, or the fork server is gone.
                if isinstance(exc, OSError | EOFError) and is_process_pool(executor):
                    raise exit_status.start_failure(exc) from exc
                raise self._failure(executor, exc) from exc
            if not hasattr(future, "add_done_callback"):
                error = TypeError(f"its submit() returned {future!r:.80}, which is not a future")
                raise self._failure(executor, error)
            if _is_standard(executor):
                exit_status.kill_rather_than_terminate(executor)  # it may have started workers
            return future, executor
        raise AssertionError  # the loop returns or raises

    def to_error(self, error: BaseException, source: object) -> AsyncBatchException:
        is_broken = isinstance(error, BrokenExecutor)
        if isinstance(error, WorkerDiedError | PoolBrokenError):  # an executor over a `WorkerPool`
            if is_broken:
                self._discard(source)
            return error
        if not is_broken or isinstance(source, ThreadPoolExecutor):
            if is_broken or is_over(source):
                self._discard(source)
            return self._failure(source, error)
        crashed = self._crashed_workers(source)
        has_initializer = getattr(source, "_initializer", None) is not None
        is_users = has_initializer and not _is_standard(source)
        return exit_status.standard_pool_crash(crashed, error, has_initializer=is_users)

    def is_broken(self) -> bool:
        executor = self._executor
        if executor is not None and getattr(executor, "_broken", False):
            # The blocked submit returns when the pool sees its workers exit.
            self._crashed_workers(executor)
        return False

    def _crashed_workers(self, executor: object) -> list[exit_status.ExitedProcess]:
        """Return which workers of a pool crashed, and discard the pool."""
        known, crashed = self._last_crash
        if executor is not known:  # its first call: the other workers still run
            crashed = exit_status.exited_processes(executor)
            self._last_crash = (executor, crashed)
            self._discard(executor)
        return crashed

    def kill(self) -> None:
        self._closed = self._killed = True
        self._kill(self._executor)

    def wait(self, seconds: float) -> None:
        """Wait until the pools that were killed have ended."""
        for thread in [*self._ending, _manager_thread(self._executor)]:
            if thread is not None:
                thread.join(seconds)

    def shut_down(self) -> None:
        with self._lock:
            self._closed = True
            executor = self._executor  # it stays where `kill` finds it
        self._shut_down_unused()
        if executor is not None:
            if self._killed:
                self._kill(executor)  # again: it may have been starting when `kill` was called
            _shut_down(executor, wait=not self._killed or bool(exit_status.processes_of(executor)))
        for thread in self._ending:
            thread.join()

    def _get(self) -> Executor:
        executor = self._executor
        if executor is not None and not self._closed and not is_over(executor):
            return executor
        with self._lock:
            self._check_open()
            if self._executor is not None and is_over(self._executor):
                self._discard(self._executor)
            if self._executor is None:
                self._shut_down_unused()
                made = self._factory()
                if not isinstance(made, Executor):
                    msg = (
                        "the factory given as executor= returned an executor first, and now a "
                        "WorkerPool; it must always return the same kind"
                    )
                    raise PoolBrokenError(msg)
                self._adopt(made)
                self._check_open()  # again: a factory may take long
            return self._executor  # type: ignore[return-value]  # mypy does not see `_adopt`

    def _check_open(self) -> None:
        if self._closed:
            msg = "the batcher has been stopped"
            raise PoolBrokenError(msg)

    def _adopt(self, executor: Executor) -> None:
        self._executor: Executor | None = executor
        self._describe(executor)
        self.has_threads = isinstance(executor, ThreadPoolExecutor) and not self.pickles
        if hasattr(executor, "_processes"):
            _kill_at_exit(self)

    def _failure(self, executor: object, error: BaseException) -> PoolBrokenError:
        verb = "gets a new one" if self._executor is None else "tries again"
        what = f"the {type(executor).__name__} that the batcher made"
        return broken_executor_error(what, error, f"The next batch {verb}")

    def _discard(self, executor: object) -> None:
        # Without the lock: the standard pool calls this while it holds its own, for which a submit
        # under our lock may wait.
        if self._executor is executor:
            self._executor = None
        ending = [thread for thread in self._ending if thread.is_alive()]
        thread = _manager_thread(executor)
        self._ending = ending if thread is None else [*ending, thread]
        self._kill(executor)
        if thread is None and isinstance(executor, Executor):
            self._unused.append(executor)

    def _shut_down_unused(self) -> None:
        while self._unused:
            discard(self._unused.pop())

    def _kill(self, executor: object) -> None:
        # The standard pool sends SIGTERM and waits, forever if a worker is stopped or ignores it.
        if os.getpid() == self._pid:
            for process in exit_status.processes_of(executor):
                exit_status.kill(process)


def make_adapter(
    factory: Factory | None, executor: Executor | None, loop: asyncio.AbstractEventLoop
) -> ExecutorAdapter:
    if executor is None:
        return DefaultExecutorAdapter(loop)
    if factory is None:
        return ExternalExecutorAdapter(executor)
    return OwnedExecutorAdapter(factory, executor)


def standard_factory(executor: str, workers: int, *, has_worker_pool: bool) -> Factory:
    if executor == "thread":
        return partial(ThreadPoolExecutor, workers, thread_name_prefix="async_batcher")
    if not has_worker_pool:
        return partial(_standard_pool, workers)
    from async_batcher._pool.pool import WorkerPool

    return partial(WorkerPool, workers)


def _standard_pool(workers: int) -> Executor:
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor

    from async_batcher._worker.bootstrap import init_standard_worker

    # Not fork: with other threads, a forked child may hang on a lock that is never released.
    method = "forkserver" if sys.platform == "linux" else "spawn"
    return ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context(method),
        initializer=init_standard_worker,
        initargs=(max(1, cpu_count() // workers),),
    )


def _manager_thread(executor: object) -> threading.Thread | None:
    return getattr(executor, "_executor_manager_thread", None)


def _is_standard(executor: object) -> bool:
    module = getattr(getattr(executor, "_initializer", None), "__module__", None)
    return module == "async_batcher._worker.bootstrap"


def _shut_down(executor: Executor, *, wait: bool) -> None:
    try:
        try:
            executor.shutdown(wait=wait, cancel_futures=True)
        except TypeError:  # loky, and executors older than Python 3.9
            executor.shutdown(wait=wait)
    except Exception as exc:  # noqa: BLE001 - the user's executor
        log_failed_shutdown(executor, exc)


_owned: weakref.WeakSet[OwnedExecutorAdapter] = weakref.WeakSet()
_exit_hook = threading.Lock()  # taken by the first call, which registers the hook


def _kill_at_exit(adapter: OwnedExecutorAdapter) -> None:
    """Make a program that exits without `stop` kill its workers instead of waiting for them."""
    _owned.add(adapter)
    if _exit_hook.acquire(blocking=False):
        # This registers the standard hook, which waits for batches: ours must be called first.
        import concurrent.futures.process  # noqa: F401

        getattr(threading, "_register_atexit", atexit.register)(_kill_all)


def _kill_all() -> None:
    owned = list(_owned)
    for adapter in owned:
        adapter.kill()
    # Or the standard pool's hook, which is called next, would write to a pipe that is being closed.
    for adapter in owned:
        adapter.wait(_EXIT_GRACE)
