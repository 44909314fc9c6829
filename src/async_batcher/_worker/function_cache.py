"""The functions that this process has loaded and set up, by their keys.

Rules:

- A function is loaded once, even if several threads ask for it. After an error nothing is kept, and
  the next batch tries again.
- A set-up runs while the pickle of its function is read: what follows in the pickle is imported
  after the set-up.
- A tear-down runs when its function is dropped or the process ends, but not in a process that user
  code has forked.
"""

from __future__ import annotations

import functools
import os
import threading
from collections import OrderedDict
from types import FunctionType
from typing import TYPE_CHECKING, Any, NamedTuple

from async_batcher._serialization.by_value import REGISTRY
from async_batcher._serialization.caller_exceptions import raisable
from async_batcher._serialization.codec import Codec, Payload
from async_batcher._serialization.out_of_band import BufferPickler
from async_batcher._serialization.remote_exception import encode_exception
from async_batcher._transport.protocol import FAMILY_SIZE, MAX_CACHED_FUNCTIONS, Reply, ReplyKind
from async_batcher._worker.calls import SentFunction, call_function
from async_batcher._worker.plain_pickler import PlainPickler
from async_batcher._worker.user_function import UserFunction, set_up, tear_down

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from async_batcher._worker.results import OnResult


class LoadedFunction(NamedTuple):
    """A function, what reads and writes for it, and its tear-down, if it has one.

    ``on_result`` gets what it yields; None: results are collected.
    """

    function: UserFunction
    codec: Codec
    pickler: BufferPickler
    tear_down: Callable[[], None] | None
    on_result: OnResult | None


class LoadError(Exception):
    """A function could not be loaded or set up; ``reply`` says why."""

    def __init__(self, reply: Reply) -> None:
        self.reply = reply


class SentSetup:
    """A set-up on its way to a worker: unpickling it runs the user's ``setup_worker``."""

    def __init__(self, setup: Callable[[], Any]) -> None:
        self.setup = setup

    def __reduce__(self) -> tuple[Any, ...]:
        return (_set_up, (self.setup,))


class _SetupFailedError(Exception):
    pass


def _set_up(setup: Callable[[], Any]) -> Generator[Any, Any, Any] | None:
    if _refreshing:
        return None
    REGISTRY.note_imported(setup)
    try:
        return set_up(setup)
    except BaseException as exc:  # noqa: BLE001 - user code
        raise _SetupFailedError(exc) from None


# Of this process: an executor gives its workers no state that could hold them.
_functions: OrderedDict[bytes, LoadedFunction] = OrderedDict()
_functions_lock = threading.Lock()
# Held while a function is loaded, for other threads. Each operation on the dict is one step.
_loading: dict[bytes, threading.Lock] = {}
_refreshing: list[bytes] = []  # the key of a function that is read again, after its set-up
# The process id for which tear-downs at the exit have been arranged. Two threads may both do that:
# what is called second finds nothing to tear down.
_exit_handlers_in = 0


def find_function(key: bytes) -> LoadedFunction | None:
    loaded = _functions.get(key)
    if loaded is not None and len(_functions) > 1:
        with _functions_lock:
            if key in _functions:  # another thread may have dropped it meanwhile
                _functions.move_to_end(key)
    return loaded


def load_function(
    key: bytes,
    payload: Payload,
    *,
    out_of_band: bool,
    on_result: Callable[[Codec, BufferPickler, Any], bool] | None = None,
) -> LoadedFunction:
    """Load a function and run its set-up.

    Args:
        key: Names it.
        payload: Its pickle.
        out_of_band: As of `run_batch.run_batch`.
        on_result: Called with what writes for the function, and a result that it has yielded.

    Raises:
        LoadError: That failed.
    """
    with _loading.setdefault(key, threading.Lock()):
        loaded = find_function(key)
        if loaded is not None:
            return loaded
        # Until the pickle says whether a worker of a standard pool has run the main module.
        has_main = REGISTRY.keeps_modules
        codec = Codec(worker=True, out_of_band=out_of_band, runs_main=has_main)
        try:
            parts = codec.loads(payload)
        except _SetupFailedError as exc:
            failure = encode_exception(codec, raisable(exc.args[0], "setup_worker"))
            raise LoadError((ReplyKind.RAISED, failure)) from None
        except BaseException as exc:  # noqa: BLE001 - user code
            failure = encode_exception(codec, exc)
            raise LoadError((ReplyKind.FUNCTION_ERROR, failure)) from None
        codec.runs_main = parts["runs_main"]
        REGISTRY.note_imported(parts["function"])
        function = _user_function(parts)
        ending = None
        if parts.get("setup") is not None:
            ending = functools.partial(_tear_down_in, os.getpid(), parts["setup"])
            _tear_down_at_exit()
        pickler = BufferPickler(PlainPickler, out_of_band=out_of_band)
        send = None if on_result is None else functools.partial(on_result, codec, pickler)
        loaded = LoadedFunction(function, codec, pickler, ending, send)
        with _functions_lock:
            for former in [one for one in _functions if one[:FAMILY_SIZE] == key[:FAMILY_SIZE]]:
                del _functions[former]  # without a set-up, or it would have kept its key
            _functions[key] = loaded
            oldest = next(iter(_functions)) if len(_functions) > MAX_CACHED_FUNCTIONS else None
        if oldest is not None:
            drop_function(oldest)
        _loading.pop(key, None)
        return loaded


def refresh_function(key: bytes, payload: Payload, loaded: LoadedFunction) -> LoadedFunction:
    """Read the pickle of a loaded function again, for the globals that it brings.

    A plain function is replaced. Other callables stay, as they may have state; so does a function
    with a set-up, which may have bound attributes. In a process that runs one batch at a time.

    Raises:
        LoadError: That failed.
    """
    _refreshing.append(key)
    try:
        parts = loaded.codec.loads(payload)
    except BaseException as exc:  # noqa: BLE001 - user code
        failure = encode_exception(loaded.codec, exc)
        raise LoadError((ReplyKind.FUNCTION_ERROR, failure)) from None
    finally:
        _refreshing.clear()
    if type(parts["function"]) is FunctionType and "setup" not in parts:
        loaded = _functions[key] = loaded._replace(function=_user_function(parts))
    return loaded


def _user_function(parts: dict[str, Any]) -> UserFunction:
    function = parts["function"]
    is_call = function is call_function or type(function) is SentFunction
    return UserFunction(function, by_keyword=parts["by_keyword"], setup=None, is_call=is_call)


def drop_function(key: bytes) -> Reply:
    """Drop a function, and run its tear-down."""
    with _functions_lock:
        loaded = _functions.pop(key, None)
    if loaded is not None and loaded.tear_down is not None:
        loaded.tear_down()
    return (ReplyKind.TORN_DOWN,)


def _tear_down_in(pid: int, generator: Generator[Any, Any, Any]) -> None:
    if os.getpid() == pid:  # else user code has forked, and what the set-up made is the parent's
        tear_down(generator)


def _drop_all() -> None:
    with _functions_lock:
        keys = list(_functions)
    for key in reversed(keys):  # the last one first
        drop_function(key)


def _tear_down_at_exit() -> None:
    global _exit_handlers_in  # noqa: PLW0603 - of this process
    if _exit_handlers_in == os.getpid():
        return
    import atexit
    import sys

    _exit_handlers_in = os.getpid()
    atexit.register(_drop_all)
    util = sys.modules.get("multiprocessing.util")
    if util is not None:  # a process of the standard pool runs no other exit handlers
        util.Finalize(None, _drop_all, exitpriority=100)
