"""The options: allowed values, error messages, and properties."""

from __future__ import annotations

import asyncio
import math
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest

from async_batcher import AsyncBatcher, WorkerPool, batched
from async_batcher._pool.cpu_count import cpu_count
from tests.support.batchers import async_echo, echo, make_batcher

LIMITS = ("max_batch_size", "max_queue_size", "concurrency")


@pytest.mark.parametrize("name", LIMITS)
@pytest.mark.parametrize("value", [0, -2, -(10**30)])
def test_a_limit_out_of_range(name: str, value: int) -> None:
    """The message names the option, the value and the allowed values."""
    with pytest.raises(
        ValueError, match=rf"^{name}={value}: must be .*at least 1, or -1 for no limit"
    ):
        make_batcher(**{name: value})


@pytest.mark.parametrize("name", LIMITS)
@pytest.mark.parametrize("value", [1.0, "3", True, False, [1], math.nan, math.inf])
def test_a_limit_that_is_not_an_integer(name: str, value: object) -> None:
    """The message names the type, too."""
    with pytest.raises(
        TypeError, match=rf"^{name}=.*at least 1, or -1 for no limit, not {type(value).__name__}"
    ) as raised:
        make_batcher(**{name: value})
    assert repr(value) in str(raised.value)


class Integer:
    """An integer type other than int, like NumPy's."""

    def __index__(self) -> int:
        """Return 3."""
        return 3


def test_integers_of_other_types_are_limits() -> None:
    """A value with __index__ is stored as an int."""
    limits = ("max_batch_size", "concurrency", "max_queue_size", "max_workers")
    batcher = make_batcher(executor="thread", **dict.fromkeys(limits, Integer()))
    assert [type(value) for value in (batcher.max_batch_size, batcher.concurrency)] == [int] * 2


@pytest.mark.parametrize("name", ["batch_timeout", "item_timeout"])
@pytest.mark.parametrize("value", [0, -1, math.nan])
def test_a_timeout_out_of_range(name: str, value: float) -> None:
    """batch_timeout and item_timeout must be more than 0."""
    with pytest.raises(
        ValueError, match=rf"^{name}={value}: must be a number of seconds, more than 0"
    ):
        make_batcher(**{name: value})


@pytest.mark.parametrize("value", [-1, -0.001, -math.inf, math.nan])
def test_a_max_queue_time_out_of_range(value: float) -> None:
    """max_queue_time must be 0 or more."""
    with pytest.raises(
        ValueError, match=rf"^max_queue_time={value}: must be a number of seconds, 0 or more"
    ):
        make_batcher(max_queue_time=value)


@pytest.mark.parametrize("value", ["1", True, 1j, [0.1]])
def test_a_max_queue_time_that_is_not_a_number(value: object) -> None:
    """max_queue_time must be a number; the message says so."""
    with pytest.raises(TypeError, match=r"^max_queue_time=.*number of seconds, 0 or more, not "):
        make_batcher(max_queue_time=value)


def test_a_max_queue_time_beyond_any_float() -> None:
    """It is a ValueError, not an OverflowError."""
    with pytest.raises(ValueError, match="max_queue_time"):
        make_batcher(max_queue_time=10**400)


@pytest.mark.parametrize("value", [3, b"prices", ["prices"]])
def test_a_name_that_is_not_a_string(value: object) -> None:
    """The message names the type."""
    with pytest.raises(TypeError, match=r"^name=.*: must be a string or None, not "):
        make_batcher(name=value)


@pytest.mark.parametrize("value", ["threads", "", "Process"])
def test_an_executor_of_an_unknown_name(value: str) -> None:
    """The message lists the allowed executors."""
    with pytest.raises(
        ValueError,
        match=rf"^executor='{value}': must be None, 'thread', 'process', a WorkerPool or a",
    ):
        make_batcher(executor=value)


@pytest.mark.parametrize("value", [3, object(), True, int, b"thread"])
def test_an_executor_of_a_wrong_type(value: object) -> None:
    """Anything but an executor is rejected."""
    with pytest.raises(
        TypeError, match=r"^executor=.*must be None, 'thread', 'process', a WorkerPool or a"
    ):
        make_batcher(executor=value)


