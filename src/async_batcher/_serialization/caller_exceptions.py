"""An exception of its own for each caller: the object itself, a copy, or a `BatchError`. Pure.

::

    outcome of a batch --> CallerExceptions --own(exception, place)--> the object itself   for a caller that is alone with it
                                                                    a copy, with a note for each of several callers
                                                                    a `BatchError`      for what controls the program's flow

Rules:

- An object goes out as itself if this batch raised it for the first time, or returned it once without a traceback. It is left as
  it is: a note is added to copies only, and to what came out of a worker, which is a copy.
- What cannot be copied is delivered as itself to all callers, as async-batcher 0.2.2 did with every exception.
- An exception that user code keeps and raises again does not pile up tracebacks: from the second time on, its traceback is cut
  to the part of this batch, and callers get copies that hold this part.
- The causes and contexts are shared, not copied; see `exception_copy`.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections import Counter
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from async_batcher._serialization.exception_copy import Original, add_note, remote_traceback, set_traceback, traceback_of
from async_batcher._serialization.exception_text import is_exception, qualified_name, safe_str
from async_batcher.exceptions import BatchError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from types import CodeType

    F = TypeVar("F", bound=Callable[..., Any])

# Mean something else to an event loop or a coroutine when they are raised as themselves. (asyncio's CancelledError is
# recognized by its name, so that a worker need not import asyncio.)
_CONTROL_FLOW = (SystemExit, KeyboardInterrupt, GeneratorExit, StopIteration)

_COROUTINE = 0x80  # inspect.CO_COROUTINE; inspect is slow to import

_beginnings: set[CodeType] = set()

order = itertools.count(1)  # of the batches of this process, by when they began


def begins_batch(function: F) -> F:
    """Mark the function whose frame is the outermost one in the traceback of what a batch raises.

    Its local ``_began`` is the next number of `order`.
    """
    _beginnings.add(function.__code__)
    return function


def is_control_flow(exc: BaseException) -> bool:
    """Whether ``exc``, raised as itself, would mean something else to an event loop."""
    cls = type(exc)
    if issubclass(cls, _CONTROL_FLOW):
        return True
    return any(base.__name__ == "CancelledError" and base.__module__ == "asyncio.exceptions" for base in cls.__mro__)


def raisable(exc: BaseException, function: str = "process_batch") -> BaseException:
    """The exception itself, or the `BatchError` that stands for one that controls the program's flow.

    Args:
        exc: The exception.
        function: What an error calls the function that raised it.
    """
    if not is_control_flow(exc):
        return exc
    name = qualified_name(exc)
    msg = f"{function} raised {name}, which cannot be raised in a caller as itself; it was: {safe_str(exc)}"
    error = BatchError(msg, original_type=name)
    error.__cause__ = exc  # also where it was never raised: nothing else has what it carries
    return error


def name_of(function: Any) -> str:
    """The module and name of a function, for a note."""
    while isinstance(function, functools.partial):
        function = function.func
    if not hasattr(function, "__qualname__"):
        function = type(function)
    return f"{getattr(function, '__module__', None) or 'builtins'}.{function.__qualname__}"


def of_call(exc: BaseException, function: Any) -> BaseException:
    """The exception of a call with one caller: itself, with a note if it came from a worker."""
    pid = _worker_of(exc)
    exc = raisable(exc)
    if pid is not None:
        add_note(exc, f"a call of {name_of(function)}, worker process {pid}")
    return exc


def raise_first(outcomes: list[Any], setup: Any) -> None:
    """Raise the first outcome that is an exception.

    Args:
        outcomes: What came of the setup in each worker.
        setup: The user's ``setup_worker``, or None; it is named in a note if the exception came from a worker process.
    """
    for outcome in outcomes:
        if is_exception(outcome):
            try:
                outcome = CallerExceptions.of_failed_batch(outcome, 1).own(outcome)  # noqa: PLW2901 - no other name is to be cleared
                raise outcome if setup is None else of_call(outcome, setup)
            finally:
                del outcome, outcomes[:], outcomes  # the exception's traceback holds this frame, and the caller's


class CallerExceptions:
    """The exceptions of one delivery, as the callers get them.

    Args:
        sole: The ids of those that have one caller each, who gets the object itself.
        size: Items in the batch; 0: the callers are not those of a batch, and copies get no note.
        function: The name of the batch function.
    """

    def __init__(self, sole: set[int] | None = None, size: int = 0, function: str = "") -> None:
        self._sole = sole or set()
        self._size = size
        self._function = function
        self._latest: tuple[BaseException | None, int | None, Original | None] = (None, None, None)

    @classmethod
    def of_failed_batch(cls, error: BaseException, callers: int, size: int = 0, function: str = "") -> CallerExceptions:
        """Those of a batch that raised ``error``.

        Args:
            error: What it raised. A sole caller gets it as itself if it was raised in this batch, for the first time.
            callers: How many exceptions are needed.
            size: Items in the batch; 0: no notes.
            function: The name of the batch function.
        """
        is_own = _begins_here(traceback_of(error)) or _worker_of(error) is not None
        _cut(error)
        return cls({id(error)} if callers == 1 and is_own else None, size, function)

    @classmethod
    def among_results(cls, results: Sequence[Any], function: str) -> CallerExceptions:
        """Those among the results of a batch: one that is there once, and was not raised, has one caller."""
        counts = Counter(id(result) for result in results if is_exception(result))
        for result in results:
            if is_exception(result):
                _cut(result)
        sole = {
            id(result) for result in results if is_exception(result) and counts[id(result)] == 1 and traceback_of(result) is None
        }
        return cls(sole, len(results), function)

    def own(self, exc: BaseException, place: int = 0) -> BaseException:
        """An exception for one caller.

        Args:
            exc: The exception that the batch raised or returned.
            place: The place of the caller's item in the batch, from 0.
        """
        latest, pid, original = self._latest
        if latest is not exc:  # most often all callers get the same one
            pid, original = _worker_of(exc), None
            if id(exc) not in self._sole and not is_control_flow(exc):
                original = Original(exc)
            self._latest = exc, pid, original
        if original is not None:
            mine = original.copy()
            if mine is None:
                return exc
        else:
            mine = raisable(exc)
            if mine is exc and pid is None:
                return exc
        if self._size:
            where = "" if pid is None else f", worker process {pid}"
            add_note(mine, f"item {place + 1} of {self._size} in a batch of {self._function}{where}")
        return mine


def _worker_of(exc: BaseException) -> int | None:
    """The process id of the worker that raised ``exc``; None if it was raised, or raised again, in this process."""
    if traceback_of(exc) is not None:
        return None
    remote = remote_traceback(exc)
    return None if remote is None or remote.pid == os.getpid() else remote.pid


def _begins_here(traceback: TracebackType | None) -> bool:
    """Whether a batch raised what has this traceback, and no batch had raised it before."""
    entries = list(_entries(traceback))
    return bool(entries) and _is_beginning(entries[0]) and _earlier(entries) is None


def _cut(exc: BaseException) -> None:
    """Cut the traceback to the part that begins with this batch, if an earlier batch has raised the exception.

    A later batch's part comes first; the frames of the caller of the earlier batch follow, and the earlier batch's own. Where the
    caller's frames begin is not recorded: at the next one of this package, or of a coroutine in what is not one.
    """
    entries = list(_entries(traceback_of(exc)))
    end = _earlier(entries)
    if end is None:
        return
    # Batches that this one waited for are part of it, and began after it.
    count = max((place for place in range(end) if _is_beginning(entries[place])), default=0)
    while count < end and _is_ours(entries[count]):
        count += 1
    is_async = count < end and _is_coroutine(entries[count])
    while count < end and not _is_ours(entries[count]) and (is_async or not _is_coroutine(entries[count])):
        count += 1
    part = None
    for entry in reversed(entries[:count]):
        part = TracebackType(part, entry.tb_frame, entry.tb_lasti, entry.tb_lineno)
    set_traceback(exc, part)


def _earlier(entries: list[TracebackType]) -> int | None:
    """The first entry of a batch that began before the first batch of the traceback; None if there is none."""
    first: int | None = None
    for place, entry in enumerate(entries):
        if _is_beginning(entry):
            began = entry.tb_frame.f_locals.get("_began", 0)
            if first is None:
                first = began
            elif began <= first:
                return place
    return None


def _is_beginning(entry: TracebackType) -> bool:
    return entry.tb_frame.f_code in _beginnings


def _entries(traceback: TracebackType | None) -> Iterator[TracebackType]:
    while traceback is not None:
        yield traceback
        traceback = traceback.tb_next


def _is_ours(entry: TracebackType) -> bool:
    return str(entry.tb_frame.f_globals.get("__name__")).partition(".")[0] == "async_batcher"


def _is_coroutine(entry: TracebackType) -> bool:
    return bool(entry.tb_frame.f_code.co_flags & _COROUTINE)
