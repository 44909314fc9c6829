"""The slots of a batcher in this process: each runs one batch at a time, with a set-up and a tear-down of its own.

::

    a batch --> Slots.run --> the slot of this thread, or a free one --> set_up, once --> process_batch --> given back
    stop    --> Slots.close --> each idle slot: tear_down --> left;  a busy one tears down when its batch returns

What ``setup_worker`` binds on its batcher belongs to the slot; all other attributes are shared. While a set-up runs, a hook at
`AsyncBatcher` sees what is bound, and puts a `SlotAttribute` in the class: a data descriptor, which gives each slot its own
value. The cached properties of the class are replaced in the same way for that time, and stay so if the set-up reads them.
Outside of a set-up there is no hook, so no other attribute is slower than it is anywhere. What a set-up writes to the
``__dict__`` of the batcher past all this is the batcher's, and shared.

Worker processes and the event loop have one slot each. They need nothing of this: there the batcher's own attributes do.
"""

from __future__ import annotations

import threading
from functools import cached_property
from types import MemberDescriptorType, MethodType
from typing import TYPE_CHECKING, Any

from async_batcher._serialization.caller_exceptions import begins_batch, order, raisable
from async_batcher._worker.user_function import set_up, tear_down

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from async_batcher._worker.results import Outcome
    from async_batcher._worker.user_function import UserFunction


class _Unset:
    """Stands for itself where a class has no attribute of a name."""


class _Here(threading.local):
    slot: Slot | None = None  # that this thread works for


_here = _Here()


class Slot:
    """One slot.

    Args:
        setup: The user's ``setup_worker``.

    Attributes:
        batcher: Whose attributes the set-up binds; None if it is no method of a batcher.
        attributes: What it has bound there.
        is_set_up: Whether it has run.
        is_setting_up: Whether it is running.
        thread: The thread that it was made in.
    """

    __slots__ = ("_generator", "_setup", "attributes", "batcher", "is_set_up", "is_setting_up", "thread")

    def __init__(self, setup: Callable[[], Any]) -> None:
        self._setup = setup
        self._generator: Generator[Any, Any, Any] | None = None
        self.thread = threading.current_thread()
        self.batcher = setup.__self__ if isinstance(setup, MethodType) and _hook_of(setup.__self__) else None
        self.attributes: dict[str, Any] = {}
        self.is_set_up = self.is_setting_up = False

    def set_up(self) -> None:
        """Run the set-up, in the slot's thread."""
        hook = _hook_of(self.batcher)
        self.is_setting_up = True
        try:
            if hook is not None:
                hook.put_in(type(self.batcher))
            self._generator = set_up(self._setup)
        finally:
            self.is_setting_up = False
            if hook is not None:
                hook.take_out()
        self.is_set_up = True

    @property
    def tears_down(self) -> bool:
        """Whether something follows its ``yield``."""
        return self._generator is not None

    def tear_down(self) -> None:
        """Run what follows its ``yield``, if that has not been done."""
        generator, self._generator = self._generator, None
        if generator is not None:
            previous, _here.slot = _here.slot, self
            try:
                tear_down(generator)
            finally:
                _here.slot = previous
        self.is_set_up = False
        self.attributes.clear()


