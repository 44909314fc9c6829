"""Pickle objects that no other process can import; `unpickler.py` creates them again.

pickle handles what can be imported. cloudpickle handles all else, apart from the four kinds that
`unpickler.py` lists. Code keeps its file and line numbers, and source without a file, as in a
notebook, travels with it.
"""

from __future__ import annotations

import contextlib
import functools
import linecache
import marshal
import os
import pickle
import sys
from collections import ChainMap
from types import CellType, CodeType, FunctionType, ModuleType
from typing import TYPE_CHECKING, Any

import cloudpickle
from cloudpickle import cloudpickle as internals

from async_batcher._serialization import arrays, tensors
from async_batcher._serialization.by_name import CACHED, is_known_kind, reduce_named
from async_batcher._serialization.by_value import MISSING, SentValue, globals_of
from async_batcher._serialization.object_path import (
    MAIN_MODULES,
    find_by_path,
    is_by_value,
    is_importable,
    load_object,
    object_path,
)
from async_batcher._serialization.unpickler import Receiver, content_of

if TYPE_CHECKING:
    import io
    from collections.abc import Callable, Iterable, Iterator

    from async_batcher._serialization.by_value import Namespace, NamespaceUpdate, SentVersion
    from async_batcher._serialization.codec import Codec

_PROTOCOL = 5
_ATTRIBUTES = ("qualname", "module", "doc", "defaults", "kwdefaults", "type_params")


class Trace:
    """The modules that a pickle takes something from by value, and what it has sent of them."""

    __slots__ = ("_sent", "modules")

    def __init__(self) -> None:
        self.modules: set[str] = set()
        # What reads a variable, and its value as sent; by the dict or cell that holds it.
        self._sent: dict[tuple[int, str], tuple[Callable[[], Any], SentValue]] = {}

    def note(self, names: dict[str, Any], name: str, sent: SentValue) -> None:
        """Record a global, which may be `MISSING`."""
        self._sent[id(names), name] = (functools.partial(names.get, name, MISSING), sent)

    def note_cell(self, cell: CellType) -> None:
        sent = SentValue(0, content_of(cell))
        self._sent[id(cell), ""] = (functools.partial(content_of, cell), sent)

    def has_variables(self) -> bool:
        """Tell whether anything that was sent can be bound to another object."""
        return bool(self._sent)

    def is_current(self) -> bool:
        """Tell whether every variable still refers to the object that was sent."""
        return all(sent.is_still(read()) for read, sent in self._sent.values())

    def changed(self) -> list[str]:
        """Return the names of the globals that refer to other objects."""
        return [name for (_, name), (read, sent) in self._sent.items() if not sent.is_still(read())]


