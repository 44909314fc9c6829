"""The far side: what a worker (a process, an interpreter, or a thread of this process) does with a batch.

::

    RemoteCall  --unpickled in the worker-->  RemoteCall()  -->  UserFunction.run(batch)  -->  reply, a tuple of builtins
                                               |   ^
                       the first time: load, set up     tear down: when the function is dropped, or the worker ends

Rules:

- Bytes in, bytes out: an executor pickles and unpickles only our own classes and builtins; every object of the user's is
  unpickled here, inside a ``try``.
- A worker loads a program once, and asks for what it lacks: the program, or the definition of a class.
- A set-up runs while its function's pickle is read, so that what comes after it in the pickle is imported after it.
- Whatever user code raises, ``SystemExit`` included, becomes a reply; a worker never ends because of it.
- Plain data travels as one pickle; anything else answer by answer, so that one that will not pickle fails alone.
- Imports neither asyncio nor what it does not use.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import pickle
import threading
from collections import OrderedDict
from types import BuiltinFunctionType, FunctionType
from typing import TYPE_CHECKING, Any, TypeAlias

from async_batcher._serialization import tensors
from async_batcher._serialization.by_value import REGISTRY
from async_batcher._serialization.caller_exceptions import raisable
from async_batcher._serialization.codec import Codec, Payload
from async_batcher._serialization.diagnostics import pickling_error
from async_batcher._serialization.exception_text import is_exception
from async_batcher._serialization.out_of_band import MIN_BUFFER_SIZE, BytesBuffer, OutOfBandPickler
from async_batcher._serialization.remote_exception import PickledException, clear_tracebacks, encode_exception
from async_batcher._serialization.unpickler import UnknownClassError
from async_batcher._worker.user_function import UserFunction, set_up, tear_down

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence
    from typing import Protocol

    from async_batcher._worker.results import Outcome

    class Watch(Protocol):
        """Sees how far a batch is."""

        def prepares(self) -> None:
            """Its function is going to be loaded and set up."""

        def tears_down(self) -> None:
            """The set-up of its function has a tear-down."""

        def begins(self) -> None:
            """The batch itself begins."""


# ("need", the function?, definitions?)  send it again with what is missing
# ("unloadable", PickledException)       the function could not be unpickled
# ("unreadable", PickledException)       the items, sent as one, could not be unpickled: send them one by one
# ("raised", PickledException)           set-up or the batch raised
# ("ready",)                             a call without items: the function is loaded and set up
# ("torn down",)                         the function has been dropped; see `drop`
# ("done", Payload)                      the results as one list of plain data
# ("done", [result, ...])                for each item ("value", Payload), ("raised", PickledException) or
#                                        ("unreadable", PickledException)
Reply: TypeAlias = tuple[Any, ...]

# Programs that one process keeps loaded; beyond it the one that was used longest ago is dropped (and loaded again when it is
# called). Only a pool that many batchers share comes near it.
MAX_CACHED_FUNCTIONS = 64

# Objects of these modules unpickle anywhere: they hold no user code.
_BUILTIN_MODULES = frozenset(
    {"builtins", "collections", "copyreg", "datetime", "decimal", "fractions", "numpy", "torch", "uuid", "_codecs"}
)


class RemoteCall:
    """One batch on its way to a worker.

    Args:
        key: Names the program.
        program: The program, for a worker that lacks it.
        definitions: The classes of the items, for a worker that lacks one.
        items: The batch: as one list, or item by item when the list would not be unpickled; None to get ready only.
    """

    __slots__ = ("definitions", "items", "key", "program")

    def __init__(
        self, key: bytes, program: Payload | None, definitions: list[Payload] | None, items: Payload | list[Payload] | None
    ) -> None:
        self.key = key
        self.program = program
        self.definitions = definitions
        self.items = items

    def __reduce__(self) -> tuple[Any, ...]:
        """As builtins, which every executor's pickler can take."""
        return (RemoteCall, (self.key, self.program, self.definitions, self.items))

    def __call__(self) -> Reply:
        """Run the batch in this process."""
        return run_batch(self.key, self.program, self.definitions, self.items)


