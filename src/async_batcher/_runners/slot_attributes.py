"""Attributes that a ``setup_worker`` binds on its batcher: each slot has a value of its own.

All others are shared. While a set-up runs, a hook in `AsyncBatcher` sees what it binds, and puts a
`SlotAttribute`, a data descriptor, into the class. The cached properties of the class are replaced
likewise for that time, and stay so if the set-up reads them. Outside of a set-up there is no hook.
What a set-up writes directly to the batcher's ``__dict__`` is shared.
"""

from __future__ import annotations

import contextlib
import threading
from functools import cached_property
from types import MemberDescriptorType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    from async_batcher._runners.slots import Slot


class _Unset:
    """Where a class has no attribute of a name."""


class _Current(threading.local):
    slot: Slot | None = None  # that this thread works for


current = _Current()


@contextlib.contextmanager
def working_for(slot: Slot) -> Iterator[None]:
    """Make this thread work for a slot."""
    previous, current.slot = current.slot, slot
    try:
        yield
    finally:
        current.slot = previous


def _slot_of(instance: Any) -> Slot | None:
    """Return the slot that this thread works for, if it is one of this batcher."""
    slot = current.slot
    is_own = slot is not None and instance is not None and slot.batcher is instance
    return slot if is_own else None


class SlotAttribute:
    """Replaces one attribute in a batcher's class; outside of slots it behaves as before."""

    __slots__ = ("is_bound", "name", "original", "owner")

    def __init__(self, owner: type, name: str, *, is_bound: bool) -> None:
        self.owner = owner
        self.name = name
        self.is_bound = is_bound  # by a set-up
        self.original = owner.__dict__.get(name, _Unset)

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        slot, name = _slot_of(instance), self.name
        if slot is not None and name in slot.attributes:
            return slot.attributes[name]
        original = self._original_in(owner or type(instance))
        if not hasattr(type(original), "__set__"):
            shared = getattr(instance, "__dict__", {}).get(name, _Unset)
            if shared is not _Unset:
                return shared
        if slot is not None and slot.is_setting_up and isinstance(original, cached_property):
            # The property itself would cache it in the batcher's __dict__.
            value = slot.attributes[name] = original.func(instance)
            self.is_bound = True
            return value
        if original is _Unset:
            raise AttributeError(name, name=name, obj=instance)
        get = getattr(type(original), "__get__", None)
        return original if get is None else get(original, instance, owner or type(instance))

    def __set__(self, instance: Any, value: Any) -> None:
        slot, name = _slot_of(instance), self.name
        if slot is not None and (slot.is_setting_up or name in slot.attributes):
            slot.attributes[name] = value
            self.is_bound = True
            return
        original = self._original_in(type(instance))
        if hasattr(type(original), "__set__"):
            original.__set__(instance, value)
        else:
            instance.__dict__[name] = value

    def __delete__(self, instance: Any) -> None:
        slot, name = _slot_of(instance), self.name
        original = self._original_in(type(instance))
        if slot is not None and name in slot.attributes:
            del slot.attributes[name]
        elif hasattr(type(original), "__delete__"):
            original.__delete__(instance)
        elif name in getattr(instance, "__dict__", {}):
            del instance.__dict__[name]
        else:
            raise AttributeError(name, name=name, obj=instance)

    def restore(self) -> None:
        """Put back what the class had."""
        if self.original is _Unset:
            delattr(self.owner, self.name)
        else:
            setattr(self.owner, self.name, self.original)

    def _original_in(self, cls: type) -> Any:
        if self.original is not _Unset:
            return self.original
        return _lookup(cls.__mro__[cls.__mro__.index(self.owner) + 1 :], self.name)


def is_per_slot(cls: type, name: str) -> bool:
    """Tell whether a set-up has bound an attribute of that name in a slot."""
    return isinstance(_lookup(cls.__mro__, name), SlotAttribute)


def _lookup(classes: tuple[type, ...], name: str) -> Any:
    for cls in classes:
        found = cls.__dict__.get(name, _Unset)  # one step: a set-up may end in another thread
        if found is not _Unset:
            return found
    return _Unset


def base_of(cls: type) -> Any:
    """Return the class that defines the empty ``setup_worker``, if ``cls`` is of a batcher."""
    for base in cls.__mro__:
        if getattr(base.__dict__.get("setup_worker"), "does_nothing", None) is True:
            return base
    return None


class AttributeHook:
    """Sees what set-ups bind on batchers, while at least one runs.

    It is in `AsyncBatcher`, so that a ``__setattr__`` of the user's class comes before it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._replaced: list[SlotAttribute] = []  # in place of cached properties

    @contextlib.contextmanager
    def installed(self, cls: type) -> Iterator[None]:
        """See what a set-up binds on an instance of ``cls``."""
        base = base_of(cls)
        with self._lock:
            self._users += 1
            # Copies, since other threads may bind attributes of a class meanwhile.
            for name in {name for some in cls.__mro__ for name in vars(some).copy()}:
                if isinstance(_lookup(cls.__mro__, name), cached_property):
                    self._replaced.append(SlotAttribute(cls, name, is_bound=False))
                    setattr(cls, name, self._replaced[-1])
            if self._users == 1:

                def bind(instance: Any, name: str, value: Any) -> None:
                    slot = _slot_of(instance)
                    if slot is not None and slot.is_setting_up:
                        self._replace(base, type(instance), name)
                    super(base, instance).__setattr__(name, value)

                base.__setattr__ = bind
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if not self._users:
                    del base.__setattr__
                    replaced, self._replaced = self._replaced, []
                    for attribute in replaced:
                        if not attribute.is_bound:
                            attribute.restore()

    def _replace(self, base: type, cls: type, name: str) -> None:
        """Give each slot that attribute; not a property or the like, which binds another one."""
        with self._lock:
            there = _lookup(cls.__mro__, name)
            is_member = isinstance(there, MemberDescriptorType)
            is_ours = is_member and base.__dict__.get(name) is there
            if not is_ours and (is_member or not hasattr(type(there), "__set__")):
                setattr(cls, name, SlotAttribute(cls, name, is_bound=True))


hook = AttributeHook()
