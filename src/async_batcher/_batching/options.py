"""The options of a batcher: declared, checked, and the error when a value is not allowed."""

from __future__ import annotations

import dataclasses
import operator
import sys
import warnings
from concurrent.futures import Executor
from functools import partial
from inspect import Parameter, Signature
from typing import TYPE_CHECKING, Any, Literal, TypedDict, TypeGuard

from async_batcher._pool.checks import (
    check_int,
    check_is_int,
    check_positive_seconds,
    check_seconds,
    is_worker_pool,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from typing import TypeAlias

    from async_batcher._pool.pool import WorkerPool
    from async_batcher.stats import BatchRecord

    ExecutorOption: TypeAlias = (
        Executor
        | WorkerPool
        | Literal["thread", "process"]
        | Callable[[], Executor | WorkerPool]
        | None
    )

NO_LIMIT = sys.maxsize

_DEPRECATED = {
    "batch_size": "is deprecated and will be removed: use 'max_batch_size'.",
    "buffering_time": "has no effect and will be removed: 'max_queue_time' bounds the wait.",
    "sleep_time": (
        "has no effect and will be removed: callers are woken when their result is there."
    ),
}


class _DeprecatedOptions(TypedDict, total=False):
    batch_size: int | None
    buffering_time: float
    sleep_time: float


class BatcherOptions(_DeprecatedOptions, total=False):
    """The keyword arguments of `AsyncBatcher`, for type checkers; see there."""

    max_batch_size: int | None
    max_queue_time: float
    concurrency: int | None
    max_queue_size: int | None
    executor: ExecutorOption
    max_workers: int | None
    batch_timeout: float | None
    item_timeout: float | None
    when_full: Literal["raise", "wait"]
    isolate_failures: bool
    cancel_abandoned: bool
    on_batch: Callable[[BatchRecord], object] | None
    trace: bool


class BatchedOptions(BatcherOptions, total=False):
    """The keyword arguments of `batched`, for type checkers; see there."""

    setup_worker: Callable[[], Any] | None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CheckedOptions:
    """The options with their defaults, checked.

    Raises:
        TypeError: A value has the wrong type, or ``max_workers`` has no pool to size.
        ValueError: A value is out of range.
    """

    max_batch_size: int | None = -1
    max_queue_time: float = 0.01
    concurrency: int | None = None
    max_queue_size: int | None = -1
    executor: ExecutorOption = None
    max_workers: int | None = None
    batch_timeout: float | None = None
    item_timeout: float | None = None
    when_full: Literal["raise", "wait"] = "raise"
    isolate_failures: bool = False
    cancel_abandoned: bool = False
    on_batch: Callable[[BatchRecord], object] | None = None
    trace: bool = False

    def __post_init__(self) -> None:
        for name in ("max_batch_size", "max_queue_size", "concurrency", "max_workers"):
            value: Any = getattr(self, name)
            if not isinstance(value, int) and hasattr(type(value), "__index__"):  # as NumPy's
                object.__setattr__(self, name, operator.index(value))
        for name, check in _CHECKS.items():
            check(name, getattr(self, name))
        if self.max_workers is not None and self.executor not in ("thread", "process"):
            msg = (
                f"max_workers={self.max_workers!r} sizes the pool that executor='thread' or "
                f"executor='process' makes; with executor={self.executor!r} there is none to size"
            )
            raise TypeError(msg)

    @classmethod
    def of_keywords(
        cls, keywords: Mapping[str, Any], callee: str, stack_level: int
    ) -> CheckedOptions:
        """Make the options of keyword arguments; the deprecated ones warn.

        Args:
            keywords: What was passed to the class or function.
            callee: Its name, for the error.
            stack_level: Frames from this one to the caller of the callee.

        Raises:
            TypeError: There is no such option.
        """
        check_keywords(keywords, callee)
        options = {name: value for name, value in keywords.items() if name not in _DEPRECATED}
        for name in keywords.keys() & _DEPRECATED.keys():
            msg = f"The {name!r} argument {_DEPRECATED[name]}"
            warnings.warn(msg, stacklevel=stack_level + 1)
            if name == "batch_size":
                options["max_batch_size"] = keywords[name]
        return cls(**options)


_PARAMETERS = [
    Parameter(field.name, Parameter.KEYWORD_ONLY, default=field.default, annotation=field.type)
    for field in dataclasses.fields(CheckedOptions)
]


def signature_with_options(first: Parameter, *last: Parameter) -> Signature:
    """Return the signature of a callable that takes the options as keywords."""
    return Signature([first, *_PARAMETERS, *last])


def check_keywords(keywords: Iterable[str], callee: str, *more: str) -> None:
    """Raise TypeError unless each is an option, a deprecated one, or one of ``more``."""
    known = [parameter.name for parameter in _PARAMETERS] + list(more)
    for name in keywords:
        if name not in known and name not in _DEPRECATED:
            import difflib

            close = difflib.get_close_matches(name, known, 1)
            hint = f". Did you mean {close[0]!r}?" if close else ""
            msg = f"{callee} got an unexpected keyword argument {name!r}{hint}"
            raise TypeError(msg)


def or_unlimited(value: int | None) -> int:
    """A limit as a number: -1 and None mean none."""
    return NO_LIMIT if value is None or value == -1 else value


def check_limit(name: str, value: object, of: str) -> None:
    """Raise unless ``value`` is a whole number of at least 1, -1 or None."""
    allowed = f"a number of {of}, at least 1, or -1 for no limit"
    if value is None:
        return
    check_is_int(name, value, allowed)
    if value != -1 and value < 1:  # type: ignore[operator]
        msg = f"{name}={value!r}: must be {allowed}"
        raise ValueError(msg)


def is_factory(executor: object) -> TypeGuard[Callable[[], Executor | WorkerPool]]:
    """Whether it makes an executor when it is called."""
    return callable(executor) and not isinstance(executor, Executor)


def _check_optional_seconds(name: str, value: object) -> None:
    if value is not None:
        check_positive_seconds(name, value)


def _check_when_full(name: str, value: object) -> None:
    msg = f"{name}={value!r}: must be 'raise' or 'wait'"
    if not isinstance(value, str):
        msg = f"{msg}, not {type(value).__name__}"
        raise TypeError(msg)
    if value not in ("raise", "wait"):
        raise ValueError(msg)


def _check_on_batch(name: str, value: object) -> None:
    if value is not None and not callable(value):
        msg = f"{name}={value!r}: must be a function of one argument, a BatchRecord, or None"
        raise TypeError(msg)


def _check_bool(name: str, value: object) -> None:
    if not isinstance(value, bool):
        msg = f"{name}={value!r}: must be True or False, not {type(value).__name__}"
        raise TypeError(msg)


def _check_executor(name: str, executor: object) -> None:
    allowed = (
        "None, 'thread', 'process', a WorkerPool or a concurrent.futures.Executor, or a function "
        "that makes one"
    )
    if executor is None or isinstance(executor, Executor) or is_worker_pool(executor):
        return
    if isinstance(executor, str):
        if executor not in ("thread", "process"):
            msg = f"{name}={executor!r}: must be {allowed}"
            raise ValueError(msg)
        return
    if not callable(executor) or (isinstance(executor, type) and not _makes_executors(executor)):
        msg = f"{name}={executor!r}: must be {allowed}"
        raise TypeError(msg)


def _makes_executors(cls: type) -> bool:
    module = sys.modules.get("async_batcher._pool.pool")
    return issubclass(cls, Executor if module is None else (Executor, module.WorkerPool))


_CHECKS: dict[str, Callable[[str, Any], None]] = {
    "max_batch_size": partial(check_limit, of="items in a batch"),
    "max_queue_size": partial(check_limit, of="items that may wait"),
    "max_queue_time": check_seconds,
    "concurrency": partial(check_limit, of="batches at a time"),
    "executor": _check_executor,
    "max_workers": partial(check_int, least=1),
    "batch_timeout": _check_optional_seconds,
    "item_timeout": _check_optional_seconds,
    "when_full": _check_when_full,
    "isolate_failures": _check_bool,
    "cancel_abandoned": _check_bool,
    "trace": _check_bool,
    "on_batch": _check_on_batch,
}
