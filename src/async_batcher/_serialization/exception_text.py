"""Exceptions and numbers in words. Runs on both sides of the process boundary."""

from __future__ import annotations

from typing import Any


def counted(number: float, noun: str) -> str:
    text = str(number) if type(number) is int else f"{number:g}"
    return f"{text} {noun}" if number == 1 else f"{text} {noun}s"


def duration(seconds: float) -> str:
    """Write a duration with a unit that suits it."""
    for unit, name in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= 0.9995 * unit:
            value = seconds / unit
            return f"{value:.3g} {name}" if value < 999.5 else f"{value:,.0f} {name}"
    return f"{seconds * 1e6:.3g} us"


def is_exception(result: Any) -> bool:
    """Tell whether a result is to be raised; a mock or proxy of an exception is not."""
    return issubclass(type(result), BaseException)


def qualified_name(exc: BaseException) -> str:
    return f"{type(exc).__module__}.{type(exc).__qualname__}"


def one_line(exc: BaseException) -> str:
    """The last line of a traceback; builtins and the package's own classes without their module."""
    name = qualified_name(exc).removeprefix("builtins.").removeprefix("async_batcher.exceptions.")
    try:
        text = " ".join(str(exc).split())
    except BaseException:  # noqa: BLE001 - user code
        text = safe_str(exc)
    return f"{name}: {text}" if text else name


def safe_str(exc: BaseException) -> str:
    """``str(exc)``, also where ``__str__`` fails or returns nothing."""
    try:
        return str(exc) or "(no message)"
    except BaseException:  # noqa: BLE001 - user code
        return "(its __str__ failed)"
