"""What a `pickler.ValuePickler` has written is read here: functions, classes and modules are made again.

::

    function -> code, namespace, globals with their versions --->  Receiver.create_function, .populate_function
    class    -> its id, or its definition ---------------------->  Receiver.lookup_class, .create_class, .populate_class
    module   -> namespace, its names --------------------------->  Receiver.module, .set_module
    an object that pickles as its name (lru_cache, NewType) ---->  Receiver.named, or .existing on its way back
"""

from __future__ import annotations

import linecache
import pickle
from types import CellType, CodeType, FunctionType, ModuleType
from typing import TYPE_CHECKING, Any

from async_batcher._serialization.by_name import restored, type_of
from async_batcher._serialization.by_value import MISSING, Registry

if TYPE_CHECKING:
    import io
    from collections.abc import Callable, Sequence


class UnknownClassError(Exception):
    """A reference to a class whose definition has not arrived here yet."""


# Stand in the pickle for the methods of the `Receiver` that reads it.
def lookup_class() -> None: ...
def create_class() -> None: ...
def populate_class() -> None: ...
def create_function() -> None: ...
def populate_function() -> None: ...
def module() -> None: ...
def update() -> None: ...
def named() -> None: ...
def existing() -> None: ...


_STAND_INS = frozenset(
    {
        "lookup_class",
        "create_class",
        "populate_class",
        "create_function",
        "populate_function",
        "module",
        "update",
        "named",
        "existing",
    }
)


class ValueUnpickler(pickle.Unpickler):
    """Reads what a `ValuePickler` has written.

    Args:
        file: Holds the pickle.
        receiver: What the stand-ins in it stand for.
        buffers: The large buffers beside it.
    """

    def __init__(self, file: io.BytesIO, receiver: Receiver, buffers: Sequence[Any]) -> None:
        super().__init__(file, buffers=buffers)
        self._receiver = receiver

    def find_class(self, module_name: str, name: str) -> Any:
        """Find what a pickle refers to by name."""
        if module_name == __name__ and name in _STAND_INS:
            return getattr(self._receiver, name)
        return super().find_class(module_name, name)


class Receiver:
    """Makes the objects that arrived by value.

    Args:
        registry: What this process has sent and received.
        keeps: Whether the classes are kept; otherwise they live for as long as something refers to them.
    """

    def __init__(self, registry: Registry, *, keeps: bool) -> None:
        self._registry = registry
        self._keeps = keeps
        self._incomplete: set[str] = set()

    def give_up(self) -> None:
        """Forget the classes whose definitions broke off, so that they can come again."""
        for name in self._incomplete:
            self._registry.forget_class(name)
        self._incomplete.clear()

    # What the unpickler calls.

    def lookup_class(self, name: str, age: int) -> type:
        """Return the class of that id, if no newer definition of it has been made than the one that arrived here.

        Args:
            name: The id.
            age: How often the globals of its methods have been bound anew; a definition that arrives again brings them.
        """
        cls = self._registry.class_of(name)
        if cls is None or self._registry.ages.get(name, 0) < age:
            raise UnknownClassError(name)
        return cls

    def create_class(self, name: str, age: int, make: Callable[..., type], args: tuple[Any, ...]) -> type:
        """Return the class of that id; make it empty if it is not here yet."""
        if age:
            self._registry.ages[name] = max(age, self._registry.ages.get(name, 0))
        known = self._registry.class_of(name)
        if known is not None:
            return known
        cls = make(*args)
        self._registry.add_class(cls, name, keep=self._keeps)
        self._incomplete.add(name)
        return cls

    def populate_class(self, cls: type, state: tuple[str, Callable[[type, Any], None], Any, tuple[Any, ...] | None]) -> None:
        """Give a class that `create_class` has just made its methods and attributes; leave any other as it is."""
        name, setter, content, binding = state
        if name in self._incomplete:
            setter(cls, content)
            self._incomplete.discard(name)
        if binding is not None:
            about, versions = binding
            self._registry.take(self._registry.namespace(about), dict.fromkeys(versions, cls), versions)

    def create_function(
        self, code: CodeType, about: tuple[Any, ...], name: str, closure: tuple[CellType, ...] | None
    ) -> FunctionType:
        """Make a function over its namespace."""
        return FunctionType(code, self._registry.namespace(about).globals, name, None, closure)

    def populate_function(self, made: FunctionType, state: tuple[Any, ...]) -> None:
        """Give a function its attributes, and its namespace the globals that are newer than those that are there."""
        about, attributes, own, closure, names, versions, source, *_ = state  # the rest need only be unpickled, which it is
        self._registry.take(self._registry.namespace(about), names, versions)
        for cell, sent in zip(made.__closure__ or (), closure or (), strict=True):
            content = content_of(sent)
            if content is not MISSING:
                cell.cell_contents = content
        for name, value in attributes.items():
            setattr(made, name, value)
        made.__dict__.update(own)
        if source is not None:
            linecache.cache[made.__code__.co_filename] = (sum(map(len, source)), None, source, made.__code__.co_filename)

    def module(self, about: tuple[Any, ...]) -> ModuleType:
        """Return the module that a namespace belongs to."""
        return self._registry.namespace(about).module

    def update(self, about: tuple[Any, ...], names: dict[str, Any], versions: dict[str, int]) -> None:
        """Take names of a module."""
        self._registry.take(self._registry.namespace(about), names, versions)

    def named(
        self, about: tuple[Any, ...], name: str, version: int, make: Callable[..., Any], args: tuple[Any, ...], state: Any
    ) -> Any:
        """Return the object that a namespace has under a name; make it if it is newer than what is there."""
        namespace = self._registry.namespace(about)
        present = namespace.globals.get(name)
        if namespace.is_adopted and version == 0 and type(present) is type_of(make, args):
            return present  # a process has one such object, and classes that were here before refer to it
        if namespace.accepts(name, version):
            namespace.globals[name] = restored(make(*args), state)
        return namespace.globals[name]

    def existing(self, key: str, path: str) -> Any:
        """Return what this process has sent under that name."""
        found = self._registry.find(key, path)
        if found is MISSING:
            msg = f"{path!r}, which a result refers to, no longer exists in the module that it was sent from"
            raise AttributeError(msg)
        return found


def content_of(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # an empty one
        return MISSING
