"""The executors that batches run in: whose they are, how they are made, how they end, what their failures mean.

===============  ==============================  ===================================  ==============================
place            made by                         when it breaks                       at `close`
===============  ==============================  ===================================  ==============================
`LoopThreads`    the event loop                  (it does not)                        left to the loop
`Threads`        us                              (it does not)                        shut down
`Processes`      us, on the first batch          `WorkerDiedError`; a fresh one next  shut down, or killed
                 (where there is no
                 `WorkerPool`)
`Given`          the user                        `PoolBrokenError`, for every call    left running
===============  ==============================  ===================================  ==============================
"""

from __future__ import annotations

import asyncio
import atexit
import os
import sys
import threading
import warnings
import weakref
from concurrent.futures import BrokenExecutor, CancelledError, Executor, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Protocol

from async_batcher._cores import usable_cores
from async_batcher._deaths import Dead, could_not_start, dead_processes, death, processes_of
from async_batcher.exceptions import AsyncBatchException, PoolBrokenError, WorkerDiedError

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future, ProcessPoolExecutor

    from async_batcher.pool._pool import WorkerPool

_WINDOWS_MAX_WORKERS = 61  # WaitForMultipleObjects takes 63 handles; the standard pool refuses more
_EXIT_PATIENCE = 2.0  # seconds; a pool whose workers were killed takes hundredths
_MAX_TASKS_FIXED_IN = (3, 14)  # https://github.com/python/cpython/issues/115634: workers that are not replaced, a pool that hangs


class Place(Protocol):
    """An executor, and what is known of it.

    Attributes:
        workers: How many batches it runs at a time.
        crosses: Whether what is submitted is known to be pickled on its way to the worker.
        blocks: Whether ``submit`` may hold up its caller (it starts processes, or waits for a lock).
        is_ours: Whether we made it, and so end it.
        runs_main: Whether its workers have run the program's main module, or are forks of a process that has.
    """

    workers: int
    crosses: bool
    blocks: bool
    is_ours: bool
    runs_main: bool

    def submit(self, call: Callable[[], Any]) -> tuple[Future[Any] | asyncio.Future[Any], object]:
        """Hand a call to the executor.

        Returns:
            Its future, and the very pool that took it, for `lost`.

        Raises:
            AsyncBatchException: It takes no more; nothing has run.
        """

    def lost(self, error: BaseException, source: object) -> AsyncBatchException:
        """What the failure of a call that ``source`` took means to its callers; called where the failure is reported."""

    def has_failed(self) -> bool:
        """Whether calls whose ``submit`` does not return are lost. Waits for nothing; frees the ``submit`` where it can."""

    def kill(self) -> None:
        """End the workers that we made and that can be ended, without waiting for anything."""

    def shut_down(self) -> None:
        """Wait until what we made has ended; may block."""


class LoopThreads:
    """The event loop's own default executor."""

    workers = 1
    crosses = False
    blocks = False
    is_ours = False
    runs_main = False

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop

    def submit(self, call: Callable[[], Any]) -> tuple[asyncio.Future[Any], object]:
        try:
            return self._loop.run_in_executor(None, call), None
        except RuntimeError as exc:
            msg = f"the event loop's default executor takes no more calls: {exc}. Do not use the batcher after shutting it down"
            raise PoolBrokenError(msg) from exc

    def lost(self, error: BaseException, source: object) -> AsyncBatchException:  # noqa: ARG002 - there is only one
        return _given_up("the event loop's default executor", error)

    def has_failed(self) -> bool:
        return False

    def kill(self) -> None: ...

    def shut_down(self) -> None: ...


class Threads:
    """Threads that we make.

    Args:
        workers: How many.
    """

    crosses = False
    blocks = False
    is_ours = True
    runs_main = False

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._executor = ThreadPoolExecutor(workers, thread_name_prefix="async_batcher")
        self._killed = False

    def submit(self, call: Callable[[], Any]) -> tuple[Future[Any], object]:
        try:
            return self._executor.submit(call), None
        except RuntimeError as exc:  # the interpreter is shutting down, or no thread can be started
            msg = f"the thread pool takes no more calls: {exc}"
            raise PoolBrokenError(msg) from exc

    def lost(self, error: BaseException, source: object) -> AsyncBatchException:  # noqa: ARG002 - there is only one
        return _given_up("the thread pool", error)

    def has_failed(self) -> bool:
        return False

    def kill(self) -> None:
        self._killed = True
        self._executor.shutdown(wait=False, cancel_futures=True)  # a thread that runs cannot be ended

    def shut_down(self) -> None:
        self._executor.shutdown(wait=not self._killed)


