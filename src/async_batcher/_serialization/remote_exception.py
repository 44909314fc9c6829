"""An exception to bytes and back: it arrives as itself, with its chain of causes and the worker's traceback at the end of it.

::

    worker                                                              caller's side
    exception --encode_exception--> PickledException, of builtins -->   decode_exception --> exception of the same class
        cause --each link by itself--> its pickle                           cause            ...
                                                                                RemoteTraceback: the traceback as text

Rules:

- Plain pickle where that gives back an equal exception, values and notes included; else class, args and state, without the
  class's ``__init__``. Values that could only be compared by user code count as different.
- An exception that has been sent has no traceback left in the worker: user code may keep it and raise it again.
- What has been pickled is unpickled at once in the worker and compared, since the caller's side could not mend it.
- An object in args or state that cannot be pickled (a lock, a socket) is replaced by a `NotCarried` that has its repr.
- A link that cannot be carried at all is a `BatchError` with its text.
"""

from __future__ import annotations

import functools
import io
import os
import sys
import traceback
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import TYPE_CHECKING, Any, TypeAlias

from async_batcher._serialization.exception_copy import (
    ExceptionState,
    RemoteTraceback,
    agree,
    cause_of,
    chain,
    context_of,
    fill,
    is_same,
    members_of,
    rebuild,
    set_args,
    set_cause,
    set_traceback,
    state_of,
)
from async_batcher._serialization.exception_text import is_exception, qualified_name, safe_str
from async_batcher._serialization.object_path import load_object
from async_batcher._serialization.pickler import ValuePickler
from async_batcher.exceptions import BatchError

if TYPE_CHECKING:
    from collections.abc import Callable

    from async_batcher._serialization.codec import Codec, Payload

# One exception of a chain: its pickle (None if it cannot be carried), the name of its type, its text.
Link: TypeAlias = "tuple[Payload | None, str, str]"

# The exception and its causes, the traceback in the worker, the process id of the worker.
PickledException: TypeAlias = "tuple[list[Link], str, int]"

# How an exception is pickled, and whether what is unpickled is faithful to it.
_Way: TypeAlias = "tuple[Callable[..., Payload], Callable[[BaseException, BaseException], bool]]"

# May be any object of the program's, of any size; CPython does not pickle it either.
_LEFT_BEHIND = (AttributeError, "obj")


class NotCarried:
    """Stands for an object in the state of an exception that cannot be pickled.

    Args:
        text: The repr of that object.
    """

    def __init__(self, text: str) -> None:
        """Keep the text."""
        self.text = text

    def __repr__(self) -> str:
        """The repr of the object in the worker."""
        return self.text


def encode_exception(codec: Codec, exc: BaseException, *, clear: bool = True) -> PickledException:
    """Make an exception ready to be sent.

    Args:
        codec: Pickles it.
        exc: The exception.
        clear: Whether to clear its tracebacks then; see `clear_tracebacks`.
    """
    try:
        text = "".join(traceback.format_exception(exc))
    except BaseException:  # noqa: BLE001 - user code (__str__)
        text = f"{qualified_name(exc)}: (its traceback could not be formatted)\n"
    links = [(_encoded(codec, link), qualified_name(link), safe_str(link)) for link in chain(exc)]
    if clear:
        clear_tracebacks(exc)
    return (links, text, os.getpid())


def clear_tracebacks(exc: BaseException) -> None:
    """Clear the tracebacks of an exception, its causes, contexts and members; what one raises again would add to them."""
    seen: set[int] = set()
    found = [exc]
    while found:
        link = found.pop()
        if id(link) in seen:
            continue
        seen.add(id(link))
        set_traceback(link, None)
        found += [other for other in (cause_of(link), context_of(link)) if other is not None]
        if isinstance(link, BaseExceptionGroup):
            found += members_of(link)


def decode_exception(codec: Codec, failure: PickledException) -> BaseException:
    """Make the exception again, with its chain of causes, which ends with the traceback in the worker."""
    links, text, pid = failure
    cause: BaseException = RemoteTraceback(text, pid)
    for link in reversed(links):
        exc = _decoded(codec, *link)
        set_cause(exc, cause)
        cause = exc
    return cause


def type_name(failure: PickledException) -> str:
    """The name of the type of an exception."""
    return failure[0][0][1]


def describe_failure(failure: PickledException) -> tuple[RemoteTraceback, str]:
    """The traceback, and the type and text of an exception that is not made again."""
    links, text, pid = failure
    _, name, message = links[0]
    return RemoteTraceback(text, pid), f"{name}: {message}"


def _encoded(codec: Codec, exc: BaseException) -> Payload | None:
    """The pickle of one exception, which was tried out; None if it has none."""
    ways: list[_Way] = [
        (_plainly, _has_same_values),
        (functools.partial(_by_state, replaces=False), _has_same_names),
        (_plainly, functools.partial(_has_same_values, unknown=True)),  # the class may make a lock anew, say
        (_by_state, _has_same_names),
        (_plainly, _has_same_fields),  # a class that cannot be made from its state
    ]
    if isinstance(exc, BaseExceptionGroup) or _place_elsewhere(type(exc)) is not None:
        ways = [
            way for way in ways if way[0] is not _plainly
        ]  # members of a group keep their causes then, and the class is found
    for pickled, is_faithful in ways:
        try:
            blob = pickled(codec, exc)
            twin = _loaded(codec, blob)
            if agree(exc, twin) and is_faithful(exc, twin):
                return blob
        except BaseException:  # noqa: BLE001, S112 - user code may raise anything
            continue
    return None


