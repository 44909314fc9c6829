"""The exceptions that callers of a failed batch get."""

from __future__ import annotations

import asyncio
import dataclasses
import sys
import traceback
from typing import TYPE_CHECKING, Any

import pytest

from async_batcher import batched
from async_batcher._serialization.caller_exceptions import name_of
from async_batcher.exceptions import BatchError, BatcherStoppedError
from tests.support.batchers import (
    CONTROL_FLOW,
    async_echo,
    failing_batcher,
    make_batcher,
    process_all,
)

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.usefixtures("no_noise")
every_loop = pytest.mark.every_loop
needs_eager_tasks = pytest.mark.skipif(
    sys.version_info < (3, 12), reason="eager tasks came with Python 3.12"
)


@every_loop
async def test_every_caller_gets_an_exception_of_its_own() -> None:
    """It has the original's type, traceback, cause and notes, and a note about the item."""
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

    errors = await process_all(fail, 1, 2, 3)
    assert [type(error) for error in errors] == [LookupError] * 3
    assert len({id(error) for error in (*errors, *raised)}) == 4
    for place, error in enumerate(errors, 1):
        assert error.args == ("no", 3)
        assert error.__notes__ == [
            "a note",
            f"item {place} of 3 in a batch of {name_of(fail.process_batch)}",
        ]
        assert error.__cause__ is raised[0].__cause__
        assert isinstance(error.__cause__, IndexError)
        assert error.__suppress_context__
        assert "raise error from exc" in "".join(traceback.format_exception(error))
    assert raised[0].__notes__ == ["a note"]
    assert len({id(error.__notes__) for error in errors}) == 3
    await fail.stop()


class MessageError(Exception):
    """Builds its message from its argument, as many classes do."""

    def __init__(self, name: str) -> None:
        super().__init__(f"{name} was not found")
        self.name = name


class OddError(Exception):
    """Has an __init__ that does not accept its args."""

    def __init__(self, code: int, *, text: str) -> None:
        super().__init__(code, text)
        self.code = code


class FalsyError(Exception):
    """Is false and has length 0."""

    def __bool__(self) -> bool:
        """Return False."""
        return False

    def __len__(self) -> int:
        """Return 0."""
        return 0


@dataclasses.dataclass(frozen=True)
class FrozenError(Exception):
    """Accepts no attribute."""


@dataclasses.dataclass(frozen=True)
class FrozenFieldError(Exception):
    """Accepts no attribute, and has a field."""

    code: int


class SealedError(Exception):
    """Accepts no attribute."""

    def __setattr__(self, name: str, value: object) -> None:
        """Fail."""
        raise AttributeError(name)


class NotesError(Exception):
    """Its notes cannot be read."""

    @property
    def __notes__(self) -> list[str]:  # type: ignore[override]
        """Fail."""
        msg = "no notes"
        raise ValueError(msg)


class StrError(Exception):
    """Cannot be printed or copied."""

    def __str__(self) -> str:
        """Fail."""
        raise ValueError

    def __reduce__(self) -> Any:
        """Fail."""
        raise ValueError


class SameError(Exception):
    """Is its own copy."""

    def __copy__(self) -> Any:
        """Return itself."""
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
async def test_any_exception_reaches_every_caller(kind: str, way: str) -> None:
    """Each caller gets its original type, or a BatchError that names the type; no call hangs."""

    def process_batch(batch: list[int]) -> list[Any]:
        if way == "returned":
            return [EXCEPTIONS[kind]() for _ in batch]
        error = EXCEPTIONS[kind]()
        raise error

    async def async_process_batch(batch: list[int]) -> list[Any]:
        return process_batch(batch)

    original = EXCEPTIONS[kind]()
    batcher = batched(process_batch if way == "raised in a thread" else async_process_batch)
    errors = await process_all(batcher, 1, 2)
    await asyncio.wait_for(batcher.stop(), 5.0)
    assert len({id(error) for error in errors}) == 2
    for error in errors:
        if isinstance(error, BatchError):
            assert (
                error.original_type == f"{type(original).__module__}.{type(original).__qualname__}"
            )
            assert kind in str(error)
        else:
            assert type(error) is type(original)
            assert repr(error.args) == repr(original.args)


