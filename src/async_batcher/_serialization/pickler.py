"""How objects that no other process can import are pickled: `unpickler.py` makes them again.

Rules:

- What can be imported is left to pickle, everything else to cloudpickle, apart from the four kinds above.
- Code keeps its file and line numbers. Source that is in no file, as in a notebook, travels with it.
"""

from __future__ import annotations

import contextlib
import linecache
import marshal
import os
import pickle
import sys
from types import CellType, CodeType, FunctionType, ModuleType
from typing import TYPE_CHECKING, Any

import cloudpickle
from cloudpickle import cloudpickle as internals

from async_batcher._serialization import tensors, unpickler
from async_batcher._serialization.by_name import parts_of
from async_batcher._serialization.by_value import MISSING, Registry, globals_of
from async_batcher._serialization.object_path import (
    MAIN_MODULES,
    find_by_path,
    is_by_value,
    is_importable,
    load_object,
    object_path,
)
from async_batcher._serialization.unpickler import content_of

if TYPE_CHECKING:
    import io
    from collections.abc import Callable, Iterable, Iterator

    from async_batcher._serialization.by_value import Namespace, SentValue

_PROTOCOL = 5


class Trace:
    """What a pickle has taken by value, and what its globals were.

    Attributes:
        modules: Names of the modules that something was taken from.
    """

    __slots__ = ("_cells", "_names", "modules")

    def __init__(self) -> None:
        self.modules: set[str] = set()
        self._names: dict[tuple[int, str], tuple[dict[str, Any], str, SentValue | None]] = {}
        self._cells: list[tuple[CellType, Any]] = []

    def note(self, names: dict[str, Any], name: str, sent: SentValue | None) -> None:
        """Note a global as it is sent; None: there is none of that name."""
        self._names[id(names), name] = (names, name, sent)

    def note_cell(self, cell: CellType) -> None:
        """Note what a closure variable holds."""
        self._cells.append((cell, content_of(cell)))

    def is_current(self) -> bool:
        """Tell whether every name is still bound to the object that was sent."""
        for names, name, sent in self._names.values():
            if not (name not in names if sent is None else sent.is_still(names.get(name, MISSING))):
                return False
        return not self._cells or all(content_of(cell) is content for cell, content in self._cells)


