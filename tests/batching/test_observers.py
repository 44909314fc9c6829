"""What observes batches: functions and observers, given as ``on_batch``."""

from __future__ import annotations

import asyncio
import collections
import contextvars
import functools
import logging
import pickle
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest

from async_batcher import AsyncBatcher, WorkerPool, batched
from async_batcher._batching.batch import Batch
from async_batcher._batching.bulk import sources
from async_batcher._batching.bulk.slices import BulkFuture, Slice
from async_batcher._batching.instance import LIFECYCLE_ATTR
from async_batcher._batching.records import observers
from async_batcher._batching.records.observers import Observers
from async_batcher.exceptions import (
    BatchError,
    BatcherStoppedError,
    BatchTimeoutError,
    QueueFullException,
)
from async_batcher.failures import isolate
from async_batcher.stats import BatchRecord, BatchStart
from tests.support import scripts
from tests.support.batchers import async_echo
from tests.support.polling import turn, wait_until
from tests.support.virtual_clock import FAKE, FakeBatcher
from tests.support.worker_functions import DEADLINE

if TYPE_CHECKING:
    from collections.abc import Callable

CALLER: contextvars.ContextVar[str | None] = contextvars.ContextVar("CALLER", default=None)


class Recording:
    """An observer that keeps what it gets.

    Attributes:
        batches: What `started` got.
        records: What `finished` got.
    """

    def __init__(self) -> None:
        self.batches: list[BatchStart] = []
        self.records: list[BatchRecord] = []

    def started(self, batch: BatchStart) -> None:
        """Keep it."""
        self.batches.append(batch)

    def finished(self, record: BatchRecord) -> None:
        """Keep it."""
        self.records.append(record)

    @property
    def is_balanced(self) -> bool:
        """Whether each batch that started has finished once."""
        ended = sorted((record.batcher, record.number) for record in self.records)
        return ended == [(batch.batcher, batch.number) for batch in self.batches]


class Capturing(Recording):
    """An observer that captures a context variable of the callers, with a prefix.

    Attributes:
        calls: How often `enqueued` was called.
    """

    def __init__(self, prefix: str = "") -> None:
        super().__init__()
        self.calls = 0
        self._prefix = prefix

    def enqueued(self) -> str | None:
        """Return what the caller has set."""
        self.calls += 1
        caller = CALLER.get()
        return None if caller is None else self._prefix + caller

    @property
    def captured(self) -> list[list[Any]]:
        """What each batch has of its callers."""
        return [batch.captured for batch in self.batches]


class Failing:
    """An observer each of whose methods raises."""

    def __init__(self, error: BaseException | None = None) -> None:
        self._error = ZeroDivisionError() if error is None else error

    def enqueued(self) -> None:
        """Raise."""
        raise self._error

    def started(self, _: object) -> None:
        """Raise."""
        raise self._error

    def finished(self, _: object) -> None:
        """Raise."""
        raise self._error


def as_caller(name: str, function: Callable[[], Any]) -> Any:
    """Call a function in the context of a caller."""
    context = contextvars.copy_context()
    context.run(CALLER.set, name)
    return context.run(function)


