"""What travels by value: classes, and the functions of modules that no worker can import.

::

    this process                                          a worker
    function --> its namespace's key, code, globals --->  function over the dict of one module, shared by all that has the key
                 (each with a version)                    a global is taken only if its version is newer than what is there
    class    --> its id ------------------------------->  the class of that id, made once

Rules:

- All functions of one module share one namespace in each process. So what an ``initializer``, a set-up or an earlier call binds
  to a global is what later functions see.
- The version of a global counts how often the name was bound to another object when it was sent. What is changed in place is not
  noticed.
- A process takes no global into a namespace of its own: a function that comes home sees the globals that are there.
- A class keeps the id that it got in the process where it was first pickled.
"""

from __future__ import annotations

import builtins
import os
import sys
import threading
import weakref
from collections import OrderedDict
from types import FunctionType, ModuleType
from typing import TYPE_CHECKING, Any

from async_batcher._serialization.object_path import MAIN_MODULES, is_importable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

# Namespaces that belong to no module, such as those of exec(), that are remembered at a time; each is held by this.
_MAX_NAMESPACES = 256

_CLASSES_KEPT = 1024  # classes that a worker received and keeps, so that their definitions need not come again

_ATTRIBUTES = ("__name__", "__file__", "__package__", "__doc__")  # what a received module has from the start

MISSING: Any = object()

# Set in a new Python that this package has started: its main module is not the program's, and may be replaced.
BOOT_MARK = "__async_batcher_boot__"
START_MARK = "_ASYNC_BATCHER_START"  # in the environment of an interpreter that we start, until it is one of our processes


class SentValue:
    """A global as it was last sent.

    Attributes:
        version: How often the name has been bound to another object.
    """

    __slots__ = ("_get", "version")

    def __init__(self, version: int, value: Any) -> None:
        self.version = version
        try:
            self._get: Callable[[], Any] = weakref.ref(value)
        except TypeError:  # it must be held, or another object could take its address
            self._get = _none if value is None else lambda: value

    def is_still(self, value: Any) -> bool:
        """Tell whether ``value`` is the very object that was sent."""
        return self._get() is value and (value is not None or self._get is _none)  # a dead reference returns None as well


def _none() -> None: ...


class Namespace:
    """The globals that the functions of one module share, in one process.

    Attributes:
        key: The same in every process.
        globals: The dict.
        about: What another process needs to make it: key, whether its module is to be put into ``sys.modules``, attributes.
        pid: The process that the key comes from; 0 for another than this one and those that it was forked from.
        is_adopted: Whether the names were here before anything was received.
    """

    __slots__ = ("_inherited", "_module", "_received", "_sent", "about", "globals", "is_adopted", "key", "pid")

    def __init__(self, names: dict[str, Any], about: tuple[Any, ...], *, pid: int, module: ModuleType | None = None) -> None:
        self.key: str = about[0]
        self.globals = names
        self.about = about
        self.pid = pid
        self.is_adopted = False
        self._module = module
        self._inherited: dict[str, Any] = {}  # globals that give way to the first that is sent
        self._received: dict[str, int] = {}
        self._sent: dict[str, SentValue] = {}

    @property
    def module(self) -> ModuleType:
        """The module whose dict this is."""
        return self._module or sys.modules[self.globals["__name__"]]

    def send(self, name: str, value: Any) -> SentValue:
        """Note that a global is about to be sent."""
        sent = self._sent.get(name)
        if sent is None or not sent.is_still(value):
            sent = self._sent[name] = SentValue(0 if sent is None else sent.version + 1, value)
        return sent

    def take(self, name: str, value: Any, version: int) -> None:
        """Take a global if it is newer than what is here."""
        if self.accepts(name, version):
            self.globals[name] = value

    def accepts(self, name: str, version: int) -> bool:
        """Note a global that was sent, and tell whether it is newer than what is here.

        What code in this process has bound stays until the program binds the name to another object than the first one sent.
        """
        if self.pid == os.getpid():
            return False
        known = self._received.get(name)
        if known is None:
            is_new = name not in self.globals or self._inherited.get(name, MISSING) is self.globals[name]
        else:
            is_new = known < version
        if known is None or is_new:
            self._received[name] = version
        return is_new

    def adopt(self, *, keeps: bool) -> None:
        """Note that the names were here first: in a forked process, or where the main module has been run.

        Args:
            keeps: Whether they stay when they are sent for the first time.
        """
        self.pid = 0
        self.is_adopted = True
        self._inherited = {} if keeps else dict(self.globals)


