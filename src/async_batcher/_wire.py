"""How objects travel between processes: the bytes, and what happens to classes on the way.

::

    caller's side                                                    worker's side
    Codec.dumps(object) --> Blob --------------------------------->  Codec.loads(blob)
        plain pickle where it does, else cloudpickle

    class of __main__ --> reference (its id) --------------------->  known: that class;  not known: UnknownClassError,
    Codec.definitions() --> each class referred to, by value ----->  and the worker asks for the definitions

    that class again  <-- reference (its id) <---------------------  an instance among the results

Rules:

- Whatever an importable module holds crosses by reference, as pickle does it; a function behind a decorator that keeps it as
  ``__wrapped__`` crosses as a reference to that.
- A class that crosses by value is made once on the other side, under an id, and never again: cloudpickle by itself redefines
  methods and resets attributes each time that the class arrives, also on its way back.
- What user code raises while it is pickled or unpickled comes out as `SerializationError`, which says where the fault lies.
"""

from __future__ import annotations

import functools
import io
import os
import pickle
import sys
import weakref
from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any, TypeAlias

import cloudpickle

from async_batcher._bulk import BULKY, Packer, buffers
from async_batcher._outcome import qualified_name, restore, safe_str
from async_batcher.exceptions import SerializationError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from async_batcher._frames import Buffer

# Whether the codec's own unpickler is needed, the pickle, and the large buffers that are not in it.
Blob: TypeAlias = "tuple[bool, Buffer, Sequence[Any]]"

_PROTOCOL = 5
_MAX_DEPTH = 12  # steps from a value to the part of it that is at fault; a longer path helps nobody
_MAIN_MODULES = ("__main__", "__mp_main__")  # the program's own main module, which no other process has
_MAIN = b"_main__"  # in a pickle that refers to either


class UnknownClassError(Exception):
    """A reference to a class whose definition has not arrived here yet."""