class Slots:
    """The slots that run one program in the threads of this process.

    Args:
        program: The user's function and its set-up.
        by_thread: Whether each thread has a slot of its own; otherwise a batch gets any slot that is free.
    """

    def __init__(self, program: UserFunction, *, by_thread: bool) -> None:
        self._program = program
        self._local = threading.local()
        self._by_thread = by_thread
        self._lock = threading.Lock()
        self._idle: list[Slot] = []
        self._closing = False
        self._unfinished = 0  # idle slots that `leave` has yet to tear down
        self._all_left = threading.Event()
        self._on_left: Callable[[], object] = self._all_left.set

    @begins_batch
    def run(self, batch: list[Any] | None, begins: Callable[[], object] | None) -> Outcome | None:
        """Run one batch in a slot, in this thread.

        Args:
            batch: The items; None to set up only.
            begins: Called when the batch function begins, which is after the set-up.

        Returns:
            What came of it; None if the slots have been closed.
        """
        _began = next(order)
        slot = self._take()
        if slot is None:
            return None
        previous, _here.slot = _here.slot, slot
        try:
            if not slot.is_set_up:
                try:
                    slot.set_up()
                except BaseException as exc:  # noqa: BLE001 - user code
                    return raisable(exc, "setup_worker")
            if batch is None:
                return []
            if begins is not None:
                begins()
            return self._program.run(batch)
        finally:
            _here.slot = previous
            self._give_back(slot)

    @property
    def tears_down(self) -> bool:
        """Whether an idle slot has something to tear down."""
        return any(slot.tears_down for slot in self._idle)

    def close(self, on_left: Callable[[], object]) -> bool:
        """Run no more batches; the busy slots tear down by themselves when their batches return.

        Args:
            on_left: Called, in any thread, when `leave` has torn down the slots that are idle now.

        Returns:
            Whether there is something to tear down; `leave` is to be called then, in a thread of each slot.
        """
        with self._lock:
            if self._closing:
                return False
            self._closing = True
            self._unfinished = len(self._idle)
            self._on_left = on_left
            return self.tears_down

    def leave(self) -> None:
        """Tear down what can be torn down in this thread: its own slot and those of threads that have ended, or all.

        A thread that has done so stays here until all others have, so that as many calls as there are threads reach each.
        """
        while True:
            with self._lock:
                slot = self._pick() or next((slot for slot in self._idle if not slot.thread.is_alive()), None)
                if slot is None:
                    break
                self._idle.remove(slot)
            slot.tear_down()
            with self._lock:
                self._unfinished -= 1
                is_last = self._unfinished == 0
            if is_last:
                self._all_left.set()
                self._on_left()
        if self._by_thread:
            self._all_left.wait()

    def _pick(self) -> Slot | None:
        if not self._by_thread:
            return self._idle[-1] if self._idle else None
        own = getattr(self._local, "slot", None)
        return own if own in self._idle else None

    def _take(self) -> Slot | None:
        with self._lock:
            if self._closing:
                return None
            slot = self._pick()
            if slot is not None:
                self._idle.remove(slot)
        if slot is None:
            assert self._program.setup is not None  # noqa: S101 - there are slots where there is a set-up
            slot = self._local.slot = Slot(self._program.setup)
        return slot

    def _give_back(self, slot: Slot) -> None:
        with self._lock:
            if not self._closing:
                self._idle.append(slot)
                return
        slot.tear_down()


class SlotAttribute:
    """In a batcher's class, under the name of an attribute that its set-up binds: each slot has a value of its own.

    Elsewhere the attribute is what it would be without this.

    Args:
        owner: The class.
        name: The attribute.
        is_bound: Whether a set-up has bound it.
    """

    __slots__ = ("beneath", "is_bound", "name", "owner")

    def __init__(self, owner: type, name: str, *, is_bound: bool) -> None:
        self.owner = owner
        self.name = name
        self.is_bound = is_bound
        self.beneath = owner.__dict__.get(name, _Unset)  # what the class had there

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        """The slot's value, or that outside of all slots."""
        if instance is None:
            return _bound(self._beneath(owner or self.owner), None, owner or self.owner, self.name)
        slot = _here.slot
        if slot is not None and slot.batcher is instance and self.name in slot.attributes:
            return slot.attributes[self.name]
        beneath = self._beneath(type(instance))
        if not hasattr(type(beneath), "__set__"):
            try:
                return vars(instance)[self.name]
            except (KeyError, TypeError):  # not there; or the instance has no __dict__
                pass
        if isinstance(beneath, cached_property) and slot is not None and slot.batcher is instance and slot.is_setting_up:
            # The property itself would cache it in the batcher's __dict__.
            value = slot.attributes[self.name] = beneath.func(instance)
            self.is_bound = True
            return value
        return _bound(beneath, instance, type(instance), self.name)

    def __set__(self, instance: Any, value: Any) -> None:
        """Bind it in the slot if it is bound there, or a set-up runs; else on the instance."""
        slot = _here.slot
        if slot is not None and slot.batcher is instance and (slot.is_setting_up or self.name in slot.attributes):
            slot.attributes[self.name] = value
            self.is_bound = True
            return
        beneath = self._beneath(type(instance))
        if hasattr(type(beneath), "__set__"):
            beneath.__set__(instance, value)
        else:
            instance.__dict__[self.name] = value

    def __delete__(self, instance: Any) -> None:
        """Delete it where it is bound."""
        slot = _here.slot
        if slot is not None and slot.batcher is instance and self.name in slot.attributes:
            del slot.attributes[self.name]
            return
        beneath = self._beneath(type(instance))
        if hasattr(type(beneath), "__delete__"):
            beneath.__delete__(instance)
        elif self.name in getattr(instance, "__dict__", {}):
            del instance.__dict__[self.name]
        else:
            raise AttributeError(self.name, name=self.name, obj=instance)

    def remove(self) -> None:
        """Put back what the class had."""
        if self.beneath is _Unset:
            delattr(self.owner, self.name)
        else:
            setattr(self.owner, self.name, self.beneath)

    def _beneath(self, cls: type) -> Any:
        """What ``cls`` would have under that name."""
        if self.beneath is not _Unset:
            return self.beneath
        return _found(cls.__mro__[cls.__mro__.index(self.owner) + 1 :], self.name)


