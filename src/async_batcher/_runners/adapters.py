"""The executors that batches run in.

=========================  ===========================  ========================  =============
adapter                    made by                      when it breaks            at `close`
=========================  ===========================  ========================  =============
`ExecutorAdapter`          the user                     `PoolBrokenError`         left running
`DefaultExecutorAdapter`   the event loop               (it does not)             left running
`OwnedExecutorAdapter`     a factory, the user's or     `WorkerDiedError`, then   shut down, or
                           ours (factory.py)            a new one                 killed
=========================  ===========================  ========================  =============

An executor that a factory made is made again after it broke or was shut down::

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
import contextlib
import os
import threading
import weakref
from concurrent.futures import BrokenExecutor, Executor, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from async_batcher._runners import standard_pool
from async_batcher._runners.known_executors import (
    broken_executor_error,
    has_threads,
    is_interpreter_pool,
    is_our_process_pool,
    is_over,
    is_process_pool,
    manager_thread,
    shut_down,
    workers_of,
)
from async_batcher._worker.imports import check_not_importing
from async_batcher.exceptions import AsyncBatchException, PoolBrokenError, WorkerDiedError

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable
    from concurrent.futures import Future
    from typing import TypeAlias

    from async_batcher._runners.factory import Factory

    AnyFuture: TypeAlias = Future[Any] | asyncio.Future[Any]

_END_GRACE = 2.0  # seconds; a pool whose workers were killed ends in hundredths


class ExecutorAdapter:
    """An executor that the user made and will shut down.

    Attributes:
        workers: How many batches it runs at a time.
        pickles: Whether it is known to pickle what is submitted.
        owned: Whether the batcher made it, and so ends it.
        runs_main: Whether its workers ran the user's main module, or are forks of such a process.
        threads: How many threads of ours it consists of, each of which is a slot.
    """

    workers = 1
    pickles = False
    owned = False
    runs_main = False
    threads = 0

    def __init__(self, executor: Executor) -> None:
        self._executor: Any = executor
        self.workers = workers_of(executor, is_ours=self.owned)
        self.runs_main = is_process_pool(executor)
        self.pickles = self.runs_main or is_interpreter_pool(executor)
        if self.pickles or hasattr(executor, "_processes"):
            check_not_importing()

    @property
    def submit_may_block(self) -> bool:
        """Whether `submit` may block: it starts processes, or waits for a lock."""
        return type(self._executor) is not ThreadPoolExecutor

    def submit(self, call: Callable[[], Any]) -> tuple[AnyFuture, Any]:
        """Return the future of a call, and the very executor that took it, for `to_error`.

        Raises:
            AsyncBatchException: It takes no calls; nothing has run.
        """
        try:
            return _submit(self._executor, call), self._executor
        except Exception as exc:
            raise self.to_error(exc, self._executor) from exc

    def to_error(self, error: BaseException, source: Any) -> AsyncBatchException:
        """Return what callers get for ``error``, with which a call that ``source`` took failed."""
        if isinstance(error, WorkerDiedError):  # of an executor over a `WorkerPool`, which runs on
            return error
        what = f"the {type(source).__name__} that was given as executor="
        return broken_executor_error(what, error)

    def blocks_forever(self) -> bool:
        """Tell whether a ``submit`` that blocks never returns; unblock it where possible."""
        return bool(getattr(self._executor, "_broken", False))

    def kill(self) -> None:
        """Kill the workers that are ours and can be killed; never blocks."""

    def shut_down(self) -> None:
        """Wait until what is ours has ended; may block."""


class DefaultExecutorAdapter(ExecutorAdapter):
    """The event loop's default executor."""

    submit_may_block = False

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop

    def submit(self, call: Callable[[], Any]) -> tuple[AnyFuture, Any]:
        try:
            return self._loop.run_in_executor(None, call), None
        except RuntimeError as exc:
            msg = (
                f"the event loop's default executor takes no more calls: {exc}. "
                "Do not use the batcher after shutting it down"
            )
            raise PoolBrokenError(msg) from exc

    def to_error(self, error: BaseException, source: Any) -> AsyncBatchException:  # noqa: ARG002
        return broken_executor_error("the event loop's default executor", error)


