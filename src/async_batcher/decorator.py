"""`batched`: a batcher made of a function, which is called with one item."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import AsyncGenerator, AsyncIterable, Generator, Iterable
from inspect import Parameter, Signature
from typing import TYPE_CHECKING, Any, TypeVar, Unpack, get_args, get_origin, overload

from async_batcher._batching.options import BatchedOptions, check_keywords, signature_with_options
from async_batcher.batcher import AsyncBatcher

if TYPE_CHECKING:
    from collections.abc import Callable

    from async_batcher._batching.user_code import BatchFunction

__all__ = ["BatchedFunction", "batched"]

T = TypeVar("T")
S = TypeVar("S")

_NO_ITEM: Any = Parameter.empty  # which signatures do not show


class _ItemSignature:
    """The signature of a batched function: one item in, one result out."""

    def __get__(self, instance: BatchedFunction[Any, Any] | None, owner: type) -> Signature:
        if instance is None:
            raise AttributeError  # inspect.signature(BatchedFunction) looks at __init__ then
        function: Any = instance.__wrapped__  # type: ignore[attr-defined]
        try:
            found = inspect.signature(function, eval_str=True)
        except Exception:  # noqa: BLE001 - annotations may name what exists for type checkers only
            try:
                found = inspect.signature(function)
            except (TypeError, ValueError):  # some builtins have none
                found = Signature()
        batch = next(iter(found.parameters.values()), None)
        item = Parameter(
            "item",
            Parameter.POSITIONAL_OR_KEYWORD,
            annotation=Signature.empty if batch is None else _element(batch.annotation),
        )
        return Signature([item], return_annotation=_element(found.return_annotation))


def _element(annotation: Any) -> Any:
    """Return the ``T`` of ``list[T]`` and other collections of one type; empty for the rest."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if not isinstance(origin, type) or not issubclass(origin, Iterable | AsyncIterable):
        return Signature.empty
    has_one_type = len(arguments) == 1 or issubclass(origin, Generator | AsyncGenerator)
    return arguments[0] if has_one_type else Signature.empty


def _name_of(function: Any) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    name: str = getattr(function, "__qualname__", type(function).__qualname__)
    return name


class BatchedFunction(AsyncBatcher[T, S]):
    """What `batched` returns: a batcher that is called with one item."""

    __signature__ = _ItemSignature()

    def __init__(
        self,
        function: BatchFunction[T, S],
        *,
        setup_worker: Callable[[], Any] | None = None,
        **options: Any,
    ) -> None:
        """See `batched`."""
        # Attributes of the function are not copied: they might hide methods of the batcher.
        functools.update_wrapper(self, function, updated=())
        if not hasattr(self, "__qualname__"):  # a partial or another callable object
            self.__qualname__ = _name_of(function)
        check_keywords(options, f"batched({self.__qualname__})", "setup_worker")
        if setup_worker is not None:
            if not callable(setup_worker):
                msg = f"setup_worker={setup_worker!r}: must be a function without arguments"  # type: ignore[unreachable]
                raise TypeError(msg)
            self.setup_worker = setup_worker  # type: ignore[method-assign]
        super().__init__(**options)

    @property
    def process_batch(self) -> BatchFunction[T, S]:
        """The function that was decorated."""
        return self.__wrapped__  # type: ignore[no-any-return,attr-defined]

    if TYPE_CHECKING:

        async def __call__(self, item: T, *, timeout: float | None = None) -> S:  # noqa: ASYNC109
            """Process one item; see `AsyncBatcher.process`."""
            ...

    elif sys.version_info >= (3, 12):
        # Not async, so that the coroutine can have the name of the user's function; marked, since
        # frameworks ask whether what they call is.
        @inspect.markcoroutinefunction
        def __call__(self, item=_NO_ITEM, *more, timeout=None):
            """Process one item; see `AsyncBatcher.process`."""
            if item is _NO_ITEM or more:
                raise _wrong_call_error(self, more)
            coroutine = AsyncBatcher.process(self, item, timeout=timeout)
            coroutine.__qualname__ = self.__qualname__  # in "coroutine ... was never awaited"
            return coroutine

    else:

        async def __call__(self, item=_NO_ITEM, *more, timeout=None):  # noqa: ASYNC109
            """Process one item; see `AsyncBatcher.process`."""
            if item is _NO_ITEM or more:
                raise _wrong_call_error(self, more)
            return await AsyncBatcher.process(self, item, timeout=timeout)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle by reference where it can be imported, as a function is."""
        from async_batcher._serialization.object_path import find_by_path, is_by_value

        if find_by_path(self) is self and not is_by_value(self.__module__):
            return self.__qualname__
        return super().__reduce_ex__(protocol)


def _wrong_call_error(function: BatchedFunction[Any, Any], more: tuple[Any, ...]) -> TypeError:
    name = function.__qualname__
    given = f"{1 + len(more)} were" if more else "none was"
    hint = f"; call {name}.process_many() for many" if more else ""
    return TypeError(f"{name}() takes one item, but {given} given{hint}")


@overload
def batched(
    function: BatchFunction[T, S], **options: Unpack[BatchedOptions]
) -> BatchedFunction[T, S]: ...
@overload
def batched(
    function: None = None, **options: Unpack[BatchedOptions]
) -> Callable[[BatchFunction[T, S]], BatchedFunction[T, S]]: ...
def batched(
    function: BatchFunction[T, S] | None = None, **options: Unpack[BatchedOptions]
) -> BatchedFunction[T, S] | Callable[[BatchFunction[T, S]], BatchedFunction[T, S]]:
    """Make an `AsyncBatcher` of a function over a batch; also a decorator.

    ::

        @batched(max_batch_size=64, executor="process")
        def lengths(batch: list[str]) -> list[int]:
            return [len(text) for text in batch]

        await lengths("one item")

    Args:
        function: As `AsyncBatcher.process_batch`: from a list of items to one result each, sync or
            async. A generator resolves each caller when its result is yielded.
        **options: The options of `AsyncBatcher`, and ``setup_worker``: a function or generator
            function without arguments; see `AsyncBatcher.setup_worker`.

    Returns:
        The batcher, which is called with one item; without ``function``, a decorator that makes it.

    Raises:
        TypeError: See `AsyncBatcher`; or ``function`` cannot be called.
        ValueError: See `AsyncBatcher`.
    """
    if function is None:
        check_keywords(options, "batched()", "setup_worker")
        return functools.partial(batched, **options)
    return BatchedFunction(function, **options)


batched.__signature__ = signature_with_options(  # type: ignore[attr-defined]
    Parameter("function", Parameter.POSITIONAL_OR_KEYWORD, default=None),
    Parameter(
        "setup_worker", Parameter.KEYWORD_ONLY, default=None, annotation="Callable[[], Any] | None"
    ),
)
