"""Executors that the batcher makes by a factory, and makes again after they broke or were shut down.

::

    submit --> the executor --> BrokenExecutor, or it is over: discard it --> factory() --> submit once more
                   `-> a future --> lost(): which worker crashed; discard --> the next submit calls factory()

Rules:

- A call that was refused has not run, and goes to the next executor; one that was taken and lost never runs again.
- The workers of a standard pool that broke are killed: the pool itself waits for ever for one that is stopped.
- At the end of a program that did not stop its batcher, the workers are killed before the standard library waits for them.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
import threading
import weakref
from concurrent.futures import BrokenExecutor, Executor, ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

from async_batcher._pool.cpu_count import cpu_count
from async_batcher._pool.exit_status import (
    ExitedProcess,
    exited_processes,
    kill,
    kill_rather_than_terminate,
    processes_of,
    standard_pool_crash,
    start_failure,
)
from async_batcher._runners.adapters import (
    DefaultExecutorAdapter,
    ExternalExecutorAdapter,
    broken_executor_error,
    is_process_pool,
    pickles,
    workers_of,
)
from async_batcher._runners.factory import discard, is_over
from async_batcher.exceptions import AsyncBatchException, PoolBrokenError, WorkerDiedError

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable
    from concurrent.futures import Future

    from async_batcher._runners.factory import Factory

_EXIT_PATIENCE = 2.0  # seconds; a pool whose workers were killed takes hundredths

logger = logging.getLogger("async_batcher")


class OwnedExecutorAdapter:
    """An executor that the batcher made by a factory, and makes again after it broke or was shut down.

    Args:
        factory: Makes the next one; called in the thread of `submit`.
        executor: The first one.
    """

    owned = True

    def __init__(self, factory: Factory, executor: Executor) -> None:
        self._factory = factory
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._closed = False
        self._killed = False
        self._last_death: tuple[object, list[ExitedProcess]] = (None, [])
        self._ending: list[threading.Thread] = []  # of pools that broke; each ends when its workers have been reaped
        self._unused: list[Executor] = []  # others that broke; to be shut down where no lock of theirs is held
        self._adopt(executor)

    @property
    def submit_may_block(self) -> bool:
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
                if is_broken and attempt == 1:  # it ended while idle; this call has not run
                    continue
                if is_broken and not isinstance(executor, ThreadPoolExecutor):
                    msg = f"the pool of worker processes broke twice before the batch could be handed over: {exc}"
                    raise WorkerDiedError(msg, may_have_run=False) from exc
                if isinstance(exc, OSError | EOFError) and is_process_pool(executor):  # no process, or no fork server
                    raise start_failure(exc) from exc
                raise self._failure(executor, exc) from exc
            if not hasattr(future, "add_done_callback"):
                raise self._failure(executor, TypeError(f"its submit() returned {future!r:.80}, which is no future"))
            if _is_standard(executor):
                kill_rather_than_terminate(executor)  # it may have started workers
            return future, executor
        raise AssertionError  # the loop returns or raises

    def to_error(self, error: BaseException, source: object) -> AsyncBatchException:
        is_broken = isinstance(error, BrokenExecutor)
        if isinstance(error, WorkerDiedError | PoolBrokenError):  # of an executor over a `WorkerPool`
            if is_broken:
                self._discard(source)
            return error
        if not is_broken or isinstance(source, ThreadPoolExecutor):
            if is_broken or is_over(source):
                self._discard(source)
            return self._failure(source, error)
        dead = self._dead_of(source)
        has_initializer = getattr(source, "_initializer", None) is not None and not _is_standard(source)
        return standard_pool_crash(dead, error, has_initializer=has_initializer)

    def is_broken(self) -> bool:
        executor = self._executor
        if executor is not None and getattr(executor, "_broken", False):
            self._dead_of(executor)  # the submit returns as soon as the pool has seen its workers die; it then gets a fresh pool
        return False

    def _dead_of(self, executor: object) -> list[ExitedProcess]:
        """Return which workers of a pool crashed, and discard it."""
        known, dead = self._last_death
        if executor is not known:  # the first call of that pool: the other workers still live
            dead = exited_processes(executor)
            self._last_death = (executor, dead)
            self._discard(executor)
        return dead

    def kill(self) -> None:
        self._closed = self._killed = True
        self._kill(self._executor)

    def wait(self, seconds: float) -> None:
        """Wait until the pools that were killed have come to their end."""
        threads = [*self._ending, getattr(self._executor, "_executor_manager_thread", None)]
        for thread in threads:
            if thread is not None:
                thread.join(seconds)

    def shut_down(self) -> None:
        with self._lock:
            self._closed = True
            executor = self._executor  # it stays where `kill` finds it
        self._shut_down_unused()
        if executor is not None:
            if self._killed:
                self._kill(executor)  # again: it may have been starting when `kill` came
            _shut_down(executor, wait=not self._killed or bool(processes_of(executor)))
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
                    msg = "the factory given as executor= returned an executor first, and now a WorkerPool; it must not change"
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
        self.workers = workers_of(executor, is_ours=True)
        self.pickles = pickles(executor)
        self.runs_main = is_process_pool(executor)
        self.has_threads = isinstance(executor, ThreadPoolExecutor) and not self.pickles
        if hasattr(executor, "_processes"):
            _kill_at_exit(self)

    def _failure(self, executor: object, error: BaseException) -> PoolBrokenError:
        next_batch = "The next batch gets a new one" if self._executor is None else "The next batch tries again"
        return broken_executor_error(f"the {type(executor).__name__} that the batcher made", error, next_batch)

    def _discard(self, executor: object) -> None:
        # No lock: this is also called while the standard pool holds its own, which a submit under our lock may be waiting for.
        if self._executor is executor:
            self._executor = None
        thread = getattr(executor, "_executor_manager_thread", None)
        self._ending = [*(other for other in self._ending if other.is_alive()), *([thread] if thread is not None else [])]
        self._kill(executor)
        if thread is None and isinstance(executor, Executor):
            self._unused.append(executor)

    def _shut_down_unused(self) -> None:
        while self._unused:
            discard(self._unused.pop())

    def _kill(self, executor: object) -> None:
        # The standard pool sends SIGTERM and then waits, for ever if a worker is stopped or deaf.
        if os.getpid() == self._pid:
            for process in processes_of(executor):
                kill(process)


def make_adapter(
    factory: Factory | None, executor: Executor | None, loop: asyncio.AbstractEventLoop
) -> DefaultExecutorAdapter | OwnedExecutorAdapter | ExternalExecutorAdapter:
    """Return the place of an executor, by what made it: a factory, the user, or (None) the event loop."""
    if executor is None:
        return DefaultExecutorAdapter(loop)
    return ExternalExecutorAdapter(executor) if factory is None else OwnedExecutorAdapter(factory, executor)


def standard_factory(executor: str, workers: int, *, has_worker_pool: bool) -> Factory:
    """Return what makes the executor of ``"thread"`` or ``"process"``."""
    if executor == "thread":
        return partial(ThreadPoolExecutor, workers, thread_name_prefix="async_batcher")
    if not has_worker_pool:
        return partial(_standard_pool, workers)
    from async_batcher._pool.pool import WorkerPool

    return partial(WorkerPool, workers)


def _standard_pool(workers: int) -> Executor:
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor

    from async_batcher._worker.run_batch import init_standard_worker

    # Not fork: under an event loop, with threads about, a forked child may hang on a lock that nothing will release.
    method = "forkserver" if sys.platform == "linux" else "spawn"
    return ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context(method),
        initializer=init_standard_worker,
        initargs=(max(1, cpu_count() // workers),),
    )


def _is_standard(executor: object) -> bool:
    """Tell whether an executor is one of `_standard_pool`."""
    return getattr(getattr(executor, "_initializer", None), "__module__", None) == "async_batcher._worker.run_batch"


def _shut_down(executor: Executor, *, wait: bool) -> None:
    """Shut down what we made; what it raises is logged, as no caller waits for it."""
    try:
        try:
            executor.shutdown(wait=wait, cancel_futures=True)
        except TypeError:  # loky, and executors older than Python 3.9
            executor.shutdown(wait=wait)
    except Exception:
        logger.exception("%s.shutdown() failed", type(executor).__qualname__)


_made_here: weakref.WeakSet[OwnedExecutorAdapter] = weakref.WeakSet()
_exit_hook = threading.Lock()  # taken once, by the first call that registers the hook


def _kill_at_exit(made: OwnedExecutorAdapter) -> None:
    """Make a program that ends without `stop` neither wait for its batches nor leave workers behind."""
    _made_here.add(made)
    if _exit_hook.acquire(blocking=False):
        import concurrent.futures.process  # noqa: F401 - registers its own hook, which waits for batches: ours must come first

        getattr(threading, "_register_atexit", atexit.register)(_kill_all)


def _kill_all() -> None:
    made_here = list(_made_here)
    for made in made_here:
        made.kill()
    for made in made_here:  # or the standard pool's own hook, which comes next, would write to a pipe that is being closed
        made.wait(_EXIT_PATIENCE)