class ValuePickler(cloudpickle.Pickler):  # type: ignore[misc]
    """Pickles what other processes cannot import by value.

    Args:
        file: Takes the pickle.
        registry: What this process has sent and received.
        refers: Told of each class that travels by value, with its id; returns the age of its definition if the id alone will
            do, else None.
        replies: Whether this answers the process that the registry's received namespaces came from.
        aside: Takes large buffers; see `out_of_band.buffer_collector`.
        age: Of the definitions of classes in it.

    Attributes:
        trace: See `Trace`.
    """

    def __init__(
        self,
        file: io.BytesIO,
        registry: Registry,
        *,
        refers: Callable[[type, str], int | None],
        replies: bool,
        aside: Callable[[pickle.PickleBuffer], bool] | None,
        age: int = 0,
    ) -> None:
        table = cloudpickle.Pickler.dispatch_table
        self.dispatch_table = tensors.reducers(table) or table  # first: pickle looks at it when it is set up
        super().__init__(file, protocol=_PROTOCOL, buffer_callback=aside)
        self.trace = Trace()
        self._registry = registry
        self._refers = refers
        self._replies = replies
        self._open: dict[int, str] = {}  # objects that pickle as their names and are being pickled, by id
        self._in_part: set[int] = set()  # modules of which only what is used travels, by id
        self._age = age

    def reducer_override(self, obj: Any) -> Any:
        """Reduce ``obj``, or leave it to cloudpickle."""
        kind = type(obj)
        if issubclass(kind, type):
            return self._class(obj)
        if kind is FunctionType:
            return self._function(obj)
        if kind is CodeType:
            return _code(obj)
        if kind is ModuleType:
            return self._module(obj)
        if _reduces_by_default(kind) or kind in self.dispatch_table:
            return NotImplemented
        reduced = obj.__reduce_ex__(_PROTOCOL)
        return self._named(obj, reduced) if type(reduced) is str else reduced

    def _function(self, obj: FunctionType) -> Any:
        place = None if is_by_value(obj.__module__) else undecorated_path(obj)
        if place is not None:
            return (unwrap, place)
        if object_path(obj) is not None:
            return NotImplemented
        code, every = obj.__code__, obj.__globals__
        used = internals._extract_code_globals(code)  # noqa: SLF001 - checked by a test
        names = {name: every[name] for name in used if name in every and self._open.get(id(every[name])) != name}
        submodules = internals._find_imported_submodules(code, [*names.values(), *map(content_of, obj.__closure__ or ())])  # noqa: SLF001
        if every.get(obj.__qualname__) is obj:  # so that pickle finds it there as well
            names[obj.__qualname__] = obj
        namespace = self._namespace(every)
        versions = self._send(namespace, names)
        for name in used:
            if name not in every:
                self.trace.note(every, name, None)
        for cell in obj.__closure__ or ():
            self.trace.note_cell(cell)
        closure = None if obj.__closure__ is None else tuple(CellType() for _ in obj.__closure__)
        parts = self._parts_of_modules(code, [*names.values(), *map(content_of, obj.__closure__ or ())])
        rest = (submodules, parts)  # need only be unpickled
        state = (namespace.about, _attributes(obj), obj.__dict__, obj.__closure__, names, versions, _source(code), *rest)
        return (
            unpickler.create_function,
            (code, namespace.about, obj.__name__, closure),
            state,
            None,
            None,
            unpickler.populate_function,
        )

    def _class(self, cls: type) -> Any:
        name = self._registry.id_of(cls)
        if name is not None and (age := self._refers(cls, name)) is not None:
            return (unpickler.lookup_class, (name, age))
        reduced = super().reducer_override(cls)
        if reduced is NotImplemented and not _has_importable_module(cls):
            reduced = internals._dynamic_class_reduce(cls)  # noqa: SLF001 - checked by a test
        if reduced is NotImplemented or len(reduced) != 6:
            return reduced  # it can be imported, or is a builtin that pickle treats apart, such as type(None)
        name = name or self._registry.add_class(cls)
        if (age := self._refers(cls, name)) is not None:
            return (unpickler.lookup_class, (name, age))
        make, args, state, _, _, setter = reduced
        state = (name, setter, state, self._binding(cls))
        return (
            unpickler.create_class,
            (name, self._age, make, _class_args(cls, args)),
            state,
            None,
            None,
            unpickler.populate_class,
        )

    def _module(self, obj: ModuleType) -> Any:
        if not _is_by_value(obj):
            return NotImplemented
        names = self._namespace(globals_of(obj))
        if obj.__name__ in MAIN_MODULES or id(obj) in self._in_part:
            return (unpickler.module, (names.about,))
        every = {name: value for name, value in names.globals.items() if not name.startswith("__")}
        self._in_part.add(id(obj))  # it may refer to itself
        return (unpickler.module, (names.about,), self._update(names, every), None, None, _ignore)

    def _update(self, namespace: Namespace, names: dict[str, Any]) -> Any:
        """What brings globals of a module, as the state of something that needs them."""
        return _Call(unpickler.update, (namespace.about, names, self._send(namespace, names)))

    def _parts_of_modules(self, code: CodeType, values: Iterable[Any]) -> list[Any]:
        """The globals that code may use of modules that travel by value: all that it names; they themselves travel without."""
        parts = []
        for value in values:
            if type(value) is ModuleType and _is_by_value(value) and value.__name__ not in MAIN_MODULES:
                self._in_part.add(id(value))
                every = vars(value)
                parts.append(
                    self._update(self._namespace(every), {name: every[name] for name in _names_in(code) if name in every})
                )
        return parts

    def _named(self, obj: Any, path: str) -> Any:
        """Reduce an object that pickle would refer to by its name."""
        home = sys.modules.get(pickle.whichmodule(obj, path))  # type: ignore[attr-defined]
        if home is None or not is_by_value(home.__name__):
            return path
        names = globals_of(home)
        namespace = self._namespace(names)
        if self._replies and namespace.pid != os.getpid():
            return (unpickler.existing, (namespace.key, path))
        self._open[id(obj)] = path
        make, args, state = parts_of(obj)
        if names.get(path) is not obj:  # an attribute of a class
            return (make, args, state)
        version = self._send(namespace, {path: obj})[path]
        return (unpickler.named, (namespace.about, path, version, make, args, state))

    def _namespace(self, names: dict[str, Any]) -> Namespace:
        name = names.get("__name__")
        if isinstance(name, str):
            self.trace.modules.add(name)
        return self._registry.namespace_of(names)

    def _send(self, namespace: Namespace, names: dict[str, Any]) -> dict[str, int]:
        versions: dict[str, int] = {}
        for name, value in names.items():
            sent = namespace.send(name, value)
            versions[name] = sent.version
            self.trace.note(namespace.globals, name, sent)
        return versions

    def _binding(self, cls: type) -> tuple[Any, ...] | None:
        """Return which global a class is bound to, and the version of that."""
        if find_by_path(cls) is not cls or "." in cls.__qualname__:
            return None
        namespace = self._namespace(globals_of(sys.modules[cls.__module__]))
        return (namespace.about, {cls.__qualname__: namespace.send(cls.__qualname__, cls).version})


