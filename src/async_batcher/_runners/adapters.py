"""The executors that batches run in: whose they are, how they are made, how they end, what their failures mean.

========================  ==============================  ===================================  =====================
adapter                   made by                         when it breaks                       at `close`
========================  ==============================  ===================================  =====================
`DefaultExecutorAdapter`  the event loop                  (it does not)                        left to the loop
`OwnedExecutorAdapter`    the batcher, by a factory:      `WorkerDiedError`; a fresh one next  shut down, or killed
(`owned_executor.py`)     the user's, or a standard one
                          for ``"thread"``, and for
                          ``"process"`` where there is
                          no `WorkerPool`
`ExternalExecutorAdapter`  the user                       `PoolBrokenError`, for every call    left running
`ExternalExecutorAdapter`          the user                        `PoolBrokenError`, for every call    left running
===============  ==============================  ===================================  ==============================
"""

from __future__ import annotations

import asyncio
import sys
import warnings
from concurrent.futures import BrokenExecutor, CancelledError, Executor, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Protocol

from async_batcher._pool.cpu_count import cpu_count
from async_batcher.exceptions import AsyncBatchException, PoolBrokenError, WorkerDiedError

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

    from async_batcher._pool.pool import WorkerPool

_WINDOWS_MAX_WORKERS = 61  # WaitForMultipleObjects takes 63 handles; the standard pool refuses more
_MAX_TASKS_FIXED_IN = (3, 14)  # https://github.com/python/cpython/issues/115634: workers that are not replaced, a pool that hangs


class ExecutorAdapter(Protocol):
    """An executor, and what is known of it.

    Attributes:
        workers: How many batches it runs at a time.
        pickles: Whether what is submitted is known to be pickled on its way to the worker.
        submit_may_block: Whether ``submit`` may hold up its caller (it starts processes, or waits for a lock).
        owned: Whether we made it, and so end it.
        runs_main: Whether its workers have run the program's main module, or are forks of a process that has.
        has_threads: Whether it consists of threads that are ours, each of which is a slot.
    """

    workers: int
    pickles: bool
    owned: bool
    runs_main: bool
    has_threads: bool

    @property
    def submit_may_block(self) -> bool: ...

    def submit(self, call: Callable[[], Any]) -> tuple[Future[Any] | asyncio.Future[Any], object]:
        """Hand a call to the executor.

        Returns:
            Its future, and the very pool that took it, for `to_error`.

        Raises:
            AsyncBatchException: It takes no more; nothing has run.
        """

    def to_error(self, error: BaseException, source: object) -> AsyncBatchException:
        """What the failure of a call that ``source`` took means to its callers; called where the failure is reported."""

    def is_broken(self) -> bool:
        """Whether calls whose ``submit`` does not return are lost. Waits for nothing; frees the ``submit`` where it can."""

    def kill(self) -> None:
        """End the workers that we made and that can be ended, without waiting for anything."""

    def shut_down(self) -> None:
        """Wait until what we made has ended; may block."""


class DefaultExecutorAdapter:
    """The event loop's own default executor."""

    workers = 1
    pickles = False
    submit_may_block = False
    owned = False
    runs_main = False
    has_threads = False

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop

    def submit(self, call: Callable[[], Any]) -> tuple[asyncio.Future[Any], object]:
        try:
            return self._loop.run_in_executor(None, call), None
        except RuntimeError as exc:
            msg = f"the event loop's default executor takes no more calls: {exc}. Do not use the batcher after shutting it down"
            raise PoolBrokenError(msg) from exc

    def to_error(self, error: BaseException, source: object) -> AsyncBatchException:  # noqa: ARG002 - there is only one
        return broken_executor_error("the event loop's default executor", error)

    def is_broken(self) -> bool:
        return False

    def kill(self) -> None: ...

    def shut_down(self) -> None: ...