def logs(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return what the package has logged."""
    return [record.message for record in caplog.records if record.name == "async_batcher"]


# ---- what observers get


@pytest.mark.virtual_clock
async def test_an_observer_sees_the_start_and_the_end_of_a_batch() -> None:
    """`started` comes before the batch is submitted, `finished` after its callers."""
    events: list[str] = []

    class Ordered(Recording):
        def started(self, batch: BatchStart) -> None:
            super().started(batch)
            events.append(f"started, {len(batcher.batches)} submitted")

        def finished(self, record: BatchRecord) -> None:
            super().finished(record)
            events.append(f"finished, results: {all(future.done() for future in futures)}")

    observer = Ordered()
    batcher = FakeBatcher(on_batch=observer, max_batch_size=2, max_queue_time=9.0, name="tens")
    futures = [batcher.submit(1)]
    await asyncio.sleep(3.0)
    futures.append(batcher.submit(2))
    await turn()
    await asyncio.sleep(4.0)
    batcher.runner.end()
    assert events == ["started, 0 submitted", "finished, results: True"]
    assert observer.batches == [BatchStart("tens", 1, 2, "full", 3.0, None, 1, [])]
    assert observer.records == [BatchRecord(2, "full", 3.0, 4.0, 0, None, "tens", 1, None, 1)]
    assert observer.records[0].exception is None
    await batcher.stop()


@pytest.mark.virtual_clock
async def test_a_record_has_the_exception_of_the_batch() -> None:
    """The object; it is in neither `repr` nor comparisons."""
    observer = Recording()
    batcher = FakeBatcher(on_batch=observer)
    future = batcher.submit(1)
    await turn()
    error = ZeroDivisionError("secret")
    batcher.runner.end(0, error)
    await asyncio.wait([future])
    (record,) = observer.records
    assert record.exception is error
    assert record.error == "builtins.ZeroDivisionError"
    assert "secret" not in repr(record)
    same = BatchRecord(1, "timeout", 0.0, 0.0, 1, record.error, "FakeBatcher", 1)
    assert record == same
    assert hash(record) == hash(same)
    assert hash(observer.batches[0]) == hash(BatchStart("FakeBatcher", 1, 1, "timeout", 0.0))
    await batcher.stop()


@pytest.mark.virtual_clock
async def test_numbers_go_on_after_a_restart() -> None:
    """They count the batches of the batcher, not those since its start."""
    observer = Recording()
    batcher = FakeBatcher(on_batch=observer)
    for item in range(3):
        future = batcher.submit(item)
        await turn()
        batcher.runner.end()
        assert await future == item
        await batcher.stop()
        await batcher.start()
    await batcher.stop()
    assert [batch.number for batch in observer.batches] == [1, 2, 3]
    assert observer.is_balanced


@pytest.mark.virtual_clock
@pytest.mark.parametrize("kind", [list, tuple])
async def test_several_observers(kind: Any) -> None:
    """Functions and observers, in a list or a tuple; changing the list later has no effect."""
    first, second = Recording(), Recording()
    records: list[BatchRecord] = []
    given = [first, records.append, second]
    batcher = FakeBatcher(on_batch=kind(given))
    given.clear()
    future = batcher.submit(1)
    await turn()
    assert first.batches == second.batches == [BatchStart("FakeBatcher", 1, 1, "timeout", 0.0)]
    assert not records
    batcher.runner.end()
    assert await future == 1
    assert first.records == second.records == records
    assert len(records) == 1
    await batcher.stop()


@pytest.mark.virtual_clock
async def test_an_observer_of_several_batchers() -> None:
    """It gets the batches of all, each with the name of its batcher."""
    observer = Recording()
    batchers = [FakeBatcher(on_batch=observer, name=name) for name in ("a", "b")]
    futures = [batcher.submit(1) for batcher in batchers]
    await turn()
    for batcher in batchers:
        batcher.runner.end()
    assert [await future for future in futures] == [1, 1]
    assert [(batch.batcher, batch.number) for batch in observer.batches] == [("a", 1), ("b", 1)]
    assert observer.is_balanced
    for batcher in batchers:
        await batcher.stop()


@pytest.mark.virtual_clock
async def test_a_mock_is_a_function() -> None:
    """It is called, although it seems to have each method that is looked up."""
    observer = mock.Mock()
    batcher = FakeBatcher(on_batch=observer)
    future = batcher.submit(1)
    await turn()
    batcher.runner.end()
    assert await future == 1
    (call,) = observer.mock_calls
    assert call == mock.call(BatchRecord(1, "timeout", 0.0, 0.0, 0, None, "FakeBatcher", 1))
    await batcher.stop()


@pytest.mark.virtual_clock
async def test_a_named_tuple_may_be_an_observer() -> None:
    """It is not taken for several observers."""

    class Pair(collections.namedtuple("Pair", ["batches", "records"])):
        def started(self, batch: BatchStart) -> None:
            self.batches.append(batch)

        def finished(self, record: BatchRecord) -> None:
            self.records.append(record)

    pair = Pair([], [])
    batcher = FakeBatcher(on_batch=pair)
    future = batcher.submit(1)
    await turn()
    batcher.runner.end()
    assert await future == 1
    assert [len(kept) for kept in pair] == [1, 1]
    await batcher.stop()


# ---- enqueued


@pytest.mark.virtual_clock
async def test_what_enqueued_returns_is_captured() -> None:
    """In the context of each caller; None is left out."""
    observer = Capturing()
    batcher = FakeBatcher(on_batch=observer, max_batch_size=3)

    async def call(item: int, caller: str) -> Any:
        CALLER.set(caller)
        return await batcher.process(item)

    calls = [asyncio.create_task(call(item, caller)) for item, caller in [(0, "a"), (1, "b")]]
    calls.append(batcher.call(2))
    await turn()
    submitted = as_caller("c", lambda: batcher.submit(3))
    batcher.runner.end()
    await turn()
    batcher.runner.end()
    assert [await call for call in calls] == [0, 1, 2]
    assert await submitted == 3
    assert observer.captured == [["a", "b"], ["c"]]
    assert observer.calls == 4
    await batcher.stop()


@pytest.mark.virtual_clock
async def test_a_bulk_call_is_captured_once() -> None:
    """Its value is in each of its batches."""
    observer = Capturing()
    batcher = FakeBatcher(on_batch=observer, max_batch_size=2)

    async def call_many() -> Any:
        CALLER.set("bulk")
        return await batcher.process_many(range(3))

    bulk = asyncio.create_task(call_many())
    await turn()
    single = as_caller("single", lambda: batcher.submit(3))
    batcher.runner.end()
    await turn()
    batcher.runner.end()
    assert await bulk == [0, 1, 2]
    assert await single == 3
    assert observer.captured == [["bulk"], ["bulk", "single"]]
    assert observer.calls == 2
    await batcher.stop()


async def test_a_stream_is_captured_once_for_each_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the context of its consumer."""
    monkeypatch.setattr(sources, "_MAX_BLOCKING_READ", DEADLINE)  # so it is one chunk
    observer = Capturing()
    batcher = batched(async_echo, on_batch=observer, max_batch_size=2, max_queue_time=0)
    CALLER.set("stream")
    assert [item async for item in batcher.map(range(4), window=4)] == [0, 1, 2, 3]
    await batcher.stop()
    assert observer.calls == 1
    assert observer.captured == [["stream"], ["stream"]]


@pytest.mark.virtual_clock
async def test_each_observer_gets_its_own_captured_values() -> None:
    """One without `enqueued` gets none."""
    first, second, third = Capturing("1"), Recording(), Capturing("3")
    batcher = FakeBatcher(on_batch=[first, second, third])
    future = as_caller("a", lambda: batcher.submit(0))
    await turn()
    batcher.runner.end()
    assert await future == 0
    assert (first.captured, third.captured) == ([["1a"]], [["3a"]])
    assert [batch.captured for batch in second.batches] == [[]]
    await batcher.stop()


@pytest.mark.virtual_clock
async def test_reruns_have_the_captured_values_of_their_callers() -> None:
    """Each part has those of its own callers."""
    observer = Capturing()
    batcher = FakeBatcher(on_batch=observer, on_failure=isolate(), max_queue_time=1.0)

    async def call_many() -> Any:
        CALLER.set("bulk")
        return await batcher.process_many([0, 1], return_exceptions=True)

    bulk = asyncio.create_task(call_many())
    await turn()
    single = as_caller("single", lambda: batcher.submit(2))
    await asyncio.sleep(1.0)
    batcher.runner.end(0, ZeroDivisionError())
    while batcher.runner.running:
        batcher.runner.end()
    assert await bulk == [0, 1]
    assert await single == 2
    assert observer.captured[0] == ["bulk", "single"]
    assert {batch.reason for batch in observer.batches[1:]} == {"isolation"}
    assert observer.captured[1:] == [["bulk"], ["single"]]
    assert observer.is_balanced
    await batcher.stop()


def test_a_bulk_call_with_several_parts_in_a_batch_is_captured_once() -> None:
    """The others are in their order."""
    observer = Capturing()
    of_batcher = Observers([observer])
    bulk, other = BulkFuture(3), BulkFuture(1)
    as_caller("bulk", lambda: of_batcher.enqueued(bulk))
    as_caller("other", lambda: of_batcher.enqueued(other))
    parts = [Slice(bulk, 0, 1), Slice(other, 0, 1), Slice(bulk, 2, 1)]
    of_batcher.started(Batch([0, 1, 2], parts, [], [], "isolation"))
    assert observer.captured == [["bulk", "other"]]


@pytest.mark.virtual_clock
async def test_a_call_that_is_rejected_is_not_captured() -> None:
    """One that waits for capacity is, when it is called."""
    observer = Capturing()
    batcher = FakeBatcher(on_batch=observer, max_batch_size=1, max_queue_size=1, when_full="wait")
    tasks = [as_caller(name, functools.partial(batcher.call, name)) for name in ("a", "b", "c")]
    await turn()
    assert observer.calls == 3
    with pytest.raises(QueueFullException):
        batcher.submit("d")
    assert observer.calls == 3
    for _ in tasks:
        batcher.runner.end()
        await turn()
    assert [await task for task in tasks] == ["a", "b", "c"]
    assert observer.captured == [["a"], ["b"], ["c"]]
    await batcher.stop()


# ---- each start has one end


async def _submission_fails(batcher: FakeBatcher) -> None:
    with mock.patch.object(batcher.runner, "submit", side_effect=MemoryError):
        futures = [batcher.submit(item) for item in range(2)]
        await turn()
    assert all(isinstance(future.exception(), MemoryError) for future in futures)


async def _fails_and_runs_again(batcher: FakeBatcher) -> None:
    futures = [batcher.submit(item) for item in range(4)]
    await turn()
    while batcher.runner.running:
        batcher.runner.end(0, ZeroDivisionError())
    await asyncio.wait(futures)
    assert {type(future.exception()) for future in futures} == {ZeroDivisionError}


async def _leaks_its_slot(batcher: FakeBatcher) -> None:
    future = batcher.submit(0)
    await turn()
    batcher.runner.on_timeouts[0](BatchTimeoutError("hangs"))
    assert isinstance(future.exception(), BatchTimeoutError)
    batcher.runner.end()


async def _is_abandoned(batcher: FakeBatcher) -> None:
    future = batcher.submit(0)
    await turn()
    future.cancel()
    await turn()
    assert not batcher.runner.running


async def _yields_results_before_its_end(batcher: FakeBatcher) -> None:
    futures = [batcher.submit(item) for item in range(2)]
    await turn()
    batcher.runner.yield_results()
    batcher.runner.end()
    assert [await future for future in futures] == [0, 1]


async def _is_stopped_by_force(batcher: FakeBatcher) -> None:
    futures = [batcher.submit(0)]
    await turn()
    await batcher.stop(force=True)
    assert isinstance(futures[0].exception(), BatcherStoppedError)


@pytest.mark.virtual_clock
@pytest.mark.parametrize(
    "case",
    [
        _submission_fails,
        _fails_and_runs_again,
        _leaks_its_slot,
        _is_abandoned,
        _yields_results_before_its_end,
        _is_stopped_by_force,
    ],
)
async def test_each_batch_that_starts_ends_once(case: Any) -> None:
    """However it ends."""
    observer = Recording()
    batcher = FakeBatcher(on_batch=observer, on_failure=isolate(), cancel_abandoned=True)
    await case(batcher)
    await batcher.stop()
    assert observer.batches
    assert observer.is_balanced


@pytest.mark.slow
@pytest.mark.parametrize("place", ["coroutine", "thread", "WorkerPool"])
@pytest.mark.skipif(sys.platform == "win32", reason="no WorkerPool")
async def test_batches_that_run_end_once(place: str) -> None:
    """Those that return and those that raise; each with its exception."""
    observer = Capturing()
    CALLER.set("a")

    async def on_the_loop(batch: list[int]) -> list[float]:
        return [1 / item for item in batch]

    def elsewhere(batch: list[int]) -> list[float]:
        return [1 / item for item in batch]

    executor: Any = {"coroutine": None, "thread": "thread", "WorkerPool": one_worker}[place]
    function: Any = on_the_loop if place == "coroutine" else elsewhere
    async with batched(function, executor=executor, on_batch=observer, name=place) as batcher:
        assert await batcher(2) == 0.5
        with pytest.raises(ZeroDivisionError):
            await batcher(0)
    assert observer.is_balanced
    assert [type(record.exception) for record in observer.records] == [
        type(None),
        ZeroDivisionError,
    ]
    assert observer.captured == [["a"], ["a"]]
    assert [batch.number for batch in observer.batches] == [1, 2]


def one_worker() -> WorkerPool:
    """Make a pool of one worker."""
    return WorkerPool(1)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["coroutine", "thread", "process"])
