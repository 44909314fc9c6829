"""What is known of executors: kind, size, state, faults. Most is in private attributes."""

from __future__ import annotations

import asyncio
import logging
import sys
from concurrent.futures import BrokenExecutor, CancelledError, Executor, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from async_batcher._pool.checks import warn_user
from async_batcher._pool.cpu_count import cpu_count
from async_batcher._serialization.exception_text import one_line
from async_batcher.exceptions import PoolBrokenError

if TYPE_CHECKING:
    import threading

    from async_batcher._pool.pool import WorkerPool

# WaitForMultipleObjects takes 63 handles; the standard pool refuses more workers.
_WINDOWS_MAX_WORKERS = 61

# https://github.com/python/cpython/issues/115634: workers are not replaced, and the pool hangs.
_MAX_TASKS_FIXED_IN = (3, 14)

# Where executors keep that they are broken or shut down; none has a public attribute for it.
_END_ATTRIBUTES = ("_broken", "_shutdown", "_shutdown_thread", "_is_shut_down", "_is_stopped")

logger = logging.getLogger("async_batcher")


def is_process_pool(executor: object) -> bool:
    return _is_instance(executor, "process", "ProcessPoolExecutor")


def is_our_process_pool(executor: Any) -> bool:
    """Tell whether it is the standard pool that ``executor="process"`` makes."""
    if not is_process_pool(executor):
        return False
    from async_batcher._worker.bootstrap import init_standard_worker

    return executor._initializer is init_standard_worker  # noqa: SLF001


def is_interpreter_pool(executor: object) -> bool:
    return _is_instance(executor, "interpreter", "InterpreterPoolExecutor")


def _is_instance(executor: object, module: str, name: str) -> bool:
    found = sys.modules.get(f"concurrent.futures.{module}")  # imported if such a pool exists
    return found is not None and isinstance(executor, getattr(found, name))


def has_threads(executor: object) -> bool:
    """Tell whether its workers are threads that share all objects."""
    return isinstance(executor, ThreadPoolExecutor) and not is_interpreter_pool(executor)


def manager_thread(executor: object) -> threading.Thread | None:
    """Return the thread of a process pool, which ends when its workers have been reaped."""
    return getattr(executor, "_executor_manager_thread", None)


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
    if has_threads(executor) and not is_ours:
        return 1
    size = getattr(executor, "_max_workers", None)  # no executor has a public attribute for it
    return size if isinstance(size, int) and size > 0 else 1


def is_over(executor: object) -> bool | None:
    """Tell whether an executor is broken or shut down; None if unknown."""
    if type(executor) is ThreadPoolExecutor:  # asked for each batch
        return bool(executor._broken or executor._shutdown)  # noqa: SLF001
    flags = getattr(executor, "_flags", None)  # of loky
    values = [
        *(getattr(executor, name, None) for name in _END_ATTRIBUTES),
        *(getattr(flags, name, None) for name in ("broken", "shutdown")),
    ]
    # A subclass may have methods of these names. `_broken` is a message or False; None in loky,
    # where that means nothing.
    known = [value for value in values if isinstance(value, bool | str | BaseException)]
    return any(map(bool, known)) if known else None


def shut_down(executor: Executor, **options: bool) -> None:
    """Call its ``shutdown``, and log what that raises."""
    try:
        try:
            executor.shutdown(**options)
        except TypeError:  # loky, and executors older than Python 3.9: no cancel_futures
            executor.shutdown(wait=options["wait"])
    except Exception as exc:
        name = type(executor).__qualname__
        logger.exception("%s.shutdown() failed: %s", name, one_line(exc))  # noqa: TRY401


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


def warn_of_known_faults(executor: object) -> None:
    """Warn of a pool whose settings are known to fail on this Python."""
    if (
        sys.version_info < _MAX_TASKS_FIXED_IN
        and is_process_pool(executor)
        and getattr(executor, "_max_tasks_per_child", None) is not None
    ):
        msg = (
            "a ProcessPoolExecutor with max_tasks_per_child may hang on this Python "
            "(https://github.com/python/cpython/issues/115634); omit it, or use Python 3.14+"
        )
        warn_user(msg, RuntimeWarning)
