"""One exception taken apart, put together again, copied. Pure; nothing is pickled here.

::

    exception --state_of--> State: args, members, attributes --rebuild--> an equal exception

Rules:

- The class's own ``__new__`` and ``__init__`` are not called: those of its nearest base in C are, with ``args``.
- A copy has the type, args, text, attributes, notes, traceback and chain of the original; type and text are compared.
- Copies share the exceptions of the chain: each caller that raises a cause again adds to the one traceback of that cause.
- Nothing is asked of an exception that its class may override, apart from its text and what copies it.
"""

from __future__ import annotations

import copy
import functools
from contextlib import suppress
from types import GetSetDescriptorType, MemberDescriptorType
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import TracebackType

# Compared by value; a type that is not listed may have an __eq__ of the user's.
_ATOMS = frozenset({int, float, complex, str, bytes})
_SEQUENCES = frozenset({tuple, list})
_MAX_DEPTH = 20  # of values that are compared; a list may contain itself

_HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE: a class made by a class statement, or its like in C

# Part of every exception, and copied by name.
_COMMON = frozenset({"__cause__", "__context__", "__dict__", "__suppress_context__", "__traceback__", "__weakref__", "args"})

# What builtin exceptions are read and written by, past properties and __setattr__ of the user's.
_fields: Any = vars(BaseException)
_ARGS, _ATTRIBUTES = _fields["args"], _fields["__dict__"]
_CAUSE, _CONTEXT, _SUPPRESS = _fields["__cause__"], _fields["__context__"], _fields["__suppress_context__"]
_TRACEBACK = _fields["__traceback__"]
_MEMBERS: Any = vars(BaseExceptionGroup)["exceptions"]


class RemoteTraceback(Exception):  # noqa: N818 - carries a traceback as text; it is not raised
    """The traceback in a worker, as text: the cause at the end of the chain of an exception that came from there.

    Args:
        text: The traceback as it would have been printed in the worker.
        pid: The process id of the worker.
    """

    def __init__(self, text: str = "", pid: int | None = None) -> None:
        """Keep the text and the process id."""
        super().__init__(text)
        self.pid = pid

    def __str__(self) -> str:
        """The text as it would have been printed in the worker."""
        return f"\n{self.args[0]}" if self.args else ""


class ExceptionState(NamedTuple):
    """What an exception consists of, apart from its class.

    Attributes:
        args: Its ``args``.
        members: Slots that are not empty, and fields of classes in C that are not None, each as
            the place of the class in the MRO, the name, the value.
        attributes: Its ``__dict__``.
    """

    args: tuple[Any, ...]
    members: list[tuple[int, str, Any]]
    attributes: dict[str, Any]


def state_of(exc: BaseException) -> ExceptionState:
    """Take an exception apart; what `rebuild` makes a copy of."""
    members: list[tuple[int, str, Any]] = []
    for place, cls in enumerate(type(exc).__mro__):
        for name, field in vars(cls).items():
            if isinstance(field, MemberDescriptorType | GetSetDescriptorType) and name not in _COMMON:
                try:
                    value = field.__get__(exc)
                except AttributeError:  # an empty slot
                    continue
                is_slot = isinstance(field, MemberDescriptorType) and cls.__flags__ & _HEAP_TYPE
                if value is not None or is_slot:
                    members.append((place, name, value))
    attributes = dict(_ATTRIBUTES.__get__(exc))
    return ExceptionState(_ARGS.__get__(exc), members, attributes)


def rebuild(cls: type[BaseException], state: ExceptionState) -> BaseException:
    """Make an exception of its class and its `ExceptionState`, without the class's own ``__new__`` and ``__init__``.

    Raises:
        TypeError: Its class does not allow that.
        BaseException: What a field of a class in C raised.
    """
    exc = _bare(cls, state)
    fill(exc, state.members, state.attributes)
    set_args(exc, state.args)
    return exc


def fill(exc: BaseException, members: list[tuple[int, str, Any]], attributes: dict[str, Any]) -> None:
    """Set the members and attributes of a `ExceptionState`; members that it does not have become None where they can.

    Raises:
        BaseException: What a field of a class in C raised.
    """
    mro = type(exc).__mro__
    given = {(place, name) for place, name, _ in members}
    for place, name, _ in state_of(exc).members:
        if (place, name) not in given:
            with suppress(AttributeError, TypeError):
                vars(mro[place])[name].__set__(exc, None)
    for place, name, value in members:
        field = vars(mro[place])[name]
        try:
            field.__set__(exc, value)
        except (AttributeError, TypeError):  # read-only: __new__ may have set it
            if not is_same(field.__get__(exc), value):
                raise
    _ATTRIBUTES.__get__(exc).update(attributes)


def _bare(cls: type[BaseException], state: ExceptionState) -> BaseException:
    base: Any = next(base for base in cls.__mro__ if not base.__flags__ & _HEAP_TYPE)
    if issubclass(cls, BaseExceptionGroup):
        fields = {name: value for _, name, value in state.members}
        made: BaseException = base.__new__(cls, fields["message"], fields["exceptions"])
        return made
    try:
        made = base.__new__(cls, *state.args)
    except Exception:  # noqa: BLE001 - args that are no longer those of the constructor
        made = base.__new__(cls)
    if type(made) is not cls:  # OSError chooses a subclass by its args
        made = base.__new__(cls)
    with suppress(Exception):  # the fields that it would have set are among the members
        base.__init__(made, *state.args)
    return made