async def _make_later() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1)


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (
            echo,
            (
                r"without arguments to make an executor "
                r"\(missing a required argument: 'batch'\).*functools.partial"
            ),
        ),
        (_make_later, "is async; the batcher calls it in a thread"),
        (partial(_make_later), "is async; the batcher calls it in a thread"),
    ],
)
def test_a_factory_that_cannot_be_called(factory: Any, message: str) -> None:
    """Errors that can be seen are raised at construction, and when it is set."""
    with pytest.raises(TypeError, match=f"^executor=.*{message}"):
        make_batcher(executor=factory)
    batcher = make_batcher()
    with pytest.raises(TypeError, match=f"^executor=.*{message}"):
        batcher.executor = factory
    assert batcher.executor is None


@pytest.mark.parametrize("value", [0, -1, -7])
def test_max_workers_out_of_range(value: int) -> None:
    """max_workers must be at least 1, or None for all cores."""
    with pytest.raises(ValueError, match="max_workers") as caught:
        make_batcher(executor="thread", max_workers=value)
    allowed = "a whole number of at least 1, or None for the default"
    assert str(caught.value) == f"max_workers={value}: must be {allowed}"


@pytest.mark.parametrize("value", [1.5, "2", True])
def test_max_workers_that_is_not_an_integer(value: object) -> None:
    """max_workers must be an integer; the message says so."""
    with pytest.raises(TypeError, match=r"^max_workers=.*at least 1, or None"):
        make_batcher(executor="thread", max_workers=value)


def test_max_workers_without_an_executor_of_the_batcher() -> None:
    """It is a TypeError, because there is nothing that it could size."""
    for function in (echo, async_echo):
        with pytest.raises(TypeError, match=r"^max_workers=2 sizes the pool"):
            make_batcher(function, max_workers=2)
    with (
        ThreadPoolExecutor(1) as executor,
        pytest.raises(TypeError, match=r"^max_workers=2 sizes the pool"),
    ):
        make_batcher(executor=executor, max_workers=2)
    with pytest.raises(TypeError, match=r"^max_workers=2 sizes the pool"):
        make_batcher(executor=ThreadPoolExecutor, max_workers=2)
    # The pool's repr, without the name of a private module.
    with pytest.raises(
        TypeError, match=r"executor=<WorkerPool-\d+ not started max_workers=3> there"
    ):
        make_batcher(executor=WorkerPool(3), max_workers=2)


def test_an_async_process_batch_takes_no_executor() -> None:
    """It would run on the event loop anyway; the message at construction says so."""
    with ThreadPoolExecutor(1) as executor:
        for value in ("thread", "process", executor, ThreadPoolExecutor):
            with pytest.raises(
                TypeError, match=r"process_batch is async, and runs on the event loop"
            ):
                make_batcher(async_echo, executor=value)

    async def generate(batch: list[Any]) -> Any:
        for item in batch:
            yield item

    with pytest.raises(TypeError, match="process_batch is async"):
        make_batcher(generate, executor="thread")


