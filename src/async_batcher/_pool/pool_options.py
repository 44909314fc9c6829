"""The options of a `WorkerPool`, checked, with their defaults filled in."""

from __future__ import annotations

import multiprocessing
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from async_batcher._pool.checks import check_int, check_positive_seconds
from async_batcher._pool.cpu_count import cpu_count
from async_batcher._serialization.codec import Codec
from async_batcher._serialization.diagnostics import pickling_error
from async_batcher._serialization.object_path import MAIN_MODULES
from async_batcher._worker.user_function import is_async

if TYPE_CHECKING:
    from multiprocessing.context import BaseContext

    from async_batcher._serialization.codec import Payload

_METHODS = ("forkserver", "spawn", "fork")


@dataclass(slots=True)
class PoolOptions:
    """The options of a `WorkerPool`; raises TypeError or ValueError for one that is not valid."""

    max_workers: int | None
    mp_context: BaseContext | str | None
    initializer: Any
    initargs: Any
    max_tasks_per_child: int | None
    max_memory_per_child: int | None
    threads_per_worker: int | None
    start_timeout: float
    preload: Any
    size: int = field(init=False)  # number of workers
    threads: int = field(init=False)
    start_method: str = field(init=False)

    def __post_init__(self) -> None:
        check_int("max_workers", self.max_workers, 1)
        check_int("max_tasks_per_child", self.max_tasks_per_child, 1)
        check_int("max_memory_per_child", self.max_memory_per_child, 1)
        check_int("threads_per_worker", self.threads_per_worker, 0)
        check_positive_seconds("start_timeout", self.start_timeout)
        self._check_initializer()
        self.initargs = tuple(self.initargs)
        self.size = self.max_workers if self.max_workers is not None else cpu_count()
        threads = self.threads_per_worker
        self.threads = max(1, cpu_count() // self.size) if threads is None else threads
        self.start_method = _start_method(self.mp_context)
        self.preload = _module_names(self.preload)
        if self.preload and self.start_method != "forkserver":
            msg = (
                f"preload={self.preload!r}: needs mp_context='forkserver', which imports them once "
                f"for all workers; here it is {self.start_method!r}"
            )
            raise ValueError(msg)

    def _check_initializer(self) -> None:
        if self.initializer is not None and not callable(self.initializer):
            msg = f"initializer={self.initializer!r}: must be a function, or None"
            raise TypeError(msg)
        if self.initializer is not None and is_async(self.initializer):
            msg = (
                f"initializer={self.initializer!r}: is async, and a worker has no event loop; pass "
                "a sync function"
            )
            raise TypeError(msg)
        if not isinstance(self.initargs, list | tuple):
            msg = (
                f"initargs={self.initargs!r}: must be a tuple of the initializer's arguments, not "
                f"{type(self.initargs).__name__}"
            )
            raise TypeError(msg)

    def pickled_initializer(self) -> Payload | None:
        if self.initializer is None:
            return None
        call = (self.initializer, self.initargs)
        try:
            return Codec().dumps_checked(call, define=True)[0]
        except BaseException as exc:
            what = "initializer"
            raise pickling_error(what, call, exc) from exc


def _module_names(names: Any) -> tuple[str, ...]:
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        msg = f"preload={names!r}: must be a list of names of modules, such as ['torch']"
        raise TypeError(msg)
    for name in names:
        if not all(part.isidentifier() for part in name.split(".")):
            msg = f"preload={names!r}: {name!r} must be the full name of a module"
            raise ValueError(msg)
        if name in MAIN_MODULES:
            msg = (
                f"preload={names!r}: no worker runs the main module; move what workers are to "
                "share to a module of its own"
            )
            raise ValueError(msg)
    return tuple(str.__str__(name) for name in names)  # no class that only this process has


def _start_method(context: BaseContext | str | None) -> str:
    if context is None:
        # Not fork: with threads, a forked child may hang on a lock that nothing will release.
        return "forkserver" if sys.platform == "linux" else "spawn"
    if isinstance(context, str):
        method: Any = context
    else:
        method = getattr(context, "get_start_method", lambda: context)()
    allowed = f"{', '.join(map(repr, _METHODS))}, a context of multiprocessing, or None"
    if not isinstance(method, str):
        msg = f"mp_context={context!r}: must be {allowed}"
        raise TypeError(msg)
    if method not in _METHODS or method not in multiprocessing.get_all_start_methods():
        msg = f"mp_context={context!r}: must be {allowed}, and this system must have it"
        raise ValueError(msg)
    return method