async def test_batches_that_a_stop_ends_are_finished(place: str) -> None:
    """By force; a batch in a thread ends when it returns."""
    observer = Recording()
    released = threading.Event()

    async def hang(batch: list[int]) -> list[int]:
        await asyncio.Event().wait()
        return batch

    def wait(batch: list[int]) -> list[int]:
        released.wait(30)
        return batch

    def sleep(batch: list[int]) -> list[int]:
        threading.Event().wait(30)
        return batch

    functions: dict[str, Any] = {"coroutine": hang, "thread": wait, "process": sleep}
    executor: Any = None if place == "coroutine" else place
    batcher = batched(functions[place], executor=executor, max_workers=1 if executor else None,
                      on_batch=observer)  # fmt: skip
    future = batcher.submit(1)
    await wait_until(lambda: observer.batches)
    stopping = asyncio.create_task(batcher.stop(force=True))
    with pytest.raises(BatcherStoppedError):
        await future
    released.set()
    await stopping
    await wait_until(lambda: observer.records)
    assert observer.is_balanced


# ---- observers that raise


@pytest.mark.virtual_clock
async def test_a_function_that_raises_fails_no_batch(caplog: pytest.LogCaptureFixture) -> None:
    """It is called for each batch, and its first exception is logged."""
    records: list[BatchRecord] = []

    def on_batch(record: BatchRecord) -> None:
        records.append(record)
        raise ZeroDivisionError

    batcher = FakeBatcher(on_batch=on_batch)
    with caplog.at_level(logging.ERROR, "async_batcher"):
        for item in range(3):
            future = batcher.submit(item)
            await turn()
            batcher.runner.end()
            assert await future == item
    assert len(records) == 3
    name = f"{__name__}.{on_batch.__qualname__}"
    assert logs(caplog) == [
        f"{FAKE}: the observer {name} raised; its further exceptions are not logged"
    ]
    assert caplog.records[0].exc_info is not None
    assert caplog.records[0].exc_info[0] is ZeroDivisionError
    await batcher.stop()


