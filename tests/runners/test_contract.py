"""One contract for every runner: loop, threads, processes, interpreters, any executor.

All tests of this file share the given pools, as a program's batchers would. What the batcher makes
itself is made and shut down in each test. ``_nothing_left`` (conftest) checks for leaks.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import multiprocessing
import sys
import threading
import time
import traceback
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest

from async_batcher import AsyncBatcher, WorkerPool, batched
from async_batcher.exceptions import BadResultError, BatchError, BatcherStoppedError
from tests.support import worker_functions as work
from tests.support.batchers import call_all
from tests.support.executors import WORKERS, InlineExecutor, make_executor
from tests.support.polling import wait_until
from tests.support.worker_pools import METHODS, may_warn_of_fork

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from async_batcher import BatchedFunction

pytestmark = [
    may_warn_of_fork,
]


@dataclass
class Place:
    """A place where batches run.

    Args:
        name: The name in test reports.
        fixed: The options for a batcher that runs batches there.
        at_a_time: Batches at a time without ``concurrency``.
        crosses: Whether batches run in another process or interpreter.
    """

    name: str
    fixed: dict[str, Any] = field(default_factory=dict)
    at_a_time: int = 1
    crosses: bool = False
    method: str | None = (
        None  # of a `WorkerPool` that is given: a new one for each batcher, as each test has its own loop
    )

    @property
    def options(self) -> dict[str, Any]:
        """Return the options of a batcher that runs batches here."""
        return (
            self.fixed
            if self.method is None
            else {"executor": WorkerPool(WORKERS, mp_context=self.method)}
        )

    @property
    def is_async(self) -> bool:
        """Whether ``process_batch`` is a coroutine here."""
        return self.name == "coroutine"

    def batched(
        self, function: Callable[[list[Any]], Any], **options: Any
    ) -> BatchedFunction[Any, Any]:
        """Return a batcher of the function; all calls of a test make one batch."""
        options = {"max_queue_time": 0.01, "max_batch_size": 1000, **self.options, **options}
        if not self.is_async:
            return batched(function, **options)

        async def process_batch(batch: list[Any]) -> Any:
            return function(batch)

        return batched(process_batch, **options)

    def gated(self, folder: Path, **options: Any) -> BatchedFunction[Any, int]:
        """Return a batcher whose batches wait; a result is the number of running batches."""
        options = {"max_queue_time": 0, "max_batch_size": 1, **self.options, **options}
        if not self.is_async:
            return batched(functools.partial(work.gated, folder), **options)
        inside = 0

        async def process_batch(batch: list[Any]) -> list[int]:
            nonlocal inside
            inside += 1
            work.note(folder, "begun", str(batch))
            count = inside
            try:
                await wait_until((folder / "go").exists)
            finally:
                inside -= 1
            return [count] * len(batch)

        return batched(process_batch, **options)


def _given(name: str) -> Executor:
    if name == "inline":
        return InlineExecutor()
    kind = "threads" if name == "given_threads" else f"standard_{name}" if name in METHODS else name
    executor: Executor = make_executor(kind)
    return executor


def _places() -> Iterator[Any]:
    yield from ("coroutine", "loop_threads", "threads", "given_threads", "inline")
    slow = ["process", "spawn", "loky", "factory_threads", "factory_spawn"]
    if sys.platform != "win32":
        yield "forkserver"
        slow += ["standard", "pool_forkserver", "pool_spawn"]
    if sys.platform == "linux":  # elsewhere the system's own libraries do not survive it
        yield "fork"
        slow.append("pool_fork")
    if sys.version_info >= (3, 14):
        slow.append("interpreters")
    for name in slow:
        yield pytest.param(name, marks=pytest.mark.slow)


@pytest.fixture(scope="module", params=_places())
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    """Return each place where batches run."""
    name: str = request.param
    match name:
        case "coroutine" | "loop_threads":
            yield Place(name)
        case "threads":
            yield Place(name, {"executor": "thread", "max_workers": WORKERS}, at_a_time=WORKERS)
        case "process":
            yield Place(
                name,
                {"executor": "process", "max_workers": WORKERS},
                at_a_time=WORKERS,
                crosses=True,
            )
        case "standard":  # what "process" means on Windows
            with pytest.MonkeyPatch.context() as patched:
                patched.setattr("async_batcher._batching.lifecycle.SUPPORTS_WORKER_POOL", False)
                yield Place(
                    name,
                    {"executor": "process", "max_workers": WORKERS},
                    at_a_time=WORKERS,
                    crosses=True,
                )
        case "factory_threads" | "factory_spawn":  # the batcher makes it, once it has been called
            make: Callable[[], Executor] = functools.partial(ThreadPoolExecutor, WORKERS)
            if name == "factory_spawn":
                make = functools.partial(
                    ProcessPoolExecutor, WORKERS, mp_context=multiprocessing.get_context("spawn")
                )
            yield Place(
                name, {"executor": make}, at_a_time=WORKERS, crosses=name == "factory_spawn"
            )
        case "pool_forkserver" | "pool_spawn" | "pool_fork":
            yield Place(name, at_a_time=WORKERS, crosses=True, method=name.removeprefix("pool_"))
        case _:
            if name == "loky":
                pytest.importorskip("loky")
            executor = _given(name)
            crosses = name not in ("given_threads", "inline")
            with executor:
                # All its workers, so that they do not look like something that a test has left
                # behind.
                warm = [executor.submit(time.sleep, 0.02) for _ in range(WORKERS)]
                assert [future.result(work.DEADLINE) for future in warm] == [None] * WORKERS
                yield Place(
                    name,
                    {"executor": executor},
                    at_a_time=WORKERS if crosses else 1,
                    crosses=crosses,
                )


def history(exc: BaseException) -> str:
    """Return the exception's text in a log."""
    return "".join(traceback.format_exception(exc))


