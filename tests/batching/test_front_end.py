"""`AsyncBatcher` and `batched` on real loops, with batches as coroutines and in threads."""

from __future__ import annotations

import array
import asyncio
import contextlib
import contextvars
import copy
import dataclasses
import functools
import gc
import logging
import os
import pickle
import sys
import threading
import traceback
import types
import warnings
import weakref
from collections import UserDict
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any
from unittest.mock import AsyncMock, MagicMock

import pytest

from async_batcher import AsyncBatcher, batched
from async_batcher._serialization.caller_exceptions import name_of
from async_batcher.exceptions import BadResultError, BatchError, BatcherStoppedError

try:
    import numpy  # here: its import keeps a descriptor open, which would look like a leak of the test
except ImportError:
    numpy = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

pytestmark = pytest.mark.usefixtures("no_noise")
every_loop = pytest.mark.every_loop
needs_eager_tasks = pytest.mark.skipif(sys.version_info < (3, 12), reason="eager tasks came with Python 3.12")


async def gather(batcher: AsyncBatcher[Any, Any], *items: Any) -> list[Any]:
    """Ask for all of them; exceptions among the results. A call that hangs shows itself as TimeoutError."""
    calls = (asyncio.wait_for(batcher.process(item), 5.0) for item in items)
    return await asyncio.gather(*calls, return_exceptions=True)


def echo(batch: list[Any]) -> list[Any]:
    """Sync: runs in a thread."""
    return list(batch)


async def async_echo(batch: list[Any]) -> list[Any]:
    """Runs on the loop."""
    return list(batch)


def make(function: Callable[..., Any], **options: Any) -> AsyncBatcher[Any, Any]:
    """A batcher of any type."""
    return batched(function, **options)


def raising(error: Callable[[], BaseException]) -> AsyncBatcher[Any, Any]:
    """A batcher that always fails."""

    async def process_batch(batch: list[Any]) -> None:  # noqa: ARG001 - whatever it holds
        raise error()

    return batched(process_batch, max_queue_time=0)


