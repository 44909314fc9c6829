"""The executors that batches run in.

=========================  ===========================  ========================  =============
adapter                    made by                      when it breaks            at `close`
=========================  ===========================  ========================  =============
`DefaultExecutorAdapter`   the event loop               (it does not)             left running
`OwnedExecutorAdapter`     a factory, the user's or     `WorkerDiedError`, then   shut down, or
                           ours (owned_executor.py)     a new one                 killed
`ExternalExecutorAdapter`  the user                     `PoolBrokenError`         left running
=========================  ===========================  ========================  =============
"""

from __future__ import annotations

import asyncio
import sys
import warnings
from concurrent.futures import BrokenExecutor, CancelledError, Executor, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from async_batcher._pool.cpu_count import cpu_count
from async_batcher.exceptions import AsyncBatchException, PoolBrokenError, WorkerDiedError

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

    from async_batcher._pool.pool import WorkerPool

# WaitForMultipleObjects takes 63 handles; the standard pool refuses more workers.
_WINDOWS_MAX_WORKERS = 61

# https://github.com/python/cpython/issues/115634: workers are not replaced, and the pool hangs.
_MAX_TASKS_FIXED_IN = (3, 14)


class ExecutorAdapter:
    """An executor. The defaults are those of one that is not ours.

    Attributes:
        workers: How many batches it runs at a time.
        pickles: Whether it is known to pickle what is submitted.
        submit_may_block: Whether `submit` may block (it starts processes, or waits for a lock).
        owned: Whether the batcher made it, and so ends it.
        runs_main: Whether its workers ran the user's main module, or are forks of such a process.
        has_threads: Whether it consists of threads that are ours, each of which is a slot.
    """

    workers = 1
    pickles = False
    submit_may_block = False
    owned = False
    runs_main = False
    has_threads = False

    def _describe(self, executor: Executor) -> None:
        self.workers = workers_of(executor, is_ours=self.owned)
        self.pickles = pickles(executor)
        self.runs_main = is_process_pool(executor)

    def submit(self, call: Callable[[], Any]) -> tuple[Future[Any] | asyncio.Future[Any], object]:
        """Return the future of a call, and the very executor that took it, for `to_error`.

        Raises:
            AsyncBatchException: It takes no calls; nothing has run.
        """
        raise NotImplementedError

    def to_error(self, error: BaseException, source: object) -> AsyncBatchException:
        """Return what callers get for ``error``, with which a call that ``source`` took failed."""
        raise NotImplementedError

    def is_broken(self) -> bool:
        """Tell whether a ``submit`` that blocks never returns; unblock it where possible."""
        return False

    def kill(self) -> None:
        """Kill the workers that are ours and can be killed; never blocks."""

    def shut_down(self) -> None:
        """Wait until what is ours has ended; may block."""


class DefaultExecutorAdapter(ExecutorAdapter):
    """The event loop's default executor."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop

    def submit(self, call: Callable[[], Any]) -> tuple[asyncio.Future[Any], object]:
        try:
            return self._loop.run_in_executor(None, call), None
        except RuntimeError as exc:
            msg = (
                f"the event loop's default executor takes no more calls: {exc}. "
                "Do not use the batcher after shutting it down"
            )
            raise PoolBrokenError(msg) from exc

    def to_error(self, error: BaseException, source: object) -> AsyncBatchException:  # noqa: ARG002
        return broken_executor_error("the event loop's default executor", error)


class ExternalExecutorAdapter(ExecutorAdapter):
    """An executor that the user made and will shut down."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._describe(executor)
        self.submit_may_block = type(executor) is not ThreadPoolExecutor

    def submit(self, call: Callable[[], Any]) -> tuple[Future[Any], object]:
        try:
            future = self._executor.submit(call)
        except Exception as exc:
            raise self.to_error(exc, None) from exc
        if not hasattr(future, "add_done_callback"):
            error = TypeError(f"its submit() returned {future!r:.80}, which is not a future")
            raise self.to_error(error, None)
        return future, None

    def to_error(self, error: BaseException, source: object) -> AsyncBatchException:  # noqa: ARG002
        if isinstance(error, WorkerDiedError):  # of an executor over a `WorkerPool`, which runs on
            return error
        what = f"the {type(self._executor).__name__} that was given as executor="
        return broken_executor_error(what, error)

    def is_broken(self) -> bool:
        return bool(getattr(self._executor, "_broken", False))