class Sub(AsyncBatcher[Any, Any]):
    """A subclass that passes on its options."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)

    def process_batch(self, batch: list[Any]) -> list[Any]:
        """Return the items."""
        return batch


def test_an_unknown_option() -> None:
    """The TypeError names the class and the option, as for any function."""
    with pytest.raises(
        TypeError, match=r"^Sub\(\) got an unexpected keyword argument 'max_batchsize'"
    ):
        Sub(max_batchsize=3)
    with pytest.raises(TypeError, match="'max_batchsize'"):
        make_batcher(max_batchsize=3)


def test_options_are_keyword_only() -> None:
    """Positional arguments are a TypeError."""
    with pytest.raises(TypeError, match="positional"):
        Sub(3)


@pytest.mark.parametrize("value", [3, "x"])
def test_a_setup_worker_that_is_not_a_function(value: object) -> None:
    """batched(setup_worker=) accepts functions only."""
    with pytest.raises(TypeError, match=rf"^setup_worker={value!r}: must be a function"):
        make_batcher(setup_worker=value)


@pytest.mark.parametrize(
    ("value", "error"),
    [(-1, ValueError), (math.nan, ValueError), ("1", TypeError), (True, TypeError)],
)
async def test_a_stop_timeout_out_of_range(value: Any, error: type[Exception]) -> None:
    """It is rejected before anything is stopped."""
    async with batched(async_echo, max_queue_time=0) as batcher:
        with pytest.raises(error, match=r"^timeout="):
            await batcher.stop(timeout=value)
        assert await batcher.is_running()
        assert await batcher.process(1) == 1


@pytest.mark.parametrize("name", ["sleep_time", "buffering_time", "batch_size"])
def test_a_deprecated_option_warns(name: str) -> None:
    """The UserWarning names it, and the line that passes it."""
    with pytest.warns(UserWarning, match=name) as caught:
        batcher = Sub(**{name: 7})
    assert [warning.category for warning in caught] == [UserWarning]
    assert caught[0].filename == __file__
    assert batcher.max_batch_size == (7 if name == "batch_size" else -1)


def test_batch_size_overrides_max_batch_size() -> None:
    """It is checked by the same rules."""
    with pytest.warns(UserWarning, match="max_batch_size"):
        assert make_batcher(batch_size=3, max_batch_size=9).max_batch_size == 3
    with (
        pytest.warns(UserWarning, match="max_batch_size"),
        pytest.raises(ValueError, match="at least 1"),
    ):
        make_batcher(batch_size=0)


def test_the_options_are_properties() -> None:
    """They return what was given; the defaults are the documented ones."""
    with ThreadPoolExecutor(1) as executor:
        batcher = make_batcher(
            max_batch_size=3, max_queue_time=1.5, concurrency=2, max_queue_size=9, executor=executor
        )
        assert batcher.executor is executor
    assert (batcher.max_batch_size, batcher.max_queue_time, batcher.concurrency) == (3, 1.5, 2)
    batcher = make_batcher()
    assert (batcher.max_batch_size, batcher.max_queue_time, batcher.concurrency) == (-1, 0.01, 1)
    assert batcher.executor is None
    assert make_batcher(max_batch_size=None, max_queue_size=None).max_batch_size is None


def test_the_default_max_queue_time() -> None:
    """0 in a `WorkerPool`, 0.01 elsewhere; it follows the executor, and a value of one's own."""
    assert make_batcher(async_echo).max_queue_time == 0.01
    assert make_batcher(echo).max_queue_time == 0.01
    assert make_batcher(executor="thread").max_queue_time == 0.01
    with ThreadPoolExecutor(1) as threads, ProcessPoolExecutor(1) as processes:
        assert make_batcher(executor=threads).max_queue_time == 0.01
        assert make_batcher(executor=processes).max_queue_time == 0.01
    assert make_batcher(executor=WorkerPool(1)).max_queue_time == 0
    assert make_batcher(executor=partial(WorkerPool, 1)).max_queue_time == 0.01  # not called yet
    batcher = make_batcher(executor="process")
    assert batcher.max_queue_time == 0
    batcher.executor = "thread"
    assert batcher.max_queue_time == 0.01
    batcher.max_queue_time = 0.5
    batcher.executor = "process"
    assert batcher.max_queue_time == 0.5
    batcher.max_queue_time = None
    assert batcher.max_queue_time == 0