def errors_of(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    """What the package has logged."""
    return [record for record in caplog.records if record.name == "async_batcher"]


# ---- results

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
    """A list, tuple, generator, array or other iterable with one result per item, in order."""

    async def process_batch(batch: list[int]) -> Any:
        return RESULTS[kind](batch)

    for function in (process_batch, RESULTS[kind]):
        async with make(function) as batcher:
            assert await gather(batcher, 1, 2, 3) == [2, 4, 6]


async def test_a_numpy_array_is_accepted() -> None:
    """Its rows are the results."""
    if numpy is None:
        pytest.skip("numpy is not installed")

    async with make(lambda batch: numpy.array([[item, item] for item in batch])) as batcher:
        rows = await gather(batcher, 1, 2)
    assert [row.tolist() for row in rows] == [[1, 1], [2, 2]]


@every_loop
async def test_an_async_generator_is_accepted() -> None:
    """What it yields are the results; what it raises is raised for all."""

    @batched
    async def doubled(batch: list[int]) -> AsyncIterator[int]:
        for item in batch:
            await asyncio.sleep(0)
            if item == 13:
                msg = "unlucky"
                raise ValueError(msg)
            yield item * 2

    assert await gather(doubled, 1, 2, 3) == [2, 4, 6]
    assert [type(error) for error in await gather(doubled, 12, 13)] == [ValueError, ValueError]
    await doubled.stop()


@every_loop
async def test_none_stands_for_all_nones() -> None:
    """A process_batch that returns nothing gives every caller None."""

    async def nothing_async(batch: list[int]) -> None:
        assert len(batch) == 3

    def nothing_sync(batch: list[int]) -> None:
        assert len(batch) == 3

    async with make(nothing_async) as nothing, make(nothing_sync) as nothing_in_a_thread:
        assert await gather(nothing, 1, 2, 3) == [None, None, None]
        assert await gather(nothing_in_a_thread, 1, 2, 3) == [None, None, None]


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
async def test_anything_else_is_refused(kind: str, in_thread: bool) -> None:  # noqa: FBT001
    """A string, bytes, dict, set or a wrong count is a BadResultError that names both counts, and a ValueError."""
    returned, message = BAD_RESULTS[kind]

    def process_batch(batch: list[int]) -> Any:
        return returned if batch else None

    async def async_process_batch(batch: list[int]) -> Any:
        return process_batch(batch)

    async with batched(process_batch if in_thread else async_process_batch) as batcher:
        errors = await gather(batcher, 1, 2, 3)
    assert [type(error) for error in errors] == [BadResultError] * 3
    assert all(message in str(error) for error in errors)
    assert isinstance(errors[0], ValueError)


async def test_a_sync_function_that_returns_a_coroutine_is_told_so() -> None:
    """The message says to declare it with async def; the coroutine is not left behind."""

    async def later(batch: list[int]) -> list[int]:
        return batch

    def process_batch(batch: list[int]) -> Any:
        return later(batch)

    async with batched(process_batch) as batcher:
        with pytest.raises(BadResultError, match="async def"):
            await batcher.process(1)


@pytest.mark.parametrize("in_thread", [False, True])
@pytest.mark.parametrize("returns", ["results", "None"])
async def test_a_process_batch_may_use_up_its_list(in_thread: bool, returns: str) -> None:  # noqa: FBT001
    """The list belongs to process_batch: emptied or lengthened, every caller gets its own result."""

    def consume(batch: list[int]) -> list[int] | None:
        results = []
        while batch:
            results.append(batch.pop(0) * 2)
        batch.extend(range(100))
        return results if returns == "results" else None

    async def async_consume(batch: list[int]) -> list[int] | None:
        return consume(batch)

    async with batched(consume if in_thread else async_consume) as batcher:
        assert await gather(batcher, 1, 2, 3) == ([2, 4, 6] if returns == "results" else [None] * 3)


@every_loop
async def test_an_exception_among_the_results_is_raised_for_its_item_alone() -> None:
    """The other items get their results."""

    @batched
    async def halves(batch: list[int]) -> list[Any]:
        return [item // 2 if item % 2 == 0 else ValueError(item) for item in batch]

    results = await gather(halves, 2, 3, 4)
    assert results[0] == 1
    assert isinstance(results[1], ValueError)
    assert results[1].args == (3,)
    assert results[2] == 2
    await halves.stop()


async def test_one_exception_in_two_places() -> None:
    """Each of the two waiters gets an exception object of its own."""

    @batched
    async def fail(batch: list[int]) -> list[Any]:
        error = KeyError("both")
        return [error] * len(batch)

    first, second = await gather(fail, 1, 2)
    assert type(first) is type(second) is KeyError
    assert first is not second
    assert first.__cause__ is None, "it was never raised"
    await fail.stop()


async def test_exception_classes_are_results() -> None:
    """Only an instance is raised; a class is an ordinary result."""
    async with batched(async_echo) as batcher:
        assert await gather(batcher, ValueError, KeyError) == [ValueError, KeyError]


# ---- exceptions


@every_loop
async def test_every_waiter_gets_an_exception_of_its_own() -> None:
    """Of the original type, with its traceback, its cause and its notes, and a note with the caller's place."""
    raised: list[BaseException] = []

    @batched
    async def fail(batch: list[int]) -> None:
        try:
            batch[99]
        except IndexError as exc:
            error = LookupError("no", len(batch))
            error.add_note("a note")
            raised.append(error)
            raise error from exc

    errors = await gather(fail, 1, 2, 3)
    assert [type(error) for error in errors] == [LookupError] * 3
    assert len({id(error) for error in (*errors, *raised)}) == 4
    for place, error in enumerate(errors, 1):
        assert error.args == ("no", 3)
        assert error.__notes__ == ["a note", f"item {place} of 3 in a batch of {name_of(fail.process_batch)}"]
        assert error.__cause__ is raised[0].__cause__
        assert isinstance(error.__cause__, IndexError)
        assert error.__suppress_context__
        assert "raise error from exc" in "".join(traceback.format_exception(error))
    assert raised[0].__notes__ == ["a note"]
    assert len({id(error.__notes__) for error in errors}) == 3
    await fail.stop()


class MessageError(Exception):
    """Makes its message of its argument, as many do."""

    def __init__(self, name: str) -> None:
        super().__init__(f"{name} was not found")
        self.name = name


class OddError(Exception):
    """Its __init__ does not take its args."""

    def __init__(self, code: int, *, text: str) -> None:
        super().__init__(code, text)
        self.code = code


class FalsyError(Exception):
    """Counts as false, and as empty."""

    def __bool__(self) -> bool:
        """False."""
        return False

    def __len__(self) -> int:
        """Empty."""
        return 0


@dataclasses.dataclass(frozen=True)
class FrozenError(Exception):
    """Takes no attribute."""


@dataclasses.dataclass(frozen=True)
class FrozenFieldError(Exception):
    """Takes no attribute, and has one."""

    code: int


class SealedError(Exception):
    """Takes no attribute."""

    def __setattr__(self, name: str, value: object) -> None:
        """Refuse."""
        raise AttributeError(name)


class NotesError(Exception):
    """Its notes cannot be read."""

    @property
    def __notes__(self) -> list[str]:  # type: ignore[override]
        """Fail."""
        msg = "no notes"
        raise ValueError(msg)


class StrError(Exception):
    """Cannot be shown, nor copied."""

    def __str__(self) -> str:
        """Fail."""
        raise ValueError

    def __reduce__(self) -> Any:
        """Fail."""
        raise ValueError


class SameError(Exception):
    """Is its own copy."""

    def __copy__(self) -> Any:
        """Itself."""
        return self


class EqualError(Exception):
    """Cannot be compared."""

    def __eq__(self, other: object) -> bool:
        """Fail."""
        raise ValueError

    __hash__ = None  # type: ignore[assignment]


EXCEPTIONS: dict[str, Callable[[], BaseException]] = {
    "OSError": lambda: FileNotFoundError(2, "No such file", "name"),
    "UnicodeDecodeError": lambda: UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"),
    "ExceptionGroup": lambda: ExceptionGroup("several", [ValueError(1), KeyError(2)]),
    "StopAsyncIteration": StopAsyncIteration,
    "TimeoutError": lambda: TimeoutError("slow"),
    "MessageError": lambda: MessageError("a name"),
    "OddError": lambda: OddError(3, text="a text"),
    "FalsyError": FalsyError,
    "FrozenError": FrozenError,
    "FrozenFieldError": lambda: FrozenFieldError(3),
    "SealedError": SealedError,
    "NotesError": NotesError,
    "StrError": StrError,
    "SameError": SameError,
    "EqualError": EqualError,
    "NoArguments": ValueError,
}


@pytest.mark.parametrize("way", ["raised", "raised in a thread", "returned"])
@pytest.mark.parametrize("kind", EXCEPTIONS)
async def test_any_exception_reaches_every_waiter(kind: str, way: str) -> None:
    """Whatever the class does, each waiter gets it, of its own type, or a BatchError that names the type; nobody hangs."""

    def process_batch(batch: list[int]) -> list[Any]:
        if way == "returned":
            return [EXCEPTIONS[kind]() for _ in batch]
        error = EXCEPTIONS[kind]()
        raise error

    async def async_process_batch(batch: list[int]) -> list[Any]:
        return process_batch(batch)

    original = EXCEPTIONS[kind]()
    batcher = batched(process_batch if way == "raised in a thread" else async_process_batch)
    errors = await gather(batcher, 1, 2)
    await asyncio.wait_for(batcher.stop(), 5.0)
    assert len({id(error) for error in errors}) == 2
    for error in errors:
        if isinstance(error, BatchError):
            assert error.original_type == f"{type(original).__module__}.{type(original).__qualname__}"
            assert kind in str(error)
        else:
            assert type(error) is type(original)
            assert repr(error.args) == repr(original.args)


async def test_a_message_is_not_altered() -> None:
    """A copy says what the original said, also where the class makes its message of its argument."""
    (error,) = await gather(raising(lambda: MessageError("a name")), 1)
    assert isinstance(error, MessageError)
    assert str(error) == "a name was not found"
    assert error.name == "a name"


async def test_an_exception_that_cannot_be_copied() -> None:
    """All callers get the object itself, as with 0.2.2."""

    class UnsteadyError(Exception):
        def __str__(self) -> str:
            return f"at {id(self):x}"

    known = UnsteadyError()
    first, second = await gather(raising(lambda: known), 1, 2)
    assert first is second is known
    assert not hasattr(known, "__notes__")


async def test_something_that_only_looks_like_an_exception_is_a_result() -> None:
    """A mock or a proxy of an exception cannot be raised; it is handed over as it is."""
    mock = MagicMock(spec=ValueError)
    async with batched(async_echo) as batcher:
        assert (await gather(batcher, mock, 2))[1] == 2
        assert (await gather(batcher, mock))[0] is mock


class Unbound:
    """As a proxy that is bound to nothing: even to ask for its class fails, until it is bound (a report must show it)."""

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
        """Never."""


@pytest.mark.parametrize("in_thread", [False, True])
async def test_a_result_that_cannot_be_asked_for_its_class(in_thread: bool) -> None:  # noqa: FBT001
    """It is handed over as it is: nothing of a result's own is called on the way."""
    result = Unbound()

    def process_batch(batch: list[int]) -> list[Any]:
        return [result for _ in batch]

    async def async_process_batch(batch: list[int]) -> list[Any]:
        return process_batch(batch)

    try:
        async with make(process_batch if in_thread else async_process_batch) as batcher:
            results = await gather(batcher, 1, 2)
    finally:
        result.is_bound = True
    assert [one is result for one in results] == [True, True]


SIGNALS: dict[str, Callable[[], BaseException]] = {
    "builtins.StopIteration": lambda: StopIteration(1),
    "builtins.GeneratorExit": GeneratorExit,
    "asyncio.exceptions.CancelledError": asyncio.CancelledError,
    "builtins.SystemExit": lambda: SystemExit(3),
    "builtins.KeyboardInterrupt": KeyboardInterrupt,
}


@pytest.mark.parametrize("name", SIGNALS)
async def test_a_signal_out_of_a_thread_is_a_batch_error(name: str) -> None:
    """sys.exit() ends no server, CancelledError cancels no caller, StopIteration hangs no await: each is a BatchError."""

    def process_batch(batch: list[int]) -> None:
        assert batch
        error = SIGNALS[name]()
        raise error

    async with make(process_batch) as batcher:
        errors = await gather(batcher, 1, 2)
        assert [type(error) for error in errors] == [BatchError, BatchError]
        assert [error.original_type for error in errors] == [name] * 2
        assert await gather(batched(async_echo), 3) == [3], "the loop goes on"


@every_loop
@pytest.mark.parametrize("name", ["builtins.GeneratorExit", "asyncio.exceptions.CancelledError"])
async def test_a_signal_out_of_a_coroutine_is_a_batch_error(name: str) -> None:
    """A CancelledError that process_batch raises by itself does not look like the caller's cancellation."""
    batcher = raising(SIGNALS[name])
    errors = await gather(batcher, 1, 2)
    assert [type(error) for error in errors] == [BatchError, BatchError]
    assert [error.original_type for error in errors] == [name] * 2
    await batcher.stop()


@every_loop
@pytest.mark.parametrize("from_inside", [True, False])
async def test_one_cancelled_batch_does_not_end_the_batcher(from_inside: bool) -> None:  # noqa: FBT001
    """A batch whose task is cancelled, by its own code or by other code of the program, fails alone; the next one runs."""
    tasks: list[asyncio.Task[Any] | None] = []
    begun = asyncio.Event()

    @batched(max_queue_time=0, max_batch_size=2)
    async def process_batch(batch: list[int]) -> list[int]:
        if batch[0] == 0:
            tasks.append(task := asyncio.current_task())
            begun.set()
            if from_inside and task is not None:
                task.cancel()
            await asyncio.sleep(60)
        return batch

    calls = asyncio.ensure_future(gather(process_batch, 0, 1, 2, 3))
    await begun.wait()
    if not from_inside and tasks[0] is not None:
        tasks[0].cancel()
    results = await calls
    assert all(isinstance(error, BatchError | BatcherStoppedError) for error in results[:2])
    assert results[2:] == [2, 3]
    assert await gather(process_batch, 4) == [4]
    assert await process_batch.is_running()
    await process_batch.stop()


@pytest.mark.parametrize("name", SIGNALS)
async def test_a_signal_among_the_results_is_a_batch_error(name: str) -> None:
    """For its item alone."""

    @batched
    async def process_batch(batch: list[int]) -> list[Any]:
        return [SIGNALS[name](), *batch[1:]]

    error, other = await gather(process_batch, 1, 2)
    assert isinstance(error, BatchError)
    assert error.original_type == name
    assert other == 2
    await process_batch.stop()


async def test_stop_iteration_out_of_a_coroutine() -> None:
    """Python itself makes a RuntimeError of it."""
    errors = await gather(raising(SIGNALS["builtins.StopIteration"]), 1, 2)
    assert [type(error) for error in errors] == [RuntimeError, RuntimeError]


@pytest.mark.parametrize("eager", [False, pytest.param(True, marks=needs_eager_tasks)])
@pytest.mark.parametrize("signal", [KeyboardInterrupt, SystemExit])
def test_keyboard_interrupt_and_exit_in_a_coroutine_end_the_program(signal: type[BaseException], eager: bool) -> None:  # noqa: FBT001
    """They settle the waiters and then propagate, as anywhere on the loop's own thread; nothing else is logged."""
    futures: list[asyncio.Future[Any]] = []

    async def main() -> None:
        if eager:
            asyncio.get_running_loop().set_task_factory(asyncio.eager_task_factory)  # type: ignore[attr-defined,unused-ignore]
        batcher = raising(signal)
        futures.extend([batcher.submit(1), batcher.submit(2)])
        await asyncio.Event().wait()

    with pytest.raises(signal), asyncio.Runner() as runner:
        runner.run(main())
    errors = [future.exception() for future in futures]
    assert len(errors) == 2
    assert [type(error) for error in errors] == [BatchError, BatchError]
    del futures[:], errors


async def test_an_exception_among_the_results_with_another_constructor() -> None:
    """The object itself is its caller's, with all that it carries."""

    class StatusError(Exception):
        def __init__(self, message: str, *, response: str) -> None:
            super().__init__(message)
            self.response = response

    @batched
    async def process_batch(batch: list[int]) -> list[Any]:
        return [StatusError("429", response="too many") for _ in batch]

    (error,) = await gather(process_batch, 1)
    assert type(error) is StatusError
    assert error.response == "too many"
    assert error.__cause__ is None
    await process_batch.stop()


# ---- those who have gone, and those who watch


async def test_a_coroutine_whose_callers_have_gone_before_it_begins(caplog: pytest.LogCaptureFixture) -> None:
    """It does not begin, and is no failure."""
    begun: list[list[int]] = []

    @batched(max_batch_size=2, max_queue_time=1000.0)
    async def process_batch(batch: list[int]) -> list[int]:
        begun.append(batch)
        return batch

    calls = [asyncio.create_task(process_batch(item)) for item in range(2)]
    await asyncio.sleep(0)
    assert not begun
    for call in calls:
        call.cancel()
    assert await gather(process_batch, 2, 3) == [2, 3]
    assert begun == [[2, 3]]
    await process_batch.stop()
    assert caplog.records == []


async def test_a_batch_that_waits_for_a_thread_and_whose_callers_have_gone() -> None:
    """It is not begun when the thread comes to it."""
    begun: list[list[int]] = []
    has_begun, go_on = threading.Event(), threading.Event()

    def process_batch(batch: list[int]) -> list[int]:
        begun.append(batch)
        has_begun.set()
        assert go_on.wait(30.0)
        return batch

    with ThreadPoolExecutor(1) as executor:
        batcher = batched(process_batch, executor=executor, max_batch_size=1, concurrency=4)
        calls = [asyncio.create_task(batcher(item)) for item in range(4)]
        await asyncio.to_thread(has_begun.wait, 30.0)
        for call in calls[1:3]:
            call.cancel()
        await asyncio.wait(calls[1:3])
        go_on.set()
        assert [await calls[0], await calls[3]] == [0, 3]
        await batcher.stop()
    assert begun == [[0], [3]]


@pytest.mark.parametrize("where", ["coroutine", "thread"])
async def test_a_log_that_raises(where: str) -> None:
    """Whoever filters it so learns of it from his loop; the callers have been told what is true, and the slot is free."""

    def refuse(record: logging.LogRecord) -> bool:
        raise ZeroDivisionError(record.msg)

    told: list[Any] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: told.append(context["exception"]))
    logger = logging.getLogger("async_batcher")
    logger.addFilter(refuse)

    def fail(batch: list[int]) -> list[int]:
        if 0 in batch:
            raise KeyError(0)
        return batch

    async def fail_on_the_loop(batch: list[int]) -> list[int]:
        return fail(batch)

    batcher = batched(fail_on_the_loop if where == "coroutine" else fail, max_queue_time=0.0, concurrency=1)
    try:
        assert [repr(error) for error in await gather(batcher, 0, 1)] == ["KeyError(0)"] * 2
        assert await gather(batcher, 2) == [2]
        await asyncio.wait_for(batcher.stop(), 5.0)
    finally:
        logger.removeFilter(refuse)
    gc.collect()  # a task's exception is told of when the task goes
    await asyncio.sleep(0)
    assert [type(error) for error in told] == [ZeroDivisionError]


# ---- what process_batch may be


class AsyncCallable:
    """An object with an async __call__."""

    async def __call__(self, batch: list[Any]) -> list[Any]:
        """Give them back."""
        return list(batch)


class Overfull:
    """An object whose attributes have the names of a batcher's methods."""

    def __init__(self) -> None:
        self.process = self.submit = self.stop = self.start = self.setup_worker = "mine"
        self.max_batch_size = "mine"

    async def __call__(self, batch: list[Any]) -> list[Any]:
        """Give them back."""
        return [item for item in batch if self.process == "mine"]


def plain_wrapper(function: Callable[..., Any]) -> Callable[..., Any]:
    """A decorator without functools.wraps."""

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return wrapper


def true_wrapper(function: Callable[..., Any]) -> Callable[..., Any]:
    """A decorator with functools.wraps, for coroutines."""

    @functools.wraps(function)
    async def wrapper(*args: Any, **kwargs: Any) -> Any:
        return await function(*args, **kwargs)

    return wrapper


async def with_prefix(prefix: str, batch: list[Any]) -> list[Any]:
    """Two arguments."""
    return [f"{prefix}{item}" for item in batch]


def named_otherwise(items: list[Any]) -> list[Any]:
    """Takes the batch by position."""
    return list(items)


async def positional_only(batch: list[Any], /) -> list[Any]:
    """Takes the batch by position."""
    return list(batch)


async def keyword_only(*, batch: list[Any]) -> list[Any]:
    """Takes the batch by keyword."""
    return list(batch)


async def with_default(first: str = "x", *, batch: list[Any] | None = None) -> list[Any]:
    """Takes the batch by keyword: by position it would be the wrong one."""
    assert first == "x"
    return list(batch or ())


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "coroutine function": async_echo,
    "function": echo,
    "lambda": lambda batch: batch[:],
    "builtin": list,
    "method of a builtin": [].__add__,
    "object with an async call": AsyncCallable(),
    "object with attributes of our names": Overfull(),
    "partial of an object with an async call": functools.partial(AsyncCallable()),
    "partial of a coroutine function": functools.partial(async_echo),
    "decorated with wraps": true_wrapper(async_echo),
    "decorated without wraps, batch": plain_wrapper(echo),
    "decorated without wraps, items": plain_wrapper(named_otherwise),
    "named otherwise": named_otherwise,
    "positional only": positional_only,
    "keyword only": keyword_only,
    "with a default": with_default,
}


