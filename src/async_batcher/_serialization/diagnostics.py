"""Errors that name the part of a value that cannot be pickled."""

from __future__ import annotations

import functools
from types import FunctionType, MethodType, ModuleType
from typing import TYPE_CHECKING, Any

import cloudpickle
from cloudpickle.cloudpickle import _extract_code_globals

from async_batcher._serialization.by_name import CACHED, function_of
from async_batcher._serialization.exception_text import qualified_name, safe_str
from async_batcher.exceptions import SerializationError

if TYPE_CHECKING:
    from collections.abc import Iterator

# Packages whose frames say nothing in the traceback of an error, before the first of user code.
_PICKLING_PACKAGES = ("async_batcher", "cloudpickle", "copyreg", "pickle")

_MAX_DEPTH = 12  # steps from a value to the part that cannot be pickled; a longer path is of no use


def pickling_error(what: str, value: Any, exc: BaseException) -> SerializationError:
    """Return the error for a value that ``exc`` kept from being pickled.

    Args:
        what: What the error calls the value.
        value: The value.
        exc: What pickling it raised; its traceback is cut to the part in user code, if any.
    """
    path, culprit = _find_culprit(what, value)
    where = f"{path} (a {type(culprit).__module__}.{type(culprit).__qualname__})"
    msg = (
        f"{where} cannot be pickled, so it cannot be sent to or from a worker: {safe_str(exc)}. "
        "Make it where it is used (setup_worker runs once in each worker), leave it out in "
        "__getstate__, or use executor='thread'"
    )
    error = SerializationError(msg)
    error.__cause__ = _from_user_code(exc)
    return error


def unpickling_error(what: str, cause: BaseException, why: str | None = None) -> SerializationError:
    """Return the error for an item or result that arrived; ``why`` describes the cause."""
    why = why or f"{qualified_name(cause)}: {safe_str(cause)}"
    msg = (
        f"the {what} was sent, but could not be unpickled on the other side: {why}. Its class must "
        "be importable there, and its __setstate__, __reduce__ or __init__ must work there"
    )
    error = SerializationError(msg)
    error.__cause__ = cause
    return error


def _from_user_code(exc: BaseException) -> BaseException:
    """Cut the frames from a traceback that come before the first one of user code."""
    trace = exc.__traceback__
    while trace is not None:
        module = str(trace.tb_frame.f_globals.get("__name__"))
        if module.partition(".")[0] not in _PICKLING_PACKAGES:
            break
        trace = trace.tb_next
    return exc.with_traceback(trace)


def _find_culprit(path: str, value: Any) -> tuple[str, Any]:
    """Return the innermost part that cannot be pickled, and the way to it."""
    seen = {id(value)}
    for _ in range(_MAX_DEPTH):
        for name, part in _children(path, value):
            if id(part) not in seen and not _picklable(part):
                seen.add(id(part))
                path, value = name, part
                break
        else:
            break
    return path, value


def _picklable(value: Any) -> bool:
    try:
        cloudpickle.dumps(value, protocol=5)
    except BaseException:  # noqa: BLE001 - user code
        return False
    return True


def _children(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, MethodType):
        yield "self", value.__self__
    elif isinstance(value, FunctionType):
        yield from _parts_of_function(path, value)
    elif isinstance(value, functools.partial):
        yield f"{path}: the function of the partial", value.func
        yield f"{path}: arguments of the partial", value.args
        yield f"{path}: keyword arguments of the partial", value.keywords
    elif isinstance(value, type):
        for name, part in vars(value).items():
            is_wrapper = isinstance(part, staticmethod | classmethod)
            yield f"{path}.{name}", part.__func__ if is_wrapper else part
    elif isinstance(value, ModuleType):
        for name, part in vars(value).items():
            if not name.startswith("__"):
                yield f"{path}.{name}", part
    elif type(value) is CACHED:
        yield f"{path}: the function that it caches", function_of(value)
    elif isinstance(value, dict):
        for key, part in value.items():
            yield f"{path}[{key!r}]" if isinstance(key, str | int) else f"a value of {path}", part
    elif isinstance(value, list | tuple | set | frozenset):
        for index, part in enumerate(value):
            yield f"{path}[{index}]", part
    else:
        try:
            state = value.__getstate__()
        except BaseException:  # noqa: BLE001 - user code
            return
        yield f"{path}: its class", type(value)
        for attributes in state if isinstance(state, tuple) else (state,):
            if isinstance(attributes, dict):
                for name, part in attributes.items():
                    yield f"{path}.{name}", part


def _parts_of_function(path: str, function: FunctionType) -> Iterator[tuple[str, Any]]:
    code = function.__code__
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield f"{path}: closure variable {name!r}", cell.cell_contents
        except ValueError:  # an empty cell
            continue
    for name in _extract_code_globals(code):  # those of nested functions too
        if name in function.__globals__:
            yield f"{path}: global variable {name!r}", function.__globals__[name]
    for index, default in enumerate(function.__defaults__ or ()):
        yield f"{path}: default argument {index}", default
    for name, default in (function.__kwdefaults__ or {}).items():
        yield f"{path}: default of argument {name!r}", default