# Results.


@pytest.mark.every_loop
async def test_every_caller_gets_its_own_result(place: Place) -> None:
    """Each caller gets the result of its own item."""
    async with place.batched(work.double, max_batch_size=8) as batcher:
        assert await call_all(batcher, list(range(50))) == [item * 2 for item in range(50)]


async def test_gathered_calls_are_divided_by_the_workers(place: Place) -> None:
    """If no size is given; where the slot is no worker, they make one batch."""
    async with place.batched(work.batch_sizes, max_batch_size=None) as batcher:
        assert await call_all(batcher, range(100)) == [100 // place.at_a_time] * 100


async def test_every_way_to_call_keeps_the_order(place: Place) -> None:
    """`process_many`, `submit` and `map` return results in order."""
    async with place.batched(work.double, max_batch_size=3) as batcher:
        futures = [batcher.submit(item) for item in range(7)]
        assert await asyncio.gather(*futures) == [item * 2 for item in range(7)]
        assert await batcher.process_many(range(7)) == [item * 2 for item in range(7)]
        assert [result async for result in batcher.map(range(50))] == [
            item * 2 for item in range(50)
        ]
        assert sorted(
            [result async for result in batcher.map(range(50), ordered=False, read_in_thread=True)]
        ) == [item * 2 for item in range(50)]


async def test_results_of_several_shapes(place: Place) -> None:
    """A tuple, a generator and a list are equal; None stands for as many Nones."""
    async with place.batched(work.results_of_shape, max_batch_size=3) as batcher:
        for shape in ("list", "tuple", "generator"):
            assert await call_all(batcher, [shape] * 3) == [0, 1, 2], shape
        assert await call_all(batcher, ["None"] * 3) == [None] * 3


async def test_rows_of_an_array_are_results(place: Place, numpy: Any) -> None:
    """The rows of an array are results."""
    if place.name == "interpreters":
        pytest.skip("numpy does not load in a second interpreter")

    def rows(batch: list[Any]) -> Any:
        import numpy

        return numpy.stack(batch) * 2

    async with place.batched(rows) as batcher:
        results = await call_all(batcher, [numpy.arange(3) + i for i in range(4)])
        assert [result.tolist() for result in results] == [
            [2 * i, 2 * i + 2, 2 * i + 4] for i in range(4)
        ]


async def test_wrong_shape_is_rejected(place: Place) -> None:
    """A wrong count, a string, a dict: every caller gets BadResultError."""
    async with place.batched(work.results_of_shape, max_batch_size=3) as batcher:
        for shape, named in {
            "too few": "2 results",
            "too many": "4 results",
            "str": "str",
            "bytes": "bytes",
            "dict": "dict",
            "int": "int",
        }.items():
            errors = await call_all(batcher, [shape] * 3)
            assert [type(error) for error in errors] == [BadResultError] * 3, shape
            assert len({id(error) for error in errors}) == 3
            assert all(text in str(error) for error in errors for text in (named, "3 items"))
        assert await call_all(batcher, ["list"] * 3) == [0, 1, 2]


async def test_exception_among_the_results_fails_its_item_alone(place: Place) -> None:
    """An exception among the results fails its item alone."""
    async with place.batched(work.odd_ones_fail) as batcher:
        results = await call_all(batcher, [0, 1, 2, 3])
        assert [results[0], results[2]] == [0, 2]
        assert [(type(results[i]), str(results[i]), results[i].code) for i in (1, 3)] == [
            (work.FrankError, "1 is odd", 1),
            (work.FrankError, "3 is odd", 3),
        ]


# Exceptions.


@pytest.mark.every_loop
async def test_a_failed_batch_fails_for_each_caller_on_its_own(place: Place) -> None:
    """Each gets a copy with type, attributes and the original traceback."""
    async with place.batched(work.raise_named) as batcher:
        errors = await call_all(batcher, ["fine", "frank", "fine"])
        assert [(type(error), str(error), error.code) for error in errors] == [
            (work.FrankError, "frankly", 7)
        ] * 3
        assert len({id(error) for error in errors}) == 3
        assert all("in raise_named" in history(error) for error in errors)
        assert await call_all(batcher, ["fine"]) == ["fine"]


async def test_what_cannot_be_raised_as_itself(place: Place) -> None:
    """Exceptions that control the loop arrive as a BatchError that names them."""
    originals = {
        "cancelled": "asyncio.exceptions.CancelledError",
        "closed": "builtins.GeneratorExit",
    }
    if not place.is_async:  # these end the loop, or are a RuntimeError already (PEP 479)
        originals |= {
            "exit": "builtins.SystemExit",
            "interrupt": "builtins.KeyboardInterrupt",
            "stop": "builtins.StopIteration",
        }
    async with place.batched(work.raise_named, max_batch_size=2) as batcher:
        for name, original in originals.items():
            results = await call_all(batcher, [name, "fine", "fine", "fine"])
            assert results[2:] == ["fine", "fine"]
            for error in results[:2]:
                assert type(error) is BatchError
                assert error.original_type == original
                assert original in str(error)
                assert "in raise_named" in history(error)
        assert await call_all(batcher, ["fine"]) == ["fine"]


async def test_falsy_exception_is_raised(place: Place) -> None:
    """An exception that is false is not taken for success."""
    async with place.batched(work.raise_named) as batcher:
        assert [type(error) for error in await call_all(batcher, ["falsy", "fine"])] == [
            work.FalsyError
        ] * 2


async def test_users_base_exception_reaches_the_callers(place: Place) -> None:
    """A BaseException reaches the callers and stops nothing else."""
    async with place.batched(work.raise_named, max_batch_size=1) as batcher:
        results = await call_all(batcher, ["own", "fine"])
        assert [type(results[0]), results[1]] == [work.OwnSignal, "fine"]


async def test_exception_whose_copy_raises_system_exit(place: Place) -> None:
    """The callers get an error even if copying the exception raises SystemExit."""

    class Rogue(Exception):  # noqa: N818
        def __copy__(self) -> Any:
            raise SystemExit(4)

    def process_batch(batch: list[int]) -> list[int]:
        if 0 in batch:
            raise Rogue
        return batch

    async with place.batched(process_batch, max_batch_size=2) as batcher:
        results = await call_all(batcher, [0, 1, 2, 3])
        assert [type(error).__name__ for error in results[:2]] == ["Rogue"] * 2
        assert results[2:] == [2, 3]


async def test_exception_whose_str_raises_system_exit(place: Place) -> None:
    """An exception whose ``__str__`` raises SystemExit fails its own batch only."""

    class Mute(Exception):  # noqa: N818
        def __str__(self) -> str:
            raise SystemExit(4)

    def process_batch(batch: list[int]) -> list[int]:
        if 0 in batch:
            raise Mute
        return batch

    async with place.batched(process_batch, max_batch_size=2) as batcher:
        results = await call_all(batcher, [0, 1, 2, 3])
        assert {type(error).__name__ for error in results[:2]} <= {"Mute", "BatchError"}
        assert results[2:] == [2, 3]


async def test_exception_notes_and_groups_reach_the_caller(place: Place) -> None:
    """Notes on an exception and the members of a group reach the caller."""

    def process_batch(batch: list[int]) -> list[int]:  # noqa: ARG001
        error = ExceptionGroup("several", [ValueError("one"), KeyError("two")])
        error.add_note("a hint")
        raise error

    async with place.batched(process_batch) as batcher:
        (error,) = await call_all(batcher, [1])
        assert isinstance(error, ExceptionGroup)
        assert [type(member) for member in error.exceptions] == [ValueError, KeyError]
        assert error.__notes__[0] == "a hint"
        assert len(error.__notes__) == 1 + place.crosses, (
            "the object itself, for the only caller, is left as it is"
        )


async def test_exception_raised_repeatedly_keeps_one_traceback(place: Place) -> None:
    """An exception object that is raised repeatedly does not collect tracebacks."""
    known = ValueError("always this one")

    def process_batch(batch: list[int]) -> list[int]:  # noqa: ARG001
        raise known

    async with place.batched(process_batch, max_queue_time=0) as batcher:
        depths = []
        for _ in range(4):
            (error,) = await call_all(batcher, [1])
            depths.append(len(traceback.extract_tb(error.__traceback__)))
        assert len(set(depths)) == 1


# Set-up.


async def test_set_up_runs_once_in_each_worker_before_its_first_batch(
    place: Place, tmp_path: Path
) -> None:
    """Once per worker process or interpreter, per thread of ours, or per slot."""
    function = functools.partial(work.with_setup, tmp_path)
    setup = functools.partial(work.note_setup, tmp_path)
    async with place.batched(function, setup_worker=setup, max_batch_size=1) as batcher:
        assert work.noted(tmp_path, "setup"), "start() sets up a worker"
        results = await call_all(batcher, list(range(20)))
    setups = work.noted(tmp_path, "setup")
    assert len(setups) == len(set(setups))
    if place.crosses:
        assert all(str(where) in done for where, done in results)
        assert len(setups) <= WORKERS
    else:
        assert len(setups) <= place.at_a_time


async def test_failed_set_up_reaches_the_callers_and_is_retried(
    place: Place, tmp_path: Path
) -> None:
    """The first batch's callers get the error; the next batch tries again."""
    batcher = place.batched(work.double, setup_worker=functools.partial(work.fail_first, tmp_path))
    errors = await call_all(batcher, [1, 2])
    assert [type(error) for error in errors] == [LookupError] * 2
    assert all("in fail_first" in history(error) for error in errors)
    assert await call_all(batcher, [1, 2]) == [2, 4]
    await batcher.stop()


async def test_start_raises_the_set_up_error(place: Place, tmp_path: Path) -> None:
    """``start`` raises what the set-up raised, and may be called again."""
    batcher = place.batched(work.double, setup_worker=functools.partial(work.fail_first, tmp_path))
    with pytest.raises(LookupError, match="not there yet"):
        await batcher.start()
    await batcher.start()
    assert await batcher(1) == 2
    await batcher.stop()


async def test_set_up_binds_attributes_of_a_subclass(place: Place) -> None:
    """``process_batch`` sees the attributes that ``setup_worker`` binds."""

    class Adder(AsyncBatcher[int, int]):
        base: int

        def setup_worker(self) -> None:
            self.base = 100

        def process_batch(self, batch: list[int]) -> list[int]:
            return [self.base + item for item in batch]

    class AsyncAdder(Adder):
        async def process_batch(self, batch: list[int]) -> list[int]:  # type: ignore[override]
            return super().process_batch(batch)

    batcher = AsyncAdder() if place.is_async else Adder(**place.options)
    async with batcher:
        assert await call_all(batcher, [1, 2, 3]) == [101, 102, 103]
    if place.crosses:
        assert not hasattr(batcher, "base")


# Concurrency.


async def test_default_concurrency(place: Place, tmp_path: Path) -> None:
    """``concurrency`` defaults to the size of the pool where known, otherwise to 1."""
    async with place.gated(tmp_path) as batcher:
        assert batcher.concurrency == place.at_a_time
        calls = asyncio.gather(*(batcher(item) for item in range(5)))
        await wait_until(lambda: len(work.noted(tmp_path, "begun")) >= place.at_a_time)
        (tmp_path / "go").touch()
        assert max(await calls) == place.at_a_time


async def test_concurrency_is_a_limit(place: Place, tmp_path: Path) -> None:
    """With ``concurrency=1`` no two batches run at the same time."""
    async with place.gated(tmp_path, concurrency=1) as batcher:
        calls = asyncio.gather(*(batcher(item) for item in range(5)))
        await wait_until(lambda: work.noted(tmp_path, "begun"))
        (tmp_path / "go").touch()
        assert await calls == [1] * 5


async def test_items_collect_while_all_slots_are_busy(place: Place, tmp_path: Path) -> None:
    """Items that arrive meanwhile form one batch, which a free slot takes."""
    async with place.gated(tmp_path, concurrency=1, max_batch_size=10) as batcher:
        first = asyncio.ensure_future(batcher(0))
        await wait_until(lambda: work.noted(tmp_path, "begun"))
        rest = asyncio.gather(*(batcher(item) for item in range(1, 5)))
        await asyncio.sleep(0)
        (tmp_path / "go").touch()
        await asyncio.gather(first, rest)
    assert work.noted(tmp_path, "begun") == ["[0]", "[1, 2, 3, 4]"]


# Callers and stopping.


async def test_cancelled_caller_does_not_affect_others(place: Place, tmp_path: Path) -> None:
    """The other callers of a batch get results; a queued item is never run."""
    async with place.gated(tmp_path, concurrency=1, max_batch_size=3) as batcher:
        running = [asyncio.ensure_future(batcher(item)) for item in range(3)]
        await wait_until(lambda: work.noted(tmp_path, "begun"))
        waiting = [asyncio.ensure_future(batcher(item)) for item in range(3, 6)]
        await asyncio.sleep(0)
        running[1].cancel()
        waiting[0].cancel()
        await asyncio.sleep(0)
        (tmp_path / "go").touch()
        results = await asyncio.gather(*running, *waiting, return_exceptions=True)
    assert [type(result).__name__ for result in results] == [
        "int",
        "CancelledError",
        "int",
        "CancelledError",
        "int",
        "int",
    ]
    assert work.noted(tmp_path, "begun") == ["[0, 1, 2]", "[4, 5]"]


async def test_stop_drains_the_queue(place: Place, tmp_path: Path) -> None:
    """``stop`` returns when the last batch has ended, and rejects new items."""
    batcher = place.gated(tmp_path, concurrency=1)
    calls = asyncio.gather(*(batcher(item) for item in range(4)))
    await wait_until(lambda: work.noted(tmp_path, "begun"))
    stop = asyncio.ensure_future(batcher.stop())
    await asyncio.sleep(0)
    with pytest.raises(BatcherStoppedError):
        await batcher(4)
    assert not stop.done()
    (tmp_path / "go").touch()
    await stop
    assert calls.done()
    assert await calls == [1] * 4
    await batcher.stop()
    assert not await batcher.is_running()


async def test_forced_stop_fails_all_callers(place: Place, tmp_path: Path) -> None:
    """All callers get BatcherStoppedError, and ``stop`` returns though a batch hangs."""
    batcher = place.gated(tmp_path, concurrency=1)
    calls = asyncio.gather(*(batcher(item) for item in range(4)), return_exceptions=True)
    await wait_until(lambda: work.noted(tmp_path, "begun"))
    await batcher.stop(force=True)
    assert [type(error) for error in await calls] == [BatcherStoppedError] * 4
    (tmp_path / "go").touch()  # for threads and given pools, which run on
    with pytest.raises(BatcherStoppedError):
        await batcher(5)


async def test_stop_with_a_timeout_fails_what_runs_on(place: Place, tmp_path: Path) -> None:
    """What has not ended by then fails, and ``stop`` raises TimeoutError."""
    batcher = place.gated(tmp_path, concurrency=1)
    calls = asyncio.gather(*(batcher(item) for item in range(3)), return_exceptions=True)
    await wait_until(lambda: work.noted(tmp_path, "begun"))
    with pytest.raises(TimeoutError):
        await batcher.stop(timeout=0.01)
    assert [type(error) for error in await calls] == [BatcherStoppedError] * 3
    (tmp_path / "go").touch()


async def test_cancelled_stop_is_forced(place: Place, tmp_path: Path) -> None:
    """A cancelled ``stop`` fails all callers instead of leaving them waiting."""
    batcher = place.gated(tmp_path, concurrency=1)
    calls = asyncio.gather(*(batcher(item) for item in range(3)), return_exceptions=True)
    await wait_until(lambda: work.noted(tmp_path, "begun"))
    stop = asyncio.ensure_future(batcher.stop())
    await asyncio.sleep(0)
    stop.cancel()
    with pytest.raises(asyncio.CancelledError):
        await stop
    assert [type(error) for error in await calls] == [BatcherStoppedError] * 3
    (tmp_path / "go").touch()


async def test_start_reopens_a_stopped_batcher(place: Place) -> None:
    """``start`` reopens a batcher after a plain or forced stop."""
    batcher = place.batched(work.double, max_queue_time=0)
    for force in (False, True, False):
        await batcher.start()
        assert await batcher(21) == 42
        await batcher.stop(force=force)
        with pytest.raises(BatcherStoppedError):
            await batcher(1)


async def test_given_executor_is_left_running(place: Place) -> None:
    """A given executor works on after its batcher has stopped, even by force."""
    for force in (False, True):
        batcher = place.batched(work.double)
        assert await batcher(1) == 2
        await batcher.stop(force=force)
    executor = place.options.get("executor")
    if isinstance(executor, Executor):
        assert executor.submit(abs, -1).result(work.DEADLINE) == 1


async def test_several_batchers_share_a_place(place: Place) -> None:
    """Batchers in one pool are independent, and stopping one stops no other."""
    batchers = [
        place.batched(functools.partial(work.scaled, factor), max_batch_size=4)
        for factor in range(3)
    ]
    results = await asyncio.gather(*(call_all(batcher, list(range(10))) for batcher in batchers))
    assert results == [[item * factor for item in range(10)] for factor in range(3)]
    await batchers[0].stop(force=True)
    assert await call_all(batchers[1], [1, 2]) == [1, 2]
    for batcher in batchers:
        await batcher.stop()


async def test_batch_runs_in_the_context_of_its_batcher(place: Place) -> None:
    """A batch in this process sees the context in which the batcher was made."""
    if place.crosses:
        pytest.skip("there is no context on the other side")
    variable = contextvars.ContextVar("variable", default="default")
    variable.set("at construction")

    def process_batch(batch: list[int]) -> list[str]:
        value = variable.get()
        variable.set("in a batch")
        return [value] * len(batch)

    async with place.batched(process_batch, max_queue_time=0) as batcher:
        variable.set("in a caller")
        assert [await batcher(i) for i in range(2)] == ["at construction"] * 2
        assert variable.get() == "in a caller"


async def test_the_loop_stays_free(place: Place, tmp_path: Path) -> None:
    """The event loop goes on while a batch runs."""
    if place.is_async:
        pytest.skip("it is one of the others")
    async with place.gated(tmp_path) as batcher:
        call = asyncio.ensure_future(batcher(1))
        await wait_until(lambda: work.noted(tmp_path, "begun"))
        (tmp_path / "go").touch()
        assert await call == 1


async def test_where_a_batch_runs(place: Place) -> None:
    """A batch runs on the loop, in a thread, or elsewhere, as the options say."""
    async with place.batched(work.whereabouts) as batcher:
        ((pid, thread),) = await call_all(batcher, [1])
    here = work.where()
    if place.name == "coroutine":
        assert (pid, thread) == here
    elif not place.crosses or place.name == "interpreters":
        assert pid == here[0]
        assert thread != here[1]
    else:
        assert pid != here[0]


async def test_many_batches_under_load(place: Place) -> None:
    """Of hundreds of calls, some cancelled, every other one gets its own result."""
    async with place.batched(work.double, max_batch_size=5, max_queue_time=0.001) as batcher:
        tasks = [asyncio.ensure_future(batcher(item)) for item in range(300)]
        await asyncio.sleep(0)
        for task in tasks[::7]:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
    for item, result in enumerate(results):
        if item % 7:
            assert result == item * 2
        else:
            assert isinstance(result, asyncio.CancelledError)


def test_batchers_on_loops_in_several_threads_share_a_place(place: Place) -> None:
    """A given executor serves batchers on different loops."""
    results: list[list[int]] = []

    async def main() -> None:
        async with place.batched(work.double, max_batch_size=4) as batcher:
            results.append(await call_all(batcher, list(range(20))))

    threads = [threading.Thread(target=asyncio.run, args=(main(),)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [[item * 2 for item in range(20)]] * 3