@pytest.mark.parametrize("kind", FUNCTIONS)
async def test_whatever_can_be_called_with_a_batch(kind: str) -> None:
    """The batch goes as keyword `batch` where the signature accepts that, positionally otherwise."""
    async with batched(FUNCTIONS[kind]) as batcher:
        assert await gather(batcher, 1, 2) == [1, 2]


async def test_a_partial_keeps_its_arguments() -> None:
    """A partial is called with what is left of its signature."""
    async with batched(functools.partial(with_prefix, "a")) as batcher:
        assert await gather(batcher, 1, 2) == ["a1", "a2"]


@every_loop
async def test_an_async_mock_as_process_batch() -> None:
    """A program's tests may put a mock in place of process_batch, on the class or on the instance."""

    class Mocked(AsyncBatcher[int, int]):
        process_batch = AsyncMock(side_effect=lambda batch: [item * 2 for item in batch])

    batcher = Mocked()
    assert await gather(batcher, 1, 2) == [2, 4]
    Mocked.process_batch.assert_awaited_once_with(batch=[1, 2])
    await batcher.stop()
    batcher = Mocked()
    batcher.process_batch = AsyncMock(return_value=[7])
    assert await batcher.process(1) == 7
    await batcher.stop()


@pytest.mark.parametrize("function", [3, "text", lambda: None, lambda first, second: (first, second)])
def test_what_cannot_take_a_batch_is_refused_at_once(function: Any) -> None:
    """What is no function of one argument is a TypeError at construction."""
    with pytest.raises(TypeError, match=r"one argument, the batch"):
        batched(function)