def is_of_slots(cls: type, name: str) -> bool:
    """Whether a set-up has bound an attribute of that name in a slot."""
    return isinstance(_found(cls.__mro__, name), SlotAttribute)


def _found(classes: tuple[type, ...], name: str) -> Any:
    return next((cls.__dict__[name] for cls in classes if name in cls.__dict__), _Unset)


def _bound(attribute: Any, instance: Any, owner: type, name: str) -> Any:
    if attribute is _Unset:
        raise AttributeError(name, name=name, obj=instance)
    get = getattr(type(attribute), "__get__", None)
    return attribute if get is None else get(attribute, instance, owner)


class _Hook:
    """Sees what set-ups bind on batchers, while at least one runs.

    Args:
        base: `AsyncBatcher`, so that a ``__setattr__`` of the user's class comes before it.
    """

    def __init__(self, base: type) -> None:
        self._base = base
        self._lock = threading.Lock()
        self._users = 0
        self._cached: list[SlotAttribute] = []  # in place of cached properties

    def put_in(self, cls: type) -> None:
        """See what a set-up binds on an instance of ``cls``."""
        with self._lock:
            self._users += 1
            for name in {name for some in cls.__mro__ for name in vars(some)}:
                if isinstance(_found(cls.__mro__, name), cached_property):
                    self._cached.append(SlotAttribute(cls, name, is_bound=False))
                    setattr(cls, name, self._cached[-1])
            if self._users == 1:
                base: Any = self._base

                def bind(instance: Any, name: str, value: Any) -> None:
                    slot = _here.slot
                    if slot is not None and slot.is_setting_up and slot.batcher is instance:
                        self._make_own(type(instance), name)
                    super(base, instance).__setattr__(name, value)

                base.__setattr__ = bind

    def take_out(self) -> None:
        with self._lock:
            self._users -= 1
            if self._users:
                return
            del self._base.__setattr__
            cached, self._cached = self._cached, []
            for attribute in cached:
                if not attribute.is_bound:
                    attribute.remove()

    def _make_own(self, cls: type, name: str) -> None:
        """Have each slot bind that attribute for itself, unless it is a property or the like, which binds another one."""
        with self._lock:
            there = _found(cls.__mro__, name)
            is_ours = isinstance(there, MemberDescriptorType) and self._base.__dict__.get(name) is there
            if not is_ours and (not hasattr(type(there), "__set__") or isinstance(there, MemberDescriptorType)):
                setattr(cls, name, SlotAttribute(cls, name, is_bound=True))


_hooks: dict[type, _Hook] = {}


def _hook_of(batcher: Any) -> _Hook | None:
    """The hook at the class that defines the ``setup_worker`` which does nothing; None for what is no batcher."""
    for cls in type(batcher).__mro__:
        if getattr(cls.__dict__.get("setup_worker"), "does_nothing", None) is True:
            return _hooks.get(cls) or _hooks.setdefault(cls, _Hook(cls))
    return None