class Codec:
    """Pickles for one pair of sides, which share the ids of the classes that cross.

    Args:
        worker: Whether this is the worker's side. It keeps every class that arrives alive, and sends the definition of a class
            of its own along each time; the caller's side has the originals, and sends definitions when asked.
        out_of_band: Whether large buffers (arrays, bytes) may travel beside the pickles, uncopied; the channel must know how.
    """

    def __init__(self, *, worker: bool = False, out_of_band: bool = False) -> None:
        self._prefix = os.urandom(8).hex()
        self._count = 0
        self._ids: weakref.WeakKeyDictionary[type, str] = weakref.WeakKeyDictionary()
        self._classes: weakref.WeakValueDictionary[str, type] = weakref.WeakValueDictionary()
        self._worker = worker
        self.out_of_band = out_of_band
        self._packer = Packer()
        self._definitions: weakref.WeakKeyDictionary[type, Blob] = weakref.WeakKeyDictionary()
        self._kept: list[type] = []
        self._unfilled: set[str] = set()

    def dumps(self, value: Any, *, define: bool = False) -> Blob:
        """Pickle ``value``.

        Args:
            value: Any object.
            define: Send classes that cross by value whole, rather than as references.

        Raises:
            Exception: Whatever pickling raised.
        """
        if not cloudpickle.list_registry_pickle_by_value():
            try:
                data, beside = self._packer.dumps(value) if self.out_of_band else (pickle.dumps(value, _PROTOCOL), [])
            except Exception:  # noqa: BLE001, S110 - cloudpickle may do it, or says better why not
                pass
            else:
                if _MAIN not in data:
                    return (False, data, beside) if len(data) < BULKY else self.blob(own=False, data=data, beside=beside)
        return self._by_value(value, define=define)

    def _by_value(self, value: Any, *, define: bool) -> Blob:
        file = io.BytesIO()
        beside, aside = buffers() if self.out_of_band else ([], None)
        _Pickler(file, self, define=define, aside=aside).dump(value)
        return self.blob(own=True, data=file.getvalue(), beside=beside)

    def blob(self, *, own: bool, data: bytes, beside: list[pickle.PickleBuffer]) -> Blob:
        """A pickle and its buffers, as they travel."""
        return (own, pickle.PickleBuffer(data) if self.out_of_band and len(data) >= BULKY else data, beside)

    def loads(self, blob: Blob) -> Any:
        """The object again.

        Raises:
            UnknownClassError: It refers to a class whose definition is not here.
            Exception: Whatever unpickling raised.
        """
        own, data, beside = blob
        if not own:
            return pickle.loads(data, buffers=beside)  # noqa: S301 - from this program's own worker or caller
        try:
            return _Unpickler(io.BytesIO(data), self, beside).load()
        finally:
            if self._unfilled:  # a definition that broke off: forget it, so that it can come again
                for name in self._unfilled:
                    self._classes.pop(name, None)
                self._unfilled.clear()

    def definitions(self) -> list[Blob]:
        """Every class that was referred to so far and still lives, by value; each is pickled once."""
        return list(self._definitions.values())

    # The ids. A class keeps the id that it got on the side where it was first pickled.

    def name_of(self, cls: type) -> str | None:
        """The id of ``cls``, if it has one."""
        return self._ids.get(cls)

    def refer(self, cls: type, name: str) -> bool:
        """Whether the other side knows the class of that id, or may ask for it; sees to it that it can."""
        if self._worker:
            return not name.startswith(self._prefix)
        if cls not in self._definitions:
            self._definitions[cls] = self._by_value(cls, define=True)
        return True

    def register(self, cls: type, name: str | None = None) -> str:
        """Note a class under its id; a new id if it has none."""
        if name is None:
            self._count += 1
            name = f"{self._prefix}:{self._count}"
        self._ids[cls] = name
        self._classes[name] = cls
        if self._worker:
            self._kept.append(cls)
        return name

    # What the unpickler calls.

    def find(self, name: str) -> type:
        """The class of that id."""
        try:
            return self._classes[name]
        except KeyError:
            raise UnknownClassError(name) from None

    def skeleton(self, name: str, make: Callable[..., type], args: tuple[Any, ...]) -> type:
        """The class of that id; made empty if it is not here yet."""
        known = self._classes.get(name)
        if known is not None:
            return known
        cls = make(*args)
        self.register(cls, name)
        self._unfilled.add(name)
        return cls

    def fill(self, cls: type, state: tuple[str, Callable[[type, Any], None], Any]) -> None:
        """Give a class that `skeleton` has just made its methods and attributes; leave any other as it is."""
        name, setter, content = state
        if name in self._unfilled:
            self._unfilled.discard(name)
            setter(cls, content)


# Stand in the pickle for the methods of the codec that reads it.
def _find() -> None: ...
def _skeleton() -> None: ...
def _fill() -> None: ...


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    def __init__(
        self, file: io.BytesIO, codec: Codec, *, define: bool, aside: Callable[[pickle.PickleBuffer], bool] | None
    ) -> None:
        super().__init__(file, protocol=_PROTOCOL, buffer_callback=aside)
        self._codec = codec
        self._define = define

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, type):
            name = self._codec.name_of(obj)
            if name is not None and not self._define and self._codec.refer(obj, name):
                return (_find, (name,))
            reduced = super().reducer_override(obj)
            if reduced is NotImplemented or len(reduced) != 6:
                return reduced  # it can be imported, or is a builtin that pickle treats apart, such as type(None)
            name = name or self._codec.register(obj)
            if not self._define and self._codec.refer(obj, name):
                return (_find, (name,))
            make, args, state, _, _, setter = reduced
            return (_skeleton, (name, make, _class_args(obj, args)), (name, setter, state), None, None, _fill)
        if isinstance(obj, FunctionType):
            place = _behind_decorator(obj)
            if place is not None:
                return (_unwrap, place)
        return super().reducer_override(obj)


