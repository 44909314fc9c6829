"""The checks of the options, one at a time: each raises TypeError or ValueError."""

from __future__ import annotations

import sys
from concurrent.futures import Executor
from functools import partial
from typing import TYPE_CHECKING, Any

from async_batcher._pool.checks import (
    check_int,
    check_limit,
    check_optional_str,
    check_positive_seconds,
    check_seconds,
    is_worker_pool,
)
from async_batcher.limits import Limit

if TYPE_CHECKING:
    from collections.abc import Callable


def as_tuple(value: Any) -> tuple[Any, ...]:
    """Return the values of an option that takes several, one, or None."""
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _check_queue_time(name: str, value: object) -> None:
    if value is not None:
        check_seconds(name, value)


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
    if value is not None:
        from async_batcher._batching.records.observers import check_observers

        check_observers(name, value)


def _check_bool(name: str, value: object) -> None:
    if not isinstance(value, bool):
        msg = f"{name}={value!r}: must be True or False, not {type(value).__name__}"
        raise TypeError(msg)


def _check_on_failure(name: str, value: object) -> None:
    for policy in as_tuple(value):
        if not callable(policy) or isinstance(policy, type):
            msg = (
                f"{name}={value!r}: must be a list of policies, as retry() and isolate() return "
                "them: functions of an exception and the number of the attempt"
            )
            raise TypeError(msg)


def _check_limits(name: str, value: object) -> None:
    for limit in as_tuple(value):
        if not isinstance(limit, Limit):
            msg = f"{name}={value!r}: must be a list of Limit objects, or None"
            raise TypeError(msg)


def _check_key(name: str, value: object) -> None:
    if value is not None and not callable(value):
        msg = f"{name}={value!r}: must be a function of one item, or None"
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


CHECKS: dict[str, Callable[[str, Any], None]] = {
    "max_batch_size": partial(check_limit, of="items in a batch"),
    "max_queue_size": partial(check_limit, of="items that may wait"),
    "max_queue_time": _check_queue_time,
    "concurrency": partial(check_limit, of="batches at a time"),
    "executor": _check_executor,
    "max_workers": partial(check_int, least=1),
    "batch_timeout": _check_optional_seconds,
    "item_timeout": _check_optional_seconds,
    "when_full": _check_when_full,
    "on_failure": _check_on_failure,
    "limits": _check_limits,
    "key": _check_key,
    "key_concurrency": partial(check_int, least=1),
    "cancel_abandoned": _check_bool,
    "name": check_optional_str,
    "on_batch": _check_on_batch,
}