@pytest.mark.virtual_clock
async def test_observers_that_raise_do_not_affect_others(caplog: pytest.LogCaptureFixture) -> None:
    """The first exception of each is logged, by name; all others still run."""
    before, after = Capturing("1"), Capturing("2")

    def fail(_: object) -> None:
        raise ValueError

    batcher = FakeBatcher(on_batch=[before, Failing(), fail, Failing(), after])
    with caplog.at_level(logging.ERROR, "async_batcher"):
        for item in range(2):
            future = as_caller("a", functools.partial(batcher.submit, item))
            await turn()
            batcher.runner.end()
            assert await future == item
    for observer, prefix in ((before, "1"), (after, "2")):
        assert observer.captured == [[f"{prefix}a"]] * 2
        assert len(observer.records) == 2
        assert observer.is_balanced
    end = "raised; its further exceptions are not logged"
    assert logs(caplog) == [
        f"{FAKE}: the observer {__name__}.Failing.enqueued {end}",
        f"{FAKE}: the observer {__name__}.Failing.enqueued {end}",
        f"{FAKE}: the observer {__name__}.{fail.__qualname__} {end}",
    ]
    await batcher.stop()


class Interrupted(Recording):
    """An observer that raises KeyboardInterrupt for its second batch, in one of its methods."""

    def __init__(self, method: str) -> None:
        super().__init__()
        self._method = method

    def started(self, batch: BatchStart) -> None:
        """Raise, perhaps."""
        super().started(batch)
        if self._method == "started" and batch.number == 2:
            raise KeyboardInterrupt

    def finished(self, record: BatchRecord) -> None:
        """Raise, perhaps."""
        super().finished(record)
        if self._method == "finished" and record.number == 2:
            raise KeyboardInterrupt


