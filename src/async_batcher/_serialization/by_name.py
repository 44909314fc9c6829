"""Objects that pickle refers to by their names: how one is made again where its module cannot be imported."""

from __future__ import annotations

import builtins
import copyreg
import functools
import typing
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable


def parts_of(obj: Any) -> tuple[Callable[..., Any], tuple[Any, ...], Any]:
    """How an object that pickles as its name is made: a function, its arguments, and the state to set."""
    kind = type(obj)
    if kind is _CACHED:
        return _cached, (obj.__wrapped__, obj.cache_parameters()), None
    if kind in _BY_NAME:
        return _renamed, (kind, _BY_NAME[kind](obj), getattr(obj, "__module__", None)), None
    return copyreg.__newobj__, (kind,), obj.__getstate__()  # type: ignore[attr-defined]


def type_of(make: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """The type of what `parts_of` says how to make."""
    return args[0] if make in (copyreg.__newobj__, _renamed) else None  # type: ignore[attr-defined]


def _cached(wrapped: Any, parameters: dict[str, Any]) -> Any:
    return functools.lru_cache(**parameters)(wrapped)


def _renamed(kind: Callable[..., Any], args: tuple[Any, ...], module_name: str | None) -> Any:
    """Call ``kind`` as that module would: some look at their caller to learn where they belong, and cannot be told."""
    return eval("kind(*args)", {"kind": kind, "args": args, "__name__": module_name})  # noqa: S307 - of ours


_CACHED = type(functools.lru_cache(len))

_BY_NAME: dict[type, Callable[[Any], tuple[Any, ...]]] = {
    typing.NewType: lambda obj: (obj.__name__, obj.__supertype__),
    typing.ParamSpec: lambda obj: (obj.__name__,),
    typing.TypeVarTuple: lambda obj: (obj.__name__,),
}
if hasattr(typing, "TypeAliasType"):  # from Python 3.12
    _BY_NAME[typing.TypeAliasType] = lambda obj: (obj.__name__, obj.__value__)
if hasattr(builtins, "sentinel"):  # from Python 3.15
    _BY_NAME[builtins.sentinel] = lambda obj: (obj.__name__,)


def restored(obj: Any, state: Any) -> Any:
    """Give an object its state, as pickle does."""
    if hasattr(obj, "__setstate__"):
        obj.__setstate__(state)
    elif state is not None:
        attributes, slots = state if isinstance(state, tuple) else (state, None)
        obj.__dict__.update(attributes or {})
        for name, value in (slots or {}).items():
            setattr(obj, name, value)
    return obj