class Given:
    """An executor that the user made and will shut down.

    Args:
        executor: Any `concurrent.futures.Executor`.
    """

    is_ours = False

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self.workers = workers_of(executor)
        self.runs_main = _is_process_pool(executor)
        self.crosses = self.runs_main or _is_interpreter_pool(executor)
        self.blocks = type(executor) is not ThreadPoolExecutor

    def submit(self, call: Callable[[], Any]) -> tuple[Future[Any], object]:
        try:
            future = self._executor.submit(call)
        except Exception as exc:
            raise self.lost(exc, None) from exc
        if not hasattr(future, "add_done_callback"):
            raise self.lost(TypeError(f"its submit() returned {future!r:.80}, which is no future"), None)
        return future, None

    def lost(self, error: BaseException, source: object) -> AsyncBatchException:  # noqa: ARG002 - there is only one
        if isinstance(error, WorkerDiedError):  # of an executor over a `WorkerPool`, which runs on
            return error
        return _given_up(f"the {type(self._executor).__name__} that was given as executor=", error)

    def has_failed(self) -> bool:
        return bool(getattr(self._executor, "_broken", False))

    def kill(self) -> None: ...

    def shut_down(self) -> None: ...


class Processes:
    """A standard `ProcessPoolExecutor` that we make with the first batch, and again after it has broken.

    Args:
        workers: How many processes.
    """

    crosses = True
    blocks = True
    is_ours = True
    runs_main = True

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._pool: ProcessPoolExecutor | None = None
        self._closed = False
        self._killed = False
        self._last_death: tuple[object, list[Dead]] = (None, [])
        self._ending: list[threading.Thread] = []  # of pools that broke; each ends when its workers have been reaped

    def submit(self, call: Callable[[], Any]) -> tuple[Future[Any], object]:
        for attempt in (1, 2):
            pool = self._get()
            try:
                return pool.submit(call), pool
            except BrokenExecutor as exc:  # it broke while idle; this call has not run
                self._discard(pool)
                if attempt == 2:
                    msg = f"the pool of worker processes broke twice before the batch could be handed over: {exc}"
                    raise WorkerDiedError(msg, may_have_run=False) from exc
            except (OSError, EOFError) as exc:  # no process could be started, or what starts them has ended
                self._discard(pool)
                raise could_not_start(exc) from exc
            except RuntimeError as exc:  # the interpreter is shutting down
                msg = f"the pool of worker processes takes no more batches: {exc}"
                raise PoolBrokenError(msg) from exc
        raise AssertionError  # the loop returns or raises

    def lost(self, error: BaseException, source: object) -> AsyncBatchException:
        if not isinstance(error, BrokenExecutor):
            return _given_up("the pool of worker processes", error)
        known, dead = self._last_death
        if source is not known:  # the first of its batches to hear of it: the other workers still live
            dead = dead_processes(source)
            self._last_death = (source, dead)
            self._discard(source)
        return death(dead, error)

    def has_failed(self) -> bool:
        pool = self._pool
        if getattr(pool, "_broken", False):
            self._discard(pool)  # the submit returns as soon as the pool has seen its workers die; it then gets a fresh pool
        return False

    def kill(self) -> None:
        self._closed = self._killed = True
        if self._pool is not None:
            self._kill(self._pool)

    def wait(self, seconds: float) -> None:
        """Wait until the pools that were killed have come to their end."""
        threads = [*self._ending, getattr(self._pool, "_executor_manager_thread", None)]
        for thread in threads:
            if thread is not None:
                thread.join(seconds)

    def shut_down(self) -> None:
        with self._lock:
            self._closed = True
            pool = self._pool  # it stays where `kill` finds it
        if pool is not None:
            if self._killed:
                self._kill(pool)  # again: it may have been starting when `kill` came
            pool.shutdown(wait=True, cancel_futures=True)
        for thread in self._ending:
            thread.join()

    def _get(self) -> ProcessPoolExecutor:
        import multiprocessing
        from concurrent.futures import ProcessPoolExecutor

        from async_batcher._worker import prepare_process

        with self._lock:
            if self._closed:
                msg = "the batcher has been stopped"
                raise PoolBrokenError(msg)
            if self._pool is None:
                _kill_at_exit(self)
                # Not fork: under an event loop, with threads about, a forked child may hang on a lock that nobody will release.
                method = "forkserver" if sys.platform == "linux" else "spawn"
                self._pool = ProcessPoolExecutor(
                    self.workers,
                    mp_context=multiprocessing.get_context(method),
                    initializer=prepare_process,
                    initargs=(max(1, usable_cores() // self.workers),),
                )
            return self._pool

    def _discard(self, pool: object) -> None:
        # No lock: this is also called while the standard pool holds its own, which a submit under our lock may be waiting for.
        if self._pool is pool:
            self._pool = None
        thread = getattr(pool, "_executor_manager_thread", None)
        self._ending = [*(other for other in self._ending if other.is_alive()), *([thread] if thread is not None else [])]
        self._kill(pool)

    def _kill(self, pool: object) -> None:
        # The standard pool sends SIGTERM and then waits, for ever if a worker is stopped or deaf.
        if os.getpid() == self._pid:
            for process in processes_of(pool):
                process.kill()


def place_for(
    executor: Executor | str | None, max_workers: int | None, loop: asyncio.AbstractEventLoop
) -> LoopThreads | Threads | Processes | Given:
    """The place that the options ``executor`` and ``max_workers`` name."""
    if executor is None:
        return LoopThreads(loop)
    if isinstance(executor, Executor):
        return Given(executor)
    workers = workers_for(executor, max_workers)
    return Threads(workers) if executor == "thread" else Processes(workers)


def workers_for(executor: Executor | WorkerPool | str | None, max_workers: int | None) -> int:
    """How many batches run at a time when ``concurrency`` does not say."""
    if executor is None:
        return 1
    if not isinstance(executor, Executor | str):
        return executor.max_workers
    if isinstance(executor, Executor):
        return workers_of(executor)
    workers = max_workers or usable_cores()
    return min(workers, _WINDOWS_MAX_WORKERS) if sys.platform == "win32" and executor == "process" else workers


def workers_of(executor: Executor) -> int:
    """The size of a given pool; 1 for threads, as in 0.2.2, and where it cannot be told."""
    if isinstance(executor, ThreadPoolExecutor) and not _is_interpreter_pool(executor):
        return 1
    size = getattr(executor, "_max_workers", None)  # no executor tells its size in public
    return size if isinstance(size, int) and size > 0 else 1


def warn_of_known_faults(executor: object) -> None:
    """Warn of a given pool whose settings are known to fail on this Python."""
    if (
        sys.version_info < _MAX_TASKS_FIXED_IN
        and _is_process_pool(executor)
        and getattr(executor, "_max_tasks_per_child", None) is not None
    ):
        warnings.warn(
            "a ProcessPoolExecutor with max_tasks_per_child may hang on this Python "
            "(https://github.com/python/cpython/issues/115634); leave it out, or use Python 3.14 or later",
            RuntimeWarning,
            stacklevel=_level_of_user(),
        )


def _level_of_user() -> int:
    """The stack level, for a warning by the caller, of the innermost frame that is not of this package."""
    level, frame = 1, sys._getframe(1)  # noqa: SLF001 - what warnings.warn(skip_file_prefixes=) does from Python 3.12
    while frame.f_back is not None and frame.f_globals.get("__package__", "").partition(".")[0] == "async_batcher":
        level, frame = level + 1, frame.f_back
    return level


def _is_process_pool(executor: object) -> bool:
    module = sys.modules.get("concurrent.futures.process")  # nobody has a pool of it who has not imported it
    return module is not None and isinstance(executor, module.ProcessPoolExecutor)


def _is_interpreter_pool(executor: object) -> bool:
    module = sys.modules.get("concurrent.futures.interpreter")
    return module is not None and isinstance(executor, module.InterpreterPoolExecutor)


def _given_up(what: str, error: BaseException) -> PoolBrokenError:
    if isinstance(error, BrokenExecutor):
        msg = (
            f"{what} is broken, a worker of it ended or could not start: {error}. It runs nothing more: make a new executor and "
            "a new batcher with it, or use executor='process', which replaces its pool"
        )
    elif isinstance(error, CancelledError | asyncio.CancelledError):
        msg = f"{what} dropped the batch before it ran: it was shut down with cancel_futures=True. Stop the batcher first"
    else:
        msg = (
            f"{what} did not run the batch: {type(error).__name__}: {error}. If it has been shut down, stop the batcher first, "
            "or make a new executor and a new batcher with it"
        )
    broken = PoolBrokenError(msg)
    broken.__cause__ = error
    return broken


_made_here: weakref.WeakSet[Processes] = weakref.WeakSet()
_exit_hook = threading.Lock()  # taken once, by whoever registers the hook


def _kill_at_exit(processes: Processes) -> None:
    """See to it that a program which ends without `stop` does not wait for its batches, nor leave workers behind."""
    _made_here.add(processes)
    if _exit_hook.acquire(blocking=False):
        import concurrent.futures.process  # noqa: F401 - registers its own hook, which waits for batches: ours must come first

        getattr(threading, "_register_atexit", atexit.register)(_kill_all)


def _kill_all() -> None:
    made_here = list(_made_here)
    for processes in made_here:
        processes.kill()
    for processes in made_here:  # or the standard pool's own hook, which comes next, would write to a pipe that is being closed
        processes.wait(_EXIT_PATIENCE)
