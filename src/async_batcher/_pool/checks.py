"""Checks of arguments that a pool and a batcher share."""

from __future__ import annotations

import sys
import warnings
from typing import Any


def check_seconds(
    name: str, value: object, allowed: str = "a number of seconds, 0 or more"
) -> None:
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


def check_int(name: str, value: int | None, least: int) -> None:
    """Raise unless ``value`` is a whole number of at least ``least``, or None."""
    allowed = f"a whole number of at least {least}, or None for the default"
    if value is None:
        return
    check_is_int(name, value, allowed)
    if value < least:
        msg = f"{name}={value!r}: must be {allowed}"
        raise ValueError(msg)


def check_is_int(name: str, value: Any, allowed: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        msg = f"{name}={value!r}: must be {allowed}, not {type(value).__name__}"
        raise TypeError(msg)


def check_limit(name: str, value: object, of: str) -> None:
    """Raise unless ``value`` is a whole number of at least 1, -1 or None."""
    allowed = f"a number of {of}, at least 1, or -1 for no limit"
    if value is None:
        return
    check_is_int(name, value, allowed)
    if value != -1 and value < 1:  # type: ignore[operator]
        msg = f"{name}={value!r}: must be {allowed}"
        raise ValueError(msg)


def check_optional_str(name: str, value: object) -> None:
    """Raise unless ``value`` is a string or None."""
    if value is not None and not isinstance(value, str):
        msg = f"{name}={value!r}: must be a string or None, not {type(value).__name__}"
        raise TypeError(msg)


def warn_user(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn of the line of the user's code that has called the package."""
    # What warnings.warn(skip_file_prefixes=) does from Python 3.12.
    level, frame = 1, sys._getframe(0)  # noqa: SLF001 - `inspect` is slow to import
    while frame.f_globals.get("__name__", "").startswith("async_batcher.") and frame.f_back:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


def is_worker_pool(executor: object) -> bool:
    """Tell whether ``executor`` is a `WorkerPool`, without importing that module."""
    module = sys.modules.get("async_batcher._pool.pool")
    return module is not None and isinstance(executor, module.WorkerPool)
