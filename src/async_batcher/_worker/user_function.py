"""The user's function, its set-up and its tear-down: in a worker, a thread, or the event loop."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import AsyncGenerator, Coroutine, Generator
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import TYPE_CHECKING, Any

from async_batcher._serialization.caller_exceptions import batch_numbers, begins_batch
from async_batcher._serialization.exception_text import one_line
from async_batcher._worker.results import Outcome, normalize_results
from async_batcher._worker.signals import interruptible
from async_batcher.current import running_batch

if TYPE_CHECKING:
    from collections.abc import Callable

    from async_batcher._worker.results import OnResult
    from async_batcher.current import BatchFacts


# Returned by a function that has run none of the user's code yet.
_NEVER_RUN = (
    Coroutine,
    AsyncGenerator,
    contextlib._GeneratorContextManager,  # noqa: SLF001
    contextlib._AsyncGeneratorContextManager,  # noqa: SLF001
)
_ASYNC = inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR


class UserFunction:
    """The user's function and its set-up.

    Args:
        function: Called with the batch, a list.
        by_keyword: Whether to pass it as ``batch=``.
        setup: Called once in each slot before its first batch; see `set_up`. None: no set-up.
        is_call: Whether what runs is a single call, which has no `current_batch`.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        by_keyword: bool,
        setup: Callable[[], Any] | None,
        is_call: bool = False,
    ) -> None:
        self.function = function
        self.by_keyword = by_keyword
        self.setup = setup
        self.is_call = is_call

    @interruptible
    def call(self, batch: list[Any]) -> Any:
        return self.function(batch=batch) if self.by_keyword else self.function(batch)

    @begins_batch
    def run(
        self,
        batch: list[Any],
        on_result: OnResult | None = None,
        facts: BatchFacts | None = None,
    ) -> Outcome:
        """Run a batch; return the outcome of the items whose results did not go to ``on_result``.

        Only the results of a generator do; see `pass_on`.
        """
        _batch_number = next(batch_numbers)  # caller_exceptions reads this frame
        count = len(batch)  # now: the user's code may consume its list
        token = running_batch.set(None if self.is_call else (count, facts, self))
        try:
            return normalize_results(self.call(batch), count, on_result)
        except BaseException as exc:  # noqa: BLE001 - SystemExit and the like are outcomes here
            return exc
        finally:
            running_batch.reset(token)


def set_up(setup: Callable[[], Any]) -> Generator[Any, Any, Any] | None:
    """Run a set-up.

    Args:
        setup: The user's ``setup_worker``: a function, or a generator function with one ``yield``.

    Returns:
        The generator, suspended at its ``yield`` until `tear_down`; None: there is no tear-down.
    """
    return first_part(setup())


def first_part(returned: Any) -> Generator[Any, Any, Any] | None:
    """Run a generator that a set-up has returned up to its ``yield``; see `set_up`."""
    if isinstance(returned, Generator):
        try:
            next(returned)
        except StopIteration:
            return None
        return returned
    # Other context managers may be what a function that did its work returns.
    if isinstance(returned, _NEVER_RUN):
        if isinstance(returned, Coroutine):
            returned.close()  # or Python warns that it was never awaited
        msg = (
            f"setup_worker returned {returned!r:.120}, which nothing enters or awaits. Write it as "
            "a plain function, or as a generator function with one yield, whose tear-down follows "
            "the yield; without contextlib.contextmanager"
        )
        raise TypeError(msg)
    return None


def tear_down(generator: Generator[Any, Any, Any]) -> None:
    """Run what follows the ``yield`` of a set-up, and log its errors."""
    try:
        next(generator)
    except StopIteration:
        return
    except BaseException as exc:  # noqa: BLE001 - user code; other slots are torn down all the same
        log_tear_down(generator, exc)
    else:
        log_tear_down(generator, None)
        with contextlib.suppress(BaseException):
            generator.close()


def log_tear_down(generator: object, error: BaseException | None) -> None:
    """Log that the tear-down in a set-up raised ``error``; None: that it yielded again."""
    import logging

    logger = logging.getLogger("async_batcher")
    name = getattr(generator, "__qualname__", "setup_worker")
    if error is None:
        msg = "%s yielded twice; it must yield once, and its tear-down follows the yield"
        logger.error(msg, name)
    else:
        logger.error("%s: the tear-down failed: %s", name, one_line(error), exc_info=error)


def accepts_batch_keyword(function: Any) -> bool:
    """Tell whether a ``process_batch`` takes the batch as ``batch=`` rather than by position.

    Raises:
        TypeError: It takes the batch neither way.
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
        if next(iter(signature.parameters), None) == "self":
            method = name.rpartition(".")[2]
            msg += f". Decorate a method in __init__: self.{method} = batched(self._{method})"
        raise TypeError(msg)
    if by_keyword and by_position and "batch" not in signature.parameters:
        return is_async(function)  # *args, **kwargs: as 0.2.2 did it
    return by_keyword


def _binds(signature: inspect.Signature, *args: Any, **kwargs: Any) -> bool:
    try:
        signature.bind(*args, **kwargs)
    except TypeError:
        return False
    return True


def is_async(function: Any) -> bool:
    """Tell whether a call returns something to await, or to iterate over with ``async for``."""
    while isinstance(function, (functools.partial, MethodType)):
        function = function.func if isinstance(function, functools.partial) else function.__func__
    # Most are of these kinds; to ask inspect takes some 40 us.
    kind = type(function)
    if kind is BuiltinFunctionType or (kind is FunctionType and not function.__dict__):
        return kind is FunctionType and bool(function.__code__.co_flags & _ASYNC)
    call = getattr(function, "__call__", None)  # noqa: B004 - the method itself, which may be async
    return any(
        inspect.iscoroutinefunction(f) or inspect.isasyncgenfunction(f) for f in (function, call)
    )