def run_batch(
    key: bytes,
    program: Payload | None,
    definitions: list[Payload] | None,
    items: Payload | list[Payload] | None,
    *,
    out_of_band: bool = False,
    watch: Watch | None = None,
) -> Reply:
    """Run a batch in this process.

    Args:
        key: As for `RemoteCall`, and so are the next three.
        program: The program, for a worker that lacks it.
        definitions: The classes of the items, for a worker that lacks one.
        items: The batch; None to get ready only.
        out_of_band: Whether large buffers may travel beside the pickles; see `Codec`.
        watch: Called as the batch goes on.
    """
    loaded = _get_function(key)
    if loaded is None:
        if program is None:
            return ("need", True, False)
        if watch is not None:
            watch.prepares()
        try:
            loaded = _load(key, program, out_of_band=out_of_band)
        except _RefusedError as refused:
            return refused.reply
        if watch is not None and loaded[3] is not None:
            watch.tears_down()
    prepared, codec, packer, _ = loaded
    if items is None:
        return ("ready",)
    if watch is not None:
        watch.begins()
    broken: PickledException | None = None
    for definition in definitions or ():
        try:
            codec.loads(definition)
        except BaseException as exc:  # noqa: BLE001 - user code; the items that need this class fail with it
            broken = broken or encode_exception(codec, exc)
    unreadable: dict[int, PickledException] | None = None
    try:
        if isinstance(items, tuple):  # as nearly always
            batch = codec.loads(items)
        else:
            batch, unreadable = _read_each(codec, items, has_definitions=definitions is not None, broken=broken)
    except UnknownClassError as exc:
        return ("need", False, True) if definitions is None else ("unreadable", broken or encode_exception(codec, exc))
    except BaseException as exc:  # noqa: BLE001 - user code
        return ("unreadable", encode_exception(codec, exc))
    outcome = prepared.run(batch) if batch else []
    del batch
    if unreadable:
        return ("done", _encode_some(codec, outcome, unreadable, len(items)))
    if isinstance(outcome, list):
        return ("done", _encode_answers(codec, packer, outcome))
    return ("raised", encode_exception(codec, outcome))


def _read_each(
    codec: Codec, items: Sequence[Payload], *, has_definitions: bool, broken: PickledException | None
) -> tuple[list[Any], dict[int, PickledException]]:
    batch: list[Any] = []
    unreadable: dict[int, PickledException] = {}
    for index, blob in enumerate(items):
        try:
            batch.append(codec.loads(blob))
        except BaseException as exc:
            is_unknown = isinstance(exc, UnknownClassError)
            if is_unknown and not has_definitions:
                raise
            unreadable[index] = (broken if is_unknown else None) or encode_exception(codec, exc)
    return batch, unreadable


def _encode_some(codec: Codec, outcome: Outcome, unreadable: dict[int, PickledException], count: int) -> list[tuple[str, Any]]:
    if isinstance(outcome, BaseException):
        raised = ("raised", encode_exception(codec, outcome))
        rest = iter([raised] * (count - len(unreadable)))
    else:
        rest = iter(_encode_each(codec, outcome))
    return [("unreadable", unreadable[i]) if i in unreadable else next(rest) for i in range(count)]


def _encode_answers(codec: Codec, packer: OutOfBandPickler | None, answers: list[Any]) -> Payload | list[tuple[str, Any]]:
    try:
        data, beside = (_dumps_plain(answers), []) if packer is None else packer.dumps(answers)
    except BaseException:  # noqa: BLE001 - not plain, or user code that fails: then one by one
        return _encode_each(codec, answers)
    return (False, data, beside) if len(data) < MIN_BUFFER_SIZE else codec.payload(data, beside)


def _dumps_plain(value: Any) -> bytes:
    file = io.BytesIO()
    _BuiltinPickler(file, 5).dump(value)
    return file.getvalue()


def _encode_each(codec: Codec, answers: list[Any]) -> list[tuple[str, Any]]:
    encoded = [_encode_answer(codec, answer) for answer in answers]
    for answer in answers:  # after all of them: they may share one, or a cause
        if is_exception(answer):
            clear_tracebacks(answer)
    return encoded


def _encode_answer(codec: Codec, answer: Any) -> tuple[str, Any]:
    if is_exception(answer):
        return ("raised", encode_exception(codec, answer, clear=False))
    try:
        return ("value", codec.dumps(answer))
    except BaseException as exc:  # noqa: BLE001 - user code
        return ("raised", encode_exception(codec, pickling_error("the result", answer, exc)))


class _NotBuiltinError(Exception):
    pass


class _BuiltinPickler(pickle.Pickler):
    def reducer_override(self, obj: Any) -> Any:
        # Called for what is not an int, str, bytes, list, dict or the like.
        holder = obj if isinstance(obj, type | FunctionType | BuiltinFunctionType) else type(obj)
        module = getattr(holder, "__module__", None) or ""
        if type(obj) is BytesBuffer or module == tensors.__name__:
            return NotImplemented
        if module.partition(".")[0] not in _BUILTIN_MODULES or isinstance(obj, BaseException):
            raise _NotBuiltinError
        return NotImplemented


class SlotSetup:
    """A set-up on its way to a worker: unpickling this runs it, and what comes later in the pickle is imported after it.

    Args:
        setup: The user's ``setup_worker``.
    """

    def __init__(self, setup: Callable[[], Any]) -> None:
        self.setup = setup

    def __reduce__(self) -> tuple[Any, ...]:
        """Run it when it arrives."""
        return (_set_up, (self.setup,))


def _set_up(setup: Callable[[], Any]) -> Generator[Any, Any, Any] | None:
    REGISTRY.note_imported(setup)
    try:
        return set_up(setup)
    except BaseException as exc:  # noqa: BLE001 - user code
        raise _SetupFailedError(exc) from None


class _SetupFailedError(Exception):
    pass


class _RefusedError(Exception):
    def __init__(self, reply: Reply) -> None:
        self.reply = reply


# The program, what reads and writes for it, and its tear-down, if it has one.
_Loaded: TypeAlias = "tuple[UserFunction, Codec, OutOfBandPickler | None, Callable[[], None] | None]"