class ValuePickler(cloudpickle.Pickler):  # type: ignore[misc]
    """Pickles by value what other processes cannot import, for the other side of a codec.

    ``define`` sends the definitions of classes, which get that ``version``, rather than references.
    ``trace`` has what was taken by value.
    """

    def __init__(
        self,
        file: io.BytesIO,
        codec: Codec,
        *,
        define: bool = False,
        version: int = 0,
        buffer_callback: Callable[[pickle.PickleBuffer], bool] | None = None,
    ) -> None:
        table = ChainMap(cloudpickle.Pickler.dispatch_table, arrays.reducers())
        self.dispatch_table = tensors.reducers(table) or table  # read by the next line
        super().__init__(file, protocol=_PROTOCOL, buffer_callback=buffer_callback)
        self.trace = Trace()
        self._codec = codec
        self._registry = codec.registry
        self._define = define
        self._version = version
        self._in_progress: dict[int, str] = {}  # objects that pickle as their names, by id
        self._partial: set[int] = set()  # ids of modules of which only what is used travels

    def reducer_override(self, obj: Any) -> Any:
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
        if kind is CACHED and not hasattr(obj, "__qualname__"):  # which its __reduce__ expects
            return reduce_named(obj)
        reduced = obj.__reduce_ex__(_PROTOCOL)
        return self._named(obj, reduced) if type(reduced) is str else reduced

    def _function(self, obj: FunctionType) -> Any:
        path = None if is_by_value(obj.__module__) else undecorated_path(obj)
        if path is not None:
            return (unwrap, path)
        if object_path(obj) is not None:
            return NotImplemented
        code, every, cells = obj.__code__, obj.__globals__, obj.__closure__ or ()
        used = internals._extract_code_globals(code)  # noqa: SLF001 - checked by a test
        present = [name for name in used if name in every]
        open_names = self._in_progress
        names = {name: every[name] for name in present if open_names.get(id(every[name])) != name}
        values = [*names.values(), *map(content_of, cells)]
        submodules = internals._find_imported_submodules(code, values)  # noqa: SLF001
        if every.get(obj.__qualname__) is obj:  # so that pickle finds it there as well
            names[obj.__qualname__] = obj
        namespace = self._namespace(every)
        update = self._update(namespace, names)
        for name in used:
            if name not in every:
                self.trace.note(every, name, SentValue(0, MISSING))
        for cell in cells:
            self.trace.note_cell(cell)
        attributes = (_attributes(obj), obj.__dict__, obj.__closure__)
        updates = [update, *self._module_parts(code, values)]
        state = (*attributes, updates, _source(code), submodules)
        args = (code, namespace.info, obj.__name__, tuple(CellType() for _ in cells) or None)
        return (Receiver.create_function, args, state, None, None, Receiver.populate_function)

    def _class(self, cls: type) -> Any:
        class_id = self._registry.class_ids.get(cls)
        is_there = self._codec.runs_main and _is_in_main(cls)
        # A worker that lacks the main module knows its classes by their ids.
        if class_id is not None and (self._codec.is_worker or not is_there):
            reference = self._reference(cls, class_id)
            if reference is not None:
                return reference
        if is_there:
            return NotImplemented
        reduced = super().reducer_override(cls)
        module: Any = cls.__module__  # a property, for some
        if reduced is NotImplemented and type(module) is str and not is_importable(module):
            reduced = internals._dynamic_class_reduce(cls)  # noqa: SLF001 - checked by a test
        if reduced is NotImplemented or len(reduced) != 6:
            return reduced  # it can be imported, or pickle treats it apart, as it does type(None)
        class_id = class_id or self._registry.register_class(cls)
        if (reference := self._reference(cls, class_id)) is not None:
            return reference
        create, args, content, _, _, setter = reduced
        state = (class_id, self._version, setter, content, self._binding(cls))
        args = (class_id, create, _class_args(cls, args))
        return (Receiver.create_class, args, state, None, None, Receiver.populate_class)

    def _reference(self, cls: type, class_id: str) -> Any:
        version = None if self._define else self._codec.send_by_reference(cls, class_id)
        return None if version is None else (Receiver.lookup_class, (class_id, version))

    def _module(self, obj: ModuleType) -> Any:
        if not _is_by_value(obj):
            return NotImplemented
        namespace = self._namespace(globals_of(obj))
        if obj.__name__ in MAIN_MODULES or id(obj) in self._partial:
            return (Receiver.module, (namespace.info,))
        every = namespace.globals
        names = {name: every[name] for name in every if not name.startswith("__")}
        self._partial.add(id(obj))  # it may refer to itself
        update = self._update(namespace, names)
        return (Receiver.module, (namespace.info,), update, None, None, Receiver.populate_module)

    def _module_parts(self, code: CodeType, values: Iterable[Any]) -> list[NamespaceUpdate]:
        """Return the globals of modules that travel by value, as far as the code names them."""
        parts = []
        for value in values:
            is_sent = type(value) is ModuleType and _is_by_value(value)
            if is_sent and value.__name__ not in MAIN_MODULES:
                self._partial.add(id(value))
                every = vars(value)
                names = {name: every[name] for name in _names_in(code) if name in every}
                parts.append(self._update(self._namespace(every), names))
        return parts

    def _named(self, obj: Any, path: str) -> Any:
        """Reduce an object that pickle would refer to by its name."""
        home = _home_of(obj, path)
        if home is None:  # it was executed without a module, as by runpy.run_path()
            return reduce_named(obj) if is_known_kind(obj) else path
        if not is_by_value(home.__name__):
            return path
        names = globals_of(home)
        namespace = self._namespace(names)
        if self._codec.is_worker and namespace.pid != os.getpid():
            if is_known_kind(obj) and names.get(path) is not obj:  # a local one, or renamed
                return reduce_named(obj)
            return (Receiver.find_sent, (namespace.key, path))
        self._in_progress[id(obj)] = path
        create, args, state = reduce_named(obj)
        if names.get(path) is not obj:  # an attribute of a class
            return (create, args, state)
        *_, versions = self._update(namespace, {path: obj})
        return (Receiver.create_named, (namespace.info, path, versions[path], create, args, state))

    def _namespace(self, names: dict[str, Any]) -> Namespace:
        name = names.get("__name__")
        if isinstance(name, str):
            self.trace.modules.add(name)
        return self._registry.namespace_of(names)

    def _update(self, namespace: Namespace, names: dict[str, Any]) -> NamespaceUpdate:
        """Return what `Registry.update` needs to take these globals."""
        versions: dict[str, SentVersion] = {}
        for name, value in names.items():
            sent, versions[name] = self._codec.record_sent(namespace, name, value)
            self.trace.note(namespace.globals, name, sent)
        return (namespace.info, names, versions)

    def _binding(self, cls: type) -> tuple[Any, ...] | None:
        """Return the namespace with a global for the class, and the version of that."""
        if find_by_path(cls) is not cls or "." in cls.__qualname__:
            return None
        namespace = self._namespace(globals_of(sys.modules[cls.__module__]))
        _, version = self._codec.record_sent(namespace, cls.__qualname__, cls)
        return (namespace.info, {cls.__qualname__: version})