def _class_args(cls: type, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments with which cloudpickle makes an empty class, mended in two places.

    Without its own id of the class: by that, a process that has the class already (a forked one) would be given its own, and
    that would be filled again. With the class's ``__slots__``: an instance of the copy would have a ``__dict__`` otherwise, and
    could not become an instance of the original again.
    """
    track = getattr(cloudpickle.cloudpickle, "_get_or_create_tracker_id", None)
    tracked = track(cls) if track is not None else None
    slots = {"__slots__": cls.__dict__["__slots__"]} if cls.__dict__.get("__slots__") else {}
    mended: list[Any] = []
    for arg in args:
        if isinstance(arg, str) and arg == tracked:
            mended.append(None)
        elif type(arg) is dict and "__module__" in arg:
            mended.append(arg | slots)
        else:
            mended.append(arg)
    return tuple(mended)


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, codec: Codec, buffers: Sequence[Any]) -> None:
        super().__init__(file, buffers=buffers)
        self._codec = codec

    def find_class(self, module: str, name: str) -> Any:
        if module == __name__ and name in ("_find", "_skeleton", "_fill"):
            return getattr(self._codec, name[1:])
        return super().find_class(module, name)


def place_of(function: Any) -> tuple[str, str] | None:
    """The module and the name by which any process can find ``function``; None if it crosses otherwise."""
    if type(function) is not FunctionType or cloudpickle.list_registry_pickle_by_value():
        return None
    return (function.__module__, function.__qualname__) if _at_its_place(function) is function else None


def at_place(module: str, qualname: str) -> Any:
    """What is there; the module is imported if need be."""
    import importlib

    found: Any = importlib.import_module(module)
    return functools.reduce(getattr, qualname.split("."), found)


def _at_its_place(function: FunctionType) -> Any:
    """What an importable module has under the name of ``function``; None where there is nothing."""
    found: Any = sys.modules.get(function.__module__)
    if found is None or function.__module__ in _MAIN_MODULES:
        return None
    for part in function.__qualname__.split("."):
        try:
            found = getattr(found, part, None)
        except Exception:  # noqa: BLE001 - a module's own __getattr__
            return None
    return found


def _behind_decorator(function: FunctionType) -> tuple[str, str] | None:
    """Where the decorated form of ``function`` can be imported from, if it is one that keeps it as ``__wrapped__``."""
    found = _at_its_place(function)
    if found is function or getattr(found, "__wrapped__", None) is not function:
        return None
    if function.__module__.partition(".")[0] in {name.partition(".")[0] for name in cloudpickle.list_registry_pickle_by_value()}:
        return None
    return (function.__module__, function.__qualname__)


def _unwrap(module: str, qualname: str) -> Any:
    return at_place(module, qualname).__wrapped__


def unpicklable(what: str, value: Any, exc: BaseException) -> SerializationError:
    """The error for a value that would not be pickled, with the part of it that is at fault."""
    path, culprit = _trace(what, value)
    where = f"{path} (a {type(culprit).__module__}.{type(culprit).__qualname__})"
    msg = (
        f"{where} cannot be pickled, so it cannot be sent to or from a worker: {safe_str(exc)}. Make it where it is used "
        "(setup_worker runs once in each worker), leave it out in __getstate__, or use executor='thread'"
    )
    error = SerializationError(msg)
    error.__cause__ = exc
    return error


def _trace(path: str, value: Any) -> tuple[str, Any]:
    """Follow what cannot be pickled down to the innermost part that cannot."""
    seen = {id(value)}
    for _ in range(_MAX_DEPTH):
        for name, part in _parts(path, value):
            if id(part) not in seen and not _picklable(part):
                seen.add(id(part))
                path, value = name, part
                break
        else:
            break
    return path, value


def _picklable(value: Any) -> bool:
    try:
        cloudpickle.dumps(value, protocol=_PROTOCOL)
    except BaseException:  # noqa: BLE001 - user code
        return False
    return True


def _parts(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, MethodType):
        yield "self", value.__self__
    elif isinstance(value, FunctionType):
        code = value.__code__
        for name, cell in zip(code.co_freevars, value.__closure__ or (), strict=True):
            try:
                yield f"{path}: closure variable {name!r}", cell.cell_contents
            except ValueError:  # an empty cell
                continue
        for name in code.co_names:
            if name in value.__globals__:
                yield f"{path}: global variable {name!r}", value.__globals__[name]
        for index, default in enumerate(value.__defaults__ or ()):
            yield f"{path}: default argument {index}", default
        for name, default in (value.__kwdefaults__ or {}).items():
            yield f"{path}: default of argument {name!r}", default
    elif isinstance(value, functools.partial):
        yield f"{path}: the function of the partial", value.func
        yield f"{path}: arguments of the partial", value.args
        yield f"{path}: keyword arguments of the partial", value.keywords
    elif isinstance(value, type):
        for name, part in vars(value).items():
            yield f"{path}.{name}", part.__func__ if isinstance(part, staticmethod | classmethod) else part
    elif isinstance(value, dict):
        for key, part in value.items():
            yield f"{path}[{key!r}]" if isinstance(key, str | int) else f"a value of {path}", part
    elif isinstance(value, list | tuple | set | frozenset):
        for index, part in enumerate(value):
            yield f"{path}[{index}]", part
    else:
        try:
            state = value.__getstate__()
        except BaseException:  # noqa: BLE001 - user code
            return
        yield f"{path}: its class", type(value)
        for attributes in state if isinstance(state, tuple) else (state,):
            if isinstance(attributes, dict):
                for name, part in attributes.items():
                    yield f"{path}.{name}", part


def unreadable(what: str, cause: BaseException, why: str | None = None) -> SerializationError:
    """The error for what arrived and could not be unpickled.

    Args:
        what: What it was: "item", "result".
        cause: What unpickling raised, or its traceback.
        why: The same in a few words, if not those of ``cause``.
    """
    why = why or f"{qualified_name(cause)}: {safe_str(cause)}"
    msg = (
        f"the {what} was sent, but could not be unpickled on the other side: {why}. Its class must be importable there, and its "
        "__setstate__, __reduce__ or __init__ must work there"
    )
    error = SerializationError(msg)
    error.__cause__ = cause
    return error


class RemoteTraceback(Exception):  # noqa: N818 - not an error of its own: it carries a worker's traceback as text
    """The traceback in a worker, as text; the cause of the exception that crossed."""

    def __str__(self) -> str:
        """The text as it would have been printed in the worker."""
        return f"\n{self.args[0]}" if self.args else ""


# An exception as it crosses: its pickle (None if it cannot cross), its type's name, its message, its traceback.
Failure: TypeAlias = "tuple[Blob | None, str, str, str]"


def encode_exception(codec: Codec, exc: BaseException) -> Failure:
    """An exception ready to cross; tried out here, since one that will not unpickle would be found out too late."""
    import traceback

    try:
        text = "".join(traceback.format_exception(exc))
    except BaseException:  # noqa: BLE001 - user code (__str__)
        text = f"{qualified_name(exc)}: (its traceback could not be formatted)\n"
    blob: Blob | None
    try:
        blob = codec.dumps((exc, exc.args))
        if type(codec.loads(blob)[0]) is not type(exc):
            blob = None
    except BaseException:  # noqa: BLE001 - user code; whatever it raises, the exception does not cross
        blob = None
    return (blob, qualified_name(exc), safe_str(exc), text)


def decode_exception(codec: Codec, failure: Failure) -> BaseException:
    """The exception that crossed, its traceback there as its cause."""
    from async_batcher.exceptions import BatchError

    blob, name, text, trace = failure
    exc: BaseException | None = None
    if blob is not None:
        try:
            exc, args = codec.loads(blob)
            restore(exc, args)
        except BaseException:  # noqa: BLE001 - user code
            exc = None
    if not isinstance(exc, BaseException):
        msg = (
            f"process_batch raised {name}, which cannot be pickled and unpickled, so it cannot be handed over: {text}. "
            "Make its __init__ accept its args, or give it a __reduce__"
        )
        exc = BatchError(msg, original_type=name)
    object.__setattr__(exc, "__cause__", RemoteTraceback(trace))
    return exc