def test_a_subclass_must_write_process_batch() -> None:
    """It is abstract."""
    with pytest.raises(TypeError, match="process_batch"):
        AsyncBatcher()  # type: ignore[abstract]


def test_batched_keeps_the_functions_name() -> None:
    """A decorated function looks like itself."""

    @batched(max_batch_size=3)
    def some_function(batch: list[int]) -> list[int]:
        """What it does."""
        return batch

    assert some_function.__name__ == "some_function"  # type: ignore[attr-defined]
    assert some_function.__doc__ == "What it does."
    assert some_function.__wrapped__([1]) == [1]  # type: ignore[attr-defined]
    assert "some_function" in repr(some_function)
    assert some_function.max_batch_size == 3


# ---- context

WHO: contextvars.ContextVar[str] = contextvars.ContextVar("WHO", default="nobody")


@every_loop
@pytest.mark.parametrize("where", ["coroutine", "loop threads", "thread"])
async def test_batches_run_in_the_context_of_construction(where: str) -> None:
    """In a copy of it, made per batch: no batch sees a caller's variables, nor what another batch has set."""

    def who(batch: list[str]) -> list[str]:
        seen = WHO.get()
        WHO.set("a batch")
        return [seen for _ in batch]

    async def async_who(batch: list[str]) -> list[str]:
        return who(batch)

    WHO.set("the maker")
    if where == "coroutine":
        batcher = batched(async_who, max_batch_size=1)
    else:
        batcher = batched(who, max_batch_size=1, executor="thread" if where == "thread" else None)

    async def call(name: str) -> str:
        WHO.set(name)
        answer = await batcher.process(name)
        assert WHO.get() == name
        return answer

    calls = [asyncio.create_task(call(name)) for name in ("first", "second")]
    assert await asyncio.gather(*calls) == ["the maker", "the maker"]
    WHO.set("the caller")
    assert await batcher.process("third") == "the maker"
    assert WHO.get() == "the caller"
    await batcher.stop()


# ---- setup_worker


class WithSetup(AsyncBatcher[Any, Any]):
    """Counts its set-ups; the first `failures` of them fail."""

    def __init__(self, failures: int = 0, **options: Any) -> None:
        super().__init__(**options)
        self.failures = failures
        self.seen: list[bool] = []  # not a number that the set-up binds: that would be one for each slot
        self.batches = 0
        self.is_ready = False

    @property
    def setups(self) -> int:
        """So many."""
        return len(self.seen)

    def setup_worker(self) -> None:
        """Count."""
        assert not self.is_ready
        self.seen.append(True)
        if self.setups <= self.failures:
            msg = f"set-up {self.setups}"
            raise OSError(msg)
        self.is_ready = True


class CoroutineWithSetup(WithSetup):
    """On the loop."""

    async def process_batch(self, batch: list[Any]) -> list[Any]:
        """Count."""
        assert self.is_ready
        self.batches += 1
        await asyncio.sleep(0)
        return batch


class AsyncSetup(CoroutineWithSetup):
    """With an async set-up."""

    async def setup_worker(self) -> None:  # type: ignore[override]
        """Take a while."""
        await asyncio.sleep(0)
        super().setup_worker()
        await asyncio.sleep(0)


class ThreadWithSetup(WithSetup):
    """In threads."""

    def process_batch(self, batch: list[Any]) -> list[Any]:
        """Count."""
        assert self.is_ready
        self.batches += 1
        return batch


# The class, its options, and how many slots there are, and are set up by start().
SETUPS: dict[str, tuple[type[WithSetup], dict[str, Any], int, int]] = {
    "coroutine": (CoroutineWithSetup, {"concurrency": 4}, 1, 1),
    "async set-up": (AsyncSetup, {"concurrency": 4}, 1, 1),
    "loop threads": (ThreadWithSetup, {"concurrency": 4}, 4, 1),
    "thread": (ThreadWithSetup, {"executor": "thread", "max_workers": 4}, 4, 4),
}


@every_loop
@pytest.mark.parametrize("kind", SETUPS)
@pytest.mark.parametrize("started", [False, True])
async def test_the_set_up_runs_once_before_the_first_batch(kind: str, started: bool) -> None:  # noqa: FBT001
    """It runs exactly once in each slot, however many batches come at the same time."""
    cls, options, slots, at_start = SETUPS[kind]
    batcher = cls(max_batch_size=1, **options)
    if started:
        await batcher.start()
        assert batcher.setups == at_start
        await batcher.start()
    assert await gather(batcher, *range(20)) == list(range(20))
    assert (at_start if started else 1) <= batcher.setups <= slots
    await batcher.stop()


