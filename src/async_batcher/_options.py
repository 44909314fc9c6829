"""The options of a batcher: what each may be, and the error when it is not."""

from __future__ import annotations

import operator
import sys
from concurrent.futures import Executor
from typing import TYPE_CHECKING, Any, TypeGuard

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Literal, TypeAlias

    from async_batcher.pool._pool import WorkerPool
    from async_batcher.stats import BatchRecord

    ExecutorOption: TypeAlias = Executor | WorkerPool | Literal["thread", "process"] | Callable[[], Executor | WorkerPool] | None

NO_LIMIT = sys.maxsize


class Options:
    """The options as they were given, checked.

    Raises:
        TypeError: A value of the wrong type, or ``max_workers`` without a pool that it could size.
        ValueError: A value out of range.
    """

    __slots__ = (
        "batch_timeout", "concurrency", "end_abandoned", "executor", "isolate_failures", "item_timeout", "max_batch_size",
        "max_queue_size", "max_queue_time", "max_workers", "on_batch", "trace", "when_full",
    )  # fmt: skip

    def __init__(
        self,
        *,
        max_batch_size: int | None,
        max_queue_time: float,
        concurrency: int | None,
        max_queue_size: int | None,
        executor: ExecutorOption,
        max_workers: int | None,
        batch_timeout: float | None,
        item_timeout: float | None,
        when_full: str,
        isolate_failures: bool,
        end_abandoned: bool,
        on_batch: Callable[[BatchRecord], object] | None,
        trace: bool,
    ) -> None:
        """Check each option."""
        self.max_batch_size = max_batch_size
        self.max_queue_time = max_queue_time
        self.concurrency = concurrency
        self.max_queue_size = max_queue_size
        self.executor = executor
        self.max_workers = max_workers
        self.batch_timeout = batch_timeout
        self.item_timeout = item_timeout
        self.when_full = when_full
        self.isolate_failures = isolate_failures
        self.end_abandoned = end_abandoned
        self.on_batch = on_batch
        self.trace = trace
        for name in ("max_batch_size", "max_queue_size", "concurrency", "max_workers"):
            value: Any = getattr(self, name)
            if not isinstance(value, int) and hasattr(type(value), "__index__"):  # a number of numpy's
                setattr(self, name, operator.index(value))
        check_limit("max_batch_size", self.max_batch_size, "items in a batch")
        check_limit("max_queue_size", self.max_queue_size, "items that may wait")
        check_seconds("max_queue_time", self.max_queue_time)
        if self.concurrency is not None:
            check_limit("concurrency", self.concurrency, "batches at a time")
        _check_executor(self.executor)
        if self.max_workers is not None:
            if self.executor not in ("thread", "process"):
                msg = (
                    f"max_workers={self.max_workers!r} sizes the pool that executor='thread' or executor='process' makes; "
                    f"with executor={self.executor!r} there is none to size"
                )
                raise TypeError(msg)
            check_whole("max_workers", self.max_workers, 1)
        if self.batch_timeout is not None:
            check_positive_seconds("batch_timeout", self.batch_timeout)
        if self.item_timeout is not None:
            check_positive_seconds("item_timeout", self.item_timeout)
        if not isinstance(self.when_full, str):
            msg = f"when_full={self.when_full!r}: must be 'raise' or 'wait', not {type(self.when_full).__name__}"  # type: ignore[unreachable]
            raise TypeError(msg)
        if self.when_full not in ("raise", "wait"):
            msg = f"when_full={self.when_full!r}: must be 'raise' or 'wait'"
            raise ValueError(msg)
        if self.on_batch is not None and not callable(self.on_batch):
            msg = f"on_batch={self.on_batch!r}: must be a function of one argument, a BatchRecord, or None"  # type: ignore[unreachable]
            raise TypeError(msg)
        for name in ("isolate_failures", "end_abandoned", "trace"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                msg = f"{name}={value!r}: must be True or False, not {type(value).__name__}"
                raise TypeError(msg)

    def replaced(self, **changes: Any) -> Options:
        """The same with other values, checked."""
        return Options(**{name: getattr(self, name) for name in self.__slots__} | changes)


def limit(value: int | None) -> int:
    """A limit as a number: -1 and None mean none."""
    return NO_LIMIT if value is None or value == -1 else value


def check_limit(name: str, value: object, of: str) -> None:
    """Raise unless ``value`` is a whole number of at least 1, -1 or None."""
    allowed = f"a number of {of}, at least 1, or -1 for no limit"
    if value is None:
        return
    _check_whole(name, value, allowed)
    if value != -1 and value < 1:  # type: ignore[operator]
        msg = f"{name}={value!r}: must be {allowed}"
        raise ValueError(msg)


def check_seconds(name: str, value: object, allowed: str = "a number of seconds, 0 or more") -> None:
    """Raise unless ``value`` is a number of seconds, 0 or more."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        msg = f"{name}={value!r}: must be {allowed}, not {type(value).__name__}"
        raise TypeError(msg)
    try:
        in_range = float(value) >= 0  # false for a NaN
    except OverflowError:
        in_range = False
    if not in_range:
        msg = f"{name}={value!r}: must be {allowed}"
        raise ValueError(msg)


def check_positive_seconds(name: str, value: object) -> None:
    """Raise unless ``value`` is a number of seconds, more than 0."""
    allowed = "a number of seconds, more than 0"
    check_seconds(name, value, allowed)
    if value == 0:
        msg = f"{name}={value!r}: must be {allowed}"
        raise ValueError(msg)


def check_whole(name: str, value: int | None, least: int) -> None:
    """Raise unless ``value`` is a whole number of at least ``least``, or None."""
    allowed = f"a whole number of at least {least}, or None for the default"
    if value is None:
        return
    _check_whole(name, value, allowed)
    if value < least:
        msg = f"{name}={value!r}: must be {allowed} ({name} must be greater than {least - 1})"
        raise ValueError(msg)


def is_worker_pool(executor: object) -> bool:
    """Whether it is a `WorkerPool`, without importing that: a program that has one has imported it."""
    module = sys.modules.get("async_batcher.pool._pool")
    return module is not None and isinstance(executor, module.WorkerPool)


def is_factory(executor: object) -> TypeGuard[Callable[[], Executor | WorkerPool]]:
    """Whether it makes an executor when it is called."""
    return callable(executor) and not isinstance(executor, Executor)


def _check_whole(name: str, value: Any, allowed: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        msg = f"{name}={value!r}: must be {allowed}, not {type(value).__name__}"
        raise TypeError(msg)


def _check_executor(executor: object) -> None:
    allowed = "None, 'thread', 'process', a WorkerPool or a concurrent.futures.Executor, or a function that makes one"
    if executor is None or isinstance(executor, Executor) or is_worker_pool(executor):
        return
    if isinstance(executor, str):
        if executor not in ("thread", "process"):
            msg = f"executor={executor!r}: must be {allowed}"
            raise ValueError(msg)
        return
    if not callable(executor) or (isinstance(executor, type) and not _makes_executors(executor)):
        msg = f"executor={executor!r}: must be {allowed}"
        raise TypeError(msg)


def _makes_executors(cls: type) -> bool:
    module = sys.modules.get("async_batcher.pool._pool")
    return issubclass(cls, Executor if module is None else (Executor, module.WorkerPool))
