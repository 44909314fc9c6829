"""What process_batch may return, and what each caller gets of it."""

from __future__ import annotations

import array
import asyncio
import types
from collections import UserDict
from typing import TYPE_CHECKING, Any
from unittest.mock import MagicMock

import pytest

from async_batcher import batched
from async_batcher.exceptions import BadResultError, BatchError
from tests.support.batchers import CONTROL_FLOW, async_echo, make_batcher, process_all

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

pytestmark = pytest.mark.usefixtures("no_noise")
every_loop = pytest.mark.every_loop


RESULTS: dict[str, Callable[[list[int]], Any]] = {
    "list": lambda batch: [item * 2 for item in batch],
    "tuple": lambda batch: tuple(item * 2 for item in batch),
    "generator": lambda batch: (item * 2 for item in batch),
    "map": lambda batch: map((2).__mul__, batch),
    "array": lambda batch: array.array("q", [item * 2 for item in batch]),
    "range": lambda batch: range(batch[0] * 2, batch[-1] * 2 + 1, 2),
    "dict values": lambda batch: {item: item * 2 for item in batch}.values(),
}


@every_loop
@pytest.mark.parametrize("kind", RESULTS)
async def test_any_iterable_of_results_is_accepted(kind: str) -> None:
    """Results may be any iterable with one result per item, in order."""

    async def process_batch(batch: list[int]) -> Any:
        return RESULTS[kind](batch)

    for function in (process_batch, RESULTS[kind]):
        async with make_batcher(function) as batcher:
            assert await process_all(batcher, 1, 2, 3) == [2, 4, 6]


async def test_a_numpy_array_is_accepted(numpy: Any) -> None:
    """The rows of a NumPy array are results."""
    async with make_batcher(lambda batch: numpy.array([[item, item] for item in batch])) as batcher:
        rows = await process_all(batcher, 1, 2)
    assert [row.tolist() for row in rows] == [[1, 1], [2, 2]]


@every_loop
async def test_an_async_generator_is_accepted() -> None:
    """An async generator yields results; its exception reaches the callers that have none."""

    @batched
    async def doubled(batch: list[int]) -> AsyncIterator[int]:
        for item in batch:
            await asyncio.sleep(0)
            if item == 13:
                msg = "unlucky"
                raise ValueError(msg)
            yield item * 2

    assert await process_all(doubled, 1, 2, 3) == [2, 4, 6]
    outcomes = await process_all(doubled, 12, 13, 14)
    assert outcomes[0] == 24
    assert [type(error) for error in outcomes[1:]] == [ValueError, ValueError]
    await doubled.stop()


@every_loop
async def test_none_stands_for_all_nones() -> None:
    """If process_batch returns None, every caller gets None."""

    async def nothing_async(batch: list[int]) -> None:
        assert len(batch) == 3

    def nothing_sync(batch: list[int]) -> None:
        assert len(batch) == 3

    async with (
        make_batcher(nothing_async) as nothing,
        make_batcher(nothing_sync) as nothing_in_a_thread,
    ):
        assert await process_all(nothing, 1, 2, 3) == [None, None, None]
        assert await process_all(nothing_in_a_thread, 1, 2, 3) == [None, None, None]


BAD_RESULTS: dict[str, tuple[Any, str]] = {
    "str": ("abc", "one str for 3 items"),
    "bytes": (b"abc", "one bytes for 3 items"),
    "bytearray": (bytearray(b"abc"), "one bytearray for 3 items"),
    "dict": ({1: 2, 2: 4, 3: 6}, "one dict for 3 items"),
    "mapping proxy": (types.MappingProxyType({1: 2, 2: 4, 3: 6}), "one mappingproxy for 3 items"),
    "user dict": (UserDict({1: 2, 2: 4, 3: 6}), "one UserDict for 3 items"),
    "set": ({1, 2, 3}, "one set for 3 items"),
    "frozenset": (frozenset({1, 2, 3}), "one frozenset for 3 items"),
    "int": (3, "one int for 3 items"),
    "too few": ([1, 2], "2 results for 3 items"),
    "too many": ((1, 2, 3, 4), "4 results for 3 items"),
    "none at all": ([], "0 results for 3 items"),
}


@pytest.mark.parametrize("kind", BAD_RESULTS)
@pytest.mark.parametrize("in_thread", [False, True])
async def test_other_return_values_are_rejected(kind: str, in_thread: bool) -> None:
    """A string, bytes, dict, set or wrong count raises BadResultError, a ValueError."""
    returned, message = BAD_RESULTS[kind]

    def process_batch(batch: list[int]) -> Any:
        return returned if batch else None

    async def async_process_batch(batch: list[int]) -> Any:
        return process_batch(batch)

    async with batched(process_batch if in_thread else async_process_batch) as batcher:
        errors = await process_all(batcher, 1, 2, 3)
    assert [type(error) for error in errors] == [BadResultError] * 3
    assert all(message in str(error) for error in errors)
    assert isinstance(errors[0], ValueError)


