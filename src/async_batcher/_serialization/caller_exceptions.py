"""An exception of its own for each caller: the object itself, a copy, or a `BatchError`. Pure.

::

    outcome --> CallerExceptions --own(exception, index)--> the object itself   for a sole caller
                                                            a copy with a note  for each of several
                                                            a `BatchError`      for control flow

Rules:

- A caller gets the object itself, unchanged, if it is the only one and this batch raised the
  exception for the first time, or returned it once without a traceback.
- Notes are added to copies only, and to exceptions from a worker process, which are copies.
- All callers share an exception that cannot be copied, as with every exception in async-batcher
  0.2.2.
- An exception that user code keeps and raises again collects no tracebacks: from the second time
  on, its traceback is cut to the part of this batch, and callers get copies with that part.
- The causes and contexts are shared, not copied; see `exception_copy`.
"""

from __future__ import annotations

import functools
import itertools
import os
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from async_batcher._serialization.exception_copy import (
    ExceptionCopier,
    add_note,
    remote_traceback,
    set_traceback,
    traceback_of,
)
from async_batcher._serialization.exception_text import is_exception, qualified_name, safe_str
from async_batcher.exceptions import BatchError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from types import CodeType

    F = TypeVar("F", bound=Callable[..., Any])

# Raised as themselves, these mean something else to an event loop or a coroutine. asyncio's
# CancelledError is recognized by its name, so that a worker need not import asyncio.
_CONTROL_FLOW = (SystemExit, KeyboardInterrupt, GeneratorExit, StopIteration)

_COROUTINE = 0x80  # inspect.CO_COROUTINE; inspect is slow to import

_entry_points: set[CodeType] = set()

# Given as batches begin here, in any thread: `next` is one step, also without a GIL.
batch_numbers = itertools.count(1)


def begins_batch(function: F) -> F:
    """Mark a function in which a batch begins.

    Its local ``_batch_number`` is the next of `batch_numbers`; `_index_of_earlier` reads it from
    the frames of a traceback.
    """
    _entry_points.add(function.__code__)
    return function


def is_control_flow(exc: BaseException) -> bool:
    cls = type(exc)
    return issubclass(cls, _CONTROL_FLOW) or any(
        base.__name__ == "CancelledError" and base.__module__ == "asyncio.exceptions"
        for base in cls.__mro__
    )


def raisable(exc: BaseException, function: str = "process_batch") -> BaseException:
    """Return the exception itself, or a `BatchError` instead of one that means control flow."""
    if not is_control_flow(exc):
        return exc
    name = qualified_name(exc)
    text = safe_str(exc)
    msg = f"{function} raised {name}, which cannot be raised in a caller as itself; it was: {text}"
    error = BatchError(msg, original_type=name)
    error.__cause__ = exc  # also if it was never raised: nothing else has what it carries
    return error


def name_of(function: Any) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    if not hasattr(function, "__qualname__"):
        function = type(function)
    return f"{getattr(function, '__module__', None) or 'builtins'}.{function.__qualname__}"


def of_call(exc: BaseException, function: Any) -> BaseException:
    """Return what the one caller of a call gets; it has a note if it came from a worker."""
    pid = _worker_of(exc)
    exc = raisable(exc)
    if pid is not None:
        add_note(exc, f"a call of {name_of(function)}, worker process {pid}")
    return exc


def raise_first(outcomes: list[Any], setup: Any) -> None:
    """Raise the first exception among the outcomes of a set-up in each worker.

    A note names ``setup``, unless that is None, if the exception came from a worker process.
    """
    error = next(filter(is_exception, outcomes), None)
    if error is None:
        return
    try:
        error = CallerExceptions.of_failed_batch(error, 1).own(error)
        raise error if setup is None else of_call(error, setup)
    finally:  # the exception's traceback holds this frame, and the caller's
        del error, outcomes[:], outcomes


