"""Take an exception apart, rebuild it, copy it. Pure; nothing is pickled here.

::

    exception --state_of--> args, fields, attributes --make_bare, fill--> an equal exception

Rules:

- The class's own ``__new__`` and ``__init__`` are not called; those of its nearest base in C are,
  with ``args``: the one that determines the layout of instances, if there are several.
- A copy has the type, args, text, attributes, notes, traceback and chain of the original; type and
  text are compared.
- Copies share the exceptions of the chain: each caller that raises a cause again adds to its one
  traceback.
- Only ``__str__`` and the copy protocol of a class are called; all else is read past what a class
  may override.
"""

from __future__ import annotations

import copy
import functools
from contextlib import suppress
from types import GetSetDescriptorType, MemberDescriptorType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import TracebackType

# Compared by value. The __eq__ of any other type may be user code.
_ATOMS = frozenset({int, float, complex, str, bytes})
_SEQUENCES = frozenset({tuple, list})
_MAX_DEPTH = 20  # nested containers; a list may contain itself

_HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE: from a class statement, or its like in C

# Access to exceptions past properties and __setattr__ of their classes.
_base: Any = vars(BaseException)
_args_of: Callable[[BaseException], tuple[Any, ...]] = _base["args"].__get__
set_args: Callable[[BaseException, tuple[Any, ...]], None] = _base["args"].__set__
_attributes_of: Callable[[BaseException], dict[str, Any]] = _base["__dict__"].__get__
cause_of: Callable[[BaseException], BaseException | None] = _base["__cause__"].__get__
set_cause: Callable[[BaseException, BaseException], None] = _base["__cause__"].__set__
context_of: Callable[[BaseException], BaseException | None] = _base["__context__"].__get__
traceback_of: Callable[[BaseException], TracebackType | None] = _base["__traceback__"].__get__
set_traceback: Callable[[BaseException, Any], None] = _base["__traceback__"].__set__
members_of: Callable[[BaseException], Any] = vars(BaseExceptionGroup)["exceptions"].__get__

_COMMON = {*_base, "__weakref__"}  # fields of every exception, which are copied by name


class RemoteTraceback(Exception):  # noqa: N818 - carries a traceback as text; it is not raised
    """The traceback in a worker, as text: the last cause of an exception that was raised there."""

    def __init__(self, text: str = "", pid: int | None = None) -> None:
        super().__init__(text)
        self.pid = pid

    def __str__(self) -> str:
        return f"\n{self.args[0]}" if self.args else ""


# A slot that has a value, or a field of a C class that is not None: the index of the class in the
# MRO, the name, the value.
Field: TypeAlias = tuple[int, str, Any]


class ExceptionState(NamedTuple):
    """What an exception consists of, apart from its class."""

    args: tuple[Any, ...]
    fields: list[Field]
    attributes: dict[str, Any]


def state_of(exc: BaseException) -> ExceptionState:
    fields: list[Field] = []
    for index, cls in enumerate(type(exc).__mro__):
        for name, field in vars(cls).items():
            is_member = isinstance(field, MemberDescriptorType)
            if name in _COMMON or not (is_member or isinstance(field, GetSetDescriptorType)):
                continue
            with suppress(AttributeError):  # an empty slot
                value = field.__get__(exc)
                if value is not None or (is_member and cls.__flags__ & _HEAP_TYPE):
                    fields.append((index, name, value))
    return ExceptionState(_args_of(exc), fields, dict(_attributes_of(exc)))


def rebuild(cls: type[BaseException], state: ExceptionState) -> BaseException:
    """Make an equal exception; raise TypeError if its class does not allow that."""
    exc = make_bare(cls, state.args, state.fields)
    fill(exc, state)
    return exc


def fill(exc: BaseException, state: tuple[tuple[Any, ...], list[Field], dict[str, Any]]) -> None:
    """Set a state; fields that are not given become None where they can."""
    args, fields, attributes = state
    mro = type(exc).__mro__
    given = {field[:2] for field in fields}
    for index, name, _ in state_of(exc).fields:
        if (index, name) not in given:
            with suppress(AttributeError, TypeError):
                vars(mro[index])[name].__set__(exc, None)
    for index, name, value in fields:
        field = vars(mro[index])[name]
        try:
            field.__set__(exc, value)
        except (AttributeError, TypeError):  # read-only: __new__ may have set it
            if not is_same(field.__get__(exc), value):
                raise
    _attributes_of(exc).update(attributes)
    set_args(exc, args)


