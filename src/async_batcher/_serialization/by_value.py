"""What travels by value: classes, and the functions of modules that no worker can import.

::

    this process                                       a worker
    function -> its namespace's key, code, globals --> function over the dict of one module, which
                (each with a version)                  all functions with that key share; it takes
                                                       only globals with newer versions
    class    -> its id ------------------------------> the class of that id, created once

Rules:

- All functions of one module share one namespace in each process, so that functions that arrive
  later see what an ``initializer``, a set-up or an earlier call has bound to a global.
- The version of a global counts how often its name was bound to another object when it was sent. An
  object that is changed in place is not sent again.
- What a worker's own code has bound stays until the name is rebound after the function that uses it
  was first sent. So each version says whether it was, and all workers decide alike, whichever
  versions they have received.
- A process takes no global into a namespace of its own: a function that comes back sees the globals
  there.
- A class keeps the id that it got in the process where it was first pickled.
- Threads may pickle at the same time, so ids and versions are given under the lock. What a process
  receives from another one, one thread unpickles, so no class is created twice.
"""

from __future__ import annotations

import builtins
import os
import sys
import threading
from collections import OrderedDict, deque
from types import FunctionType, ModuleType
from typing import TYPE_CHECKING, Any, TypeAlias
from weakref import WeakKeyDictionary, WeakValueDictionary, ref

from async_batcher._serialization.object_path import MAIN_MODULES, is_importable, modules_used_by

if TYPE_CHECKING:
    from collections.abc import Iterable

_MAX_CLASSES = 1024  # received classes that a worker keeps, so that they need not be sent again

# Namespaces without a module, such as those of exec(), that are remembered and kept alive.
_MAX_NAMESPACES = 256

# What a created module has at once.
_ATTRIBUTES = ("__name__", "__file__", "__package__", "__doc__")

# What another process needs to create a namespace: its key, which is the same in every process,
# whether ``sys.modules`` has its module, and the first attributes of that.
NamespaceInfo: TypeAlias = tuple[str, bool, dict[str, str]]

# The version of a global, and whether the name was rebound since the codec first sent it.
SentVersion: TypeAlias = tuple[int, bool]

# The globals that are sent for a namespace, and their versions.
NamespaceUpdate: TypeAlias = tuple[NamespaceInfo, dict[str, Any], dict[str, SentVersion]]

MISSING: Any = object()

# Set in the main module of an interpreter that this package starts; the program's replaces that.
BOOT_MARK = "__async_batcher_boot__"
# In the environment of such an interpreter, until it is one of the pool's processes.
START_MARK = "_ASYNC_BATCHER_START"


class SentValue:
    """A global as it was last sent; ``version`` counts how often its name was rebound."""

    __slots__ = ("_ref", "_value", "version")

    def __init__(self, version: int, value: Any) -> None:
        self.version = version
        self._value: Any = None
        self._ref: ref[Any] | None = None
        try:
            self._ref = ref(value)
        except TypeError:  # keep it alive, or another object could get its address
            self._value = value

    def is_still(self, value: Any) -> bool:
        """Tell whether this is the very object that was sent."""
        if self._ref is None:
            return self._value is value
        return value is not None and self._ref() is value  # a dead reference returns None


class Namespace:
    """The globals that the functions of one module share, in one process."""

    def __init__(
        self, names: dict[str, Any], info: NamespaceInfo, pid: int, module: ModuleType | None
    ) -> None:
        self.globals = names
        self.info = info
        self.key, self.has_module, _ = info
        self.pid = pid  # that created the key; 0 if this process, and those before a fork, did not
        self.is_adopted = False  # whether the globals were here before any was received
        self._module = module
        self._inherited: dict[str, Any] = {}  # globals that the first ones sent replace
        self._received: dict[str, int] = {}
        self._sent: dict[str, SentValue] = {}

    @property
    def module(self) -> ModuleType:
        return self._module or sys.modules[self.globals["__name__"]]

    def record_sent(self, name: str, value: Any) -> SentValue:
        """Record that a global is about to be sent."""
        sent = self._sent.get(name)
        if sent is None or not sent.is_still(value):
            sent = self._sent[name] = SentValue(0 if sent is None else sent.version + 1, value)
        return sent

    def accept(self, name: str, sent: SentVersion) -> bool:
        """Record that a global was received; return whether it replaces the one that is here."""
        if self.pid == os.getpid():
            return False
        version, is_rebound = sent
        known = self._received.get(name)
        if known is not None:
            is_new = known < version
        else:
            present = self.globals.get(name, MISSING)
            is_untouched = present is MISSING or present is self._inherited.get(name, MISSING)
            is_new = is_untouched or is_rebound
        if known is None or is_new:
            self._received[name] = version
        return is_new

    def adopt(self, *, keep: bool) -> None:
        """Record that the globals were here first: in a fork, or where the main module was run.

        With ``keep``, the first ones that are sent do not replace them.
        """
        self.pid = 0
        self.is_adopted = True
        self._inherited = {} if keep else dict(self.globals)