def unwrap(module_name: str, qualname: str) -> Any:
    """Return the function behind a decorator."""
    return load_object(module_name, qualname).__wrapped__


def undecorated_path(obj: FunctionType) -> tuple[str, str] | None:
    """Return where the decorated form of a function is found, if it is one that keeps the function as ``__wrapped__``."""
    found = find_by_path(obj)
    if found is obj or getattr(found, "__wrapped__", None) is not obj:
        return None
    return (obj.__module__, obj.__qualname__)


class Decorated:
    """Stands for a function behind a decorator in the main module, for workers that have run that.

    Args:
        place: Where the decorated form is found.
    """

    def __init__(self, place: tuple[str, str]) -> None:
        self._place = place

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as a reference."""
        return (unwrap, self._place)


class _Call:
    """A call that is made when this is unpickled."""

    def __init__(self, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
        self._reduced = (function, args)

    def __reduce__(self) -> tuple[Any, ...]:
        return self._reduced


def _ignore(made: ModuleType, state: None) -> None:
    """Stands where pickle sets a state, which has been set."""


def _is_by_value(module: ModuleType) -> bool:
    return sys.modules.get(module.__name__) is not module or is_by_value(module.__name__)


def _names_in(code: CodeType) -> Iterator[str]:
    """The names that code may use of a module: attributes are among them."""
    yield from code.co_names
    for const in code.co_consts:
        if type(const) is CodeType:
            yield from _names_in(const)


def _reduces_by_default(kind: Any) -> bool:
    return kind.__reduce_ex__ is object.__reduce_ex__ and kind.__reduce__ is object.__reduce__


def _has_importable_module(cls: type) -> bool:
    module_name: Any = cls.__module__  # a property, for some
    return type(module_name) is not str or is_importable(module_name)


def _code(code: CodeType) -> Any:
    """As in a .pyc file; cloudpickle drops the name of the file from its version 3.1.2 on."""
    try:
        return (marshal.loads, (marshal.dumps(code),))
    except ValueError:  # it has constants that are no literals
        return NotImplemented


_ATTRIBUTES = ("__qualname__", "__module__", "__doc__", "__defaults__", "__kwdefaults__", "__type_params__")


def _attributes(obj: FunctionType) -> dict[str, Any]:
    attributes = {name: getattr(obj, name) for name in _ATTRIBUTES if hasattr(obj, name)}
    with contextlib.suppress(Exception):  # from Python 3.14 they are evaluated here, and may name what is not there
        attributes["__annotations__"] = obj.__annotations__
    return attributes


def _source(code: CodeType) -> list[str] | None:
    """The lines of a source that is in no file; a notebook keeps those of its cells in the cache of tracebacks."""
    entry = linecache.cache.get(code.co_filename)
    return entry[2] if entry is not None and len(entry) == 4 and entry[1] is None else None


def _class_args(cls: type, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments with which cloudpickle makes an empty class, mended in three places.

    Without its own id of the class: by that, a process that has the class already (a forked one) would be given its own, and
    that would be filled again. With the class's ``__slots__``: an instance of the copy would have a ``__dict__`` otherwise, and
    could not become an instance of the original again. With its ``__qualname__``, which a nested class loses otherwise.
    """
    track = getattr(internals, "_get_or_create_tracker_id", None)
    tracked = track(cls) if track is not None else None
    more = {"__qualname__": cls.__qualname__}
    if cls.__dict__.get("__slots__"):
        more["__slots__"] = cls.__dict__["__slots__"]
    mended: list[Any] = []
    for arg in args:
        if isinstance(arg, str) and arg == tracked:
            mended.append(None)
        elif type(arg) is dict and "__module__" in arg:
            mended.append(arg | more)
        else:
            mended.append(arg)
    return tuple(mended)
