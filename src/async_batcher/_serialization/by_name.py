"""Objects that pickle as a name, such as a `typing.NewType`: reduce and create them."""

from __future__ import annotations

import builtins
import copy
import copyreg
import functools
import gc
import typing
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

CACHED = type(functools.lru_cache(len))

# What `functools.wraps` sets.
_OF_WRAPS = ("__module__", "__name__", "__qualname__", "__doc__", "__wrapped__")

_new_object: Any = copyreg.__newobj__  # type: ignore[attr-defined]

_ARGS_OF: dict[type, Callable[[Any], tuple[Any, ...]]] = {
    typing.NewType: lambda obj: (obj.__name__, obj.__supertype__),
    typing.ParamSpec: lambda obj: (obj.__name__,),
    typing.TypeVarTuple: lambda obj: (obj.__name__,),
}
if hasattr(typing, "TypeAliasType"):  # from Python 3.12
    _ARGS_OF[typing.TypeAliasType] = lambda obj: (obj.__name__, obj.__value__)
if hasattr(builtins, "sentinel"):  # from Python 3.15
    _ARGS_OF[builtins.sentinel] = lambda obj: (obj.__name__,)


def is_known_kind(obj: Any) -> bool:
    """Whether a copy of the object will do, as of one that is no sentinel."""
    return type(obj) is CACHED or type(obj) in _ARGS_OF


def function_of(cached: Any) -> Any:
    """Return the function that a cached one calls.

    Its ``__wrapped__`` is another one if `functools.wraps` was applied to it.
    """
    wrapped = getattr(cached, "__wrapped__", None)
    parts = gc.get_referents(cached)
    if any(part is wrapped for part in parts):
        return wrapped
    return next(part for part in parts if callable(part) and not _is_of_functools(part))


def _is_of_functools(part: Any) -> bool:
    return isinstance(part, type) and part.__module__ == "functools"


def reduce_named(obj: Any) -> tuple[Callable[..., Any], tuple[Any, ...], Any]:
    """Return a function that makes the object, its arguments, and the state to set."""
    kind = type(obj)
    if kind is CACHED:
        function = function_of(obj)
        is_renamed = getattr(obj, "__wrapped__", None) is not function
        state = {name: vars(obj)[name] for name in _OF_WRAPS if name in vars(obj)}
        args = (function, obj.cache_parameters())
        return _create_cached, args, state if is_renamed else None
    if kind in _ARGS_OF:
        return _create_named, (kind, _ARGS_OF[kind](obj), getattr(obj, "__module__", None)), None
    return _new_object, (kind,), obj.__getstate__()


def type_of(create: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """Return the type of what `reduce_named` has reduced; None if it is not known."""
    return args[0] if create in (_new_object, _create_named) else None


def _create_cached(function: Any, parameters: dict[str, Any]) -> Any:
    return functools.lru_cache(**parameters)(function)


def _create_named(kind: Any, args: tuple[Any, ...], module_name: str | None) -> Any:
    # Some read the name of their module from the globals of their caller, and take no argument for
    # it.
    scope = {"kind": kind, "args": args, "__name__": module_name}
    return eval("kind(*args)", scope)  # noqa: S307 - a constant


def construct(function: Callable[..., Any], args: tuple[Any, ...], state: Any) -> Any:
    """Create what `reduce_named` has reduced, as pickle does."""
    return copy._reconstruct(None, None, function, args, state)  # type: ignore[attr-defined]  # noqa: SLF001