async def test_a_copied_exception_keeps_its_message() -> None:
    """The copy keeps the message even if the class builds it from its argument."""
    (error,) = await process_all(failing_batcher(lambda: MessageError("a name")), 1)
    assert isinstance(error, MessageError)
    assert str(error) == "a name was not found"
    assert error.name == "a name"


async def test_an_exception_that_cannot_be_copied_is_shared() -> None:
    """Every caller gets the object itself, as in 0.2.2."""

    class UnsteadyError(Exception):
        def __str__(self) -> str:
            return f"at {id(self):x}"

    known = UnsteadyError()
    first, second = await process_all(failing_batcher(lambda: known), 1, 2)
    assert first is second is known
    assert not hasattr(known, "__notes__")


@pytest.mark.parametrize("name", CONTROL_FLOW)
async def test_a_control_flow_exception_in_a_thread_is_a_batch_error(name: str) -> None:
    """sys.exit() stops no server, and a CancelledError cancels no caller."""

    def process_batch(batch: list[int]) -> None:
        assert batch
        error = CONTROL_FLOW[name]()
        raise error

    async with make_batcher(process_batch) as batcher:
        errors = await process_all(batcher, 1, 2)
        assert [type(error) for error in errors] == [BatchError, BatchError]
        assert [error.original_type for error in errors] == [name] * 2
        assert await process_all(batched(async_echo), 3) == [3], "the loop goes on"


@every_loop
@pytest.mark.parametrize("name", ["builtins.GeneratorExit", "asyncio.exceptions.CancelledError"])
async def test_a_control_flow_exception_in_a_coroutine_is_a_batch_error(name: str) -> None:
    """A CancelledError of process_batch does not look like the caller's cancellation."""
    batcher = failing_batcher(CONTROL_FLOW[name])
    errors = await process_all(batcher, 1, 2)
    assert [type(error) for error in errors] == [BatchError, BatchError]
    assert [error.original_type for error in errors] == [name] * 2
    await batcher.stop()


@every_loop
@pytest.mark.parametrize("from_inside", [True, False])
async def test_a_cancelled_batch_does_not_stop_the_batcher(from_inside: bool) -> None:
    """A batch whose task is cancelled, from inside or outside, fails alone."""
    tasks: list[asyncio.Task[Any] | None] = []
    started = asyncio.Event()

    @batched(max_queue_time=0, max_batch_size=2)
    async def process_batch(batch: list[int]) -> list[int]:
        if batch[0] == 0:
            tasks.append(task := asyncio.current_task())
            started.set()
            if from_inside and task is not None:
                task.cancel()
            await asyncio.sleep(60)
        return batch

    calls = asyncio.ensure_future(process_all(process_batch, 0, 1, 2, 3))
    await started.wait()
    if not from_inside and tasks[0] is not None:
        tasks[0].cancel()
    results = await calls
    assert all(isinstance(error, BatchError | BatcherStoppedError) for error in results[:2])
    assert results[2:] == [2, 3]
    assert await process_all(process_batch, 4) == [4]
    assert await process_batch.is_running()
    await process_batch.stop()


async def test_stop_iteration_in_a_coroutine_is_a_runtime_error() -> None:
    """Python itself converts a StopIteration that leaves a coroutine."""
    errors = await process_all(failing_batcher(CONTROL_FLOW["builtins.StopIteration"]), 1, 2)
    assert [type(error) for error in errors] == [RuntimeError, RuntimeError]


@pytest.mark.parametrize("eager", [False, pytest.param(True, marks=needs_eager_tasks)])
@pytest.mark.parametrize("signal", [KeyboardInterrupt, SystemExit])
def test_keyboard_interrupt_and_exit_in_a_coroutine_end_the_program(
    signal: type[BaseException],
    eager: bool,
) -> None:
    """They fail the callers and then propagate out of the loop; nothing else is logged."""
    futures: list[asyncio.Future[Any]] = []

    async def main() -> None:
        if eager:
            asyncio.get_running_loop().set_task_factory(asyncio.eager_task_factory)  # type: ignore[attr-defined,unused-ignore]
        batcher = failing_batcher(signal)
        futures.extend([batcher.submit(1), batcher.submit(2)])
        await asyncio.Event().wait()

    with pytest.raises(signal), asyncio.Runner() as runner:
        runner.run(main())
    errors = [future.exception() for future in futures]
    assert len(errors) == 2
    assert [type(error) for error in errors] == [BatchError, BatchError]
    del futures[:], errors
