"""Exceptions of all kinds: every builtin one, and classes as users write them.

Importable in workers, without pytest or asyncio.
"""

from __future__ import annotations

import builtins
import contextlib
import dataclasses
import enum
import json
import socket
import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

# Control-flow exceptions, which have another meaning for an event loop.
CONTROL_FLOW = ("SystemExit", "KeyboardInterrupt", "GeneratorExit", "StopIteration")


class KeywordOnlyError(Exception):
    """Has a constructor with a keyword only."""

    def __init__(self, *, retry_after: int) -> None:
        super().__init__(f"retry after {retry_after}")
        self.retry_after = retry_after


class TwoArgumentsError(Exception):
    """Builds one message from two arguments."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(f"{code}: {text}")
        self.code = code


class NoArgumentsError(Exception):
    """Passes no argument to its base class."""

    def __init__(self, code: int) -> None:
        self.code = code

    def __str__(self) -> str:
        """Return the code."""
        return f"code {self.code}"


class SlotsError(Exception):
    """Has slots, one of them empty."""

    __slots__ = ("code", "empty")

    def __init__(self, code: int) -> None:
        self.code = code


class MoreSlotsError(SlotsError):
    """Has slots of its base class and a private one."""

    __slots__ = ("__secret",)

    def __init__(self, code: int, secret: str) -> None:
        super().__init__(code)
        self.__secret = secret

    def __str__(self) -> str:
        """Return the secret."""
        return self.__secret


class SlotOfTextError(Exception):
    """Has a slot that plain pickle would set to the text."""

    __slots__ = ("where",)

    def __init__(self, where: object) -> None:
        super().__init__("bad record")
        self.where = where


class SlotDefaultError(Exception):
    """Has slots that plain pickle would set to defaults."""

    __slots__ = ("name", "retries")

    def __init__(self, text: str = "text", retries: int = 0, name: str | None = "default") -> None:
        super().__init__(text)
        self.retries = retries
        self.name = name


class ReducedError(Exception):
    """Pickles itself without its state, as many clients' exceptions do."""

    def __init__(self, status: int) -> None:
        super().__init__(f"status {status}")
        self.status = status

    def __reduce__(self) -> tuple[type, tuple[int]]:
        """Return the class and its argument."""
        return (ReducedError, (self.status,))