def _plainly(codec: Codec, exc: BaseException) -> Payload:
    return codec.dumps((exc, state_of(exc).args))


def _by_state(codec: Codec, exc: BaseException, *, replaces: bool = True) -> Payload:
    file = io.BytesIO()
    pickler = codec.pickler(_StatePickler, file)
    pickler.exc = exc
    pickler.replaces = replaces
    pickler.dump((exc, state_of(exc).args))
    return codec.blob(own=True, data=file.getvalue(), beside=[])


def _loaded(codec: Codec, blob: Payload) -> BaseException:
    exc, args = codec.loads(blob)
    set_args(exc, args)  # a class that makes its message of its argument has made it twice
    return exc  # type: ignore[no-any-return]


def _fields_of(exc: BaseException) -> dict[tuple[int, str], Any]:
    """The slots and C fields that have a value: plain pickle forgets them in most classes."""
    mro = type(exc).__mro__
    return {(place, name): value for place, name, value in state_of(exc).members if (mro[place], name) != _LEFT_BEHIND}


def _has_same_fields(exc: BaseException, twin: BaseException) -> bool:
    return _fields_of(exc).keys() <= _fields_of(twin).keys()


def _has_same_names(exc: BaseException, twin: BaseException) -> bool:
    return _has_same_fields(exc, twin) and state_of(exc).attributes.keys() <= state_of(twin).attributes.keys()


def _has_same_values(exc: BaseException, twin: BaseException, *, unknown: bool = False) -> bool:
    one, other = ([args, _fields_of(each), attributes] for each in (exc, twin) for args, _, attributes in [state_of(each)])
    return is_same(one, other, unknown=unknown)


def _decoded(codec: Codec, blob: Payload | None, name: str, text: str) -> BaseException:
    if blob is not None:
        try:
            exc = _loaded(codec, blob)
            if is_exception(exc):
                return exc
        except BaseException:  # noqa: BLE001, S110 - user code
            pass
    msg = (
        f"a worker raised {name}, which cannot be pickled there and unpickled here, so this error stands for it: {text}. "
        "Its class must be importable here, and a __reduce__ that it has must work"
    )
    return BatchError(msg, original_type=name)


class _StatePickler(ValuePickler):
    """Pickles exceptions as class, args and state, and leaves out what cannot be pickled.

    Attributes:
        exc: The exception; its causes are sent by themselves, those of exceptions in its state are part of the pickle.
        replaces: Whether what cannot be pickled is replaced.
    """

    exc: BaseException | None = None
    replaces = True

    def reducer_override(self, obj: Any) -> Any:
        if is_exception(obj):
            return self._reduced(obj)
        if isinstance(obj, type) and (place := _place_elsewhere(obj)) is not None:
            return (load_object, place)
        try:
            reduced = super().reducer_override(obj)
            if reduced is not NotImplemented or isinstance(obj, type | FunctionType | BuiltinFunctionType | ModuleType):
                return reduced
            reduce = self.dispatch_table.get(type(obj))
            return obj.__reduce_ex__(5) if reduce is None else reduce(obj)
        except Exception:  # it cannot be pickled
            if not self.replaces:
                raise
            return (NotCarried, (_repr(obj),))

    def _reduced(self, exc: BaseException) -> tuple[Any, ...]:
        cls = type(exc)
        args, members, attributes = state_of(exc)
        members = [field for field in members if (cls.__mro__[field[0]], field[1]) != _LEFT_BEHIND]
        cause = None if exc is self.exc else cause_of(exc)
        # What the class needs to make one, then the rest, which may refer to the exception itself.
        needed = members if issubclass(cls, BaseExceptionGroup) else []
        first = () if any(arg is exc for arg in args) else args
        return (_made, (cls, first, needed), (args, members, attributes, cause), None, None, _complete)


def _made(cls: type[BaseException], args: tuple[Any, ...], members: list[tuple[int, str, Any]]) -> BaseException:
    return rebuild(cls, ExceptionState(args, members, {}))


def _complete(exc: BaseException, state: tuple[tuple[Any, ...], list[tuple[int, str, Any]], dict[str, Any], Any]) -> None:
    args, members, attributes, cause = state
    fill(exc, members, attributes)
    set_args(exc, args)
    if cause is not None:
        set_cause(exc, cause)


def _place_elsewhere(cls: type) -> tuple[str, str] | None:
    """Where a class can be imported from that names a module which does not exist, as some in C do; None for any other."""
    if cls.__module__ in sys.modules:
        return None
    for name, module in list(sys.modules.items()):
        if getattr(module, "__dict__", {}).get(cls.__name__) is cls:
            return (name, cls.__name__)
    return None


def _repr(obj: Any) -> str:
    try:
        return repr(obj)
    except Exception:  # noqa: BLE001 - user code
        return f"<{type(obj).__qualname__}>"