@every_loop
@pytest.mark.parametrize("kind", SETUPS)
async def test_a_set_up_that_fails_is_tried_again(kind: str) -> None:
    """Its error goes to that batch's callers, and the next batch tries again."""
    cls, options, slots, _ = SETUPS[kind]
    batcher = cls(failures=2, **options)
    for attempt in (1, 2):
        errors = await gather(batcher, 1, 2)
        assert [type(error) for error in errors] == [OSError, OSError]
        assert str(errors[0]) == f"set-up {attempt}"
    assert await gather(batcher, 1, 2) == [1, 2]
    assert await gather(batcher, 3) == [3]
    assert 3 <= batcher.setups <= 2 + slots
    await batcher.stop()


@pytest.mark.parametrize("kind", SETUPS)
async def test_start_raises_what_the_set_up_raised(kind: str) -> None:
    """And can be called again."""
    cls, options, _, at_start = SETUPS[kind]
    batcher = cls(failures=1, **options)
    with pytest.raises(OSError, match="set-up"):
        await batcher.start()
    await batcher.start()
    assert batcher.setups == 1 + at_start
    await batcher.stop()
    with pytest.raises(OSError, match="set-up"):
        async with cls(failures=1, **options):
            pytest.fail("it did not start")


@pytest.mark.parametrize("name", SIGNALS)
async def test_a_signal_out_of_a_set_up_in_a_thread_is_a_batch_error(name: str) -> None:
    """sys.exit() in setup_worker ends no server either, not even one that awaits start()."""

    def setup_worker() -> None:
        error = SIGNALS[name]()
        raise error

    batcher = batched(echo, setup_worker=setup_worker)
    errors = await gather(batcher, 1)
    assert [type(error) for error in errors] == [BatchError]
    came_out: BaseException | None = None
    try:
        await batcher.start()
    except BaseException as exc:  # noqa: BLE001 - a KeyboardInterrupt would end the test run
        came_out = exc
    assert isinstance(came_out, BatchError)
    assert came_out.original_type == name
    await batcher.stop()


def test_an_async_set_up_needs_an_async_process_batch() -> None:
    """A thread cannot await it: it is refused at construction, rather than never run."""

    class Mixed(ThreadWithSetup):
        async def setup_worker(self) -> None:  # type: ignore[override]
            """Never run."""

    with pytest.raises(TypeError, match="setup_worker"):
        Mixed()


@every_loop
async def test_a_set_up_whose_first_caller_leaves() -> None:
    """A set-up goes on, and is not run again, when those who waited for it have left."""
    gate = asyncio.Event()
    setups: list[int] = []

    async def setup_worker() -> None:
        setups.append(1)
        await gate.wait()

    batcher = batched(async_echo, setup_worker=setup_worker, max_queue_time=0, concurrency=2)
    first = asyncio.create_task(batcher.process(1))
    for _ in range(5):
        await asyncio.sleep(0)
    assert setups == [1]
    first.cancel()
    second = asyncio.create_task(batcher.process(2))
    await asyncio.sleep(0)
    gate.set()
    assert await second == 2
    assert setups == [1]
    await batcher.stop()


# ---- loops and processes


@pytest.mark.parametrize("function", [echo, async_echo])
def test_a_second_loop_while_the_first_lives(function: Callable[..., Any]) -> None:
    """It is a clear error, not a hang, and the first loop is not disturbed; when that has closed, the second may come."""
    batcher = batched(function, max_queue_time=0)
    with asyncio.Runner() as second:
        with asyncio.Runner() as first:
            assert first.run(gather(batcher, 1)) == [1]
            for call in (batcher.process(2), batcher.start(), batcher.stop(), batcher.stop(force=True)):
                with pytest.raises(RuntimeError, match="another event loop"):
                    second.run(call)
            assert first.run(gather(batcher, 3)) == [3]
        assert second.run(gather(batcher, 4)) == [4]
        second.run(batcher.stop())


@pytest.mark.parametrize("function", [echo, async_echo])
@pytest.mark.parametrize("options", [{}, {"executor": "thread"}])
def test_a_new_loop_after_the_old_one_has_closed(function: Callable[..., Any], options: dict[str, Any]) -> None:
    """Two runs in a row, with items left waiting and no stop between them: the batcher starts afresh."""
    if function is async_echo and options:
        pytest.skip("an async process_batch takes no executor")
    batcher = batched(function, max_batch_size=2, **options)
    left: list[asyncio.Future[Any]] = []

    async def main(item: int) -> Any:
        results = await gather(batcher, item, item)
        batcher.max_queue_time = 1000.0
        left.append(batcher.submit(-1))
        return results

    for item in range(3):
        batcher.max_queue_time = 0.0
        assert asyncio.run(main(item)) == [item, item]
    assert not any(future.done() for future in left)
    asyncio.run(batcher.stop())


def test_futures_and_options_after_the_loop_has_closed() -> None:
    """A future that is left over can be cancelled, a call can be dropped, an option can be set: without an error."""
    batcher = batched(async_echo, max_queue_time=50.0)
    left: list[Any] = []

    async def main() -> None:
        left.append(batcher.submit(1))
        call = batcher.process(2)
        call.send(None)
        left.append(call)
        await asyncio.sleep(0)
        left.append(batcher.submit(3))

    asyncio.run(main())
    batcher.max_queue_time = 5.0
    batcher.max_batch_size = 1
    left[0].cancel()
    left[1].close()
    left[2].cancel()
    assert not asyncio.run(batcher.is_running())
    assert asyncio.run(batcher.process(4)) == 4


def test_a_program_that_ends_without_stop_starts_no_further_batch() -> None:
    """When the program's end cancels the batch that runs, those that wait are not begun, and everyone is let go."""
    batches: list[list[int]] = []
    futures: list[asyncio.Future[Any]] = []

    async def process_batch(batch: list[int]) -> None:
        batches.append(batch)
        await asyncio.sleep(3600)

    async def main() -> None:
        batcher = make(process_batch, max_batch_size=1)
        futures.extend(batcher.submit(item) for item in range(3))
        await asyncio.sleep(0)
        await asyncio.sleep(0)

    asyncio.run(main())
    gc.collect()
    assert batches == [[0]]
    assert all(future.cancelled() or isinstance(future.exception(), BatcherStoppedError) for future in futures)


def test_a_loop_that_closes_under_a_running_batch() -> None:
    """A batch whose task dies with its loop ends quietly: none follows it, nothing is called on the closed loop."""
    batches: list[list[int]] = []

    async def process_batch(batch: list[int]) -> list[int]:
        batches.append(list(batch))
        await asyncio.Event().wait()
        return batch

    async def main() -> None:
        batcher = make(process_batch, max_batch_size=1)
        for item in range(3):
            batcher.submit(item)
        for _ in range(3):
            await asyncio.sleep(0)

    loop = asyncio.new_event_loop()
    loop.set_exception_handler(lambda _loop, _context: None)  # that a task was destroyed, asyncio says with reason
    loop.run_until_complete(main())
    loop.close()
    gc.collect()
    assert batches == [[0]]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.parametrize("started", [False, True])
