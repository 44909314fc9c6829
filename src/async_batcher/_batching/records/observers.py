"""The observers of a batcher's batches: what ``on_batch`` gives, checked early, called late.

::

    call ----------> enqueued() --> what it returns, kept with the future of the caller
                                          |
    dispatch ------> started(batch) <-----'  in ``batch.captured``
    end of a batch > finished(record), or the function itself

Rules:

- The first exception of each observer is logged; none has another effect. KeyboardInterrupt and
  SystemExit are raised.
- Each batch that an observer sees start, it sees end once.
- A record is made only if an observer takes it.
"""

from __future__ import annotations

import inspect
import logging
import weakref
from typing import TYPE_CHECKING, Any, Protocol

from async_batcher._serialization.caller_exceptions import name_of
from async_batcher._serialization.exception_text import qualified_name
from async_batcher._worker.user_function import is_async
from async_batcher.stats import BatchRecord, BatchStart

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import TypeAlias

    from async_batcher._batching.batch import Batch, CallerFuture

logger = logging.getLogger("async_batcher")


class ObserverObject(Protocol):
    """An object that observes batches; ``enqueued()`` is optional."""

    def started(self, batch: BatchStart, /) -> object: ...

    def finished(self, record: BatchRecord, /) -> object: ...


if TYPE_CHECKING:
    OneObserver: TypeAlias = Callable[[BatchRecord], object] | ObserverObject
    ObserverOption: TypeAlias = OneObserver | Sequence[OneObserver] | None


def check_observers(name: str, value: Any) -> None:
    """Raise TypeError unless each is a function or has the methods of an observer."""
    for observer in _listed(value):
        given = f"{name}={value!r}" if observer is value else f"{name}={value!r}: {observer!r}"
        if isinstance(observer, type):
            msg = f"{given}: is a class; give an instance, such as {observer.__name__}()"
            raise TypeError(msg)
        functions = {method: getattr(observer, method, None) for method in _methods_of(observer)}
        if not functions:
            if not callable(observer):
                msg = (
                    f"{given}: must be a function of one argument, a BatchRecord; or an object "
                    "with the methods started(batch) and finished(record); or a list of these"
                )
                raise TypeError(msg)
            functions = {"it": observer}
        for method, function in functions.items():
            if not callable(function) or is_async(function):
                why = "is async, and is never awaited" if callable(function) else "is not a method"
                msg = f"{given}: {method} {why}; declare it with 'def'"
                raise TypeError(msg)


def make_observers(option: ObserverOption) -> Observers | None:
    """Return what calls the observers of one batcher; None if there are none."""
    observers = _listed(option)
    return Observers(observers) if observers else None


class Observers:
    """The observers of one batcher.

    Attributes:
        log_name: What the log calls the batcher.
        batcher: What records call the batcher.
        captures: Whether an observer has ``enqueued``.
    """

    __slots__ = ("_all", "_capturing", "_starting", "batcher", "captures", "log_name")

    def __init__(self, observers: Sequence[OneObserver]) -> None:
        self.log_name = self.batcher = "process_batch"
        self._all = [GuardedObserver(observer) for observer in observers]
        self._starting = [observer for observer in self._all if not observer.is_function]
        self._capturing = [observer for observer in self._all if observer.captured is not None]
        self.captures = bool(self._capturing)

    def enqueued(self, future: CallerFuture) -> None:
        """Call the observers in the context of a caller, and keep what they return."""
        for observer in self._capturing:
            value = observer.call(self.log_name, "enqueued")
            if value is not None and observer.captured is not None:
                observer.captured[future] = value

    def started(self, batch: Batch[Any, Any]) -> None:
        """Call the observers with a batch that is about to be submitted."""
        for observer in self._starting:
            start = BatchStart(
                self.batcher,
                batch.number,
                batch.size,
                batch.reason,
                batch.queue_time,
                batch.key,
                batch.attempt,
                observer.captured_of(batch),
            )
            observer.call(self.log_name, "started", start)

    def finished(
        self, batch: Batch[Any, Any], run_time: float, failed: int, error: BaseException | None
    ) -> None:
        """Call the observers with the record of a batch that has ended."""
        record = BatchRecord(
            batch.size,
            batch.reason,
            batch.queue_time,
            run_time,
            failed,
            None if error is None else qualified_name(error),
            self.batcher,
            batch.number,
            batch.key,
            batch.attempt,
            error,
        )
        for observer in self._all:
            observer.call(self.log_name, "finished", record)


class GuardedObserver:
    """One observer of one batcher, whose exceptions go no further than the log.

    Attributes:
        is_function: Whether it is called itself, at the end of a batch.
        captured: What its ``enqueued`` returned, by caller; None if it has no such method. A value
            that refers to its own caller's future keeps it alive.
    """

    __slots__ = ("_error_logged", "_observer", "captured", "is_function")

    def __init__(self, observer: Any) -> None:
        methods = _methods_of(observer)
        self.is_function = not methods
        if methods and hasattr(observer, "_for_batcher"):
            observer = observer._for_batcher()  # noqa: SLF001 - of `BatchTracer`
        self._observer = observer
        self._error_logged = False
        self.captured: weakref.WeakKeyDictionary[CallerFuture, Any] | None = None
        if "enqueued" in methods:
            self.captured = weakref.WeakKeyDictionary()

    def captured_of(self, batch: Batch[Any, Any]) -> list[Any]:
        """Return what was captured of the callers of a batch, once for each."""
        captured = self.captured
        if captured is None:
            return []
        # A bulk call is there once for each of its parts.
        return [captured[future] for future in dict.fromkeys(batch.callers()) if future in captured]

    def call(self, batcher: str, method: str, *arguments: Any) -> Any:
        """Call a method, or the function; return None if that raises."""
        try:
            function = self._observer if self.is_function else getattr(self._observer, method)
            return function(*arguments)
        except Exception:
            if not self._error_logged:
                self._error_logged = True
                what = "" if self.is_function else f".{method}"
                msg = "%s: the observer %s raised; its further exceptions are not logged"
                logger.exception(msg, batcher, f"{name_of(self._observer)}{what}")
            return None


def _listed(option: Any) -> Sequence[Any]:
    if type(option) in (list, tuple):  # a named tuple may be an observer
        return list(option)
    return [] if option is None else [option]


def _methods_of(observer: Any) -> list[str]:
    """Return which methods an observer has; none if it is only callable, or no observer.

    A mock is only callable: it has every attribute that one looks up.
    """
    look_up = inspect.getattr_static if callable(observer) else getattr
    methods = ["started", "finished", "enqueued"]
    found = [method for method in methods if look_up(observer, method, None) is not None]
    return found if {"started", "finished"} <= set(found) else []