def unwrap(module_name: str, qualname: str) -> Any:
    return load_object(module_name, qualname).__wrapped__


def undecorated_path(obj: FunctionType) -> tuple[str, str] | None:
    """Return the path of the decorated form of a function, which keeps it as ``__wrapped__``."""
    found = find_by_path(obj)
    if found is obj or getattr(found, "__wrapped__", None) is not obj:
        return None
    return (obj.__module__, obj.__qualname__)


class Call:
    """Pickles as a call, which is made when it is unpickled."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self._reduced = (function, args)

    def __reduce__(self) -> tuple[Any, ...]:
        return self._reduced


def _home_of(obj: Any, path: str) -> ModuleType | None:
    """Return the module that an object says it is in, where it may have another name."""
    name = getattr(obj, "__module__", None)
    if name is None:
        try:
            name = pickle.whichmodule(obj, path)  # type: ignore[attr-defined]
        except pickle.PicklingError:  # from Python 3.14, if no module has it
            name = "__main__"
    return sys.modules.get(name)


def _is_in_main(cls: type) -> bool:
    return cls.__module__ in MAIN_MODULES and find_by_path(cls) is cls


def _is_by_value(module: ModuleType) -> bool:
    return sys.modules.get(module.__name__) is not module or is_by_value(module.__name__)


def _names_in(code: CodeType) -> Iterator[str]:
    """Yield the names that code may use of a module; attributes are among them."""
    yield from code.co_names
    for const in code.co_consts:
        if type(const) is CodeType:
            yield from _names_in(const)


def _reduces_by_default(kind: Any) -> bool:
    return kind.__reduce_ex__ is object.__reduce_ex__ and kind.__reduce__ is object.__reduce__


def _code(code: CodeType) -> Any:
    """Reduce code as in a .pyc file: cloudpickle 3.1.2 and later drop the name of its file."""
    try:
        return (marshal.loads, (marshal.dumps(code),))
    except ValueError:  # it has constants that are not literals
        return NotImplemented


def _attributes(obj: FunctionType) -> dict[str, Any]:
    names = (f"__{name}__" for name in _ATTRIBUTES)
    attributes = {name: getattr(obj, name) for name in names if hasattr(obj, name)}
    # From Python 3.14 this evaluates annotations, which may use names that do not exist.
    with contextlib.suppress(Exception):
        attributes["__annotations__"] = obj.__annotations__
    return attributes


def _source(code: CodeType) -> list[str] | None:
    """Return the lines of a source that is in no file, as those of a notebook's cells."""
    entry = linecache.cache.get(code.co_filename)
    return entry[2] if entry is not None and len(entry) == 4 and entry[1] is None else None


def _class_args(cls: type, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return cloudpickle's arguments for creating an empty class, corrected in three places.

    - No id of cloudpickle's own: by that, a process that already has the class, such as a forked
      one, would find and populate it again.
    - The class's ``__slots__``, or an instance of the copy would have a ``__dict__`` and could not
      become an instance of the original again.
    - The ``__qualname__``, which a nested class loses otherwise.
    """
    tracker_id = internals._get_or_create_tracker_id(cls)  # noqa: SLF001 - checked by a test
    more = {"__qualname__": cls.__qualname__}
    if cls.__dict__.get("__slots__"):
        more["__slots__"] = cls.__dict__["__slots__"]
    corrected = (None if arg is tracker_id else arg for arg in args)
    return tuple(
        arg | more if type(arg) is dict and "__module__" in arg else arg for arg in corrected
    )
