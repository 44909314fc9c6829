"""`isolate`: a failed batch is rerun in parts until failing items are alone."""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

from async_batcher import AsyncBatcher, WorkerPool, batched
from async_batcher._batching.failures import isolation
from async_batcher.exceptions import (
    BatchError,
    BatcherStoppedError,
    BatchTimeoutError,
    PoolBrokenError,
    SerializationError,
    WorkerDiedError,
)
from async_batcher.failures import isolate
from async_batcher.limits import Limit
from tests.support import worker_functions as work
from tests.support.polling import turn, wait_until
from tests.support.virtual_clock import FAKE, FakeBatcher, now
from tests.support.worker_functions import DEADLINE

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

POISON = ZeroDivisionError("poison")


def crash() -> WorkerDiedError:
    """Return the exception of a batch whose worker has crashed."""
    return WorkerDiedError("crashed", pid=1, exit_code=-9)


# ---- the loop's side, on a virtual clock


class FailingRunner:
    """Finishes running batches in order; one with a failing item fails."""

    def __init__(
        self, batcher: FakeBatcher, failing: set[Any], error: BaseException = POISON
    ) -> None:
        self.batcher = batcher
        self.failing = failing
        self.error = error

    def end(self) -> list[Any]:
        """Finish the oldest running batch."""
        batch = self.batcher.runner.running[0][0]
        self.batcher.runner.end(0, None if self.failing.isdisjoint(batch) else self.error)
        return batch

    def end_all(self) -> list[list[Any]]:
        """Finish batches until none is running; return them in order."""
        batches = []
        while self.batcher.runner.running:
            batches.append(self.end())
        return batches


@pytest.mark.virtual_clock
async def test_failing_items_fail_and_the_others_get_their_results() -> None:
    """A failed batch is halved until each is alone; each has an exception of its own."""
    batcher = FakeBatcher(on_failure=isolate())
    calls = [batcher.submit(item) for item in range(8)]
    await turn()
    assert FailingRunner(batcher, {2, 7}).end_all() == [
        [0, 1, 2, 3, 4, 5, 6, 7],
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [0, 1],
        [2, 3],
        [4, 5],
        [6, 7],
        [2],
        [3],
        [6],
        [7],
    ]
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    assert [outcomes[2], outcomes[7]] == [calls[2].exception(), calls[7].exception()]
    assert all(type(outcomes[item]) is ZeroDivisionError for item in (2, 7))
    assert outcomes[2] is not outcomes[7]
    assert [outcome for outcome in outcomes if isinstance(outcome, int)] == [0, 1, 3, 4, 5, 6]
    await batcher.stop()


@pytest.mark.virtual_clock
async def test_a_failed_batch_is_not_rerun_by_default() -> None:
    """Isolation is opt-in, because a rerun may repeat side effects."""
    batcher = FakeBatcher()
    calls = [batcher.submit(item) for item in range(8)]
    await turn()
    assert FailingRunner(batcher, {2}).end_all() == [list(range(8))]
    assert all(type(call.exception()) is ZeroDivisionError for call in calls)
    await batcher.stop()


@pytest.mark.virtual_clock
async def test_reruns_go_first_but_new_batches_run_between_them() -> None:
    """After two reruns comes a new batch, if one is due."""
    batcher = FakeBatcher(on_failure=isolate(), max_batch_size=4)
    calls = [batcher.submit(item) for item in range(12)]
    await turn()
    batches = FailingRunner(batcher, {0, 1, 2, 3}).end_all()
    assert batches == [
        [0, 1, 2, 3],
        [0, 1],
        [2, 3],
        [4, 5, 6, 7],
        [0],
        [1],
        [8, 9, 10, 11],
        [2],
        [3],
    ]
    await asyncio.wait(calls)
    await batcher.stop()


@pytest.mark.virtual_clock
async def test_the_reruns_of_a_crashed_batch_do_not_overlap() -> None:
    """New batches may run beside one, so that a crash has one suspect."""
    batcher = FakeBatcher(on_failure=isolate(), concurrency=3, max_batch_size=4)
    calls = [batcher.submit(item) for item in range(4)]
    await turn()
    batcher.runner.end(0, crash())
    assert [batch for batch, _ in batcher.runner.running] == [[0, 1]]
    new = [batcher.submit(item) for item in range(4, 8)]
    await turn()
    assert [batch for batch, _ in batcher.runner.running] == [[0, 1], [4, 5, 6, 7]]
    batcher.runner.end(0)
    assert [batch for batch, _ in batcher.runner.running] == [[4, 5, 6, 7], [2, 3]]
    batcher.runner.end(1, crash())
    assert [batch for batch, _ in batcher.runner.running] == [[4, 5, 6, 7], [2]]
    batcher.runner.end(1, crash())
    assert isinstance(calls[2].exception(), WorkerDiedError)
    batcher.runner.end(1)
    batcher.runner.end(0)
    assert [call.result() for call in (calls[0], calls[1], calls[3], *new)] == [0, 1, 3, 4, 5, 6, 7]
    await batcher.stop()