def make_bare(
    cls: type[BaseException], args: tuple[Any, ...], fields: list[Field]
) -> BaseException:
    """Make an exception that `fill` completes; the fields are those of a group."""
    base: Any = cls
    # Not the first one in the MRO: of several bases in C, Python lets only this one make instances.
    while base.__flags__ & _HEAP_TYPE:
        base = base.__base__
    if issubclass(cls, BaseExceptionGroup):
        values = {name: value for _, name, value in fields}
        return base.__new__(cls, values["message"], values["exceptions"])  # type: ignore[no-any-return]
    try:
        made: BaseException = base.__new__(cls, *args)
    except Exception:  # noqa: BLE001 - args that are no longer those of the constructor
        made = base.__new__(cls)
    if type(made) is not cls:  # OSError chooses a subclass by its args
        made = base.__new__(cls)
    with suppress(Exception):  # what it would have set is among the fields
        base.__init__(made, *args)
    return made


def is_same(one: Any, other: Any, *, unknown: bool = False, depth: int = 0) -> bool:
    """Tell whether two values are equal; ``unknown`` where only user code could compare them."""
    cls = type(one)
    if one is other:
        return True
    if cls is not type(other):
        return False
    if cls in _ATOMS:
        return bool(one == other)
    if depth < _MAX_DEPTH and cls in _SEQUENCES:
        pairs = zip(one, other, strict=False)
        return len(one) == len(other) and all(
            is_same(*pair, unknown=unknown, depth=depth + 1) for pair in pairs
        )
    if depth < _MAX_DEPTH and cls is dict:  # the order of its items counts too
        return is_same([*one.items()], [*other.items()], unknown=unknown, depth=depth + 1)
    return unknown


def agree(one: BaseException, other: BaseException) -> bool:
    """Tell whether these are two exceptions of one type and text."""
    return one is not other and type(one) is type(other) and _text(one) == _text(other)


def _text(exc: BaseException) -> str | type:
    try:
        return "".join([str(exc)])  # an instance of a str subclass would be compared by its __eq__
    except BaseException as error:  # noqa: BLE001 - user code; a copy must fail in the same way
        return type(error)


def chain(exc: BaseException) -> Iterator[BaseException]:
    """Yield the exception, its cause, the cause of that, and so on; stop where a circle closes."""
    seen: set[int] = set()
    link: BaseException | None = exc
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = cause_of(link)


def remote_traceback(exc: BaseException) -> RemoteTraceback | None:
    *_, last = chain(exc)
    return last if type(last) is RemoteTraceback else None


def add_note(exc: BaseException, note: str) -> None:
    attributes = _attributes_of(exc)
    notes = attributes.get("__notes__")
    attributes["__notes__"] = [*notes, note] if isinstance(notes, list) else [note]


class ExceptionCopier:
    """Copies one exception, in the first way that gives a faithful copy."""

    def __init__(self, exc: BaseException) -> None:
        self._exc = exc
        self._text = _text(exc)
        self._ways: list[Callable[[], Any]] = [functools.partial(copy.copy, exc)]
        with suppress(BaseException):  # a field of a class in C may raise anything
            self._ways.insert(0, functools.partial(rebuild, type(exc), state_of(exc)))

    def copy(self) -> BaseException | None:
        """Return a copy; None if no way gives a faithful one."""
        exc = self._exc
        while self._ways:
            try:
                made = self._ways[0]()
                if type(made) is type(exc) and made is not exc:
                    set_args(made, _args_of(exc))
                    if _text(made) == self._text:
                        return self._completed(made)
            except BaseException:  # noqa: BLE001, S110 - user code (__reduce__, __copy__, __init__)
                pass
            del self._ways[0]  # for the next copies too
        return None

    def _completed(self, made: BaseException) -> BaseException:
        for name in ("__cause__", "__context__", "__suppress_context__", "__traceback__"):
            _base[name].__set__(made, _base[name].__get__(self._exc))
        attributes = _attributes_of(made)
        if isinstance(attributes.get("__notes__"), list):
            attributes["__notes__"] = list(attributes["__notes__"])
        return made