async def test_a_sync_function_that_returns_a_coroutine_is_an_error() -> None:
    """The error suggests async def, and the coroutine is closed."""

    async def later(batch: list[int]) -> list[int]:
        return batch

    def process_batch(batch: list[int]) -> Any:
        return later(batch)

    async with batched(process_batch) as batcher:
        with pytest.raises(BadResultError, match="async def"):
            await batcher.process(1)


@pytest.mark.parametrize("in_thread", [False, True])
@pytest.mark.parametrize("returns", ["results", "None"])
async def test_process_batch_may_modify_its_list(in_thread: bool, returns: str) -> None:
    """process_batch owns its list: emptied or extended, every caller gets its own result."""

    def consume(batch: list[int]) -> list[int] | None:
        results = []
        while batch:
            results.append(batch.pop(0) * 2)
        batch.extend(range(100))
        return results if returns == "results" else None

    async def async_consume(batch: list[int]) -> list[int] | None:
        return consume(batch)

    async with batched(consume if in_thread else async_consume) as batcher:
        assert await process_all(batcher, 1, 2, 3) == (
            [2, 4, 6] if returns == "results" else [None] * 3
        )


@every_loop
async def test_an_exception_among_the_results_is_raised_for_its_item_alone() -> None:
    """The other items get their results."""

    @batched
    async def halves(batch: list[int]) -> list[Any]:
        return [item // 2 if item % 2 == 0 else ValueError(item) for item in batch]

    results = await process_all(halves, 2, 3, 4)
    assert results[0] == 1
    assert isinstance(results[1], ValueError)
    assert results[1].args == (3,)
    assert results[2] == 2
    await halves.stop()


async def test_one_exception_object_returned_for_two_items() -> None:
    """Each of the two callers gets an exception object of its own."""

    @batched
    async def fail(batch: list[int]) -> list[Any]:
        error = KeyError("both")
        return [error] * len(batch)

    first, second = await process_all(fail, 1, 2)
    assert type(first) is type(second) is KeyError
    assert first is not second
    assert first.__cause__ is None, "it was never raised"
    await fail.stop()


async def test_exception_classes_are_results() -> None:
    """Only an exception instance is raised; a class is an ordinary result."""
    async with batched(async_echo) as batcher:
        assert await process_all(batcher, ValueError, KeyError) == [ValueError, KeyError]


async def test_a_mock_of_an_exception_is_a_result() -> None:
    """A mock or proxy of an exception cannot be raised; the caller gets it as its result."""
    mock = MagicMock(spec=ValueError)
    async with batched(async_echo) as batcher:
        assert (await process_all(batcher, mock, 2))[1] == 2
        assert (await process_all(batcher, mock))[0] is mock


class Unbound:
    """Resembles an unbound proxy: reading its class fails until the test sets `is_bound`."""

    is_bound = False

    @property
    def __class__(self) -> Any:
        """Fail."""
        if self.is_bound:
            return Unbound
        msg = "unbound"
        raise RuntimeError(msg)

    @__class__.setter
    def __class__(self, value: type) -> None:
        """Ignore."""


@pytest.mark.parametrize("in_thread", [False, True])
async def test_a_result_whose_class_cannot_be_read(in_thread: bool) -> None:
    """It is delivered unchanged: delivery calls none of a result's own code."""
    result = Unbound()

    def process_batch(batch: list[int]) -> list[Any]:
        return [result for _ in batch]

    async def async_process_batch(batch: list[int]) -> list[Any]:
        return process_batch(batch)

    try:
        async with make_batcher(process_batch if in_thread else async_process_batch) as batcher:
            results = await process_all(batcher, 1, 2)
    finally:
        result.is_bound = True
    assert [one is result for one in results] == [True, True]


async def test_a_returned_exception_keeps_its_attributes() -> None:
    """The caller gets the object itself, even if its constructor has other parameters."""

    class StatusError(Exception):
        def __init__(self, message: str, *, response: str) -> None:
            super().__init__(message)
            self.response = response

    @batched
    async def process_batch(batch: list[int]) -> list[Any]:
        return [StatusError("429", response="too many") for _ in batch]

    (error,) = await process_all(process_batch, 1)
    assert type(error) is StatusError
    assert error.response == "too many"
    assert error.__cause__ is None
    await process_batch.stop()


@pytest.mark.parametrize("name", CONTROL_FLOW)
async def test_a_control_flow_exception_among_the_results_is_a_batch_error(name: str) -> None:
    """The other items get their results."""

    @batched
    async def process_batch(batch: list[int]) -> list[Any]:
        return [CONTROL_FLOW[name](), *batch[1:]]

    error, other = await process_all(process_batch, 1, 2)
    assert isinstance(error, BatchError)
    assert error.original_type == name
    assert other == 2
    await process_batch.stop()
