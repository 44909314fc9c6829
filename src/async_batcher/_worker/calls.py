"""Single calls, as `WorkerPool.run` and `as_executor` make them, in a worker; not batches."""

from __future__ import annotations

from typing import Any

from async_batcher._serialization.by_value import REGISTRY
from async_batcher._serialization.diagnostics import unpickling_error
from async_batcher._serialization.object_path import load_object
from async_batcher._worker.signals import interruptible

# By their paths; see `object_path.object_path`. Two threads that load one both get the same.
_functions: dict[tuple[str, str], Any] = {}


@interruptible
def call_function(batch: list[tuple[Any, tuple[Any, ...], dict[str, Any]]]) -> list[tuple[Any]]:
    """Call a function, or the one at a path: pickling a function takes longer than a few numbers.

    The result is in a tuple, so that an exception that is returned is not raised.
    """
    ((function, args, kwargs),) = batch
    if type(function) is tuple:
        function = _functions.get(function) or _load(function)
    return [(function(*args, **kwargs),)]


class SentFunction:
    """Calls a function that travels by value: once to each worker, not with each call."""

    def __init__(self, function: Any) -> None:
        self.function = function

    @interruptible
    def __call__(
        self, batch: list[tuple[bool, tuple[Any, ...], dict[str, Any]]]
    ) -> list[tuple[Any]]:
        """Call it as `call_function` does; the flag says whether ``args`` is a chunk of calls."""
        ((is_chunk, args, kwargs),) = batch
        if is_chunk:
            return [(call_chunk(self.function, *args),)]
        return [(self.function(*args, **kwargs),)]


@interruptible
def call_chunk(function: Any, calls: list[tuple[Any, ...]]) -> list[Any]:
    """Make the calls of one chunk of `Executor.map`, which travel together."""
    return [function(*args) for args in calls]


def _load(path: tuple[str, str]) -> Any:
    try:
        function = _functions[path] = load_object(*path)
        REGISTRY.note_imported(function)
    except BaseException as exc:
        raise unpickling_error("function", exc) from exc  # noqa: EM101 - the name of a thing
    return function
