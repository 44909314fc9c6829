"""The user's function and its set-up, as they are sent to workers: pickled once.

Imported in the thread that first pickles, since it imports cloudpickle.
"""

from __future__ import annotations

import logging
import os
import threading
from types import FunctionType
from typing import TYPE_CHECKING, Any

from async_batcher._serialization.codec import Codec, Payload
from async_batcher._serialization.diagnostics import pickling_error
from async_batcher._serialization.pickler import Call, undecorated_path, unwrap
from async_batcher._transport.protocol import FAMILY_SIZE, KEY_SIZE
from async_batcher._worker.function_cache import SentSetup
from async_batcher.exceptions import SerializationError

if TYPE_CHECKING:
    from async_batcher._serialization.pickler import Trace
    from async_batcher._worker.user_function import UserFunction

_LARGE = 1_000_000  # bytes, which take about a millisecond to pickle and to read again

logger = logging.getLogger("async_batcher")


class PickledFunction:
    """The user's function and its set-up, pickled once for all workers.

    Args:
        function: The function.
        out_of_band: Whether large buffers may travel beside the pickles; see `Codec`.
        runs_main: Whether workers have run the main module; see `Codec`. If so, what the module
            holds is sent by reference, so that the function sees the globals that an initializer
            has bound there, and by value only if a worker lacks it.
        workers: The number of workers, each of which is set up by a trip of its own, where only the
            time of a trip is known and set-ups must not count for a batch. 0: the function travels
            with a batch.

    Attributes:
        is_somewhere: Whether a worker has been set up by a trip of its own.
        key: Names the function, once it is pickled.
        payload: Its pickle; None until then.
    """

    def __init__(
        self,
        function: UserFunction,
        *,
        out_of_band: bool = False,
        runs_main: bool = False,
        workers: int = 0,
    ) -> None:
        self.has_setup = function.setup is not None
        self.workers = workers if self.has_setup else 0
        self.is_somewhere = False
        self.codec = Codec(out_of_band=out_of_band, runs_main=runs_main)
        self._function = function
        self._lock = threading.Lock()
        self._error: SerializationError | None = None
        self._trace: Trace | None = None
        self._has_warned = False
        self.key = b""
        self.payload: Payload | None = None

    @property
    def name(self) -> str:
        """The function's name, for errors."""
        return name_of(self._named)

    @property
    def _named(self) -> Any:
        """The user's function, without what calls it in a worker."""
        return getattr(self._function.function, "function", self._function.function)

    def is_current(self) -> bool:
        """Tell whether every global in the pickle is still bound to the object that was sent."""
        return self._trace is None or self._trace.is_current()

    def refresh(self, *, rename: bool) -> bool:
        """Pickle the function again if a global in its pickle is bound to another object.

        Args:
            rename: Whether it gets a new key, so that workers load it as another function.

        Returns:
            Whether there is a new pickle.

        Raises:
            SerializationError: It cannot be pickled with what is bound now.
        """
        if self.is_current():
            return False
        with self._lock:
            if self._trace is None or self._trace.is_current():  # another thread has done it
                return False
            changed = self._trace.changed()
            try:
                payload, trace = self._dumps()
            except BaseException as exc:
                if is_own_interrupt(exc):
                    raise
                raise self._error_of(exc) from exc
            self.payload = payload
            if rename:
                self.key = self.key[:FAMILY_SIZE] + os.urandom(KEY_SIZE - FAMILY_SIZE)
            self._trace = trace  # last: a thread that sees it without the lock sees the rest
        self._warn_if_large(payload, changed)
        return True

    def _warn_if_large(self, payload: Payload, changed: list[str]) -> None:
        """Say once what it costs to bind a global anew beside a large one, such as a model."""
        _, data, buffers = payload
        size = memoryview(data).nbytes + sum(memoryview(buffer).nbytes for buffer in buffers)
        if size < _LARGE or self._has_warned:
            return
        self._has_warned = True
        names = ", ".join(map(repr, filter(None, changed)))
        logger.warning(
            "%s: the program has bound %s anew, so the function with all its globals (%.0f MB) is "
            "sent to each worker again. Pass what changes with the items",
            self.name,
            names or "a closure variable",
            size / 1e6,
        )

    def send_by_value(self) -> None:
        """Pickle the function by value, since a worker could not load it by reference.

        Raises:
            SerializationError: It cannot be pickled by value.
        """
        with self._lock:
            if self.codec.runs_main:  # else another thread has done it
                self.codec.runs_main = False
                self._pickle()
        self.pickle()

    def pickle(self) -> tuple[bytes, Payload]:
        """Pickle the function, if that has not been done, and return its key and its pickle.

        Raises:
            SerializationError: It cannot be pickled, at this call as at every later one.
        """
        if self.payload is not None:
            return self.key, self.payload
        with self._lock:
            if self._error is not None:  # a new one: tracebacks pile up in one that is raised again
                raise SerializationError(str(self._error)) from self._error.__cause__
            payload = self.payload
            if payload is None:  # else another thread has done it
                payload = self._pickle()
            return self.key, payload

    def _pickle(self) -> Payload:
        try:
            payload, self._trace = self._dumps()
        except BaseException as exc:
            self.payload = None
            if is_own_interrupt(exc):
                raise
            self._error = error = self._error_of(exc)
            raise error from exc
        # Random: even equal functions are separate in a worker, since they may keep state.
        self.key = os.urandom(KEY_SIZE)
        self.payload = payload  # last: a thread that sees it without the lock sees the key, too
        return payload

    def _error_of(self, exc: BaseException) -> SerializationError:
        setup = self._function.setup
        error = pickling_error(self.name, self._named, exc)
        if setup is not None and str(error).startswith(f"{self.name} ("):
            error = pickling_error("setup_worker", setup, exc)
        return error

    def _dumps(self) -> tuple[Payload, Trace | None]:
        function: Any = self._function.function
        runs_main = self.codec.runs_main
        if runs_main and type(function) is FunctionType:
            path = undecorated_path(function)
            function = function if path is None else Call(unwrap, *path)
        parts = {
            "function": function,
            "by_keyword": self._function.by_keyword,
            "runs_main": runs_main,
        }
        if self._function.setup is not None:  # first: it runs before the function is imported
            parts = {"setup": SentSetup(self._function.setup), **parts}
        if runs_main:
            payload = self.codec.dumps(parts, define=True)
            if not payload[0]:  # else it holds something that travels by value in any case
                return payload, None
        payload, trace = self.codec.dumps_checked(parts, define=True)
        return payload, trace if trace.has_variables() else None


def name_of(function: Any) -> str:
    return str(getattr(function, "__qualname__", None) or type(function).__qualname__)


def is_own_interrupt(exc: BaseException) -> bool:
    """Tell the process's own Ctrl-C, which comes in the main thread, from one of user code."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    return isinstance(exc, KeyboardInterrupt) and in_main_thread