def test_after_a_fork_the_childs_copy_refuses(started: bool) -> None:  # noqa: FBT001
    """What runs in the parent is the parent's: the child gets a clear error. One that never started may be used."""
    batcher = batched(async_echo, max_queue_time=0)

    async def in_child() -> bool:
        if not started:
            return bool(await batcher.process(2) == 2)
        refused = 0
        for call in (batcher.process(2), batcher.start(), batcher.stop()):
            try:
                await call
            except RuntimeError as exc:
                refused += "fork" in str(exc)
        return refused == 3

    with asyncio.Runner() as runner:
        if started:
            assert runner.run(batcher.process(1)) == 1
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # there may be threads about; the child needs none of them
            pid = os.fork()
        if pid == 0:
            status = 1
            try:
                with contextlib.suppress(BaseException):
                    status = 0 if asyncio.run(asyncio.wait_for(in_child(), 20.0)) else 2
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert runner.run(batcher.process(3)) == 3, "the parent is not disturbed"
        runner.run(batcher.stop())


# ---- life


@every_loop
async def test_async_with_runs_what_waits() -> None:
    """Leaving the block drains; then the batcher is stopped."""
    async with batched(async_echo, max_queue_time=3600) as batcher:
        assert await batcher.is_running()
        futures = [batcher.submit(item) for item in range(3)]
    assert [future.result() for future in futures] == [0, 1, 2]
    assert not await batcher.is_running()
    with pytest.raises(BatcherStoppedError, match="start"):
        await batcher.process(1)
    async with batcher:
        batcher.max_queue_time = 0
        assert await batcher.process(1) == 1


@every_loop
async def test_leaving_async_with_by_an_exception_forces() -> None:
    """Nobody is left waiting, and the exception comes out."""
    forever = asyncio.Event()

    @batched(max_batch_size=1)
    async def process_batch(batch: list[int]) -> None:
        assert len(batch) == 1
        await forever.wait()

    futures: list[asyncio.Future[Any]] = []
    with pytest.raises(ZeroDivisionError):  # noqa: PT012 - the block is what is tested
        async with process_batch:
            futures += [process_batch.submit(item) for item in range(3)]
            await asyncio.sleep(0)
            raise ZeroDivisionError
    assert [type(future.exception()) for future in futures] == [BatcherStoppedError] * 3
    assert len(asyncio.all_tasks()) == 1


@every_loop
@pytest.mark.parametrize("way", ["force", "timeout", "cancel"])
async def test_no_coroutine_of_ours_outlives_a_stop(way: str) -> None:
    """After a stop by force, by timeout or by cancellation no batch runs and nobody waits."""
    forever = asyncio.Event()
    ended: list[int] = []

    async def wait(batch: list[int]) -> None:
        try:
            await forever.wait()
        finally:
            ended.extend(batch)

    process_batch = make(wait, max_batch_size=1, concurrency=2)
    calls = [asyncio.ensure_future(process_batch.process(item)) for item in range(4)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    if way == "force":
        await process_batch.stop(force=True)
    elif way == "timeout":
        with pytest.raises(TimeoutError):
            await process_batch.stop(timeout=0)
    else:
        stopping = asyncio.ensure_future(process_batch.stop())
        await asyncio.sleep(0)
        stopping.cancel()
        with pytest.raises(asyncio.CancelledError):
            await stopping
    assert sorted(ended) == [0, 1]
    errors = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(error) for error in errors] == [BatcherStoppedError] * 4
    assert len(asyncio.all_tasks()) == 1


async def test_stop_waits_for_a_thread() -> None:
    """A drain returns when the batch in the thread has ended."""
    gate = threading.Event()

    def process_batch(batch: list[int]) -> list[int]:
        gate.wait(30)
        return batch

    async with batched(process_batch, max_queue_time=0, executor="thread", max_workers=1) as batcher:
        future = batcher.submit(1)
        await asyncio.sleep(0)
        stopping = asyncio.ensure_future(batcher.stop())
        for _ in range(10):
            await asyncio.sleep(0)
        assert not stopping.done()
        gate.set()
        await stopping
        assert future.result() == 1


async def test_a_forced_stop_does_not_wait_for_a_thread() -> None:
    """A thread cannot be ended: its callers are let go at once, and it finishes its batch unseen."""
    gate, entered = threading.Event(), threading.Event()

    def process_batch(batch: list[int]) -> list[int]:
        entered.set()
        gate.wait(30)
        return batch

    batcher = batched(process_batch, max_queue_time=0, executor="thread", max_workers=1)
    future = batcher.submit(1)
    await asyncio.get_running_loop().run_in_executor(None, entered.wait, 30)
    await batcher.stop(force=True)
    assert isinstance(future.exception(), BatcherStoppedError)
    gate.set()


async def test_a_given_executor_is_left_running() -> None:
    """What the batcher was given, it does not shut down, not even by force."""
    with ThreadPoolExecutor(1) as executor:
        for force in (False, True):
            batcher = batched(echo, executor=executor)
            assert await batcher.process(1) == 1
            await batcher.stop(force=force)
        assert executor.submit(echo, [1]).result() == [1]


@pytest.mark.parametrize("force", [False, True])
async def test_stop_while_the_start_sets_up_a_thread(force: bool) -> None:  # noqa: FBT001
    """The loop is not held up by a set-up that still runs in a thread, even one that waits for the loop."""
    loop = asyncio.get_running_loop()
    entered, turned, over = threading.Event(), threading.Event(), threading.Event()
    in_time: list[bool] = []

    def setup_worker() -> None:
        entered.set()
        in_time.append(turned.wait(5))
        over.set()

    batcher = batched(echo, setup_worker=setup_worker, executor="thread", max_workers=1)
    starting = asyncio.ensure_future(batcher.start())
    await loop.run_in_executor(None, entered.wait, 30)
    loop.call_later(0.01, turned.set)
    await batcher.stop(force=force)
    await asyncio.wait([starting], timeout=10)
    assert starting.done()
    starting.exception()
    await loop.run_in_executor(None, over.wait, 30)
    assert in_time == [True], "the loop went on turning"


@every_loop
async def test_stop_by_force_while_the_start_sets_up() -> None:
    """After a stop nobody waits, neither does who called start()."""
    never = asyncio.Event()

    async def setup_worker() -> None:
        await never.wait()

    batcher = batched(async_echo, setup_worker=setup_worker)
    starting = asyncio.ensure_future(batcher.start())
    for _ in range(3):
        await asyncio.sleep(0)
    await batcher.stop(force=True)
    await asyncio.wait([starting], timeout=1)
    done = starting.done()
    starting.cancel()
    assert done
    with pytest.raises(BatcherStoppedError):
        await starting


@every_loop
async def test_a_batch_cannot_wait_for_its_own_end() -> None:
    """stop() from inside process_batch is refused, rather than a deadlock; the batcher runs on."""

    class Stopper(AsyncBatcher[int, str]):
        async def process_batch(self, batch: list[int]) -> list[str]:
            with pytest.raises(RuntimeError, match="force=True"):
                await self.stop()
            return ["alive" for _ in batch]

    batcher = Stopper(max_queue_time=0)
    assert await gather(batcher, 1) == ["alive"]
    assert await gather(batcher, 2) == ["alive"]
    await batcher.stop()


@every_loop
async def test_a_batch_can_stop_its_batcher_by_force() -> None:
    """Its waiters are let go at once, and so is the batch."""
    ended = asyncio.Event()

    class Stopper(AsyncBatcher[int, str]):
        async def process_batch(self, batch: list[int]) -> None:  # noqa: ARG002 - stopped before
            try:
                await self.stop(force=True)
            finally:
                ended.set()

    batcher = Stopper(max_queue_time=0)
    errors = await gather(batcher, 1, 2)
    assert [type(error) for error in errors] == [BatcherStoppedError] * 2
    await asyncio.wait_for(ended.wait(), 5.0)
    assert not await batcher.is_running()


