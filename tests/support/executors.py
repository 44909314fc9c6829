"""Executors of every kind, which tests of the runners share."""

from __future__ import annotations

import importlib.util
import multiprocessing
import sys
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from async_batcher import WorkerPool
from tests.support.worker_pools import METHODS

if TYPE_CHECKING:
    from collections.abc import Callable

WORKERS = 2

# Kinds of executors; see `make_executor`.
STANDARD = [f"standard_{method}" for method in METHODS]
POOLS = [f"pool_{method}" for method in METHODS]
LOKY = ["loky"] if importlib.util.find_spec("loky") is not None else []
INTERPRETERS = ["interpreters"] if sys.version_info >= (3, 14) else []


def make_executor(kind: str, **options: Any) -> Any:
    """Make an executor with two workers.

    Args:
        kind: "threads", "loky", "interpreters", or "standard" or "pool" with a start method.
        **options: Options of the executor.
    """
    name, _, method = kind.partition("_")
    if name == "threads":
        return ThreadPoolExecutor(WORKERS, **options)
    if name == "standard":
        context = multiprocessing.get_context(method)
        return ProcessPoolExecutor(WORKERS, mp_context=context, **options)
    if name == "pool":
        return WorkerPool(WORKERS, mp_context=method, **options)
    if name == "loky":
        import loky

        return loky.ProcessPoolExecutor(WORKERS, **options)
    from concurrent.futures import InterpreterPoolExecutor  # type: ignore[attr-defined]

    # pytest puts the root of the project on the path of this interpreter only.
    set_path = f"import sys; sys.path[:] = {sys.path!r}"
    return InterpreterPoolExecutor(
        WORKERS, **({"initializer": exec, "initargs": (set_path,)} | options)
    )


class InlineExecutor(Executor):
    """Runs each call in `submit`; has no known size.

    Attributes:
        refuses: Whether `submit` raises.
        is_shut: Whether it was shut down.
    """

    def __init__(self) -> None:
        self.refuses = False
        self.is_shut = False

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Run the call."""
        if self.refuses or self.is_shut:
            msg = "closed"
            raise RuntimeError(msg)
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except BaseException as exc:  # noqa: BLE001 - as executors do
            future.set_exception(exc)
        return future

    def shutdown(self, wait: bool = True) -> None:  # type: ignore[override]  # noqa: ARG002, FBT002 - as before Python 3.9
        """Take no more calls."""
        self.is_shut = True