@pytest.mark.virtual_clock
async def test_items_of_cancelled_callers_are_not_rerun(caplog: pytest.LogCaptureFixture) -> None:
    """Reruns leave them out; the log has a line for the batch and one for its reruns."""
    batcher = FakeBatcher(on_failure=isolate())
    calls = [batcher.submit(item) for item in range(6)]
    await turn()
    calls[1].cancel()
    failing = FailingRunner(batcher, {1, 3})
    with caplog.at_level(logging.ERROR, "async_batcher"):
        failing.end()
        calls[5].cancel()
        assert failing.end_all() == [[0, 2, 3], [4], [0, 2], [3]]
    assert [type(call.exception()) for call in calls if not call.cancelled()].count(
        ZeroDivisionError
    ) == 1
    assert [record.message for record in caplog.records] == [
        f"{FAKE}: a batch of 6 items failed: ZeroDivisionError: poison",
        f"{FAKE}: of a failed batch of 5 items, 1 failed alone, in 4 reruns",
    ]
    await batcher.stop()


@pytest.mark.virtual_clock
@pytest.mark.parametrize("kind", ["single", "bulk"])
@pytest.mark.parametrize("waits", ["stop", "flush", "key"])
async def test_parts_without_callers_hold_back_nothing(waits: str, kind: str) -> None:
    """They are forgotten with their last caller, although a rate holds them."""
    batcher = FakeBatcher(
        on_failure=[isolate()],
        limits=[Limit(int, rate=(10, 3600.0))],
        key=lambda _: "key",
        key_concurrency=1,
    )
    calls: list[asyncio.Future[Any]] = (
        [batcher.call_many([4, 4])] if kind == "bulk" else [batcher.submit(4) for _ in "12"]
    )
    await turn()
    batcher.runner.end(outcome=ValueError("no"))
    waiting: asyncio.Future[Any] = batcher.submit(1)
    if waits != "key":
        waiting.cancel()
        waiting = asyncio.ensure_future(getattr(batcher, waits)())
    await turn()
    assert not batcher.runner.running
    assert not waiting.done()
    for call in calls:
        call.cancel()
    await turn()
    if waits == "key":
        assert batcher.batches == [[4, 4], [1]]
        batcher.runner.end()
    start = now()
    await waiting
    await batcher.stop()
    assert now() < start + 1.0


