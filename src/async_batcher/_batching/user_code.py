"""What the user wrote, as a batcher uses it: checked early, called late."""

from __future__ import annotations

import inspect
import weakref
from typing import TYPE_CHECKING, Any, TypeVar

from async_batcher._batching.options import is_factory
from async_batcher._worker.user_function import UserFunction, accepts_batch_keyword, is_async

T = TypeVar("T")
S = TypeVar("S")

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, Awaitable, Callable, Iterable
    from typing import TypeAlias

    from async_batcher._batching.options import CheckedOptions
    from async_batcher._runners.factory import Factory
    from async_batcher.batcher import AsyncBatcher

    Results: TypeAlias = Iterable[S | BaseException] | None
    BatchFunction: TypeAlias = Callable[
        [list[T]], Results[S] | Awaitable[Results[S]] | AsyncIterable[S | BaseException]
    ]


class PatchableFunction(UserFunction):
    """The batch function as it is when a batch starts, so that a mock set later is called."""

    def __init__(self, batcher: AsyncBatcher[Any, Any], *, by_keyword: bool) -> None:
        setup: Callable[[], Any] | None = batcher.setup_worker
        if getattr(setup, "does_nothing", None) is True:
            setup = None
        super().__init__(batcher.process_batch, by_keyword=by_keyword, setup=setup)
        # A running batch does not keep a batcher alive.
        self._batcher = weakref.ref(batcher)
        # As one object: another thread may start a batch between two assignments.
        self._latest: tuple[Any, bool] = (self.function, by_keyword)

    def call(self, batch: list[Any]) -> Any:
        batcher = self._batcher()
        function, by_keyword = self._latest
        if batcher is not None:
            current = batcher.process_batch
            # A method is a new object each time.
            if current is not function and current != function:
                function, by_keyword = current, accepts_batch_keyword(current)
                self._latest = function, by_keyword
                self.function, self.by_keyword = function, by_keyword
            del current
        del batcher
        return function(batch=batch) if by_keyword else function(batch)


def check_functions(batcher: AsyncBatcher[Any, Any], options: CheckedOptions) -> bool:
    """Check what can be checked before the user's functions are called.

    Returns:
        Whether ``process_batch`` takes the batch as ``batch=``.

    Raises:
        TypeError: ``process_batch`` does not take the batch; it is async and there is an executor;
            only ``setup_worker`` is async; or the factory given as ``executor`` is async or takes
            arguments.
    """
    function: Any = batcher.process_batch
    by_keyword = accepts_batch_keyword(function)
    if is_factory(options.executor):
        _check_factory(options.executor)
    if options.executor is not None and is_async(function):
        msg = (
            f"executor={options.executor!r}: process_batch is async, and runs on the event loop; "
            "declare it with 'def' to run it in an executor, or leave out executor"
        )
        raise TypeError(msg)
    if is_async(batcher.setup_worker) and not is_async(function):
        msg = (
            "setup_worker is async, but process_batch is not, so it runs where nothing can be "
            "awaited; declare it with 'def'"
        )
        raise TypeError(msg)
    return by_keyword


def _check_factory(factory: Factory) -> None:
    """Raise unless it can be called without arguments, as far as its signature shows."""
    if is_async(factory):
        msg = (
            f"executor={factory!r}: is async; the batcher calls it in a thread, so declare it with "
            "'def'"
        )
        raise TypeError(msg)
    try:
        signature = inspect.signature(factory)
    except (TypeError, ValueError):  # some builtins have none
        return
    try:
        signature.bind()
    except TypeError as exc:
        msg = (
            f"executor={factory!r}: the batcher calls it without arguments to make an executor "
            f"({exc}); bind what it needs with functools.partial"
        )
        raise TypeError(msg) from None