class CallerExceptions:
    """The exceptions of one delivery, as the callers get them.

    ``sole`` has the ids of exceptions with one caller each, which gets the object itself. Copies
    get no note if ``size``, the number of items in the batch, is 0.
    """

    def __init__(self, sole: set[int] | None = None, size: int = 0, function: str = "") -> None:
        self._sole = sole or set()
        self._returned: dict[int, BaseException] = {}  # by id, which they keep from being reused
        self._size = size
        self._function = function
        # The last exception, the worker that raised it, and what copies it.
        self._latest: tuple[BaseException | None, int | None, ExceptionCopier | None]
        self._latest = (None, None, None)

    @classmethod
    def of_failed_batch(
        cls, error: BaseException, callers: int, size: int = 0, function: str = ""
    ) -> CallerExceptions:
        """The exceptions of a batch that raised ``error``."""
        is_new = _worker_of(error) is not None or _cut(error)
        return cls({id(error)} if callers == 1 and is_new else None, size, function)

    @classmethod
    def among_results(cls, results: Sequence[Any], function: str) -> CallerExceptions:
        """The exceptions among the results of a batch."""
        exceptions = cls(None, len(results), function)
        exceptions.add(results)
        return exceptions

    def add(self, results: Iterable[Any]) -> None:
        """Add those among results; one that occurs once, unraised, is a caller's own.

        If it occurs again in results that are added later, only the first caller has it.
        """
        for exc in filter(is_exception, results):
            _cut(exc)
            is_new = id(exc) not in self._returned
            self._returned[id(exc)] = exc
            if is_new and traceback_of(exc) is None:
                self._sole.add(id(exc))
            else:
                self._sole.discard(id(exc))
        self._latest = (None, None, None)

    def own(self, exc: BaseException, place: int = 0) -> BaseException:
        """Return an exception for the caller whose item has this index in the batch."""
        latest, pid, copier = self._latest
        if latest is not exc:  # most often all callers get the same one
            pid, copier = _worker_of(exc), None
            if id(exc) not in self._sole and not is_control_flow(exc):
                copier = ExceptionCopier(exc)
            self._latest = exc, pid, copier
        mine = raisable(exc) if copier is None else copier.copy()
        if mine is None or (mine is exc and pid is None):
            return exc
        if self._size:
            where = "" if pid is None else f", worker process {pid}"
            note = f"item {place + 1} of {self._size} in a batch of {self._function}{where}"
            add_note(mine, note)
        return mine


def _worker_of(exc: BaseException) -> int | None:
    """Return the process id of the worker that raised it; None if this process raised it last."""
    if traceback_of(exc) is not None:
        return None
    remote = remote_traceback(exc)
    return None if remote is None or remote.pid == os.getpid() else remote.pid


def _cut(exc: BaseException) -> bool:
    """Cut the traceback to the part of this batch, if an earlier batch has raised the exception.

    A later batch's part comes first; the frames of the earlier batch's caller follow, and those of
    that batch. Nothing records where the caller's frames begin: they begin at the next frame of
    this package, or of a coroutine in a part that is not one.

    Returns:
        Whether this batch is the first one that raised it.
    """
    # Only if user code raises one object in several threads at once, frames of another thread are
    # among these, and a traceback may lose entries: as with every exception that threads share.
    entries = _entries_of(exc)
    end = _index_of_earlier(entries)
    if end is None:
        return bool(entries) and _is_entry_point(entries[0])
    # Batches that this one waited for are part of it, and began after it.
    count = max((index for index in range(end) if _is_entry_point(entries[index])), default=0)
    while count < end and _is_ours(entries[count]):
        count += 1
    is_async = count < end and _is_coroutine(entries[count])
    while count < end and not _is_ours(entries[count]):
        if _is_coroutine(entries[count]) and not is_async:
            break
        count += 1
    part = None
    for entry in reversed(entries[:count]):
        part = TracebackType(part, entry.tb_frame, entry.tb_lasti, entry.tb_lineno)
    set_traceback(exc, part)
    return False


def _index_of_earlier(entries: list[TracebackType]) -> int | None:
    """Return where a batch stands that began before the first batch of the traceback."""
    first: int | None = None
    for index, entry in enumerate(entries):
        if _is_entry_point(entry):
            began = entry.tb_frame.f_locals.get("_batch_number", 0)
            if first is None:
                first = began
            elif began <= first:
                return index
    return None


def _entries_of(exc: BaseException) -> list[TracebackType]:
    entries, traceback = [], traceback_of(exc)
    while traceback is not None:
        entries.append(traceback)
        traceback = traceback.tb_next
    return entries


def _is_entry_point(entry: TracebackType) -> bool:
    return entry.tb_frame.f_code in _entry_points


def _is_ours(entry: TracebackType) -> bool:
    return str(entry.tb_frame.f_globals.get("__name__")).partition(".")[0] == "async_batcher"


def _is_coroutine(entry: TracebackType) -> bool:
    return bool(entry.tb_frame.f_code.co_flags & _COROUTINE)