async def test_is_running() -> None:
    """From the first call or start() to the stop."""
    batcher = batched(async_echo, max_queue_time=0)
    assert not await batcher.is_running()
    await batcher.process(1)
    assert await batcher.is_running()
    await batcher.stop()
    assert not await batcher.is_running()
    await batcher.start()
    assert await batcher.is_running()
    await batcher.stop(force=True)
    assert not await batcher.is_running()


# ---- subclasses


async def test_a_subclass_that_forgets_super_init() -> None:
    """It is told so."""

    class Forgetful(AsyncBatcher[int, int]):
        def __init__(self) -> None:
            pass

        async def process_batch(self, batch: list[int]) -> list[int]:
            return batch

    with pytest.raises(RuntimeError, match=r"Forgetful.*super\(\).__init__\(\)"):
        await Forgetful().process(1)


async def test_a_subclass_may_use_any_name() -> None:
    """The batcher keeps nothing of its own under a name that a subclass would use."""
    names = [
        "_queue",
        "_loop",
        "_state",
        "_session",
        "_life",
        "_options",
        "_timer",
        "_context",
        "_stop",
        "queue",
        "loop",
        "options",
    ]
    names += [
        "session",
        "timer",
        "pool",
        "_pool",
        "_executor",
        "_is_running",
        "_current_task",
        "state",
        "runner",
        "name",
        "context",
    ]

    class Crowded(AsyncBatcher[int, int]):
        def __init__(self) -> None:
            for name in names:
                setattr(self, name, "before")
            super().__init__(max_queue_time=0)
            assert vars(self) == dict.fromkeys(names, "before")
            for name in names:
                setattr(self, name, "after")

        async def process_batch(self, batch: list[int]) -> list[int]:
            assert vars(self) == dict.fromkeys(names, "after")
            return batch

    async with Crowded() as batcher:
        assert await batcher.process(1) == 1
        assert vars(batcher) == dict.fromkeys(names, "after")


async def test_a_subclass_with_slots() -> None:
    """It may have slots, and then no __dict__."""

    class Slotted(AsyncBatcher[int, int]):
        __slots__ = ("factor",)

        def __init__(self, factor: int) -> None:
            super().__init__()
            self.factor = factor

        async def process_batch(self, batch: list[int]) -> list[int]:
            return [item * self.factor for item in batch]

    async with Slotted(3) as batcher:
        assert not hasattr(batcher, "__dict__")
        assert await batcher.process(2) == 6
        twin = copy.copy(batcher)
    assert await twin.process(2) == 6
    await twin.stop()


class Sized(AsyncBatcher[int, int]):
    """Can be pickled by reference."""

    def __init__(self, factor: int, **options: Any) -> None:
        super().__init__(**options)
        self.factor = factor

    async def process_batch(self, batch: list[int]) -> list[int]:
        """Multiply."""
        return [item * self.factor for item in batch]


@every_loop
@pytest.mark.parametrize("twin_of", [copy.copy, copy.deepcopy, lambda batcher: pickle.loads(pickle.dumps(batcher))])  # noqa: S301
async def test_a_copy_is_a_batcher_of_its_own(twin_of: Callable[[Sized], Sized]) -> None:
    """A copied or unpickled batcher has the options and the attributes of the original, and nothing of its life."""
    async with Sized(3, max_batch_size=7, max_queue_time=0, concurrency=2) as batcher:
        waiting = batcher.submit(1)
        twin = twin_of(batcher)
        assert await waiting == 3
        assert not await twin.is_running()
        assert (twin.factor, twin.max_batch_size, twin.max_queue_time, twin.concurrency) == (3, 7, 0, 2)
        assert await twin.process(2) == 6
        await twin.stop()
        assert await batcher.process(3) == 9
        await batcher.stop()
    assert await twin_of(batcher).process(4) == 12, "a copy of a stopped batcher is not stopped"


async def test_subclasses_of_subclasses_and_super() -> None:
    """Inheritance works as anywhere: process_batch and setup_worker may call super()."""

    class Base(CoroutineWithSetup):
        async def process_batch(self, batch: list[Any]) -> list[Any]:
            return [item + 1 for item in await super().process_batch(batch)]

    class Derived(Base):
        def setup_worker(self) -> None:
            super().setup_worker()

    async with Derived() as batcher:
        assert await gather(batcher, 1, 2) == [2, 3]
        assert batcher.setups == 1


# ---- calls from inside, many calls, calls that leave


@every_loop
async def test_a_batch_may_call_another_batcher() -> None:
    """Batchers may be chained."""
    async with batched(async_echo, max_queue_time=0) as inner:

        @batched(max_queue_time=0)
        async def outer(batch: list[int]) -> list[int]:
            return list(await asyncio.gather(*(inner.process(item * 10) for item in batch)))

        assert await gather(outer, 1, 2, 3) == [10, 20, 30]
        await outer.stop()


@every_loop
async def test_a_batch_may_call_its_own_batcher() -> None:
    """With a slot to spare process_batch may submit to the batcher that runs it."""

    class Countdown(AsyncBatcher[int, int]):
        async def process_batch(self, batch: list[int]) -> list[int]:
            return [0 if item == 0 else 1 + await self.submit(item - 1) for item in batch]

    async with Countdown(concurrency=6, max_queue_time=0) as batcher:
        assert await gather(batcher, 5) == [5]
        assert await gather(batcher, 3) == [3]


@needs_eager_tasks
@pytest.mark.slow
async def test_ten_thousand_eager_batches_in_a_row() -> None:
    """Batches that end before `submit` returns do not pile up on the stack."""
    if not isinstance(asyncio.get_running_loop(), asyncio.BaseEventLoop):
        pytest.skip("not every uvloop can pass its options to every Python's eager tasks")
    asyncio.get_running_loop().set_task_factory(asyncio.eager_task_factory)  # type: ignore[attr-defined,unused-ignore]
    async with batched(async_echo, max_batch_size=1) as batcher:
        assert await asyncio.gather(*(batcher.process(item) for item in range(10_000))) == list(range(10_000))
        assert await asyncio.gather(*(batcher.submit(item) for item in range(10_000))) == list(range(10_000))
    gate = asyncio.Event()

    async def gated(batch: list[int]) -> list[int]:
        if not gate.is_set():
            await gate.wait()
        return batch

    async with batched(gated, max_batch_size=1) as batcher:  # 9,999 batches become due when the first one ends
        futures = [batcher.submit(item) for item in range(10_000)]
        gate.set()
        assert await asyncio.gather(*futures) == list(range(10_000))


@every_loop
async def test_gather_over_submit() -> None:
    """What submit returns is a future like any other."""
    async with batched(async_echo, max_batch_size=10) as batcher:
        assert await asyncio.gather(*map(batcher.submit, range(25))) == list(range(25))
        future = batcher.submit("x")
        seen: list[asyncio.Future[Any]] = []
        future.add_done_callback(seen.append)
        assert await asyncio.wait_for(asyncio.shield(future), 5.0) == "x"
        await asyncio.sleep(0)
        assert seen == [future]
        assert future.get_loop() is asyncio.get_running_loop()
        assert "finished" in repr(future)