def default_concurrency(
    executor: Executor | WorkerPool | str | None, max_workers: int | None
) -> int:
    """Return how many batches run at a time unless ``concurrency`` says so."""
    if executor is None:
        return 1
    if not isinstance(executor, str):
        return workers_of(executor)
    workers = max_workers or cpu_count()
    is_windows_pool = sys.platform == "win32" and executor == "process"
    return min(workers, _WINDOWS_MAX_WORKERS) if is_windows_pool else workers


def workers_of(executor: Executor | WorkerPool, *, is_ours: bool = False) -> int:
    """Return the size of an executor; 1 if unknown, and for given threads, as in 0.2.2."""
    if not isinstance(executor, Executor):
        return executor.max_workers
    is_threads = isinstance(executor, ThreadPoolExecutor) and not _is_interpreter_pool(executor)
    if is_threads and not is_ours:
        return 1
    size = getattr(executor, "_max_workers", None)  # no executor has a public attribute for it
    return size if isinstance(size, int) and size > 0 else 1


def warn_of_known_faults(executor: object) -> None:
    """Warn of a pool whose settings are known to fail on this Python."""
    if (
        sys.version_info < _MAX_TASKS_FIXED_IN
        and is_process_pool(executor)
        and getattr(executor, "_max_tasks_per_child", None) is not None
    ):
        warnings.warn(
            "a ProcessPoolExecutor with max_tasks_per_child may hang on this Python "
            "(https://github.com/python/cpython/issues/115634); omit it, or use Python 3.14+",
            RuntimeWarning,
            stacklevel=_user_stacklevel(),
        )


def _user_stacklevel() -> int:
    """Return the ``stacklevel`` of the innermost frame outside of this package."""
    # What warnings.warn(skip_file_prefixes=) does from Python 3.12.
    level, frame = 1, sys._getframe(1)  # noqa: SLF001
    while frame.f_back is not None:
        if frame.f_globals.get("__package__", "").partition(".")[0] != "async_batcher":
            break
        level, frame = level + 1, frame.f_back
    return level


def pickles(executor: object) -> bool:
    return is_process_pool(executor) or _is_interpreter_pool(executor)


def is_process_pool(executor: object) -> bool:
    return _is_instance(executor, "process", "ProcessPoolExecutor")


def _is_interpreter_pool(executor: object) -> bool:
    return _is_instance(executor, "interpreter", "InterpreterPoolExecutor")


def _is_instance(executor: object, module: str, name: str) -> bool:
    found = sys.modules.get(f"concurrent.futures.{module}")  # imported if such a pool exists
    return found is not None and isinstance(executor, getattr(found, name))


def broken_executor_error(what: str, error: BaseException, next_batch: str = "") -> PoolBrokenError:
    """Return what callers get when an executor (``what``, in words) itself failed.

    ``next_batch`` says what the next batch gets; if empty, the user must replace the executor.
    """
    if isinstance(error, BrokenExecutor):
        happened = f"{what} is broken: a worker crashed or could not start: {error}"
        advice = (
            "It runs nothing more: make a new executor and a new batcher with it, or give "
            "executor= a factory (functools.partial(ProcessPoolExecutor, 4)), which the batcher "
            "calls again"
        )
    elif isinstance(error, CancelledError | asyncio.CancelledError):
        happened = f"{what} cancelled the batch: it was shut down with cancel_futures=True"
        advice = "Stop the batcher first"
    else:
        happened = f"{what} did not run the batch: {type(error).__name__}: {error}"
        advice = (
            "If it has been shut down, stop the batcher first, or make a new executor and a new "
            "batcher with it"
        )
    broken = PoolBrokenError(f"{happened}. {next_batch or advice}")
    broken.__cause__ = error
    return broken
