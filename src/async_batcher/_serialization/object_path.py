"""What other processes can import: functions and classes that are pickled as a reference.

A name in ``sys.modules`` does not prove that another process can import the module. The main
module, modules that pytest loads with ``--import-mode=importlib``, plugins made with
`importlib.util.spec_from_file_location` and programs that `runpy` runs exist in this process only.
What they hold travels by value.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import weakref
from collections import deque
from importlib.machinery import PathFinder
from pathlib import Path
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import TYPE_CHECKING, Any

import cloudpickle

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

MAIN_MODULES = ("__main__", "__mp_main__")  # of the program; no other process can import them

_MAX_USED = 128  # that a walk visits, in about a millisecond

_NAMED_KINDS = (FunctionType, type, ModuleType)

# The names of the modules that users registered with `cloudpickle.register_pickle_by_value`. The
# public function returns a copy, and this is looked at before each call.
registered_modules: set[str] = cloudpickle.cloudpickle._PICKLE_BY_VALUE_MODULES  # noqa: SLF001

_importable: weakref.WeakKeyDictionary[ModuleType, bool] = weakref.WeakKeyDictionary()


def is_importable(name: str) -> bool:
    """Tell whether another process can import the module of that name and gets the same one.

    A module that only the program's own import hook finds counts as importable: workers may have
    the hook, too.
    """
    if name in MAIN_MODULES:
        return False
    module = sys.modules.get(name)
    if not isinstance(module, ModuleType):
        return module is not None  # an object in place of a module: pickle trusts it as well
    known = _importable.get(module)
    if known is None:
        known = _importable[module] = _is_found_again(name, module)
    return known


def is_by_value(name: str) -> bool:
    """Tell whether what a module holds travels by value.

    The user may register it for that with cloudpickle.
    """
    if not is_importable(name):
        return True
    others = list(registered_modules)  # a copy: another thread may register one meanwhile
    return any(name == other or name.startswith(f"{other}.") for other in others)


def object_path(function: Any) -> tuple[str, str] | None:
    """Return the module and qualified name of a function; None if it travels by value."""
    if type(function) is not FunctionType or find_by_path(function) is not function:
        return None
    module = function.__module__
    return None if is_by_value(module) else (module, function.__qualname__)


def load_object(module: str, qualname: str) -> Any:
    import importlib

    found: Any = importlib.import_module(module)
    return functools.reduce(getattr, qualname.split("."), found)


def find_by_path(value: Any) -> Any:
    """Return what the module of ``value`` has under the qualified name of ``value``, or None.

    A `functools.lru_cache` on a `functools.partial` has no name.
    """
    found: Any = sys.modules.get(getattr(value, "__module__", None) or "")
    for part in getattr(value, "__qualname__", "").split("."):
        try:
            found = getattr(found, part, None)
        except Exception:  # noqa: BLE001 - a module's own __getattr__
            return None
    return found


def modules_used_by(function: Any) -> Iterator[str]:
    """Yield the names of the modules of a function and of what it uses, the nearest first.

    Apart from those of the standard library, which has no state of the user's.
    """
    seen: set[int] = set()
    remaining = deque([function])
    while remaining and len(seen) < _MAX_USED:
        value = remaining.popleft()
        if id(value) in seen:
            continue
        seen.add(id(value))
        name = value.__name__ if type(value) is ModuleType else getattr(value, "__module__", None)
        if type(name) is str:
            if name.partition(".")[0] in sys.stdlib_module_names:
                if type(value) is functools.partial:  # which says that it is of functools
                    remaining += (value.func, *value.args)
                continue
            yield name
        if type(value) is FunctionType:
            remaining += _globals_used_by(value)
        elif type(value) is MethodType:
            remaining += (value.__func__, type(value.__self__))
        elif issubclass(type(value), type):
            remaining += (part for part in vars(value).values() if type(part) is FunctionType)
        elif type(value) is not ModuleType:
            remaining.append(type(value))


def _globals_used_by(function: FunctionType) -> Iterator[Any]:
    """Yield functions, classes and modules that it may use, and those of these modules."""
    codes = [function.__code__]
    for code in codes:
        codes += (const for const in code.co_consts if type(const) is CodeType)
        used = [function.__globals__.get(name) for name in code.co_names]
        modules: list[ModuleType] = []
        for value in used:
            if type(value) is ModuleType and value not in modules:  # they may refer to each other
                modules.append(value)
                used += (vars(value).get(name) for name in code.co_names)
        # By type: isinstance() would have a lazy object of the program's load what it stands for.
        yield from (value for value in used if issubclass(type(value), _NAMED_KINDS))


def _is_found_again(name: str, module: ModuleType) -> bool:
    path: Sequence[str] | None = None
    package = name.rpartition(".")[0]
    if package:
        parent = sys.modules.get(package)
        if parent is None or not is_importable(package):
            return False
        path = getattr(parent, "__path__", None)
        if path is None:  # an attribute of a module that acts as a package, as six.moves is
            return True
    for finder in sys.meta_path:
        spec: Any = None
        with contextlib.suppress(Exception):  # a finder of the program's own
            spec = finder.find_spec(name, path)
        if spec is not None:
            return finder is not PathFinder or _is_same(spec, module)
    return False


def _is_same(spec: Any, module: ModuleType) -> bool:
    """Tell whether a module spec that was found on the path is that of the module."""
    here, there = getattr(module, "__file__", None), spec.origin if spec.has_location else None
    if here is None or there is None:  # a namespace package has no file
        return here is there or not getattr(module, "__path__", None)
    try:
        return Path(here).samefile(there) or not here.endswith(".py")
    except OSError:  # one of them is deleted, or in an archive
        return True
