"""How single calls, of `WorkerPool.run` and `as_executor`, travel; batches do not pass here.

- A function that any process can import travels by its name, with each call.
- A function that belongs to a module, but cannot be imported (of ``__main__``, for example), is
  pickled once and sent once to each worker.
- A partial function or a method travels as the function that it wraps; its arguments are pickled
  with each call.
- Anything else, such as a closure, is pickled with each call.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from functools import partial
from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any

from async_batcher._pool.pickled_function import PickledFunction, name_of
from async_batcher._pool.work_item import WorkItem
from async_batcher._serialization.object_path import find_by_path, object_path, registered_modules
from async_batcher._transport.protocol import MAX_CACHED_FUNCTIONS
from async_batcher._worker.calls import SentFunction, call_chunk, call_function
from async_batcher._worker.user_function import UserFunction, is_async
from async_batcher.exceptions import SerializationError

if TYPE_CHECKING:
    from collections.abc import Callable

    from async_batcher._worker.results import Outcome

_WRAPPERS = frozenset({partial, MethodType})
_CACHED = type(functools.lru_cache(len))
_PLACEHOLDER = getattr(functools, "Placeholder", object())  # Python 3.14


class CallItem(WorkItem):
    """A call of `WorkerPool.run`."""

    __slots__ = ()

    @property
    def name(self) -> str:
        ((function, _, _),) = self._batch  # type: ignore[misc]  # a call has one item
        if type(function) is tuple:  # its path
            return str(function[1])
        return super().name if type(function) is bool else name_of(function)


class CallEncoder:
    """Makes the work items of calls.

    Attributes:
        last: The function of the last call, which is not async, and how it travels.
    """

    def __init__(self) -> None:
        # Not the pool itself, which a running call must not keep alive.
        self._client_key = object()
        caller = UserFunction(call_function, by_keyword=False, setup=None)
        self._caller = PickledFunction(caller, out_of_band=True)
        # Functions that are sent once, by their ids.
        self._sent: OrderedDict[int, tuple[Callable[..., Any], PickledFunction]] = OrderedDict()
        self.last: tuple[Callable[..., Any] | None, PickledFunction, Any] = (
            None,
            self._caller,
            None,
        )

    def work_item(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        on_outcome: Callable[[Outcome], None],
        *,
        timeout: float | None = None,
        claim: Callable[[], bool] | None = None,
    ) -> WorkItem | None:
        """Make a call's work item; see `WorkItem`. `return_or_raise` reads its outcome.

        Returns:
            None if it cannot be pickled, and ``on_outcome`` has been called.
        """
        try:
            if type(function) in _WRAPPERS:
                function, args, kwargs = _unwrap_call(function, args, kwargs)
            last, pickled, argument = self.last
            if function is not last or registered_modules or not pickled.is_current():
                pickled, argument = self._encode(function)
            work_item = CallItem(
                pickled,
                [(argument, args, kwargs)],
                self._client_key,
                timeout,
                on_outcome,
                claim,
            )
        except SerializationError as exc:
            on_outcome(exc)
            return None
        if work_item.outcome is not None:
            on_outcome(work_item.outcome)
            return None
        return work_item

    def _encode(self, function: Callable[..., Any]) -> tuple[PickledFunction, Any]:
        """Return the function to run, and the call's first argument.

        See `calls.call_function` and `SentFunction`.
        """
        pickled: PickledFunction
        argument: Any
        path = object_path(function)
        if path is not None:
            pickled, argument = self._caller, path
        elif _is_module_level(function):
            pickled, argument = self._send_once(function), False
        elif (
            type(function) is partial
            and function.func is call_chunk
            and _is_module_level(function.args[0])
        ):
            return self._send_once(function.args[0]), True
        else:
            return self._caller, function
        if not is_async(function):
            self.last = (function, pickled, argument)
        return pickled, argument

    def _send_once(self, function: Callable[..., Any]) -> PickledFunction:
        known, pickled = self._sent.pop(id(function), (None, None))
        if known is None or pickled is None or not pickled.is_current():
            sent = UserFunction(SentFunction(function), by_keyword=False, setup=None)
            pickled = PickledFunction(sent, out_of_band=True)
            pickled.pickle()
        self._sent[id(function)] = (function, pickled)
        if len(self._sent) > MAX_CACHED_FUNCTIONS:
            self._sent.popitem(last=False)
        return pickled


def _is_module_level(function: Any) -> bool:
    """Tell whether a function belongs to a module, so that workers should keep it."""
    if type(function) is _CACHED:
        return find_by_path(function) is function
    if type(function) is not FunctionType:
        return False
    is_local = function.__closure__ is not None or "<locals>" in function.__qualname__
    return find_by_path(function) is function or not is_local


def _unwrap_call(
    function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """Replace a partial function or a method by what it wraps, which may be sent once."""
    if type(function) is partial:
        has_placeholder = any(arg is _PLACEHOLDER for arg in function.args)
        if function.func is not call_chunk and not has_placeholder:
            kwargs = {**function.keywords, **kwargs}
            return _unwrap_call(function.func, (*function.args, *args), kwargs)
    elif type(function) is MethodType and _is_module_level(function.__func__):
        return function.__func__, (function.__self__, *args), kwargs
    return function, args, kwargs
