"""Import the user's function by name: ``package.module:function`` or ``path/to/file.py:function``.

Rules:

- The function is pickled as its name. Each worker has the same search path, and imports it again.
- The current folder comes first on the search path, as for a script in it; for a file, its folder.
- One line says what is wrong with the name, or with the code of the module.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from async_batcher._serialization.exception_text import one_line
from async_batcher.cli._errors import CommandError
from async_batcher.exceptions import PoolBrokenError

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType


class ImportedFunction(NamedTuple):
    """A function that was found."""

    name: str  # as the user wrote it
    module: str  # that it was found in
    function: Callable[[Any], Any]  # takes a batch, or an item
    setup: Callable[[], Any] | None  # called once in each worker, before the first batch
    is_batcher: bool = False  # whether the name is that of a batcher, whose function this is

    def __reduce__(self) -> tuple[Any, ...]:
        return (_import_in_worker, (self.name, self.module))

    @property
    def path(self) -> str:
        """What follows the module in the name, with dots."""
        return self.name.rpartition(":")[2]


def import_function(name: str) -> ImportedFunction:
    """Import a function.

    Args:
        name: ``module:function`` or ``file.py:function``. Dots after the colon lead into a class
            or an object. An `AsyncBatcher` stands for its `process_batch` and `setup_worker`.
    """
    where, colon, path = name.rpartition(":")
    if not (colon and where and path):
        base, dot, last = name.strip(":").rpartition(".")
        is_likely = dot and not base.endswith(os.sep) and last != "py"
        hint = f"; did you mean '{base}:{last}'?" if is_likely else ""
        msg = f"{name!r} does not name a function: write MODULE:FUNCTION or FILE.py:FUNCTION{hint}"
        raise CommandError(msg)
    if where.endswith(".py") or os.sep in where:
        module = _import_file(where)
    else:
        _prepend_sys_path(_current_folder())
        module = _import_module(where)
    return _find(name, module)


def _prepend_sys_path(folder: str) -> None:
    if folder and sys.path[:1] not in ([folder], [""]):
        sys.path.insert(0, folder)


def _current_folder() -> str:
    try:
        return str(Path.cwd())
    except OSError:  # it has been removed
        return ""


def _import_in_worker(name: str, module: str) -> ImportedFunction:
    """Import in a worker. A failure is reported by the call: no item is the cause."""
    try:
        return _find(name, importlib.import_module(module))
    except BaseException as exc:  # noqa: BLE001 - user code
        why = f"module {module!r} cannot be imported in a worker: {one_line(exc)}{_location(exc)}"
        return ImportedFunction(name, module, functools.partial(_missing_function, why), None)


def _missing_function(why: str, _: object) -> Any:
    raise PoolBrokenError(why)


def _import_file(path: str) -> ModuleType:
    file = Path(path).resolve()
    if not file.is_file():
        msg = f"there is no file {path!r}" if not file.exists() else f"{path!r} is not a file"
        raise CommandError(msg)
    if file.suffix != ".py" or "." in file.stem:
        why = "the name of a module's file ends in '.py' and has no other dot"
        msg = f"{path!r} cannot be imported: {why}"
        raise CommandError(msg)
    _prepend_sys_path(str(file.parent))
    module = _import_module(file.stem)
    found = getattr(module, "__file__", None)
    if found is None or Path(found).resolve() != file:
        why = f"{file.stem!r} is the name of another module ({found or 'built in'})"
        msg = f"{path!r} cannot be imported: {why}; rename the file"
        raise CommandError(msg)
    return module


def _import_module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except KeyboardInterrupt:
        raise
    except BaseException as exc:  # user code, SystemExit included
        why = f"{one_line(exc)}{_location(exc)}"
        missing = exc.name if isinstance(exc, ModuleNotFoundError) else None
        if missing and f"{name}.".startswith(f"{missing}."):  # not a module that this one imports
            first = sys.path[0] or _current_folder()
            why = f"{exc} (tried: {first}, then the rest of Python's path)"
        msg = f"module {name!r} cannot be imported: {why}"
        raise CommandError(msg) from exc


def _location(exc: BaseException) -> str:
    """Say where in the user's code an exception was raised."""
    frames = [
        frame
        for frame in traceback.extract_tb(exc.__traceback__)
        if frame.filename not in (__file__, importlib.__file__)
        and not frame.filename.startswith("<frozen importlib")
    ]
    return f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""


def _find(name: str, module: ModuleType) -> ImportedFunction:
    found: Any = module
    seen = module.__name__
    for part in name.rpartition(":")[2].split("."):
        try:
            found = getattr(found, part)
        except AttributeError as exc:
            close = difflib.get_close_matches(part, dir(found), n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            msg = f"{seen!r} has no {part!r}{hint}"
            raise CommandError(msg) from exc
        seen = f"{seen}.{part}"
    function, setup = found, None
    # User code that defines a batcher has imported this module; a worker need not do so otherwise.
    batcher_module = sys.modules.get("async_batcher.batcher")
    batcher_class: Any = () if batcher_module is None else batcher_module.AsyncBatcher
    is_batcher = isinstance(found, batcher_class)
    if is_batcher:
        function, setup = found.process_batch, found.setup_worker
        if getattr(setup, "__func__", None) is batcher_class.setup_worker:
            setup = None
    elif isinstance(found, type) and issubclass(found, batcher_class):
        msg = f"{name!r} is a class; name an instance of it, or a function"
        raise CommandError(msg)
    _check(name, function)
    return ImportedFunction(name, module.__name__, function, setup, is_batcher)


def _check(name: str, function: Any) -> None:
    if not callable(function):
        msg = f"{name!r} is not a function but of type {type(function).__name__}"
        raise CommandError(msg)
    if any(
        inspect.iscoroutinefunction(part) or inspect.isasyncgenfunction(part)
        for part in (function, type(function).__call__)
    ):
        msg = f"{name!r} is an async function; worker processes run plain ones, declared with 'def'"
        raise CommandError(msg)
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some builtins have none
        return
    try:
        signature.bind(None)
    except TypeError as exc:
        wanted = "one argument, the items of a batch or with --each an item"
        msg = f"{name!r} takes {signature}; it must take {wanted}"
        raise CommandError(msg) from exc