@every_loop
async def test_a_submitted_future_can_be_cancelled_in_any_way() -> None:
    """By itself, through a gather, through the task that awaits it, by a timeout: queued, it is never run."""
    ran: list[Any] = []

    @batched(max_queue_time=0.02)
    async def process_batch(batch: list[str]) -> list[str]:
        ran.extend(batch)
        return batch

    async def wait(future: asyncio.Future[str]) -> str:
        return await future

    direct = process_batch.submit("direct")
    assert direct.cancel("why")
    gathered = asyncio.gather(process_batch.submit("gathered"), process_batch.submit("gathered too"))
    gathered.cancel()
    task = asyncio.ensure_future(wait(process_batch.submit("awaited")))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(process_batch.submit("timed out"), 0)
    kept = process_batch.submit("kept")
    assert await kept == "kept"
    for future in (direct, gathered, task):
        with pytest.raises(asyncio.CancelledError):
            await future
    assert ran == ["kept"]
    await process_batch.stop()


@every_loop
async def test_a_timeout_around_process() -> None:
    """A caller that gives up gets TimeoutError; those who stay get their results, also from the same batch."""
    gate = asyncio.Event()

    @batched(max_batch_size=2)
    async def process_batch(batch: list[int]) -> list[int]:
        await gate.wait()
        return batch

    stays = asyncio.ensure_future(process_batch.process(1))
    await asyncio.sleep(0)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await process_batch.process(2)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(process_batch.process(3), 0.01)
    gate.set()
    assert await stays == 1
    await process_batch.stop()


async def test_a_failure_that_nobody_waits_for_any_more_makes_no_noise() -> None:
    """Callers who left, one by cancellation and one whose coroutine was closed, leave no exception that "was never retrieved"."""
    gate = asyncio.Event()

    async def fail(batch: list[int]) -> None:
        await gate.wait()
        assert len(batch) == 3
        msg = "too late"
        raise ValueError(msg)

    process_batch = make(fail, max_batch_size=3)
    cancelled = asyncio.ensure_future(process_batch.process(1))
    closed = process_batch.process(2)
    closed.send(None)
    submitted = process_batch.submit(3)
    await asyncio.sleep(0)
    cancelled.cancel()
    closed.close()
    submitted.cancel()
    gate.set()
    await process_batch.stop()


async def test_a_refused_call_makes_no_noise() -> None:
    """Futures of calls that were refused are nobody's."""
    batcher = batched(async_echo)
    await batcher.stop()
    for _ in range(3):
        with pytest.raises(BatcherStoppedError):
            batcher.submit(1)
        with pytest.raises(BatcherStoppedError):
            await batcher.process(1)


def test_submit_needs_a_running_loop() -> None:
    """Outside of one it is an error."""
    with pytest.raises(RuntimeError, match="no running event loop"):
        batched(async_echo).submit(1)


# ---- the log and the memory


WRONG_COUNT = "BadResultError: process_batch returned 0 results for 3 items; return exactly one per item, in order"


async def test_one_line_per_failed_batch(caplog: pytest.LogCaptureFixture) -> None:
    """It names the function and says the size, and the error's type and message."""

    @batched(max_batch_size=3)
    async def fail(batch: list[str]) -> list[Any]:
        if batch[0] == "wrong count":
            return []
        if batch[0] == "some":
            return [ValueError(item) for item in batch]
        raise LookupError(len(batch))

    name = f"{__name__}.{fail.process_batch.__qualname__}"
    caplog.set_level(logging.DEBUG)
    await gather(fail, "secret 1", "secret 2", "secret 3")
    await gather(fail, "wrong count", "secret 2", "secret 3")
    assert [record.getMessage() for record in errors_of(caplog)] == [
        f"{name}: a batch of 3 items failed: LookupError: 3",
        f"{name}: a batch of 3 items failed: {WRONG_COUNT}",
    ]
    await gather(fail, "some", "secret 2", "secret 3")
    assert len(errors_of(caplog)) == 2, "the batch did not fail"
    assert all(record.exc_info is None and record.levelno == logging.ERROR for record in errors_of(caplog))
    await fail.stop()


async def test_success_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is said where nothing went wrong."""
    caplog.set_level(logging.DEBUG)
    async with batched(async_echo, max_queue_time=0) as batcher:
        await batcher.process("secret")
    assert errors_of(caplog) == []


class Marked(Exception):  # noqa: N818
    """Can be referred to weakly."""


class Item:
    """Can be referred to weakly."""


@pytest.mark.parametrize("way", ["process", "submit"])
@pytest.mark.parametrize("in_thread", [False, True])
async def test_a_failure_leaves_no_reference_cycle(way: str, in_thread: bool) -> None:  # noqa: FBT001
    """When the caller drops its exception, that, its cause and the item are gone at once, without the garbage collector."""
    marks: list[weakref.ref[Any]] = []

    def fail(batch: list[Item]) -> None:
        error = Marked("no")
        marks.append(weakref.ref(error))
        try:
            raise error
        finally:
            del error, batch

    async def async_fail(batch: list[Item]) -> None:
        try:
            fail(batch)
        finally:
            del batch

    async def call(batcher: AsyncBatcher[Item, Any]) -> None:
        item = Item()
        marks.append(weakref.ref(item))
        try:
            await (batcher.process(item) if way == "process" else batcher.submit(item))
        except Marked as exc:
            marks.append(weakref.ref(exc))
        finally:
            del item

    async with make(fail if in_thread else async_fail, max_queue_time=0) as batcher:
        gc.collect()
        gc.disable()
        try:
            await call(batcher)
            for _ in range(5):
                await asyncio.sleep(0)
            if in_thread:  # the thread lets go of its last call when it takes the next one
                await asyncio.get_running_loop().run_in_executor(None, int)
            alive = [mark() for mark in marks]
        finally:
            gc.enable()
        assert alive == [None, None, None]


@pytest.mark.slow
async def test_ten_thousand_failures_leave_nothing() -> None:
    """Failing batches pile up neither tracebacks nor anything else."""

    @batched(max_batch_size=10)
    async def fail(batch: list[int]) -> list[Any]:
        if batch[0] % 2:
            raise Marked(batch)
        return [Marked(item) for item in batch]

    logger = logging.getLogger("async_batcher")
    logger.disabled = True
    try:

        async def rounds(count: int) -> None:
            for start in range(count):
                futures = [fail.submit(start) for _ in range(10)]
                await asyncio.wait(futures)
                assert all(isinstance(future.exception(), Marked) for future in futures)

        await rounds(1100)  # until what is kept of the last batches is as much as it will be
        gc.collect()
        before = len(gc.get_objects())
        await rounds(10_000)
        gc.collect()
        assert len(gc.get_objects()) - before < 1000
    finally:
        logger.disabled = False
    await fail.stop()


async def test_a_stopped_batcher_is_let_go() -> None:
    """After its stop nothing holds a batcher, nor its items and results."""

    class Short(AsyncBatcher[Item, Item]):
        async def process_batch(self, batch: list[Item]) -> Sequence[Item]:
            return batch

    batcher = Short(max_queue_time=0)
    item = Item()
    marks: list[weakref.ref[Any]] = [weakref.ref(batcher), weakref.ref(item)]
    assert await batcher.process(item) is item
    await batcher.stop()
    del batcher, item
    await asyncio.sleep(0)
    gc.collect()
    assert [mark() for mark in marks] == [None, None]


async def test_an_ended_batch_is_let_go_while_the_batcher_lives() -> None:
    """A batcher that is idle holds no item and no result."""
    async with batched(async_echo, max_queue_time=0) as batcher:
        item = Item()
        mark = weakref.ref(item)
        assert await batcher.process(item) is item
        del item
        for _ in range(3):
            await asyncio.sleep(0)
        gc.collect()
        assert mark() is None