def test_the_default_max_queue_time_without_worker_pools(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where "process" is a standard pool, it is that of a standard pool."""
    monkeypatch.setattr("async_batcher._batching.lifecycle.SUPPORTS_WORKER_POOL", False)
    assert make_batcher(executor="process").max_queue_time == 0.01


@pytest.mark.virtual_clock
async def test_max_queue_time_can_be_set_to_the_default_at_run_time() -> None:
    """Items that wait for a longer window then wait for that of the default."""
    batcher = make_batcher(async_echo, max_queue_time=1000)
    call = batcher.submit(1)
    await asyncio.sleep(1.0)
    assert not call.done()
    batcher.max_queue_time = None
    assert await call == 1
    assert batcher.max_queue_time == 0.01
    await batcher.stop()


def test_the_default_concurrency() -> None:
    """One batch for each worker that the batcher makes, otherwise 1."""

    class Unknown(Executor):
        pass

    assert make_batcher(async_echo).concurrency == 1
    assert make_batcher(echo).concurrency == 1
    assert make_batcher(executor="thread", max_workers=3).concurrency == 3
    assert make_batcher(executor="thread").concurrency == cpu_count()
    assert make_batcher(executor="process", max_workers=3).concurrency == 3
    with ThreadPoolExecutor(4) as executor:
        assert make_batcher(executor=executor).concurrency == 1
        assert make_batcher(executor=executor, concurrency=3).concurrency == 3
        assert make_batcher(executor=executor, concurrency=-1).concurrency == -1
    assert make_batcher(executor=Unknown()).concurrency == 1


@pytest.mark.virtual_clock
async def test_limits_can_be_set_at_run_time() -> None:
    """They apply to batches that have not started; a bad value changes nothing."""
    batches: list[list[int]] = []

    @batched(max_queue_time=1000)
    async def process_batch(batch: list[int]) -> list[int]:
        batches.append(list(batch))
        return batch

    futures = [process_batch.submit(item) for item in range(5)]
    for name, value in (("max_batch_size", 0), ("max_queue_time", -1), ("max_batch_size", "2")):
        with pytest.raises((ValueError, TypeError), match=name):
            setattr(process_batch, name, value)
    assert (process_batch.max_batch_size, process_batch.max_queue_time) == (-1, 1000)
    process_batch.max_batch_size = 2
    await asyncio.gather(*futures[:4])
    assert batches == [[0, 1], [2, 3]]
    process_batch.max_queue_time = 1
    await futures[4]
    assert batches == [[0, 1], [2, 3], [4]]
    process_batch.max_batch_size = None
    process_batch.max_queue_time = 0
    assert await asyncio.gather(*map(process_batch.submit, range(9))) == list(range(9))
    assert batches[3:] == [list(range(9))]
    await process_batch.stop()


def test_limits_can_be_set_before_the_start() -> None:
    """It works outside an event loop."""
    batcher = make_batcher(async_echo)
    batcher.max_batch_size = 3
    batcher.max_queue_time = 0
    assert asyncio.run(batcher.process(1)) == 1
    batcher.max_batch_size = 4
    assert batcher.max_batch_size == 4


@pytest.mark.virtual_clock
@pytest.mark.parametrize("value", [-1, None, 10**30])
async def test_values_that_mean_no_limit(value: int | None) -> None:
    """-1, None for sizes, and numbers beyond any count set no limit."""
    batches: list[int] = []

    async def process_batch(batch: list[int]) -> list[int]:
        batches.append(len(batch))
        return batch

    concurrency = -1 if value is None else value
    async with make_batcher(
        process_batch, max_batch_size=value, max_queue_size=value, concurrency=concurrency
    ) as batcher:
        assert await asyncio.gather(*map(batcher.submit, range(1000))) == list(range(1000))
    assert batches == [1000]


@pytest.mark.virtual_clock
@pytest.mark.parametrize("concurrency", [1, 3, -1])
async def test_concurrency_limits_running_batches(concurrency: int) -> None:
    """With -1 all batches run at the same time."""
    running: list[int] = []
    peak = 0

    async def process_batch(batch: list[int]) -> list[int]:
        nonlocal peak
        running.extend(batch)
        peak = max(peak, len(running))
        await asyncio.sleep(1.0)
        running.remove(batch[0])
        return batch

    async with make_batcher(process_batch, max_batch_size=1, concurrency=concurrency) as batcher:
        assert await asyncio.gather(*map(batcher.submit, range(10))) == list(range(10))
    assert peak == (10 if concurrency == -1 else concurrency)