class ExternalExecutorAdapter:
    """An executor that the user made and will shut down.

    Args:
        executor: Any `concurrent.futures.Executor`.
    """

    owned = False
    has_threads = False

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self.workers = workers_of(executor)
        self.pickles = pickles(executor)
        self.runs_main = is_process_pool(executor)
        self.submit_may_block = type(executor) is not ThreadPoolExecutor

    def submit(self, call: Callable[[], Any]) -> tuple[Future[Any], object]:
        try:
            future = self._executor.submit(call)
        except Exception as exc:
            raise self.to_error(exc, None) from exc
        if not hasattr(future, "add_done_callback"):
            raise self.to_error(TypeError(f"its submit() returned {future!r:.80}, which is no future"), None)
        return future, None

    def to_error(self, error: BaseException, source: object) -> AsyncBatchException:  # noqa: ARG002 - there is only one
        if isinstance(error, WorkerDiedError):  # of an executor over a `WorkerPool`, which runs on
            return error
        return broken_executor_error(f"the {type(self._executor).__name__} that was given as executor=", error)

    def is_broken(self) -> bool:
        return bool(getattr(self._executor, "_broken", False))

    def kill(self) -> None: ...

    def shut_down(self) -> None: ...


def default_concurrency(executor: Executor | WorkerPool | str | None, max_workers: int | None) -> int:
    """How many batches run at a time when ``concurrency`` does not say."""
    if executor is None:
        return 1
    if not isinstance(executor, str):
        return workers_of(executor)
    workers = max_workers or cpu_count()
    return min(workers, _WINDOWS_MAX_WORKERS) if sys.platform == "win32" and executor == "process" else workers


def workers_of(executor: Executor | WorkerPool, *, is_ours: bool = False) -> int:
    """Return the size of a pool: 1 for given threads, as in 0.2.2, and where the size is unknown."""
    if not isinstance(executor, Executor):
        return executor.max_workers
    if isinstance(executor, ThreadPoolExecutor) and not _is_interpreter_pool(executor) and not is_ours:
        return 1
    size = getattr(executor, "_max_workers", None)  # no executor tells its size in public
    return size if isinstance(size, int) and size > 0 else 1


def warn_of_known_faults(executor: object) -> None:
    """Warn of a given pool whose settings are known to fail on this Python."""
    if (
        sys.version_info < _MAX_TASKS_FIXED_IN
        and is_process_pool(executor)
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


def pickles(executor: object) -> bool:
    return is_process_pool(executor) or _is_interpreter_pool(executor)


def is_process_pool(executor: object) -> bool:
    module = sys.modules.get("concurrent.futures.process")  # nobody has a pool of it who has not imported it
    return module is not None and isinstance(executor, module.ProcessPoolExecutor)


def _is_interpreter_pool(executor: object) -> bool:
    module = sys.modules.get("concurrent.futures.interpreter")
    return module is not None and isinstance(executor, module.InterpreterPoolExecutor)


def broken_executor_error(what: str, error: BaseException, next_batch: str = "") -> PoolBrokenError:
    """Return what an executor's own failure means to the callers of a batch.

    Args:
        what: The executor, in words.
        error: What it raised.
        next_batch: What the next batch gets, where the batcher replaces the executor; otherwise the user must.
    """
    if isinstance(error, BrokenExecutor):
        happened = f"{what} is broken, a worker of it ended or could not start: {error}"
        advice = (
            "It runs nothing more: make a new executor and a new batcher with it, or give executor= a factory "
            "(functools.partial(ProcessPoolExecutor, 4)), which the batcher calls again"
        )
    elif isinstance(error, CancelledError | asyncio.CancelledError):
        happened = f"{what} dropped the batch before it ran: it was shut down with cancel_futures=True"
        advice = "Stop the batcher first"
    else:
        happened = f"{what} did not run the batch: {type(error).__name__}: {error}"
        advice = "If it has been shut down, stop the batcher first, or make a new executor and a new batcher with it"
    broken = PoolBrokenError(f"{happened}. {next_batch or advice}")
    broken.__cause__ = error
    return broken
