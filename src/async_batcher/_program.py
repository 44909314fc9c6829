"""The user's function and its set-up, where they run: a worker process, a thread, or the event loop."""

from __future__ import annotations

import functools
import inspect
import threading
from types import FunctionType
from typing import TYPE_CHECKING, Any

from async_batcher._outcome import Outcome, as_answers
from async_batcher._own_exceptions import begins_batch

if TYPE_CHECKING:
    from collections.abc import Callable


_ASYNC = inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR


class Program:
    """The user's function and its set-up.

    Args:
        function: Called with the batch, a list.
        by_keyword: Whether to pass it as ``batch=``.
        setup: Called once, before the first batch; again before the next one if it raised.

    Attributes:
        is_set_up: Whether `prepare` has nothing more to do.
    """

    def __init__(self, function: Callable[..., Any], *, by_keyword: bool, setup: Callable[[], None] | None) -> None:
        self.function = function
        self.by_keyword = by_keyword
        self.setup = setup
        self._lock = threading.Lock()
        self.is_set_up = setup is None

    def prepare(self) -> None:
        """Run the set-up if it has not been run."""
        with self._lock:
            if not self.is_set_up and self.setup is not None:
                self.setup()
                self.is_set_up = True

    def call(self, batch: list[Any]) -> Any:
        """What the user's function returns for the batch."""
        return self.function(batch=batch) if self.by_keyword else self.function(batch)

    @begins_batch
    def run(self, batch: list[Any]) -> Outcome:
        """What comes of the batch, whatever the user's code does."""
        count = len(batch)  # now: the user's code may use up its list
        try:
            if not self.is_set_up:
                self.prepare()
            return as_answers(self.call(batch), count)
        except BaseException as exc:  # noqa: BLE001 - SystemExit and the like are answers here
            return exc


def takes_keyword(function: Any) -> bool:
    """Whether a ``process_batch`` takes the batch as ``batch=``; otherwise it takes it by position.

    Raises:
        TypeError: It takes it neither way.
    """
    if not callable(function):
        msg = f"process_batch={function!r}: must be a function of one argument, the batch"
        raise TypeError(msg)
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some builtins have none
        return False
    by_keyword, by_position = _binds(signature, batch=[]), _binds(signature, [])
    if not by_keyword and not by_position:
        name = getattr(function, "__qualname__", repr(function))
        msg = f"{name}{signature} must take one argument, the batch"
        raise TypeError(msg)
    if by_keyword and by_position and "batch" not in signature.parameters:
        return is_async(function)  # anything goes (*args, **kwargs): as 0.2.2 did it
    return by_keyword


def _binds(signature: inspect.Signature, *args: Any, **kwargs: Any) -> bool:
    try:
        signature.bind(*args, **kwargs)
    except TypeError:
        return False
    return True


def is_async(function: Any) -> bool:
    """Whether calling it gives something to await, or to iterate over with ``async for``."""
    if type(function) is FunctionType and not function.__code__.co_flags & _ASYNC and not function.__dict__:
        return False  # what most are, without asking inspect, which takes its time
    while isinstance(function, functools.partial):
        function = function.func
    call = getattr(function, "__call__", None)  # noqa: B004 - the method itself, for an object with an async __call__
    return any(inspect.iscoroutinefunction(f) or inspect.isasyncgenfunction(f) for f in (function, call))
