"""The function that a command is to run, named by the user: ``package.module:function`` or ``path/to/file.py:function``.

Rules:

- It is imported by its name, here and in each worker, which has the same search path; it never crosses by value.
- The current folder comes first on the search path, as for a script that lies in it; with a file it is that file's folder.
- Whatever is wrong with the name or with the module's own code is said in one line.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from async_batcher._serialization.exception_text import one_line
from async_batcher._worker.user_function import is_async
from async_batcher.exceptions import PoolBrokenError

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType


class TargetError(Exception):
    """There is no such function; the message is one line that says what was tried and why it failed."""


class Target(NamedTuple):
    """A function that was found.

    Attributes:
        name: As the user wrote it.
        module: The module that it was found in.
        function: Takes one argument: the batch, or an item.
        setup: To be called once in each worker before; None where there is nothing to do.
    """

    name: str
    module: str
    function: Callable[[Any], Any]
    setup: Callable[[], None] | None

    def __reduce__(self) -> tuple[Any, ...]:
        """By name: a worker imports it."""
        return (_restored, (self.name, self.module))


def load_target(name: str) -> Target:
    """Import a function.

    Args:
        name: ``module:function``, ``file.py:function``; a part with dots after the colon goes on into a class or an object.
            What it names may be an `AsyncBatcher`: then its `process_batch` and `setup_worker` are meant.

    Raises:
        TargetError: There is none, or it is none that can be called with a batch.
    """
    where, colon, attribute = name.rpartition(":")
    if not (colon and where and attribute):
        base, dot, last = name.strip(":").rpartition(".")
        hint = f"; did you mean '{base}:{last}'?" if dot and not base.endswith(os.sep) and last != "py" else ""
        msg = f"{name!r} does not name a function: write MODULE:FUNCTION or FILE.py:FUNCTION{hint}"
        raise TargetError(msg)
    if where.endswith(".py") or os.sep in where:
        module = _import_file(where)
    else:
        put_first(_current_folder())
        module = _import(where)
    return _target(name, module)


def put_first(folder: str) -> None:
    """Have modules looked for in that folder before all others."""
    if folder and sys.path[:1] not in ([folder], [""]):
        sys.path.insert(0, folder)


def _current_folder() -> str:
    try:
        return str(Path.cwd())
    except OSError:  # it has been removed
        return ""


def _restored(name: str, module: str) -> Target:
    """In a worker; what cannot be imported there is told when it is called, since no item is to be blamed for it."""
    try:
        return _target(name, importlib.import_module(module))
    except BaseException as exc:  # noqa: BLE001 - the module's own code may raise anything
        return Target(
            name, module, _Missing(f"module {module!r} cannot be imported in a worker: {one_line(exc)}{_place(exc)}"), None
        )


class _Missing:
    """In the place of a function that a worker has not got."""

    def __init__(self, why: str) -> None:
        self._why = why

    def __call__(self, _: object) -> Any:
        """Say so."""
        raise PoolBrokenError(self._why)


def _import_file(path: str) -> ModuleType:
    file = Path(path).resolve()
    if not file.is_file():
        msg = f"there is no file {path!r}" if not file.exists() else f"{path!r} is not a file"
        raise TargetError(msg)
    if file.suffix != ".py" or "." in file.stem:
        msg = f"{path!r} cannot be imported: the name of a module's file ends in '.py' and has no other dot"
        raise TargetError(msg)
    put_first(str(file.parent))
    module = _import(file.stem)
    found = getattr(module, "__file__", None)
    if found is None or Path(found).resolve() != file:
        msg = f"{path!r} cannot be imported: {file.stem!r} is the name of another module ({found or 'built in'}); rename the file"
        raise TargetError(msg)
    return module


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as exc:
        if exc.name is not None and (name == exc.name or name.startswith(f"{exc.name}.")):
            tried = f"tried: {sys.path[0] or _current_folder()}, then the rest of Python's path"
            msg = f"module {name!r} cannot be imported: {exc.msg} ({tried})"
            raise TargetError(msg) from exc
        msg = f"module {name!r} cannot be imported: {one_line(exc)}{_place(exc)}"
        raise TargetError(msg) from exc
    except KeyboardInterrupt:
        raise
    except BaseException as exc:  # its own code may raise anything, SystemExit included
        msg = f"module {name!r} cannot be imported: {one_line(exc)}{_place(exc)}"
        raise TargetError(msg) from exc


def _place(exc: BaseException) -> str:
    """Where in the user's code it was raised."""
    frames = [frame for frame in traceback.extract_tb(exc.__traceback__) if not _is_of_imports(frame.filename)]
    return f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""


def _is_of_imports(file: str) -> bool:
    return file in (__file__, importlib.__file__) or file.startswith("<frozen importlib")


def _target(name: str, module: ModuleType) -> Target:
    found: Any = module
    seen = module.__name__
    for part in name.rpartition(":")[2].split("."):
        try:
            found = getattr(found, part)
        except AttributeError as exc:
            close = difflib.get_close_matches(part, dir(found), n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            msg = f"{seen!r} has no {part!r}{hint}"
            raise TargetError(msg) from exc
        seen = f"{seen}.{part}"
    function, setup = found, None
    batcher = sys.modules.get("async_batcher.batcher")  # a program that has none has not imported it
    if batcher is not None and isinstance(found, batcher.AsyncBatcher):
        function, setup = found.process_batch, found.setup_worker
        setup = None if getattr(setup, "does_nothing", False) else setup
    elif batcher is not None and isinstance(found, type) and issubclass(found, batcher.AsyncBatcher):
        msg = f"{name!r} is a class; name an instance of it, or a function"
        raise TargetError(msg)
    if not callable(function):
        msg = f"{name!r} is no function but of type {type(found).__name__}"
        raise TargetError(msg)
    if is_async(function):
        msg = f"{name!r} is an async function; worker processes run plain ones, declared with 'def'"
        raise TargetError(msg)
    _check_takes_one(name, function)
    return Target(name, module.__name__, function, setup)


def _check_takes_one(name: str, function: Callable[..., Any]) -> None:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some builtins have none
        return
    try:
        signature.bind(None)
    except TypeError as exc:
        msg = f"{name!r} takes {signature}; it must take one argument, the items of a batch or with --each an item"
        raise TargetError(msg) from exc