_functions: OrderedDict[bytes, _Loaded] = OrderedDict()  # of this process; an executor hands us no state to hold it
_functions_lock = threading.Lock()
_latest: tuple[bytes, _Loaded | None] = (b"", None)  # the one that was used last, with its key; read and written at once
_loading: dict[bytes, threading.Lock] = {}  # held while a program is loaded, in a process where several threads run batches
_tears_down_in = 0  # the process at whose end that has been arranged


def _get_function(key: bytes) -> _Loaded | None:
    global _latest  # noqa: PLW0603 - as `_functions`
    latest, loaded = _latest
    if latest != key:
        with _functions_lock:
            loaded = _functions.get(key)
            if loaded is not None:
                _functions.move_to_end(key)
                _latest = key, loaded
    return loaded


def _load(key: bytes, program: Payload, *, out_of_band: bool) -> _Loaded:
    """Load a program and run its set-up, once, however many threads ask for it.

    Raises:
        _RefusedError: That failed; nothing is kept, and the next batch tries again.
    """
    with _loading.setdefault(key, threading.Lock()):
        loaded = _get_function(key)
        if loaded is not None:
            return loaded
        codec = Codec(worker=True, out_of_band=out_of_band)
        try:
            parts = codec.loads(program)
        except _SetupFailedError as exc:
            raise _RefusedError(("raised", encode_exception(codec, raisable(exc.args[0], "setup_worker")))) from None
        except BaseException as exc:  # noqa: BLE001 - user code
            raise _RefusedError(("unloadable", encode_exception(codec, exc))) from None
        codec.runs_main = parts["runs_main"]
        REGISTRY.note_imported(parts["function"])
        function = UserFunction(parts["function"], by_keyword=parts["by_keyword"], setup=None)
        ending = None
        if parts.get("setup") is not None:
            ending = functools.partial(_tear_down_in, os.getpid(), parts["setup"])
            _tear_down_at_exit()
        loaded = (function, codec, OutOfBandPickler(_BuiltinPickler) if out_of_band else None, ending)
        _cache_function(key, loaded)
        _loading.pop(key, None)
        return loaded


def _cache_function(key: bytes, loaded: _Loaded) -> None:
    dropped: list[_Loaded] = []
    with _functions_lock:
        _functions[key] = loaded
        while len(_functions) > MAX_CACHED_FUNCTIONS:
            dropped.append(_functions.popitem(last=False)[1])
    for _, _, _, ending in dropped:
        if ending is not None:
            ending()


def drop(key: bytes) -> Reply:
    """Drop a program that no batch will ask for again, and run its tear-down."""
    global _latest  # noqa: PLW0603 - as `_functions`
    with _functions_lock:
        loaded = _functions.pop(key, None)
        if _latest[0] == key:
            _latest = (b"", None)
    if loaded is not None and loaded[3] is not None:
        loaded[3]()
    return ("torn down",)


def _tear_down_in(pid: int, generator: Generator[Any, Any, Any]) -> None:
    if os.getpid() == pid:  # else user code has forked: what the set-up made is the parent's
        tear_down(generator)


def _drop_all() -> None:
    """Tear down what is loaded when this process ends, the last program first."""
    for key in reversed(list(_functions)):
        drop(key)


def _tear_down_at_exit() -> None:
    global _tears_down_in  # noqa: PLW0603 - as `_functions`
    if _tears_down_in == os.getpid():
        return
    import atexit
    import sys

    _tears_down_in = os.getpid()
    atexit.register(_drop_all)
    util = sys.modules.get("multiprocessing.util")
    if util is not None:  # a process of the standard pool runs no exit handlers but these
        util.Finalize(None, _drop_all, exitpriority=100)


def init_standard_worker(threads: int) -> None:
    """Make a good worker of a process that has just started; the initializer of the standard pools that we make.

    Args:
        threads: See `limit_blas_threads`.
    """
    import multiprocessing

    reset_signals()
    limit_blas_threads(threads)
    parent = multiprocessing.parent_process()
    if parent is not None:

        def end_with_parent() -> None:
            parent.join()
            os._exit(1)

        threading.Thread(target=end_with_parent, name="async_batcher-parent-watch", daemon=True).start()


def reset_signals() -> None:
    """Leave the signals of the process group to the program, and have a crash in C code show where it happened."""
    import faulthandler
    import signal
    import sys

    from async_batcher._worker import signals as worker_signals

    if sys.platform != "win32":
        signal.set_wakeup_fd(-1)  # inherited by fork: the parent's loop would be woken by this process's signals
    worker_signals.handle()
    worker_signals.restore_in_children()
    if sys.stderr is not None:
        with contextlib.suppress(OSError, ValueError, AttributeError):  # no usable stderr
            faulthandler.enable()


def limit_blas_threads(threads: int) -> None:
    """Set what BLAS and OpenMP may use in this process, unless the environment says already. 0: leave it alone."""
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS", "NUMEXPR_NUM_THREADS"):
        if threads:
            os.environ.setdefault(name, str(threads))