@pytest.mark.virtual_clock
@pytest.mark.parametrize("method", ["started", "finished"])
async def test_ctrl_c_in_an_observer_is_raised(method: str) -> None:
    """The callers have an outcome, the slot is released, and the batch that started ends."""
    observer = Interrupted(method)
    batcher = FakeBatcher(on_batch=observer, max_batch_size=1)
    futures = [batcher.submit(item) for item in range(3)]
    if method == "finished":
        batcher.runner.end()
    with pytest.raises(KeyboardInterrupt):
        batcher.runner.end()
    await turn()
    batcher.runner.end()  # the slot is free
    failed = method == "started"
    outcomes = await asyncio.gather(*futures, return_exceptions=True)
    assert [isinstance(outcome, BatchError) for outcome in outcomes] == [False, failed, False]
    assert batcher.batches == ([[0], [2]] if failed else [[0], [1], [2]])
    assert isinstance(observer.records[1].exception, KeyboardInterrupt) == failed
    assert observer.is_balanced
    await batcher.stop()


@pytest.mark.virtual_clock
async def test_observers_may_call_their_batcher() -> None:
    """An item that is submitted in `started` or `finished` is processed."""
    futures: list[asyncio.Future[Any]] = []

    class Calling(Recording):
        def started(self, batch: BatchStart) -> None:
            super().started(batch)
            if batch.number == 1:
                futures.append(batcher.submit("from started"))

        def finished(self, record: BatchRecord) -> None:
            super().finished(record)
            if record.number == 1:
                futures.append(batcher.submit("from finished"))

    observer = Calling()
    batcher = FakeBatcher(on_batch=observer)
    futures.append(batcher.submit("first"))
    await turn()
    for _ in range(2):
        batcher.runner.end()
        await turn()
    assert sorted([await future for future in futures]) == [
        "first",
        "from finished",
        "from started",
    ]
    assert observer.is_balanced
    await batcher.stop()


