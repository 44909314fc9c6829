"""An exception to bytes and back, with its chain of causes and the traceback in the worker.

::

    worker                                               parent
    exception --encode_exception--> PickledException --> decode_exception --> exception, same class
        cause --each link by itself--> its pickle            cause                ...
                                                             RemoteTraceback: the traceback as text

Rules:

- Plain pickle where that gives back an equal exception, values and notes included; else class, args
  and state, without the class's ``__init__``. Values that only user code could compare count as
  different.
- The worker unpickles and compares what it has pickled, since the parent could not repair it.
- An exception that was sent keeps no traceback in the worker: user code may keep it and raise it
  again.
- An object in args or state that cannot be pickled (a lock, a socket) becomes a `NotCarried` with
  its repr.
- A text that differs here, as one with the `id` of a part does, is in a note.
- A link that cannot be pickled at all becomes a `BatchError` with its text.
"""

from __future__ import annotations

import functools
import io
import os
import sys
import traceback
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import TYPE_CHECKING, Any, TypeAlias

from async_batcher._serialization import exception_copy as parts
from async_batcher._serialization.exception_copy import ExceptionState, RemoteTraceback, state_of
from async_batcher._serialization.exception_text import is_exception, qualified_name, safe_str
from async_batcher._serialization.object_path import load_object
from async_batcher._serialization.pickler import ValuePickler
from async_batcher.exceptions import BatchError

if TYPE_CHECKING:
    from collections.abc import Callable

    from async_batcher._serialization.codec import Codec, Payload

# One exception of a chain: its pickle (None if there is none), the name of its type, its text.
Link: TypeAlias = "tuple[Payload | None, str, str]"

# The exception and its causes, the traceback in the worker, the process id of the worker.
PickledException: TypeAlias = "tuple[list[Link], str, int]"

# May be any object of the program's, of any size; CPython does not pickle it either.
_SKIPPED_FIELD = (AttributeError, "obj")


