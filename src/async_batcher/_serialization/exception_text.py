"""What an exception is called, and what it says, in words. Runs on both sides of the process boundary."""

from __future__ import annotations

from typing import Any


def is_exception(answer: Any) -> bool:
    """Whether an answer is to be raised; what only says that it is an exception (a mock, a proxy) is not, nor is it asked."""
    return issubclass(type(answer), BaseException)


def qualified_name(exc: BaseException) -> str:
    """The module and name of an exception's type."""
    return f"{type(exc).__module__}.{type(exc).__qualname__}"


def one_line(exc: BaseException) -> str:
    """An exception in one line, as a traceback ends; builtins and our own without their module."""
    name = qualified_name(exc).removeprefix("builtins.").removeprefix("async_batcher.exceptions.")
    try:
        text = " ".join(str(exc).split())
    except BaseException:  # noqa: BLE001 - user code
        text = safe_str(exc)
    return f"{name}: {text}" if text else name


def safe_str(exc: BaseException) -> str:
    """``str(exc)``, whatever its ``__str__`` does."""
    try:
        return str(exc) or "(no message)"
    except BaseException:  # noqa: BLE001 - user code
        return "(its __str__ failed)"
