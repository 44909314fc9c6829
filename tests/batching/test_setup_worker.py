"""`setup_worker` on the event loop and in threads."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from async_batcher import AsyncBatcher, batched
from async_batcher.exceptions import BatchError
from tests.support.batchers import CONTROL_FLOW, async_echo, echo, process_all

pytestmark = pytest.mark.usefixtures("no_noise")
every_loop = pytest.mark.every_loop


class WithSetup(AsyncBatcher[Any, Any]):
    """Counts its set-ups; the first `failures` of them fail."""

    def __init__(self, failures: int = 0, **options: Any) -> None:
        super().__init__(**options)
        self.failures = failures
        self.seen: list[bool] = []  # shared; attributes that a set-up binds are not
        self.batches = 0
        self.is_ready = False

    @property
    def setups(self) -> int:
        """Return the number of set-ups."""
        return len(self.seen)

    def setup_worker(self) -> None:
        """Count, and fail at first."""
        assert not self.is_ready
        self.seen.append(True)
        if self.setups <= self.failures:
            msg = f"set-up {self.setups}"
            raise OSError(msg)
        self.is_ready = True


class CoroutineWithSetup(WithSetup):
    """Runs batches on the event loop."""

    async def process_batch(self, batch: list[Any]) -> list[Any]:
        """Return the items; count the batch."""
        assert self.is_ready
        self.batches += 1
        await asyncio.sleep(0)
        return batch


class AsyncSetup(CoroutineWithSetup):
    """Has an async set-up."""

    async def setup_worker(self) -> None:  # type: ignore[override]
        """Count, some iterations of the loop later."""
        await asyncio.sleep(0)
        super().setup_worker()
        await asyncio.sleep(0)


class ThreadWithSetup(WithSetup):
    """Runs batches in threads."""

    def process_batch(self, batch: list[Any]) -> list[Any]:
        """Return the items; count the batch."""
        assert self.is_ready
        self.batches += 1
        return batch


# The class, its options, the number of slots, and how many of them start() sets up.
SETUPS: dict[str, tuple[type[WithSetup], dict[str, Any], int, int]] = {
    "coroutine": (CoroutineWithSetup, {"concurrency": 4}, 1, 1),
    "async set-up": (AsyncSetup, {"concurrency": 4}, 1, 1),
    "loop threads": (ThreadWithSetup, {"concurrency": 4}, 4, 1),
    "thread": (ThreadWithSetup, {"executor": "thread", "max_workers": 4}, 4, 4),
}


@every_loop
@pytest.mark.parametrize("kind", SETUPS)
@pytest.mark.parametrize("started", [False, True])
@pytest.mark.usefixtures("long_graces")
async def test_the_set_up_runs_once_before_the_first_batch(kind: str, started: bool) -> None:
    """It runs once in each slot, even if many batches start at the same time."""
    cls, options, slots, at_start = SETUPS[kind]
    batcher = cls(max_batch_size=1, **options)
    if started:
        await batcher.start()
        assert batcher.setups == at_start
        await batcher.start()
    assert await process_all(batcher, *range(20)) == list(range(20))
    assert (at_start if started else 1) <= batcher.setups <= slots
    await batcher.stop()


@every_loop
@pytest.mark.parametrize("kind", SETUPS)
async def test_a_set_up_that_fails_is_tried_again(kind: str) -> None:
    """The callers of the batch get its exception, and the next batch tries again."""
    cls, options, slots, _ = SETUPS[kind]
    batcher = cls(failures=2, max_batch_size=2, **options)
    for attempt in (1, 2):
        errors = await process_all(batcher, 1, 2)
        assert [type(error) for error in errors] == [OSError, OSError]
        assert str(errors[0]) == f"set-up {attempt}"
    assert await process_all(batcher, 1, 2) == [1, 2]
    assert await process_all(batcher, 3) == [3]
    assert 3 <= batcher.setups <= 2 + slots
    await batcher.stop()


@pytest.mark.parametrize("kind", SETUPS)
async def test_start_raises_what_the_set_up_raised(kind: str) -> None:
    """start() can then be called again."""
    cls, options, _, at_start = SETUPS[kind]
    batcher = cls(failures=1, **options)
    with pytest.raises(OSError, match="set-up"):
        await batcher.start()
    await batcher.start()
    assert batcher.setups == 1 + at_start
    await batcher.stop()
    with pytest.raises(OSError, match="set-up"):
        async with cls(failures=1, **options):
            pytest.fail("start() did not raise")


@pytest.mark.parametrize("name", CONTROL_FLOW)
async def test_a_control_flow_exception_in_a_set_up_is_a_batch_error(name: str) -> None:
    """sys.exit() in setup_worker stops no server, not even one that awaits start()."""

    def setup_worker() -> None:
        error = CONTROL_FLOW[name]()
        raise error

    batcher = batched(echo, setup_worker=setup_worker)
    errors = await process_all(batcher, 1)
    assert [type(error) for error in errors] == [BatchError]
    raised: BaseException | None = None
    try:
        await batcher.start()
    except BaseException as exc:  # noqa: BLE001 - KeyboardInterrupt would end the test run
        raised = exc
    assert isinstance(raised, BatchError)
    assert raised.original_type == name
    await batcher.stop()


def test_an_async_set_up_needs_an_async_process_batch() -> None:
    """A thread cannot await it, so it is a TypeError at construction."""

    class Mixed(ThreadWithSetup):
        async def setup_worker(self) -> None:  # type: ignore[override]
            """Never run."""

    with pytest.raises(TypeError, match="setup_worker"):
        Mixed()


@every_loop
async def test_a_set_up_continues_when_its_caller_is_cancelled() -> None:
    """The set-up does not run again for the next caller."""
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