@pytest.mark.virtual_clock
@pytest.mark.parametrize(
    "error",
    [
        PoolBrokenError("broken"),
        SerializationError("process_batch cannot be pickled"),
        BatcherStoppedError("the pool was stopped"),
        WorkerDiedError("before it started", may_have_run=False),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_errors_that_no_item_causes_are_not_isolated(error: Exception) -> None:
    """Every caller gets the error at once."""
    batcher = FakeBatcher(on_failure=isolate())
    calls = [batcher.submit(item) for item in range(4)]
    await turn()
    batcher.runner.end(0, error)
    assert [type(call.exception()) for call in calls] == [type(error)] * 4
    assert len(batcher.batches) == 1
    await batcher.stop()


@pytest.mark.virtual_clock
async def test_too_many_crashes_of_one_batch() -> None:
    """Beyond the limit the rest fails with the reason, and other batches run."""
    batcher = FakeBatcher(on_failure=isolate(), max_batch_size=64)
    calls = [batcher.submit(item) for item in range(64)]
    await turn()
    FailingRunner(batcher, set(range(64)), crash()).end_all()
    errors = [call.exception() for call in calls]
    assert all(isinstance(error, WorkerDiedError) for error in errors)
    over_limit = [
        error
        for error in errors
        if f"{isolation.CRASHES_PER_BATCH} workers or time limits" in str(error)
    ]
    assert len(over_limit) > 1
    assert all(
        error is not None and str(error.__cause__).startswith("crashed") for error in over_limit
    )
    assert len(batcher.batches) <= 2 * isolation.CRASHES_PER_BATCH + 1
    other = batcher.submit("other")
    await turn()
    batcher.runner.end()
    assert await other == "other"
    await batcher.stop()


@pytest.mark.virtual_clock
async def test_too_many_timeouts_of_one_batch() -> None:
    """They count against the limit of crashes, and are BatchTimeoutError."""
    batcher = FakeBatcher(on_failure=isolate(), max_batch_size=64)
    calls = [batcher.submit(item) for item in range(64)]
    await turn()
    FailingRunner(batcher, set(range(64)), BatchTimeoutError("too long")).end_all()
    assert {type(call.exception()) for call in calls} == {BatchTimeoutError}
    assert len(batcher.batches) <= 2 * isolation.CRASHES_PER_BATCH + 1
    await batcher.stop()


@pytest.mark.virtual_clock
async def test_a_drain_waits_for_reruns() -> None:
    """stop() runs the pending reruns, even while the queue is full."""
    batcher = FakeBatcher(
        on_failure=isolate(), max_queue_size=1, max_batch_size=4, when_full="wait"
    )
    calls = [batcher.call(item) for item in range(4)]
    await turn()
    failing = FailingRunner(batcher, {0})
    while batcher.runner.running[0][0] != [0]:
        failing.end()
        await turn()
    stopping = asyncio.create_task(batcher.stop())
    await turn()
    failing.end_all()
    await stopping
    assert all(call.done() for call in calls)


@pytest.mark.virtual_clock
async def test_a_forced_stop_fails_the_items_to_rerun() -> None:
    """Their callers get BatcherStoppedError."""
    batcher = FakeBatcher(on_failure=isolate())
    calls = [batcher.submit(item) for item in range(4)]
    await turn()
    batcher.runner.end(0, POISON)
    await batcher.stop(force=True)
    assert [type(call.exception()) for call in calls] == [BatcherStoppedError] * 4


@pytest.mark.virtual_clock
async def test_a_suspect_that_leaks_its_slot_does_not_block_others() -> None:
    """It is not rerun; others are, until every slot has leaked."""
    batcher = FakeBatcher(on_failure=isolate(), concurrency=2)
    calls = [batcher.submit(item) for item in range(4)]
    await turn()
    batcher.runner.end(0, crash())
    assert batcher.batches[-1] == [0, 1]
    batcher.runner.on_timeouts[-1](BatchTimeoutError("late"))
    assert [type(call.exception()) for call in calls[:2]] == [BatchTimeoutError] * 2
    assert batcher.batches[-1] == [2, 3]
    batcher.runner.on_timeouts[-1](BatchTimeoutError("late"))
    assert all(isinstance(call.exception(), BatchTimeoutError) for call in calls)
    with pytest.raises(BatchTimeoutError, match="every batch"):
        await batcher.process("later")
    await batcher.stop(force=True)


@pytest.mark.virtual_clock
async def test_failing_items_of_coroutines_are_isolated() -> None:
    """Exceptions and timeouts; process_batch may modify its list."""

    class Coroutine(AsyncBatcher[int, int]):
        async def process_batch(self, batch: list[int]) -> list[int]:
            results = []
            while batch:
                item = batch.pop(0)
                if item == 2:
                    raise POISON
                if item == 5:
                    await asyncio.sleep(1000.0)
                results.append(item * 10)
            return results

    batcher = Coroutine(on_failure=isolate(), batch_timeout=10.0)
    outcomes = await asyncio.gather(
        *(batcher.process(item) for item in range(7)), return_exceptions=True
    )
    assert [type(outcome) for outcome in outcomes] == [
        int,
        int,
        ZeroDivisionError,
        int,
        int,
        BatchTimeoutError,
        int,
    ]
    assert [outcome for outcome in outcomes if isinstance(outcome, int)] == [0, 10, 30, 40, 60]
    await batcher.stop()


# ---- with real workers


EXPECTED: dict[str, type[BaseException]] = {
    "raise": ArithmeticError,
    "exit": BatchError,
    "os._exit": WorkerDiedError,
    "kill": WorkerDiedError,
    "segfault": WorkerDiedError,
    "hang": BatchTimeoutError,
    "memory": WorkerDiedError,
}


async def outcomes_of(batcher: Any, items: list[Any]) -> dict[Any, Any]:
    """Process the items; return the outcome of each."""
    async with asyncio.timeout(2 * DEADLINE):
        outcomes = await asyncio.gather(
            *(batcher.process(item) for item in items), return_exceptions=True
        )
    return dict(zip(items, outcomes, strict=True))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals, limits")
@pytest.mark.parametrize("poison", EXPECTED)
async def test_a_poison_item_fails_alone_in_a_pool(poison: str) -> None:
    """One of 16 raises, exits, crashes, hangs or uses up the memory; the pool goes on."""
    if poison == "memory" and sys.platform != "linux":
        pytest.skip("limits of Linux")
    items = [*range(11), poison, *range(12, 16)]
    async with WorkerPool(2) as pool:
        limit = 1.0 if poison == "hang" else DEADLINE
        batcher = batched(
            work.poisonous,
            executor=pool,
            on_failure=isolate(),
            max_batch_size=16,
            max_queue_time=0.5,
            batch_timeout=limit,
        )
        async with batcher:
            outcomes = await outcomes_of(batcher, items)
            assert type(outcomes.pop(poison)) is EXPECTED[poison]
            assert outcomes == {item: f"{item} done" for item in items if item != poison}
            assert await batcher.process("after") == "after done"


@pytest.mark.skipif(sys.platform == "win32", reason="no event loop there watches sockets")
@pytest.mark.parametrize("isolates", [True, False])
@pytest.mark.parametrize("bad", [threading.Lock(), work.CrashAtUnpickle("raise")], ids=type)
async def test_an_item_that_raises_beside_one_that_does_not_arrive(
    bad: Any, isolates: bool
) -> None:
    """Both fail alone; without isolation, all that were in the batch fail with the first."""
    items = [1, bad, 2, "raise", 3]
    async with (
        WorkerPool(1) as pool,
        batched(
            work.poisonous, executor=pool, on_failure=[isolate()] if isolates else []
        ) as batcher,
        asyncio.timeout(DEADLINE),
    ):
        outcomes = await batcher.process_many(items, return_exceptions=True)
    assert type(outcomes.pop(1)) is SerializationError
    assert type(outcomes.pop(2)) is ArithmeticError
    if isolates:
        assert outcomes == ["1 done", "2 done", "3 done"]
    else:
        assert [type(outcome) for outcome in outcomes] == [ArithmeticError] * 3


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals")
async def test_poison_items_of_two_kinds_among_new_batches() -> None:
    """All other items get their results."""
    items = [
        item if item % 40 else ("kill", "raise")[item // 40 % 2] + " " * (item // 40)
        for item in range(160)
    ]

    def strip(batch: list[Any]) -> list[Any]:
        return work.poisonous([item.strip() if isinstance(item, str) else item for item in batch])

    async with batched(
        strip, executor="process", max_workers=2, on_failure=isolate(), max_batch_size=16
    ) as batcher:
        outcomes = await outcomes_of(batcher, items)
    for item, outcome in outcomes.items():
        if isinstance(item, int):
            assert outcome == f"{item} done"
        else:
            assert type(outcome) is EXPECTED[item.strip()]


PLACES: dict[str, Callable[[], Any]] = {
    "loop": lambda: None,
    "thread": lambda: "thread",
    "given threads": lambda: ThreadPoolExecutor(2),
}


@pytest.mark.parametrize("place", PLACES)
async def test_a_poison_item_fails_alone_in_threads(place: str) -> None:
    """Items that raise or exit are isolated."""
    executor = PLACES[place]()
    items = [*range(5), "raise", *range(6, 11), "exit"]
    async with batched(
        work.poisonous,
        executor=executor,
        on_failure=isolate(),
        max_batch_size=12,
        max_queue_time=0.5,
    ) as batcher:
        outcomes = await outcomes_of(batcher, items)
    if isinstance(executor, ThreadPoolExecutor):
        executor.shutdown()
    assert type(outcomes.pop("raise")) is ArithmeticError
    assert type(outcomes.pop("exit")) is BatchError
    assert outcomes == {item: f"{item} done" for item in items if isinstance(item, int)}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals")
async def test_an_abandoned_batch_frees_its_worker(tmp_path: Path) -> None:
    """With ``cancel_abandoned`` its worker is replaced, and the next batch runs at once."""

    def hang(batch: list[str]) -> list[str]:
        return work.note_pid_and_wait(tmp_path, batch) if batch == ["hang"] else batch

    async with WorkerPool(1) as pool:
        batcher = batched(hang, executor=pool, max_batch_size=1, cancel_abandoned=True)
        async with batcher:
            (first,) = [worker.pid for worker in pool.workers()]
            call = asyncio.ensure_future(batcher.process("hang"))
            await wait_until(lambda: work.noted(tmp_path, "pid"))
            call.cancel()
            async with asyncio.timeout(DEADLINE):
                assert await batcher.process("next") == "next"
            await wait_until(lambda: first not in [worker.pid for worker in pool.workers()])


@pytest.mark.skipif(sys.platform == "win32", reason="no WorkerPool")
async def test_an_abandoned_batch_that_waits_in_a_shared_pool_never_runs(tmp_path: Path) -> None:
    """It has not started, so ``cancel_abandoned`` does not matter."""
    async with WorkerPool(1) as pool, asyncio.timeout(DEADLINE):
        busy = asyncio.create_task(pool.run(work.note_pid_and_wait, tmp_path, [0]))
        await turn()
        batcher = batched(work.poisonous, executor=pool, max_queue_time=0.0)
        with pytest.raises(TimeoutError):
            await batcher.process("kill", timeout=0.05)
        (tmp_path / "go").touch()
        await busy
        assert await batcher.process("next") == "next done"
        await batcher.stop()
        assert sum(worker.batches for worker in pool.workers()) == 2