# ---- what costs nothing


@pytest.mark.parametrize("value", [None, [], ()])
def test_without_observers_nothing_is_made(value: Any) -> None:
    """None and no observers are the same."""
    batcher = FakeBatcher(on_batch=value)
    assert getattr(batcher, LIFECYCLE_ATTR).recorder.observers is None


@pytest.mark.slow
def test_without_observers_their_module_is_not_imported() -> None:
    """Nor are the records."""
    program = """
import asyncio, sys
from async_batcher import batched
async def main():
    async def same(batch): return batch
    async with batched(same) as batcher:
        await batcher(1)
asyncio.run(main())
print(*[name for name in sys.modules if name.endswith((".observers", ".stats"))])
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env=scripts.environment(),
    )
    assert done.stdout.split() == []


@pytest.mark.virtual_clock
async def test_a_function_costs_nothing_before_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """A `BatchStart` is made, and callers are tracked, only for observers that ask for it."""
    made: list[str] = []

    def start(*args: Any, **kwargs: Any) -> BatchStart:
        made.append("BatchStart")
        return BatchStart(*args, **kwargs)

    def enqueued(self: Observers, future: Any) -> None:  # noqa: ARG001 - as the method
        made.append("enqueued")

    monkeypatch.setattr(observers, "BatchStart", start)
    monkeypatch.setattr(Observers, "enqueued", enqueued)
    options: list[Any] = [print, Recording(), Capturing()]
    expected = [[], ["BatchStart"], ["enqueued", "BatchStart"]]
    for option, calls in zip(options, expected, strict=True):
        made.clear()
        batcher = FakeBatcher(on_batch=option)
        future = batcher.submit(1)
        await turn()
        batcher.runner.end()
        assert await future == 1
        assert made == calls
        await batcher.stop()


# ---- the option


class Half:
    """Has only one of the methods."""

    def started(self, batch: BatchStart) -> None:
        """Do nothing."""


class CallableHalf(Half):
    """Can be called, so it is a function."""

    def __init__(self) -> None:
        self.records: list[BatchRecord] = []

    def __call__(self, record: BatchRecord) -> None:
        """Keep it."""
        self.records.append(record)


class AsyncMethod(Half):
    """Has a method that would have to be awaited."""

    async def finished(self, record: BatchRecord) -> None:
        """Do nothing."""


class NoMethod(Recording):
    """Has an attribute with the name of a method."""

    enqueued = 3


async def on_batch_async(record: BatchRecord) -> None:
    """Do nothing."""


METHODS_MISSING = r"must be a function .* started\(batch\) and finished\(record\)"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (1, METHODS_MISSING),
        ("print", METHODS_MISSING),
        ({print}, METHODS_MISSING),
        (Half(), METHODS_MISSING),
        ([print, None], f"None: {METHODS_MISSING}"),
        ([[print]], METHODS_MISSING),
        (Recording, r"is a class; give an instance, such as Recording\(\)"),
        ([print, Half], r"Half'>: is a class; give an instance, such as Half\(\)"),
        (dict, "is a class"),
        (on_batch_async, "it is async, and is never awaited; declare it with 'def'"),
        (AsyncMethod(), "finished is async, and is never awaited"),
        (NoMethod(), "enqueued is not a method"),
    ],
)
def test_an_option_that_is_no_observer(value: Any, message: str) -> None:
    """It is a TypeError at construction, which names the value."""
    with pytest.raises(TypeError, match=f"^on_batch=(.|\n)*{message}"):
        batched(lambda batch: batch, on_batch=value)


@pytest.mark.virtual_clock
async def test_a_callable_with_one_of_the_methods_is_a_function() -> None:
    """It is called at the end of each batch."""
    observer = CallableHalf()
    batcher = FakeBatcher(on_batch=observer)
    future = batcher.submit(1)
    await turn()
    batcher.runner.end()
    assert await future == 1
    assert len(observer.records) == 1
    await batcher.stop()


class Pickled(AsyncBatcher[int, int]):
    """A batcher that is pickled."""

    async def process_batch(self, batch: list[int]) -> list[int]:
        """Return it."""
        return batch


def test_observers_are_not_pickled() -> None:
    """They stay behind, as the executor does."""
    unpicklable = Recording()
    unpicklable.batches.append(threading.Lock())  # type: ignore[arg-type]
    payload = pickle.dumps(Pickled(on_batch=[unpicklable, print], name="p"))
    batcher = pickle.loads(payload)  # noqa: S301 - its own
    options = getattr(batcher, LIFECYCLE_ATTR).options
    assert (options.on_batch, options.name) == (None, "p")


def test_trace_is_no_option() -> None:
    """A `BatchTracer` makes spans."""
    options: dict[str, Any] = {"trace": True}
    with pytest.raises(TypeError, match="unexpected keyword argument 'trace'"):
        batched(lambda batch: batch, **options)
