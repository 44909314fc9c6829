"""Read what a `pickler.ValuePickler` has written: create functions, classes and modules.

::

    function -> code, namespace, globals, versions --> create_function, populate_function
    class    -> its id, or its definition -----------> lookup_class; create_class, populate_class
    module   -> namespace, its globals --------------> module, populate_module
    object that pickles as a name (lru_cache) -------> create_named; find_sent on its way back

A pickle refers to methods of `Receiver`; the unpickler replaces them by those of its own receiver.
"""

from __future__ import annotations

import functools
import linecache
import pickle
from types import CellType, CodeType, FunctionType, ModuleType
from typing import TYPE_CHECKING, Any

from async_batcher._serialization.by_name import construct, type_of
from async_batcher._serialization.by_value import MISSING, Registry

if TYPE_CHECKING:
    import io
    from collections.abc import Callable, Sequence

    from async_batcher._serialization.by_value import NamespaceInfo, NamespaceUpdate, SentVersion


class UnknownClassError(Exception):
    """A reference to a class whose definition has not arrived here yet."""


class ValueUnpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, receiver: Receiver, buffers: Sequence[Any]) -> None:
        super().__init__(file, buffers=buffers)
        self._receiver = receiver

    def find_class(self, module_name: str, name: str) -> Any:
        if module_name == __name__ and name.startswith("Receiver."):
            return getattr(self._receiver, name.removeprefix("Receiver."))
        return super().find_class(module_name, name)


class Receiver:
    """Creates the objects that arrive by value; ``keep_classes`` keeps the classes alive."""

    def __init__(self, registry: Registry, *, keep_classes: bool) -> None:
        self._registry = registry
        self._keep_classes = keep_classes

    def lookup_class(self, class_id: str, version: int) -> type:
        """Return the class of that id, unless its definition here is older than the version.

        The version counts how often globals of its methods were bound to other objects; a
        definition that arrives again brings them.
        """
        cls = self._registry.classes.get(class_id)
        if cls is None or self._registry.versions.get(class_id, 0) < version:
            raise UnknownClassError(class_id)
        return cls

    def create_class(
        self, class_id: str, create: Callable[..., type], args: tuple[Any, ...]
    ) -> type:
        """Return the class of that id; create an empty one if it is not here yet."""
        known = self._registry.classes.get(class_id)
        return create(*args) if known is None else known

    def populate_class(self, cls: type, state: tuple[Any, ...]) -> None:
        """Set the methods and attributes of a class that is new here, and its global."""
        class_id, version, setter, content, binding = state
        registry = self._registry
        if cls not in registry.class_ids:  # which it is from here on, since it is complete
            setter(cls, content)
            registry.register_class(cls, class_id)
            if self._keep_classes:
                registry.kept_classes.append(cls)
        if version:
            registry.versions[class_id] = max(version, registry.versions.get(class_id, 0))
        if binding is not None:
            info, versions = binding
            registry.update(info, dict.fromkeys(versions, cls), versions)

    def create_function(
        self, code: CodeType, info: NamespaceInfo, name: str, closure: tuple[CellType, ...] | None
    ) -> FunctionType:
        return FunctionType(code, self._registry.namespace(info).globals, name, None, closure)

    def populate_function(self, function: FunctionType, state: tuple[Any, ...]) -> None:
        """Set attributes, closure and source of a function, and newer globals of its namespace."""
        # The rest of the state, submodules, need only be unpickled, which they are.
        attributes, own_dict, closure, updates, source, *_ = state
        for update in updates:
            self._registry.update(*update)
        for cell, sent in zip(function.__closure__ or (), closure or (), strict=True):
            content = content_of(sent)
            if content is not MISSING:
                cell.cell_contents = content
        for name, value in attributes.items():
            setattr(function, name, value)
        function.__dict__.update(own_dict)
        if source is not None:
            file = function.__code__.co_filename
            linecache.cache[file] = (sum(map(len, source)), None, source, file)

    def module(self, info: NamespaceInfo) -> ModuleType:
        return self._registry.namespace(info).module

    def populate_module(self, module: ModuleType, update: NamespaceUpdate) -> None:  # noqa: ARG002 - of its namespace
        self._registry.update(*update)

    def create_named(
        self,
        info: NamespaceInfo,
        name: str,
        version: SentVersion,
        create: Callable[..., Any],
        args: tuple[Any, ...],
        state: Any,
    ) -> Any:
        """Return the object of that name in a namespace; create it if it is newer there."""
        namespace = self._registry.namespace(info)
        present = namespace.globals.get(name)
        if namespace.is_adopted and version[0] == 0 and type(present) is type_of(create, args):
            return present  # classes that were here first refer to it
        if namespace.accept(name, version):
            namespace.globals[name] = construct(create, args, state)
        return namespace.globals[name]

    def find_sent(self, key: str, path: str) -> Any:
        """Return what this process has sent under that name."""
        first, *rest = path.split(".")
        try:
            return functools.reduce(getattr, rest, self._registry.namespaces[key].globals[first])
        except (AttributeError, KeyError):
            msg = (
                f"{path!r}, which a result refers to, no longer exists in the module that it was "
                "sent from"
            )
            raise AttributeError(msg) from None


def content_of(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # an empty one
        return MISSING