class Registry:
    """The namespaces and classes that one process has sent or received."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # import finders of the program's own run under it, and may come back here
        self._pid = 0
        self._prefix = ""
        self._count = 0
        self._namespaces: dict[str, Namespace] = {}
        self._of_dicts: OrderedDict[int, Namespace] = OrderedDict()  # by the id of the dict, which the namespace holds
        self._ids: weakref.WeakKeyDictionary[type, str] = weakref.WeakKeyDictionary()
        self._classes: weakref.WeakValueDictionary[str, type] = weakref.WeakValueDictionary()
        self._kept: OrderedDict[str, type] = OrderedDict()
        self.by_value_modules: set[bytes] = set()  # names that a plain pickle may not have in it
        self.ages: dict[str, int] = {}  # of the definitions that were received, by the ids of the classes
        self.sent_ages: weakref.WeakKeyDictionary[type, tuple[int, Any]] = weakref.WeakKeyDictionary()  # of those sent; a `Trace`
        self._as_imported: dict[str, dict[str, Any]] = {}  # the globals of modules before code of theirs has run here
        # Whether modules that are here already keep the globals that they have, as in the workers of a standard pool.
        self.keeps_modules = True

    def hold_at_fork(self) -> None:
        """See to it that a forked process does not inherit the lock of a thread that it lacks."""
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(before=self._lock.acquire, after_in_parent=self._lock.release, after_in_child=self._lock.release)

    @property
    def prefix(self) -> str:
        """What the ids begin with that this process gives; a forked process has another."""
        if self._pid != os.getpid():
            self._pid = os.getpid()
            self._prefix = os.urandom(8).hex()
        return self._prefix

    # Classes.

    def id_of(self, cls: type) -> str | None:
        """Return the id of ``cls``, if it has one."""
        return self._ids.get(cls)

    def class_of(self, name: str) -> type | None:
        """Return the class of that id, if it is here."""
        return self._classes.get(name)

    def add_class(self, cls: type, name: str | None = None, *, keep: bool = False) -> str:
        """Note a class under its id, a new one if it has none.

        Args:
            cls: The class.
            name: The id.
            keep: Whether to keep the class alive, so that its definition need not be sent again.
        """
        with self._lock:
            if name is None:
                name = self._new_id()
            if keep:
                self._kept[name] = cls
                if len(self._kept) > _CLASSES_KEPT:
                    self._kept.popitem(last=False)
            self._ids[cls] = name
            self._classes[name] = cls
            return name

    def forget_class(self, name: str) -> None:
        """Forget a class whose definition could not be completed, so that it can come again."""
        with self._lock:
            self._classes.pop(name, None)
            self._kept.pop(name, None)

    # Namespaces.

    def note_by_value(self, modules: Iterable[str]) -> None:
        """Note the modules that no other process can import, of those that something was taken from by value."""
        for name in modules:
            if name in sys.modules and name not in MAIN_MODULES and not is_importable(name):
                self.by_value_modules.add(name.encode())

    def namespace_of(self, names: dict[str, Any]) -> Namespace:
        """Return the namespace that functions with these globals belong to."""
        with self._lock:
            known = self._of_dicts.get(id(names))
            if known is not None:
                self._of_dicts.move_to_end(id(names))
                return known
            name: Any = names.get("__name__")
            module = sys.modules.get(name) if type(name) is str else None
            has_module = isinstance(module, ModuleType) and globals_of(module) is names
            has_module = has_module and not is_importable(name)  # what can be imported is not replaced by a copy
            key = self._new_id()
            attributes = {attribute: names[attribute] for attribute in _ATTRIBUTES if type(names.get(attribute)) is str}
            return self._add(Namespace(names, (key, has_module, attributes), pid=self._pid))

    def namespace(self, about: tuple[Any, ...]) -> Namespace:
        """Return the namespace that another process has described; make its module if it is not here."""
        key, has_module, attributes = about
        with self._lock:
            known = self._namespaces.get(key)
            if known is not None:
                if known.pid not in (0, os.getpid()):
                    known.adopt(keeps=self.keeps_modules)
                self._of_dicts[id(known.globals)] = known  # two keys may share a dict, and one may have been forgotten
                self._of_dicts.move_to_end(id(known.globals))
                return known
            module = self._module_here(attributes.get("__name__", ""), has_module=has_module)
            if module is None:
                module = self._new_module(attributes, has_module=has_module)
                return self._add(Namespace(vars(module), about, pid=0, module=module))
            adopted = Namespace(globals_of(module), about, pid=0, module=module)
            adopted.adopt(keeps=self.keeps_modules)
            return self._add(adopted)

    def take(self, namespace: Namespace, names: dict[str, Any], versions: dict[str, int]) -> None:
        """Take the globals of a namespace that are newer than those that are here.

        In a `WorkerPool`, a lambda or local function of an importable module has a copy of that module's globals. What code in
        this process has bound in the module itself, as an ``initializer`` of the module may have, goes before what was sent.
        """
        module = namespace.globals.get("__name__")
        before = self._as_imported.get(module) if self._as_imported and isinstance(module, str) else None
        now = vars(sys.modules[module]) if before is not None and isinstance(module, str) else {}
        for name, value in names.items():
            if before is not None and now.get(name, MISSING) is not before.get(name, MISSING):
                namespace.globals[name] = now.get(name)
            else:
                namespace.take(name, value, versions[name])

    def note_imported(self, function: Any) -> None:
        """Note the globals of the module that a function comes from, before it runs."""
        name = getattr(function, "__module__", None)
        module = sys.modules.get(name) if isinstance(name, str) else None
        if isinstance(module, ModuleType) and name not in self._as_imported and is_importable(module.__name__):
            self._as_imported[module.__name__] = dict(vars(module))

    def find(self, key: str, path: str) -> Any:
        """Return what the namespace of that key has under a dotted name; `MISSING` if there is nothing."""
        namespace = self._namespaces.get(key)
        found: Any = MISSING
        if namespace is not None:
            first, *rest = path.split(".")
            found = namespace.globals.get(first, MISSING)
            for part in rest:
                found = getattr(found, part, MISSING)
        return found

    def _add(self, namespace: Namespace) -> Namespace:
        self._namespaces[namespace.key] = namespace
        self._of_dicts[id(namespace.globals)] = namespace
        if len(self._of_dicts) > _MAX_NAMESPACES:
            for oldest in self._of_dicts.values():
                if not oldest.about[1] and oldest is not namespace:  # those of modules stay
                    del self._namespaces[oldest.key], self._of_dicts[id(oldest.globals)]
                    break
        return namespace

    def _new_id(self) -> str:
        self._count += 1
        return f"{self.prefix}:{self._count}"

    def _module_here(self, name: str, *, has_module: bool) -> ModuleType | None:
        """The module of a namespace, if it is here and is to be shared: a main module that was run or forked.

        In a standard pool's worker also one that was imported: the pool's initializer may have bound globals there.
        """
        if has_module and name in MAIN_MODULES:
            module = sys.modules.get("__main__")
            return None if module is None or hasattr(module, BOOT_MARK) else module
        module = sys.modules.get(name)
        return module if self.keeps_modules and isinstance(module, ModuleType) and is_importable(name) else None

    def _new_module(self, attributes: dict[str, str], *, has_module: bool) -> ModuleType:
        name = attributes.get("__name__", "")
        module = ModuleType(name)
        vars(module).update(attributes, __builtins__=builtins)  # C code that imports looks for it here
        current = sys.modules.get(name)
        if has_module and name in MAIN_MODULES:
            for main in MAIN_MODULES:
                sys.modules[main] = module
        elif has_module and (current is None or id(current.__dict__) in self._of_dicts):
            sys.modules[name] = module
        return module


def globals_of(module: ModuleType) -> dict[str, Any]:
    """The globals of a module's functions: multiprocessing runs a main module by `runpy`, and copies its names to the module."""
    names = vars(module)
    if "__mp_main__" in (names.get("__name__"), module.__name__):
        for value in names.values():
            if type(value) is FunctionType and value.__globals__.get("__name__") == "__mp_main__":
                return value.__globals__
    return names


REGISTRY = Registry()
REGISTRY.hold_at_fork()
