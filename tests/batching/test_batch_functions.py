"""What process_batch may be."""

from __future__ import annotations

import functools
from types import MethodType
from typing import TYPE_CHECKING, Any
from unittest.mock import AsyncMock

import pytest

from async_batcher import AsyncBatcher, batched
from async_batcher._worker.user_function import is_async
from tests.support.batchers import async_echo, echo, process_all

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.usefixtures("no_noise")
every_loop = pytest.mark.every_loop


class AsyncCallable:
    """An object with an async __call__."""

    async def __call__(self, batch: list[Any]) -> list[Any]:
        """Return the items."""
        return list(batch)


class WithBatcherNames:
    """An object whose attributes have the names of a batcher's methods."""

    def __init__(self) -> None:
        self.process = self.submit = self.stop = self.start = self.setup_worker = "mine"
        self.max_batch_size = "mine"

    async def __call__(self, batch: list[Any]) -> list[Any]:
        """Return the items."""
        return [item for item in batch if self.process == "mine"]


def plain_wrapper(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate without functools.wraps."""

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return wrapper


def wraps_wrapper(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a coroutine function with functools.wraps."""

    @functools.wraps(function)
    async def wrapper(*args: Any, **kwargs: Any) -> Any:
        return await function(*args, **kwargs)

    return wrapper


async def with_prefix(prefix: str, batch: list[Any]) -> list[Any]:
    """Return the items with a prefix; takes two arguments."""
    return [f"{prefix}{item}" for item in batch]


def named_otherwise(items: list[Any]) -> list[Any]:
    """Return the items; the parameter is not named ``batch``."""
    return list(items)


async def positional_only(batch: list[Any], /) -> list[Any]:
    """Return the items; takes the batch by position only."""
    return list(batch)


async def keyword_only(*, batch: list[Any]) -> list[Any]:
    """Return the items; takes the batch by keyword only."""
    return list(batch)


async def with_default(first: str = "x", *, batch: list[Any] | None = None) -> list[Any]:
    """Return the items; takes another argument in the first place."""
    assert first == "x"
    return list(batch or ())


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "coroutine function": async_echo,
    "function": echo,
    "lambda": lambda batch: batch[:],
    "builtin": list,
    "method of a builtin": [].__add__,
    "object with an async call": AsyncCallable(),
    "object with the names of batcher methods": WithBatcherNames(),
    "partial of an object with an async call": functools.partial(AsyncCallable()),
    "partial of a coroutine function": functools.partial(async_echo),
    "decorated with wraps": wraps_wrapper(async_echo),
    "decorated without wraps, batch": plain_wrapper(echo),
    "decorated without wraps, items": plain_wrapper(named_otherwise),
    "named otherwise": named_otherwise,
    "positional only": positional_only,
    "keyword only": keyword_only,
    "with a default": with_default,
}


@pytest.mark.parametrize("kind", FUNCTIONS)
async def test_any_callable_that_takes_a_batch_is_accepted(kind: str) -> None:
    """The batch is keyword `batch` if the signature allows it, otherwise positional."""
    async with batched(FUNCTIONS[kind]) as batcher:
        assert await process_all(batcher, 1, 2) == [1, 2]


SYNC = {
    "function": echo,
    "builtin": abs,
    "method of a builtin": [].append,
    "class": int,
    "method": WithBatcherNames().__repr__,
    "partial": functools.partial(echo),
    "cached": functools.lru_cache(echo),
}
ASYNC = {
    "function": async_echo,
    "object": AsyncCallable(),
    "method": AsyncCallable().__call__,
    "partial of an object": functools.partial(AsyncCallable()),
    "partial of a method": functools.partial(AsyncCallable().__call__),
    "object as a method": MethodType(AsyncCallable(), 1),
    "partial as a method": MethodType(functools.partial(async_echo), 1),
    "wrapped": functools.wraps(async_echo)(AsyncCallable()),
}


@pytest.mark.parametrize("kind", SYNC)
def test_what_is_called_in_a_worker(kind: str) -> None:
    """It is no coroutine function."""
    assert not is_async(SYNC[kind])


@pytest.mark.parametrize("kind", ASYNC)
def test_what_is_awaited(kind: str) -> None:
    """It is refused where there is no event loop."""
    assert is_async(ASYNC[kind])


async def test_a_partial_keeps_its_arguments() -> None:
    """The batch is the remaining argument of a partial."""
    async with batched(functools.partial(with_prefix, "a")) as batcher:
        assert await process_all(batcher, 1, 2) == ["a1", "a2"]


@every_loop
async def test_an_async_mock_as_process_batch() -> None:
    """Tests may replace process_batch by a mock, on the class or on the instance."""

    class Mocked(AsyncBatcher[int, int]):
        process_batch = AsyncMock(side_effect=lambda batch: [item * 2 for item in batch])

    batcher = Mocked()
    assert await process_all(batcher, 1, 2) == [2, 4]
    Mocked.process_batch.assert_awaited_once_with(batch=[1, 2])
    await batcher.stop()
    batcher = Mocked()
    batcher.process_batch = AsyncMock(return_value=[7])
    assert await batcher.process(1) == 7
    await batcher.stop()


@pytest.mark.parametrize(
    "function", [3, "text", lambda: None, lambda first, second: (first, second)]
)
def test_a_function_that_cannot_take_a_batch_is_rejected(function: Any) -> None:
    """Anything but a function of one argument is a TypeError at construction."""
    with pytest.raises(TypeError, match=r"one argument, the batch"):
        batched(function)


def test_a_subclass_must_define_process_batch() -> None:
    """process_batch is abstract."""
    with pytest.raises(TypeError, match="process_batch"):
        AsyncBatcher()  # type: ignore[abstract]


def test_batched_keeps_the_functions_name() -> None:
    """A decorated function has its name, docstring and `__wrapped__`."""

    @batched(max_batch_size=3)
    def some_function(batch: list[int]) -> list[int]:
        """What it does."""
        return batch

    assert some_function.__name__ == "some_function"  # type: ignore[attr-defined]
    assert some_function.__doc__ == "What it does."
    assert some_function.__wrapped__([1]) == [1]  # type: ignore[attr-defined]
    assert "some_function" in repr(some_function)
    assert some_function.max_batch_size == 3
