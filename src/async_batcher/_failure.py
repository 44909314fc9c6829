"""An exception to bytes and back: it arrives as itself, with its chain of causes and the worker's traceback at the end of it.

::

    worker                                                     caller's side
    exception --encode_exception--> Failure, of builtins -->   decode_exception --> exception of the same class
        cause --each link by itself--> its pickle                  cause            ...
                                                                       RemoteTraceback: the traceback as text

Rules:

- Plain pickle where that gives back an equal exception; else class, args and state, without the class's ``__init__``.
- What has been pickled is unpickled at once in the worker and compared, since the caller's side could not mend it.
- An object in args or state that cannot be pickled (a lock, a socket) is replaced by a `NotCarried` that has its repr.
- A link that cannot be carried at all is a `BatchError` with its text.
"""

from __future__ import annotations

import io
import os
import sys
import traceback
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import TYPE_CHECKING, Any, TypeAlias

from async_batcher._exception_copy import (
    RemoteTraceback,
    State,
    agree,
    cause_of,
    chain,
    fill,
    rebuild,
    set_args,
    set_cause,
    state_of,
)
from async_batcher._importable import at_place
from async_batcher._outcome import is_exception, qualified_name, safe_str
from async_batcher._pickler import ValuePickler
from async_batcher.exceptions import BatchError

if TYPE_CHECKING:
    from collections.abc import Callable

    from async_batcher._wire import Blob, Codec

# One exception of a chain: its pickle (None if it cannot be carried), the name of its type, its text.
Link: TypeAlias = "tuple[Blob | None, str, str]"

# The exception and its causes, the traceback in the worker, the process id of the worker.
Failure: TypeAlias = "tuple[list[Link], str, int]"

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


def encode_exception(codec: Codec, exc: BaseException) -> Failure:
    """Make an exception ready to be sent."""
    try:
        text = "".join(traceback.format_exception(exc))
    except BaseException:  # noqa: BLE001 - user code (__str__)
        text = f"{qualified_name(exc)}: (its traceback could not be formatted)\n"
    links = [(_encoded(codec, link), qualified_name(link), safe_str(link)) for link in chain(exc)]
    return (links, text, os.getpid())


def decode_exception(codec: Codec, failure: Failure) -> BaseException:
    """Make the exception again, with its chain of causes, which ends with the traceback in the worker."""
    links, text, pid = failure
    cause: BaseException = RemoteTraceback(text, pid)
    for link in reversed(links):
        exc = _decoded(codec, *link)
        set_cause(exc, cause)
        cause = exc
    return cause


def type_name(failure: Failure) -> str:
    """The name of the type of an exception."""
    return failure[0][0][1]


def describe_failure(failure: Failure) -> tuple[RemoteTraceback, str]:
    """The traceback, and the type and text of an exception that is not made again."""
    links, text, pid = failure
    _, name, message = links[0]
    return RemoteTraceback(text, pid), f"{name}: {message}"


def _encoded(codec: Codec, exc: BaseException) -> Blob | None:
    """The pickle of one exception, which was tried out; None if it has none."""
    ways: list[Callable[[Codec, BaseException], Blob]] = [_plainly, _by_state]
    if isinstance(exc, BaseExceptionGroup) or _place_elsewhere(type(exc)) is not None:
        ways = [_by_state]  # members of a group keep their causes then, and the class is found
    for pickled in ways:
        try:
            blob = pickled(codec, exc)
            twin = _loaded(codec, blob)
            if agree(exc, twin) and _fields_of(exc) <= _fields_of(twin):
                return blob
        except BaseException:  # noqa: BLE001, S112 - user code may raise anything
            continue
    return None


def _plainly(codec: Codec, exc: BaseException) -> Blob:
    return codec.dumps((exc, state_of(exc).args))


def _by_state(codec: Codec, exc: BaseException) -> Blob:
    file = io.BytesIO()
    pickler = codec.pickler(_StatePickler, file)
    pickler.exc = exc
    pickler.dump((exc, state_of(exc).args))
    return codec.blob(own=True, data=file.getvalue(), beside=[])


def _loaded(codec: Codec, blob: Blob) -> BaseException:
    exc, args = codec.loads(blob)
    set_args(exc, args)  # a class that makes its message of its argument has made it twice
    return exc  # type: ignore[no-any-return]


def _fields_of(exc: BaseException) -> set[tuple[int, str]]:
    """The slots and C fields that have a value: plain pickle forgets them in most classes."""
    mro = type(exc).__mro__
    return {(place, name) for place, name, _ in state_of(exc).members if (mro[place], name) != _LEFT_BEHIND}


def _decoded(codec: Codec, blob: Blob | None, name: str, text: str) -> BaseException:
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
    """

    exc: BaseException | None = None

    def reducer_override(self, obj: Any) -> Any:
        if is_exception(obj):
            return self._reduced(obj)
        if isinstance(obj, type) and (place := _place_elsewhere(obj)) is not None:
            return (at_place, place)
        try:
            reduced = super().reducer_override(obj)
            if reduced is not NotImplemented or isinstance(obj, type | FunctionType | BuiltinFunctionType | ModuleType):
                return reduced
            reduce = self.dispatch_table.get(type(obj))
            return obj.__reduce_ex__(5) if reduce is None else reduce(obj)
        except Exception:  # noqa: BLE001 - it cannot be pickled
            return (NotCarried, (_repr(obj),))

    def _reduced(self, exc: BaseException) -> tuple[Any, ...]:
        cls = type(exc)
        args, members, attributes = state_of(exc)
        members = [field for field in members if (cls.__mro__[field[0]], field[1]) != _LEFT_BEHIND]
        cause = None if exc is self.exc else cause_of(exc)
        # What the class needs to make one, then the rest, which may refer to the exception itself.
        needed = members if issubclass(cls, BaseExceptionGroup) else []
        return (_made, (cls, args, needed), (members, attributes, cause), None, None, _complete)


def _made(cls: type[BaseException], args: tuple[Any, ...], members: list[tuple[int, str, Any]]) -> BaseException:
    return rebuild(cls, State(args, members, {}))


def _complete(exc: BaseException, state: tuple[list[tuple[int, str, Any]], dict[str, Any], BaseException | None]) -> None:
    members, attributes, cause = state
    fill(exc, members, attributes)
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