class OwnedExecutorAdapter(ExecutorAdapter):
    """An executor that a factory made, and makes again in the thread of `submit`."""

    owned = True

    def __init__(self, factory: Factory, executor: Executor) -> None:
        self._factory = factory
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._closed = False
        self._killed = False
        self._last_crash: tuple[object, list[standard_pool.ExitedProcess]] = (None, [])
        self._ending: list[threading.Thread] = []  # of pools that broke, until workers are reaped
        self._unused: list[Executor] = []  # shut down later: they may hold a lock of theirs now
        self._adopt(executor)

    def _adopt(self, executor: Executor) -> None:
        super().__init__(executor)
        self.threads = self.workers if has_threads(executor) else 0
        if hasattr(executor, "_processes"):
            _kill_at_exit(self)

    @property
    def submit_may_block(self) -> bool:
        executor = self._executor
        return type(executor) is not ThreadPoolExecutor or bool(is_over(executor))

    def submit(self, call: Callable[[], Any]) -> tuple[AnyFuture, Any]:
        for attempt in (1, 2):
            executor = self._get()
            try:
                future = _submit(executor, call)
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
                    raise standard_pool.start_failure(exc) from exc
                raise self._failure(executor, exc) from exc
            if is_our_process_pool(executor):
                standard_pool.kill_rather_than_terminate(executor)  # it may have started workers
            return future, executor
        raise AssertionError  # the loop returns or raises

    def to_error(self, error: BaseException, source: Any) -> AsyncBatchException:
        is_broken = isinstance(error, BrokenExecutor)
        is_explained = isinstance(error, WorkerDiedError | PoolBrokenError)  # by a `WorkerPool`
        if is_broken and not is_explained and not isinstance(source, ThreadPoolExecutor):
            crashed = self._crashed_workers(source)
            has_initializer = getattr(source, "_initializer", None) is not None
            is_users = has_initializer and not is_our_process_pool(source)
            return standard_pool.worker_crash(crashed, error, has_initializer=is_users)
        if is_broken or is_over(source):
            self._discard(source)
        return error if is_explained else self._failure(source, error)  # type: ignore[return-value]

    def blocks_forever(self) -> bool:
        executor = self._executor
        if getattr(executor, "_broken", False):
            # The blocked submit returns when the pool sees its workers exit.
            self._crashed_workers(executor)
        return False

    def kill(self) -> None:
        self._closed = self._killed = True
        self._kill(self._executor)

    def wait(self, seconds: float) -> None:
        """Wait until the pools that were killed have ended, up to ``seconds`` for each."""
        for thread in [*self._ending, manager_thread(self._executor)]:
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
            wait = not self._killed or bool(standard_pool.processes_of(executor))
            shut_down(executor, wait=wait, cancel_futures=True)
        for thread in self._ending:
            thread.join()

    def _get(self) -> Executor:
        executor = self._executor  # once: another thread may discard it
        if executor is not None and not self._closed and not is_over(executor):
            return executor  # type: ignore[no-any-return]
        with self._lock:
            self._check_open()
            if self._executor is not None and is_over(self._executor):
                self._discard(self._executor)
            if self._executor is None:
                self._shut_down_unused()
                # A fork beside a manager thread that holds a lock leaves workers that cannot exit.
                self.wait(_END_GRACE)
                for thread in [thread for thread in self._ending if not thread.is_alive()]:
                    self._ending.remove(thread)
                made = self._factory()
                if not isinstance(made, Executor):
                    msg = (
                        "the factory given as executor= returned an executor first, and now a "
                        "WorkerPool; it must always return the same kind"
                    )
                    raise PoolBrokenError(msg)
                self._adopt(made)
                self._check_open()  # again: a factory may take long
            return self._executor  # type: ignore[no-any-return]

    def _check_open(self) -> None:
        if self._closed:
            msg = "the batcher has been stopped"
            raise PoolBrokenError(msg)

    def _failure(self, executor: Executor, error: BaseException) -> PoolBrokenError:
        verb = "gets a new one" if self._executor is None else "tries again"
        what = f"the {type(executor).__name__} that the batcher made"
        return broken_executor_error(what, error, f"The next batch {verb}")

    def _crashed_workers(self, executor: Executor) -> list[standard_pool.ExitedProcess]:
        """Return which workers of a pool crashed, and discard the pool."""
        known, crashed = self._last_crash
        if executor is not known:  # its first call: the other workers still run
            crashed = standard_pool.exited_processes(executor)
            self._last_crash = (executor, crashed)
            self._discard(executor)
        return crashed

    def _discard(self, executor: Executor) -> None:
        # Without the lock: the standard pool calls this while it holds its own, for which a submit
        # under our lock may wait.
        if self._executor is executor:
            self._executor = None
        # So nothing is replaced here that another thread may append to.
        thread = manager_thread(executor)
        if thread is None:
            self._unused.append(executor)
        elif thread not in self._ending:
            self._ending.append(thread)
        self._kill(executor)

    def _shut_down_unused(self) -> None:
        with contextlib.suppress(IndexError):  # empty, or another thread has taken the last one
            while True:
                shut_down(self._unused.pop(), wait=False)

    def _kill(self, executor: Executor | None) -> None:
        # The standard pool sends SIGTERM and waits, forever if a worker is stopped or ignores it.
        if os.getpid() == self._pid:
            for process in standard_pool.processes_of(executor):
                standard_pool.kill_process(process)


def make_adapter(
    factory: Factory | None, executor: Executor | None, loop: asyncio.AbstractEventLoop
) -> ExecutorAdapter:
    if executor is None:
        return DefaultExecutorAdapter(loop)
    if factory is None:
        return ExecutorAdapter(executor)
    return OwnedExecutorAdapter(factory, executor)


def _submit(executor: Executor, call: Callable[[], Any]) -> Future[Any]:
    future = executor.submit(call)
    if not hasattr(future, "add_done_callback"):
        msg = f"its submit() returned {future!r:.80}, which is not a future"
        raise TypeError(msg)
    return future


# By their ids. Not a WeakSet: other threads may add to it while it is read.
_owned: weakref.WeakValueDictionary[int, OwnedExecutorAdapter] = weakref.WeakValueDictionary()
_exit_hook = threading.Lock()  # taken by the first call, which registers the hook


def _kill_at_exit(adapter: OwnedExecutorAdapter) -> None:
    """Make a program that exits without `stop` kill its workers instead of waiting for them."""
    _owned[id(adapter)] = adapter
    if _exit_hook.acquire(blocking=False):
        # This registers the standard hook, which waits for batches: ours must be called first.
        import concurrent.futures.process  # noqa: F401

        getattr(threading, "_register_atexit", atexit.register)(_kill_all)


def _kill_all() -> None:
    owned = [adapter for ref in _owned.valuerefs() if (adapter := ref()) is not None]
    for adapter in owned:
        adapter.kill()
    # Or the standard pool's hook, which is called next, would write to a pipe that is being closed.
    for adapter in owned:
        adapter.wait(_END_GRACE)