def is_same(one: Any, other: Any, *, unknown: bool = False, depth: int = 0) -> bool:
    """Whether two values are equal.

    Args:
        one: A value.
        other: The other one.
        unknown: What to return for values of one type that could only be compared by user code.
        depth: How many containers they are in.
    """
    cls = type(one)
    if one is other:
        return True
    if cls is not type(other):
        return False
    if cls in _ATOMS:
        return bool(one == other)
    if depth < _MAX_DEPTH and cls in _SEQUENCES:
        pairs = zip(one, other, strict=False)
        return len(one) == len(other) and all(is_same(*pair, unknown=unknown, depth=depth + 1) for pair in pairs)
    if depth < _MAX_DEPTH and cls is dict:  # the order of its items counts too
        return is_same(list(one.items()), list(other.items()), unknown=unknown, depth=depth + 1)
    return unknown


def set_args(exc: BaseException, args: tuple[Any, ...]) -> None:
    """Give a copy the ``args`` of its original: ``__init__`` may have made others of them."""
    _ARGS.__set__(exc, args)


def cause_of(exc: BaseException) -> BaseException | None:
    """The cause, past a property of the class."""
    return _CAUSE.__get__(exc)  # type: ignore[no-any-return]


def context_of(exc: BaseException) -> BaseException | None:
    """The context, past a property of the class."""
    return _CONTEXT.__get__(exc)  # type: ignore[no-any-return]


def members_of(group: BaseExceptionGroup[Any]) -> tuple[BaseException, ...]:
    """The exceptions of a group, past a property of the class."""
    return _MEMBERS.__get__(group)  # type: ignore[no-any-return]


def set_cause(exc: BaseException, cause: BaseException) -> None:
    """Set the cause, past a ``__setattr__`` of the class such as a frozen dataclass has."""
    _CAUSE.__set__(exc, cause)


def agree(one: BaseException, other: BaseException) -> bool:
    """Whether two objects are exceptions of one type that say the same."""
    return one is not other and type(one) is type(other) and _text(one) == _text(other)


def _text(exc: BaseException) -> str | type:
    try:
        return "".join([str(exc)])
    except BaseException as error:  # noqa: BLE001 - user code; the copy's must fail in the same way
        return type(error)


def chain(exc: BaseException) -> Iterator[BaseException]:
    """The exception, its cause, the cause of that, and so on; a circle is left where it closes."""
    seen: set[int] = set()
    link: BaseException | None = exc
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = cause_of(link)


def remote_traceback(exc: BaseException) -> RemoteTraceback | None:
    """The traceback of an exception that came from a worker; None of any other."""
    *_, last = chain(exc)
    return last if type(last) is RemoteTraceback else None


def traceback_of(exc: BaseException) -> TracebackType | None:
    """The traceback, past a property of the class."""
    return _TRACEBACK.__get__(exc)  # type: ignore[no-any-return]


def set_traceback(exc: BaseException, traceback: TracebackType | None) -> None:
    """Set the traceback, past what the class forbids."""
    _TRACEBACK.__set__(exc, traceback)


def add_note(exc: BaseException, note: str) -> None:
    """Add a note, past what the class forbids."""
    attributes = _ATTRIBUTES.__get__(exc)
    notes = attributes.get("__notes__")
    attributes["__notes__"] = [*notes, note] if isinstance(notes, list) else [note]


class Original:
    """An exception of which copies are made.

    Args:
        exc: The exception.

    Attributes:
        exc: See above.
    """

    def __init__(self, exc: BaseException) -> None:
        self.exc = exc
        self._text = _text(exc)
        self._ways: list[Callable[[], Any]] = [functools.partial(copy.copy, exc)]
        with suppress(BaseException):  # a field of a class in C may raise anything
            self._ways.insert(0, functools.partial(rebuild, type(exc), state_of(exc)))

    def copy(self) -> BaseException | None:
        """A copy; None if there is no way to make a faithful one."""
        exc = self.exc
        while self._ways:
            try:
                made = self._ways[0]()
                if type(made) is type(exc) and made is not exc:
                    set_args(made, _ARGS.__get__(exc))
                    if _text(made) == self._text:
                        return self._completed(made)
            except BaseException:  # noqa: BLE001, S110 - user code (__reduce__, __copy__, __init__) may raise anything
                pass
            del self._ways[0]  # for the next copies too
        return None

    def _completed(self, made: BaseException) -> BaseException:
        exc = self.exc
        _CAUSE.__set__(made, _CAUSE.__get__(exc))
        _CONTEXT.__set__(made, _CONTEXT.__get__(exc))
        _SUPPRESS.__set__(made, _SUPPRESS.__get__(exc))
        set_traceback(made, traceback_of(exc))
        attributes = _ATTRIBUTES.__get__(made)
        if isinstance(attributes.get("__notes__"), list):
            attributes["__notes__"] = list(attributes["__notes__"])
        return made