class LockedError(Exception):
    """Has a lock; a copy has a new one."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.lock = threading.Lock()

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:
        """Leave out the lock."""
        return (LockedError, self.args)


class NewError(Exception):
    """Has a ``__new__`` with arguments."""

    def __new__(cls, code: int, *, text: str) -> NewError:
        """Keep the code."""
        made = super().__new__(cls, text)
        made.code = code
        return made

    def __init__(self, code: int, *, text: str) -> None:  # noqa: ARG002 - for __new__
        super().__init__(text)

    code: int


class HostError(OSError):
    """An OSError with a constructor of its own."""

    def __init__(self, host: str) -> None:
        super().__init__(5, f"no {host}", host)
        self.host = host


class NewOSError(OSError):
    """An OSError with a ``__new__`` of its own."""

    def __new__(cls, code: int, text: str) -> NewOSError:
        """Pass on two arguments."""
        return super().__new__(cls, code, text)

    def __init__(self, code: int, text: str) -> None:  # noqa: ARG002 - for __new__
        self.extra = text * 2


class ByteError(UnicodeDecodeError):
    """A UnicodeDecodeError with one argument."""

    def __init__(self, byte: bytes) -> None:
        super().__init__("utf8", byte, 0, 1, "bad")


@dataclasses.dataclass(frozen=True)
class FrozenError(Exception):
    """A frozen dataclass."""

    code: int
    text: str = "frozen"


@dataclasses.dataclass(kw_only=True)
class DataError(Exception):
    """A dataclass with keywords only."""

    code: int


class CodedGroup(ExceptionGroup[Exception]):
    """A group with a constructor of its own."""

    code: int

    def __new__(cls, code: int, members: Sequence[Exception]) -> CodedGroup:
        """Keep the code."""
        made = super().__new__(cls, f"code {code}", members)
        made.code = code
        return made

    def derive(self, excs: Any) -> Any:
        """Return a group with other members."""
        return CodedGroup(self.code, excs)


class FalsyError(Exception):
    """Is false and empty, and cannot be compared."""

    def __bool__(self) -> bool:
        """Return False."""
        return False

    def __len__(self) -> int:
        """Return 0."""
        return 0

    def __eq__(self, other: object) -> bool:
        """Fail."""
        raise ValueError

    __hash__ = None  # type: ignore[assignment]


class RudeError(Exception):
    """Cannot be copied, pickled, printed or changed."""

    def __init__(self, code: int) -> None:
        object.__setattr__(self, "code", code)

    def _refuse(self, *_: Any) -> Any:
        raise ZeroDivisionError

    __reduce__ = __reduce_ex__ = __copy__ = __deepcopy__ = __str__ = __repr__ = __setattr__ = (
        _refuse
    )


class ExitingError(Exception):
    """Raises SystemExit when it is copied, pickled or printed."""

    def _exit(self, *_: Any) -> Any:
        raise SystemExit

    __reduce__ = __reduce_ex__ = __copy__ = __str__ = _exit


class PropertyError(Exception):
    """Has a property and ``args`` that raise."""

    @property
    def code(self) -> int:
        """Fail."""
        raise ZeroDivisionError

    @property
    def args(self) -> Any:  # type: ignore[override]
        """Fail."""
        raise ZeroDivisionError


class AttributelessError(Exception):
    """Raises at every attribute access."""

    def __getattribute__(self, name: str) -> Any:
        """Fail, except for what Python itself needs."""
        if name.startswith("__"):
            return super().__getattribute__(name)
        raise ZeroDivisionError


class ValueOSError(ValueError, OSError):
    """Has two bases in C; the second one determines its layout."""

    def __init__(self, *, host: str) -> None:
        super().__init__(f"no {host}")
        self.host = host


class KeyImportError(KeyError, ImportError):
    """Has a member of its second base in C."""

    def __init__(self, module: str) -> None:
        super().__init__(f"no {module}")
        self.name = module


class SameError(Exception):
    """Is its own copy."""

    def __copy__(self) -> SameError:
        """Return itself."""
        return self


class _ExitsPickled:
    def __reduce__(self) -> Any:
        raise SystemExit


def uncarriable(text: str) -> BaseException:
    """Return an exception whose class cannot be pickled."""

    class UncarriableError(Exception):
        part = _ExitsPickled()

    return UncarriableError(text)


class Reason(enum.Enum):
    """An enum in the args of an exception."""

    SLOW = 1


def _raised(code: str) -> BaseException:
    try:
        exec(code, {})  # noqa: S102 - test code
    except BaseException as exc:  # noqa: BLE001 - the result
        return exc
    raise AssertionError


def _chained() -> BaseException:
    exc = ValueError("outer")
    exc.__cause__ = TwoArgumentsError(3, "middle")
    exc.__cause__.__cause__ = KeyError("inner")
    return exc


def _with_attributes(exc: BaseException, **attributes: Any) -> BaseException:
    for name, value in attributes.items():
        setattr(exc, name, value)
    return exc


def _noted(exc: BaseException) -> BaseException:
    exc.add_note("a note of the user's")
    return exc


def _in_its_args() -> BaseException:
    exc = _noted(ValueError("text"))
    return _with_attributes(exc, args=("text", exc))


def _cyclic() -> BaseException:
    exc = TwoArgumentsError(3, "x")
    return _with_attributes(exc, itself=exc)


def _closed_socket() -> socket.socket:
    with contextlib.closing(socket.socket()) as made:
        return made


def _raised_json() -> BaseException:
    try:
        json.loads("{")
    except ValueError as exc:
        return exc
    raise AssertionError


KINDS: dict[str, Callable[[], BaseException]] = {
    "OSError with a file": lambda: OSError(2, "gone", "name"),
    "OSError with two files": lambda: OSError(18, "crosses", "one", None, "two"),
    "OSError of one argument": lambda: OSError("only text"),
    "OSError with other args": lambda: _with_attributes(OSError("text"), args=(2, "gone")),
    "BlockingIOError": lambda: BlockingIOError(11, "later", 7),
    "open": lambda: _raised("open('/no/such/file')"),
    "decode": lambda: _raised("b'\\xff'.decode()"),
    "encode": lambda: _raised("'\\udc00'.encode()"),
    "syntax": lambda: _raised("compile('a b', 'f.py', 'exec')"),
    "syntax, changed": lambda: _with_attributes(
        _raised("compile('a b', 'f.py', 'exec')"), msg="other", lineno=7
    ),
    "json": _raised_json,
    "import": lambda: _raised("import no_such_module_at_all"),
    "ImportError": lambda: ImportError("text", name="module", path="/a/path"),
    "attribute": lambda: _raised("(1).foo"),
    "name": lambda: _raised("zzz"),
    "key": lambda: KeyError("key"),
    "recursion": lambda: _raised("def f(): f()\nf()"),
    "own number": lambda: TwoArgumentsError(3, "x"),
    "keyword only": lambda: KeywordOnlyError(retry_after=3),
    "nothing passed up": lambda: NoArgumentsError(3),
    "slots": lambda: SlotsError(3),
    "more slots": lambda: MoreSlotsError(3, "secret"),
    "__new__": lambda: NewError(3, text="text"),
    "HostError": lambda: HostError("host"),
    "NewOSError": lambda: NewOSError(3, "text"),
    "ByteError": lambda: ByteError(b"\xff"),
    "several bases": lambda: ValueOSError(host="host"),
    "several bases with members": lambda: KeyImportError("module"),
    "frozen dataclass": lambda: FrozenError(3),
    "dataclass": lambda: DataError(code=3),
    "group": lambda: ExceptionGroup("several", [ValueError(1), TwoArgumentsError(3, "x")]),
    "group of groups": lambda: BaseExceptionGroup(
        "outer", [CodedGroup(3, [KeywordOnlyError(retry_after=1)]), KeyError(2)]
    ),
    "group of another kind": lambda: CodedGroup(3, [ValueError(1)]),
    "falsy": FalsyError,
    "rude": lambda: RudeError(3),
    "exiting": ExitingError,
    "property": PropertyError,
    "attributeless": AttributelessError,
    "its own copy": SameError,
    "notes": lambda: _noted(TwoArgumentsError(3, "x")),
    "chain": _chained,
    "enum": lambda: ValueError(Reason.SLOW, {"a": [1, 2]}),
    "StopAsyncIteration": lambda: StopAsyncIteration(3),
    "by itself": _cyclic,
    "in its own args": _in_its_args,
    "a slot of text": lambda: SlotOfTextError(("line", 7)),
    "a slot with a default": lambda: SlotDefaultError("text", retries=5),
    "a slot that is None": lambda: SlotDefaultError("text", name=None),
    "a slot that was changed": lambda: _with_attributes(SlotDefaultError(), retries=42),
    "a line that was taken away": lambda: _with_attributes(
        SyntaxError("m", ("f", 1, 2, "t")), lineno=None
    ),
    "json with more": lambda: _with_attributes(_noted(_raised_json()), path="a.json"),
    "reduced": lambda: ReducedError(503),
    "reduced with more": lambda: _with_attributes(_noted(ReducedError(503)), request="abc"),
    "group of slots": lambda: BaseExceptionGroup(
        "group", [SlotOfTextError(3), _noted(ReducedError(503))]
    ),
}

# Exceptions with state that cannot be pickled; a copy has the object's repr instead.
UNPICKLABLE: dict[str, Callable[[], BaseException]] = {
    "a lock": lambda: _with_attributes(KeywordOnlyError(retry_after=3), lock=threading.Lock()),
    "a lock in args": lambda: ValueError("text", threading.Lock()),
    "a lock deep in args": lambda: ValueError("text", {"a": [threading.Lock()]}),
    "a socket": lambda: _with_attributes(OSError(5, "io"), peer=_closed_socket()),
    "a generator": lambda: _with_attributes(ValueError("text"), rest=(i for i in [1])),
}


_ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "UnicodeDecodeError": ("utf8", b"\xff", 0, 1, "bad"),
    "UnicodeEncodeError": ("utf8", "\udc00", 0, 1, "bad"),
    "UnicodeTranslateError": ("a", 0, 1, "bad"),
    "BaseExceptionGroup": ("group", [ValueError(1)]),
    "ExceptionGroup": ("group", [ValueError(1)]),
}


def builtin_exceptions() -> Iterator[BaseException]:
    """Yield one of every exception class in `builtins`."""
    for name, cls in sorted(vars(builtins).items()):
        if isinstance(cls, type) and issubclass(cls, BaseException) and cls.__name__ == name:
            arguments: tuple[Any, ...] = ("text",)
            if issubclass(cls, OSError):
                arguments = (5, "text", "file")
            elif issubclass(cls, SyntaxError):
                arguments = ("text", ("file.py", 1, 2, "a line", 1, 3))
            yield cls(*_ARGUMENTS.get(name, arguments))


def made(kind: str) -> BaseException:
    """Return an exception of a kind."""
    return (KINDS | UNPICKLABLE)[kind]()


def fail(batch: list[tuple[str, str]]) -> list[Any]:
    """Raise the exception of the first item, or return one for each.

    Args:
        batch: Pairs of "raise" or "return" and a kind.
    """
    how, kind = batch[0]
    if how == "raise":
        exc = made(kind)
        try:
            raise exc
        finally:
            del exc
    return [made(kind) for _, kind in batch]


def shown(exc: BaseException, depth: int = 0) -> Any:
    """Return everything that two exceptions are compared by.

    Type, text, args, fields, attributes, the user's notes, and causes.
    """
    from async_batcher._serialization.exception_copy import (
        ExceptionState,
        remote_traceback,
        state_of,
    )

    state: ExceptionState = state_of(exc)
    try:
        text = str(exc)
    except BaseException as error:  # noqa: BLE001 - it is compared
        text = f"str() raised {type(error).__name__}"
    mro = type(exc).__mro__
    members = {
        name: value
        for place, name, value in state.fields
        if (mro[place], name) != (AttributeError, "obj")
    }
    attributes = {name: value for name, value in state.attributes.items() if name != "__notes__"}
    notes = [note for note in state.attributes.get("__notes__", ()) if "user's" in note]
    cause = exc.__cause__
    if cause is not None and remote_traceback(cause) is cause:
        cause = None
    parts = [_shown_value(part, depth) for part in (state.args, members, attributes)]
    return (type(exc), text, *parts, notes, None if cause is None else shown(cause, depth))


def _shown_value(value: Any, depth: int) -> Any:
    if depth > 3:
        return type(value)
    if isinstance(value, BaseException):
        return shown(value, depth + 1)
    if isinstance(value, dict):
        return {key: _shown_value(part, depth) for key, part in value.items()}
    if isinstance(value, tuple | list):
        return [_shown_value(part, depth) for part in value]
    if type(value).__module__ in ("builtins", "tests.support.exception_kinds"):
        return value if isinstance(value, int | str | bytes | enum.Enum) else repr(value)
    return repr(value)