class Registry:
    """The namespaces and classes that one process has sent or received."""

    def __init__(self) -> None:
        self.lock = threading.RLock()  # the program's import finders run under it, and may reenter
        self.class_ids: WeakKeyDictionary[type, str] = WeakKeyDictionary()
        self.classes: WeakValueDictionary[str, type] = WeakValueDictionary()
        self.kept_classes: deque[type] = deque(maxlen=_MAX_CLASSES)
        self.versions: dict[str, int] = {}  # of the class definitions that were received, by id
        # Versions of the class definitions that were sent, and the `Trace` of each.
        self.sent_versions: WeakKeyDictionary[type, tuple[int, Any]] = WeakKeyDictionary()
        # Names that a plain pickle must not have. Replaced, never changed: threads iterate over it.
        self.by_value_modules: frozenset[bytes] = frozenset()
        # Whether the globals of existing modules stay, as in the workers of a standard pool.
        self.keeps_modules = True
        self._pid = 0
        self._prefix = ""
        self._count = 0
        self.namespaces: dict[str, Namespace] = {}
        # By the id() of their globals, which they keep alive.
        self._by_globals: OrderedDict[int, Namespace] = OrderedDict()
        # The globals of modules before code of theirs has run here.
        self._as_imported: dict[str, dict[str, Any]] = {}

    @property
    def prefix(self) -> str:
        """What ids begin with that this process creates; a forked process has another prefix."""
        with self.lock:
            if self._pid != os.getpid():
                self._pid = os.getpid()
                self._prefix = os.urandom(8).hex()
            return self._prefix

    def _new_id(self) -> str:
        self._count += 1
        return f"{self.prefix}:{self._count}"

    def register_class(self, cls: type, class_id: str | None = None) -> str:
        """Record a class under its id, or else under the one that it has, or a new one."""
        with self.lock:
            class_id = class_id or self.class_ids.get(cls) or self._new_id()
            self.class_ids[cls] = class_id
            self.classes[class_id] = cls
            return class_id

    def note_by_value(self, modules: Iterable[str]) -> None:
        """Record the modules that cannot be imported, of those that something was taken from."""
        with self.lock:
            self.by_value_modules |= {
                name.encode()
                for name in modules
                if name in sys.modules and name not in MAIN_MODULES and not is_importable(name)
            }

    def note_imported(self, function: Any) -> None:
        """Record the globals of the modules that a function may bind, before it runs."""
        for name in modules_used_by(function):
            module = sys.modules.get(name)
            if isinstance(module, ModuleType) and name not in self._as_imported:
                self._as_imported[name] = dict(vars(module))

    def namespace_of(self, names: dict[str, Any]) -> Namespace:
        """Return the namespace of functions with these globals."""
        with self.lock:
            known = self._by_globals.get(id(names))
            if known is not None:
                self._by_globals.move_to_end(id(names))
                return known
            name: Any = names.get("__name__")
            module = sys.modules.get(name) if type(name) is str else None
            is_of_module = isinstance(module, ModuleType) and globals_of(module) is names
            has_module = is_of_module and not is_importable(name)  # which no copy replaces
            attributes = {key: names[key] for key in _ATTRIBUTES if type(names.get(key)) is str}
            info = (self._new_id(), has_module, attributes)
            return self._add(Namespace(names, info, self._pid, None))

    def namespace(self, info: NamespaceInfo) -> Namespace:
        """Return the namespace that another process has described; create its module if needed."""
        with self.lock:
            known = self.namespaces.get(info[0])
            if known is not None and not self._is_of_forked_module(known):
                if known.pid not in (0, os.getpid()):
                    known.adopt(keep=self.keeps_modules)
                # Two keys may share a dict, and one of them may have been dropped.
                self._by_globals[id(known.globals)] = known
                self._by_globals.move_to_end(id(known.globals))
                return known
            module = self._existing_module(info)
            if module is None:
                module = self._new_module(info)
                return self._add(Namespace(vars(module), info, 0, module))
            adopted = Namespace(globals_of(module), info, 0, module)
            adopted.adopt(keep=self.keeps_modules)
            return self._add(adopted)

    def update(
        self, info: NamespaceInfo, names: dict[str, Any], versions: dict[str, SentVersion]
    ) -> None:
        """Take the globals of a namespace that are newer than those that are here.

        In a `WorkerPool`, a lambda or local function of an importable module has a copy of that
        module's globals. What code in this process has bound in the module itself, as an
        ``initializer`` of the module may have, takes precedence over what was sent.
        """
        namespace = self.namespace(info)
        module: Any = namespace.globals.get("__name__")
        # Of a module that no other process can import, the namespace is not a copy.
        before = {} if namespace.has_module else self._as_imported.get(module, {})
        now = vars(sys.modules[module]) if before else {}
        for name, value in names.items():
            if now.get(name, MISSING) is not before.get(name, MISSING):
                namespace.globals[name] = now.get(name)
            elif namespace.accept(name, versions[name]):
                namespace.globals[name] = value

    def _add(self, namespace: Namespace) -> Namespace:
        self.namespaces[namespace.key] = namespace
        self._by_globals[id(namespace.globals)] = namespace
        if len(self._by_globals) > _MAX_NAMESPACES:
            for oldest in self._by_globals.values():
                if not oldest.has_module and oldest is not namespace:
                    del self.namespaces[oldest.key], self._by_globals[id(oldest.globals)]
                    break
        return namespace

    def _is_of_forked_module(self, known: Namespace) -> bool:
        """Whether a fork has a namespace with the globals of a module that others import."""
        if self.keeps_modules or known.has_module or known.pid in (0, os.getpid()):
            return False
        name = known.globals.get("__name__")
        module = sys.modules.get(name) if isinstance(name, str) else None
        return isinstance(module, ModuleType) and vars(module) is known.globals

    def _existing_module(self, info: NamespaceInfo) -> ModuleType | None:
        """Return the module of a namespace if it is shared: a main module that was run or forked.

        In the worker of a standard pool also an imported one, in which the pool's initializer may
        have bound globals.
        """
        _, has_module, attributes = info
        name = attributes.get("__name__", "")
        if has_module and name in MAIN_MODULES:
            main = sys.modules.get("__main__")
            return None if main is None or hasattr(main, BOOT_MARK) else main
        module = sys.modules.get(name)
        is_shared = self.keeps_modules and isinstance(module, ModuleType) and is_importable(name)
        return module if is_shared else None

    def _new_module(self, info: NamespaceInfo) -> ModuleType:
        _, has_module, attributes = info
        name = attributes.get("__name__", "")
        module = ModuleType(name)
        # C code that imports looks for __builtins__ here.
        vars(module).update(attributes, __builtins__=builtins)
        current = sys.modules.get(name)
        if has_module and name in MAIN_MODULES:
            sys.modules.update(dict.fromkeys(MAIN_MODULES, module))
        elif has_module and (current is None or id(current.__dict__) in self._by_globals):
            sys.modules[name] = module
        return module


def globals_of(module: ModuleType) -> dict[str, Any]:
    """Return the globals of a module's functions."""
    names = vars(module)
    # multiprocessing runs a main module by `runpy`, and copies the names into the module.
    if "__mp_main__" in (names.get("__name__"), module.__name__):
        for value in names.values():
            if type(value) is FunctionType and value.__globals__.get("__name__") == "__mp_main__":
                return value.__globals__
    return names


REGISTRY = Registry()
if hasattr(os, "register_at_fork"):  # the thread that holds the lock would not exist in the child
    acquire, release = REGISTRY.lock.acquire, REGISTRY.lock.release
    os.register_at_fork(before=acquire, after_in_parent=release, after_in_child=release)