class NotCarried:
    """Replaces an object in the state of an exception that cannot be pickled; has its repr."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


def encode_exception(codec: Codec, exc: BaseException, *, clear: bool = True) -> PickledException:
    """Pickle an exception with its causes, and clear its tracebacks unless ``clear`` is False."""
    try:
        text = "".join(traceback.format_exception(exc))
    except BaseException:  # noqa: BLE001 - user code (__str__)
        text = f"{qualified_name(exc)}: (its traceback could not be formatted)\n"
    links = [(_encoded(codec, e), qualified_name(e), safe_str(e)) for e in parts.chain(exc)]
    if clear:
        clear_tracebacks(exc)
    return (links, text, os.getpid())


def clear_tracebacks(exc: BaseException) -> None:
    """Clear the tracebacks of an exception, its causes, contexts and members."""
    seen: set[int] = set()
    remaining: list[BaseException | None] = [exc]
    while remaining:
        link = remaining.pop()
        if link is None or id(link) in seen:
            continue
        seen.add(id(link))
        parts.set_traceback(link, None)
        remaining += [parts.cause_of(link), parts.context_of(link)]
        if isinstance(link, BaseExceptionGroup):
            remaining += parts.members_of(link)


def decode_exception(codec: Codec, failure: PickledException) -> BaseException:
    links, text, pid = failure
    cause: BaseException = RemoteTraceback(text, pid)
    for link in reversed(links):
        exc = _decoded(codec, *link)
        parts.set_cause(exc, cause)
        cause = exc
    return cause


def type_name(failure: PickledException) -> str:
    return failure[0][0][1]


def describe_failure(failure: PickledException) -> str:
    """Return the type and text of an exception."""
    _, name, message = failure[0][0]
    return f"{name}: {message}"


def _encoded(codec: Codec, exc: BaseException) -> Payload | None:
    ways: list[tuple[Callable[..., Payload], str]] = [
        (_dumps_plain, "equal"),
        (functools.partial(_dumps_state, replaces=False), "names"),
        (_dumps_plain, "not different"),  # makes a new lock, say
        (_dumps_state, "names"),
        (_dumps_plain, "fields"),  # its class cannot be made from its state
        (_dumps_state, "any text"),  # the text depends on which objects its parts are
    ]
    # Plain pickle drops the causes of a group's members, and does not find every C class.
    needs_state = isinstance(exc, BaseExceptionGroup) or _other_path(type(exc)) is not None
    for dumps, level in ways:
        if needs_state and dumps is _dumps_plain:
            continue
        try:
            payload = dumps(codec, exc)
            twin = _loaded(codec, payload)
            if _is_faithful(exc, twin, level):
                return payload
        except BaseException:  # noqa: BLE001, S112 - user code may raise anything
            continue
    return None


def _dumps_plain(codec: Codec, exc: BaseException) -> Payload:
    return codec.dumps((exc, state_of(exc).args))


def _dumps_state(codec: Codec, exc: BaseException, *, replaces: bool = True) -> Payload:
    file = io.BytesIO()
    _StatePickler(file, codec, exc, replaces=replaces).dump((exc, state_of(exc).args))
    return codec.payload(file.getvalue(), [], needs_codec=True)


def _loaded(codec: Codec, payload: Payload) -> BaseException:
    exc, args = codec.loads(payload)
    parts.set_args(exc, args)  # a class that builds its message from its args has done so twice
    return exc  # type: ignore[no-any-return]


def _is_faithful(exc: BaseException, twin: BaseException, level: str) -> bool:
    if type(exc) is not type(twin) or not (level == "any text" or parts.agree(exc, twin)):
        return False
    one, other = _sent_state(exc), _sent_state(twin)
    if level in ("equal", "not different"):
        return parts.is_same([*one], [*other], unknown=level == "not different")
    fields = {field[:2] for field in one.fields} <= {field[:2] for field in other.fields}
    return fields and (level == "fields" or one.attributes.keys() <= other.attributes.keys())


def _sent_state(exc: BaseException) -> ExceptionState:
    mro, (args, fields, attributes) = type(exc).__mro__, state_of(exc)
    fields = [field for field in fields if (mro[field[0]], field[1]) != _SKIPPED_FIELD]
    return ExceptionState(args, fields, attributes)


def _decoded(codec: Codec, payload: Payload | None, name: str, text: str) -> BaseException:
    if payload is not None:
        try:
            exc = _loaded(codec, payload)
            if is_exception(exc):
                if safe_str(exc) != text:
                    parts.add_note(exc, f"its text in the worker: {text}")
                return exc
        except BaseException:  # noqa: BLE001, S110 - user code
            pass
    msg = (
        f"a worker raised {name}, which cannot be pickled there and unpickled here, so this error "
        f"stands for it: {text}. Its class must be importable here, and its __reduce__, if it has "
        "one, must work"
    )
    return BatchError(msg, original_type=name)


class _StatePickler(ValuePickler):
    """Pickles exceptions as class, args and state.

    The causes of ``exc`` are sent by themselves; those of exceptions in its state are part of the
    pickle. If ``replaces`` is set, a `NotCarried` replaces what cannot be pickled.
    """

    def __init__(self, file: io.BytesIO, codec: Codec, exc: BaseException, *, replaces: bool):
        super().__init__(file, codec)
        self._exc = exc
        self._replaces = replaces

    def reducer_override(self, obj: Any) -> Any:
        if is_exception(obj):
            return self._reduced(obj)
        if isinstance(obj, type) and (path := _other_path(obj)) is not None:
            return (load_object, path)
        try:
            reduced = super().reducer_override(obj)
            by_name = type | FunctionType | BuiltinFunctionType | ModuleType
            if reduced is not NotImplemented or isinstance(obj, by_name):
                return reduced
            reduce = self.dispatch_table.get(type(obj))
            return obj.__reduce_ex__(5) if reduce is None else reduce(obj)
        except Exception:  # it cannot be pickled
            if not self._replaces:
                raise
            return (NotCarried, (_repr(obj),))

    def _reduced(self, exc: BaseException) -> tuple[Any, ...]:
        cls = type(exc)
        args, fields, attributes = _sent_state(exc)
        # First what the class needs to make one, then the rest, which may refer to the exception.
        needed = fields if issubclass(cls, BaseExceptionGroup) else []
        first = () if any(arg is exc for arg in args) else args
        cause = None if exc is self._exc else parts.cause_of(exc)
        if cause is not None:
            fields = [*fields, (cls.__mro__.index(BaseException), "__cause__", cause)]
        state = (args, fields, attributes)
        return (parts.make_bare, (cls, first, needed), state, None, None, parts.fill)


def _other_path(cls: type) -> tuple[str, str] | None:
    """Return where to import a class whose ``__module__`` does not exist, as that of some in C."""
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
