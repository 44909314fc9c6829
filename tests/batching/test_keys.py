"""``key`` and ``key_concurrency``: batches of one key, on a virtual clock."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import threading
from typing import TYPE_CHECKING, Any

import pytest

from async_batcher import WorkerPool, current_batch
from async_batcher.exceptions import BatcherStoppedError, BatchTimeoutError, QueueFullException
from async_batcher.failures import Later, isolate, retry
from async_batcher.limits import Limit
from tests.support.autopilot import Autopilot, process_as
from tests.support.batchers import make_batcher
from tests.support.polling import turn
from tests.support.virtual_clock import FakeBatcher, now
from tests.support.worker_functions import DEADLINE

if TYPE_CHECKING:
    from async_batcher.stats import BatchRecord

virtual = pytest.mark.virtual_clock


def first(item: Any) -> Any:
    """Return the key of an item: its first element."""
    return item[0]


def lanes(batcher: FakeBatcher) -> dict[Any, Any]:
    """Return what the queue keeps by key."""
    found: dict[Any, Any] = batcher.scheduler.queue._schedule.lanes  # type: ignore[union-attr]
    return found


def end(batcher: FakeBatcher, batch: list[Any], outcome: Any = None) -> None:
    """Finish the running batch with these items."""
    index = [list(left) for left, _ in batcher.runner.running].index(batch)
    batcher.runner.end(index, outcome)


def running(batcher: FakeBatcher) -> list[list[Any]]:
    """Return the batches that run."""
    return [list(left) for left, _ in batcher.runner.running]


# --- batches of one key


@virtual
@pytest.mark.parametrize("kind", ["single", "submit", "bulk", "map"])
@pytest.mark.parametrize("size", [1, 2, 3, -1])
async def test_a_batch_has_one_key(kind: str, size: int) -> None:
    """Results are in the order of the call; items of a key stay in order."""
    batcher = FakeBatcher(key=first, max_batch_size=size, concurrency=2)
    pilot = Autopilot(batcher, 0.1)
    rng = random.Random(7)  # noqa: S311 - a test
    items = [rng.choice("abc") + str(number) for number in range(30)]
    assert await process_as(kind, batcher, items) == items
    batches = [batch for _, batch in pilot.starts]
    assert all(len({item[0] for item in batch}) == 1 for batch in batches)
    for key in "abc":
        in_order = [item for batch in batches for item in batch if item[0] == key]
        assert in_order == [item for item in items if item[0] == key]
    assert lanes(batcher) == {}
    await batcher.stop()


@virtual
async def test_each_key_has_its_window() -> None:
    """It runs from the oldest item of that key."""
    batcher = FakeBatcher(key=first, max_queue_time=2.0, max_batch_size=3, concurrency=-1)
    pilot = Autopilot(batcher)
    calls = [batcher.submit("a0")]
    await asyncio.sleep(1.0)
    calls += [batcher.submit(item) for item in ("b0", "a1", "c0", "c1", "c2")]
    await asyncio.sleep(1.5)
    calls += [batcher.submit("a2")]
    await asyncio.gather(*calls)
    assert pilot.starts == [
        (1.0, ["c0", "c1", "c2"]), (2.0, ["a0", "a1"]), (3.0, ["b0"]), (4.5, ["a2"]),
    ]  # fmt: skip
    await batcher.stop()


@virtual
async def test_the_key_with_the_oldest_item_leaves_first() -> None:
    """Of the batches that are due when a slot is free."""
    batcher = FakeBatcher(key=first, max_queue_time=1.0, max_batch_size=2)
    items = ["x", "a0", "b0", "c0", "b1", "a1", "c1", "a2", "d0"]
    calls = [batcher.submit(items[0])]
    batcher.scheduler.callers.flush()
    await turn()
    calls += [batcher.submit(item) for item in items[1:]]
    await asyncio.sleep(1.5)
    while batcher.runner.running:
        batcher.runner.end()
        await turn()
    assert batcher.batches == [["x"], ["a0", "a1"], ["b0", "b1"], ["c0", "c1"], ["a2"], ["d0"]]
    assert await asyncio.gather(*calls) == items
    await batcher.stop()


@virtual
@pytest.mark.parametrize("key_concurrency", [None, 1])
@pytest.mark.parametrize("kind", ["submit", pytest.param("bulk", marks=pytest.mark.slow)])
async def test_many_keys_leave_nothing_behind(kind: str, key_concurrency: int | None) -> None:
    """10,000 of them, each used once."""
    batcher = FakeBatcher(key=lambda item: item, concurrency=8, key_concurrency=key_concurrency)
    Autopilot(batcher)
    items = list(range(10_000 if kind == "bulk" else 2_000))
    assert await process_as(kind, batcher, items) == items
    assert lanes(batcher) == {}
    schedule: Any = batcher.scheduler.queue._schedule  # type: ignore[union-attr]
    assert len(schedule._due) + len(schedule._ready) < 1000
    await batcher.stop()


@virtual
async def test_cancelled_items_leave_nothing_behind() -> None:
    """Keys whose items never ran."""
    batcher = FakeBatcher(key=lambda item: item, max_queue_time=10.0)
    calls = [batcher.submit(number) for number in range(500)]
    bulk = batcher.call_many(range(500, 1000))
    await turn()
    assert len(lanes(batcher)) == 1000
    for call in calls:
        call.cancel()
    bulk.cancel()
    await turn()
    assert lanes(batcher) == {}
    assert batcher.batches == []
    await batcher.stop()


@virtual
@pytest.mark.parametrize("key_concurrency", [None, 1])
async def test_a_rare_key_is_not_held_back_by_a_busy_one(key_concurrency: int | None) -> None:
    """It waits for the batches before it only."""
    batcher = FakeBatcher(
        key=first, max_batch_size=2, concurrency=2, key_concurrency=key_concurrency
    )
    pilot = Autopilot(batcher, 1.0)
    flood = [batcher.submit(f"a{number}") for number in range(100)]
    await turn()
    start = now()
    rare = batcher.submit("b")
    flood += [batcher.submit(f"a{number}") for number in range(100, 160)]
    if key_concurrency:
        assert await rare == "b"
        assert now() <= start + 1.0
    else:
        await rare
        position = [batch for _, batch in pilot.starts].index(["b"])
        assert position == 50
    await asyncio.gather(*flood)
    await batcher.stop()


@virtual
async def test_single_and_equal_keys() -> None:
    """1 and 1.0 are one key; None is a key, too."""
    batcher = FakeBatcher(key=first, concurrency=-1)
    pilot = Autopilot(batcher)
    await batcher.process_many([(1, "a"), (None, "b"), (1.0, "c"), (True, "d"), (None, "e")])
    assert [[item[1] for item in batch] for _, batch in pilot.starts] == [
        ["a", "c", "d"], ["b", "e"],
    ]  # fmt: skip
    await batcher.stop()


# --- keys that fail


class Grumpy:
    """A key that cannot be compared with another one of the same hash."""

    def __init__(self, error: type[Exception] = ZeroDivisionError) -> None:
        self.error = error

    def __hash__(self) -> int:
        """Return the hash that all of them have."""
        return 1

    def __eq__(self, other: object) -> bool:
        """Fail."""
        raise self.error


class Unhashable:
    """A key whose hash fails."""

    def __hash__(self) -> int:
        """Fail."""
        raise ZeroDivisionError


@virtual
@pytest.mark.parametrize("kind", ["single", "submit", "bulk", "map"])
@pytest.mark.parametrize(
    ("key", "error", "match"),
    [
        (list, TypeError, "a key must be hashable"),
        (lambda: {"a": 1}, TypeError, "unhashable type: 'dict'"),
        (Unhashable, ZeroDivisionError, ""),
        (ZeroDivisionError, ZeroDivisionError, ""),
    ],
)
async def test_a_wrong_key_fails_its_item_alone(
    kind: str, key: Any, error: type[Exception], match: str
) -> None:
    """In single and bulk calls; the others get their results."""

    def key_of(item: str) -> Any:
        if item != "bad":
            return item[0]
        made = key()
        if isinstance(made, Exception):
            raise made
        return made

    batcher = FakeBatcher(key=key_of)
    pilot = Autopilot(batcher)
    results = await process_as(kind, batcher, ["a0", "bad", "a1"])
    assert results[::2] == ["a0", "a1"]
    assert type(results[1]) is error
    assert match in str(results[1])
    assert [batch for _, batch in pilot.starts] == [["a0", "a1"]]
    with pytest.raises(error):
        await batcher.process_many(["a0", "bad"])
    await turn()
    assert len(pilot.starts) == 1
    await batcher.stop()


@virtual
@pytest.mark.parametrize("error", [ZeroDivisionError, TypeError])
@pytest.mark.parametrize("kind", ["single", "submit", "bulk", "map"])
async def test_a_key_that_cannot_be_compared_fails_its_item_alone(
    kind: str, error: type[Exception]
) -> None:
    """If there is another key with its hash, also in the same bulk call."""
    keys = {"x": Grumpy(error), "y": Grumpy(error)}
    batcher = FakeBatcher(key=lambda item: keys.get(item[0], item[0]))
    pilot = Autopilot(batcher)
    results = await process_as(kind, batcher, ["x0", "y0", "x1", "a0"])
    assert results[::2] == ["x0", "x1"]
    assert results[3] == "a0"
    assert type(results[1]) is error
    assert [batch for _, batch in pilot.starts] == [["x0", "x1"], ["a0"]]
    assert lanes(batcher) == {}
    assert await batcher.process("y1") == "y1"
    await batcher.stop()


@virtual
async def test_a_key_that_cannot_be_compared_on_the_waitlist() -> None:
    """It fails when it would be queued; callers behind it are admitted."""
    keys = {"x": Grumpy(), "y": Grumpy()}
    batcher = FakeBatcher(
        key=lambda item: keys.get(item[0], item[0]), max_queue_size=1, when_full="wait"
    )
    calls = [batcher.call("a0")]
    await turn()
    calls += [batcher.call(item) for item in ("a1", "x0", "y0", "x1", "a2")]
    calls += [
        batcher.call_many(["a3", "x2", "y1", "a4"], return_exceptions=True),
        batcher.call_many(["x3", "y2", "a5"]),
    ]
    await turn()
    while batcher.runner.running:
        batcher.runner.end()
        await turn()
    results: list[Any] = await asyncio.gather(*calls, return_exceptions=True)
    # Which of them fails depends on whether the other is queued or runs then.
    for result, item in zip(results[:6], ("a0", "a1", "x0", "y0", "x1", "a2"), strict=True):
        assert result == item or type(result) is ZeroDivisionError
    assert results[0] == "a0"
    assert results[1] == "a1"
    assert results[5] == "a2"
    assert results[6][0] == "a3"
    assert results[6][3] == "a4"
    assert batcher.stats().queued == batcher.stats().blocked == 0
    assert lanes(batcher) == {}
    await batcher.stop()


# --- key_concurrency


class Watch:
    """Checks that at most so many batches of a key run at a time."""

    def __init__(self, batcher: FakeBatcher, limit: int) -> None:
        self.most = 0
        submit = batcher.runner.submit

        def check(batch: list[Any], *args: Any) -> Any:
            handle = submit(batch, *args)
            keys = [left[0][0] for left in running(batcher) if left]
            for key in keys:
                assert keys.count(key) <= limit
                self.most = max(self.most, keys.count(key))
            return handle

        batcher.runner.submit = check  # type: ignore[assignment,method-assign]


@virtual
@pytest.mark.parametrize("key_concurrency", [1, 2])
@pytest.mark.parametrize("kind", ["single", "bulk", "map"])
async def test_batches_of_a_key_at_a_time(kind: str, key_concurrency: int) -> None:
    """No more than ``key_concurrency``; with 1, one after the other in order."""
    batcher = FakeBatcher(
        key=first, key_concurrency=key_concurrency, concurrency=4, max_batch_size=2
    )
    watch = Watch(batcher, key_concurrency)
    rng = random.Random(3)  # noqa: S311 - a test
    items = [rng.choice("aaab") + str(number) for number in range(60)]
    call = asyncio.create_task(process_as(kind, batcher, items))
    await turn(10)
    while batcher.runner.running:
        batcher.runner.end(rng.randrange(len(batcher.runner.running)))
        await turn(10)
    assert await call == items
    assert watch.most == key_concurrency
    for key in "ab":
        in_order = [item for batch in batcher.batches for item in batch if item[0] == key]
        assert in_order == [item for item in items if item[0] == key]
    assert lanes(batcher) == {}
    await batcher.stop()


@virtual
async def test_a_key_that_runs_does_not_hold_back_others() -> None:
    """Its next items wait; what is due of other keys takes the slots."""
    batcher = FakeBatcher(key=first, key_concurrency=1, concurrency=2, max_batch_size=1)
    calls = [batcher.submit(item) for item in ("a0", "a1", "a2", "b0")]
    await turn()
    assert batcher.batches == [["a0"], ["b0"]]
    end(batcher, ["b0"])
    await turn()
    assert batcher.batches == [["a0"], ["b0"]]
    end(batcher, ["a0"])
    assert batcher.batches == [["a0"], ["b0"], ["a1"]]
    end(batcher, ["a1"])
    end(batcher, ["a2"])
    await asyncio.gather(*calls)
    await batcher.stop()


@virtual
@pytest.mark.parametrize("comes_back", ["later", "retry", "isolate", "returned", "fails"])
async def test_a_key_keeps_its_order_with_failures(comes_back: str) -> None:
    """Nothing of a key starts before what came earlier has its end, or is cancelled."""
    policies = {"retry": [retry(backoff=1.0, budget=None)], "isolate": [isolate()]}.get(
        comes_back, []
    )
    batcher = FakeBatcher(
        key=first, key_concurrency=1, concurrency=4, max_batch_size=2, on_failure=policies
    )
    Watch(batcher, 1)
    calls = [batcher.submit(f"a{number}") for number in range(6)]
    await turn()
    assert batcher.batches == [["a0", "a1"]]
    error: Any = Later(1.0) if comes_back == "later" else ValueError("no")
    end(batcher, ["a0", "a1"], ["a0", Later(1.0)] if comes_back == "returned" else error)
    await turn()
    if comes_back in ("later", "returned", "retry"):
        assert running(batcher) == []
        await asyncio.sleep(0.9)
        calls[2].cancel()
        assert running(batcher) == []
        await asyncio.sleep(0.2)
    results = await finish(batcher)
    failed = comes_back == "fails"
    done = [item for item in results if not failed or item not in ("a0", "a1")]
    assert done == sorted(done)
    for index, call in enumerate(calls):
        if not call.cancelled() and not (failed and index < 2):
            assert await call == f"a{index}"
    await asyncio.gather(*calls, return_exceptions=True)
    assert lanes(batcher) == {}
    await batcher.stop()


async def finish(batcher: FakeBatcher) -> list[Any]:
    """Finish all batches, and return their items."""
    items: list[Any] = []
    while batcher.runner.running:
        batch = running(batcher)[0]
        items += batch
        end(batcher, batch)
        await turn()
    return items


@virtual
async def test_a_cancelled_batch_releases_its_key() -> None:
    """With ``cancel_abandoned``; otherwise the next batch waits for its end."""
    for abandons in (True, False):
        batcher = FakeBatcher(
            key=first,
            key_concurrency=1,
            concurrency=2,
            max_batch_size=1,
            cancel_abandoned=abandons,
        )
        gone, kept = batcher.call("a0"), batcher.call("a1")
        await turn()
        gone.cancel()
        await turn()
        assert batcher.batches == ([["a0"], ["a1"]] if abandons else [["a0"]])
        await finish(batcher)
        assert await kept == "a1"
        await batcher.stop()


@virtual
async def test_a_leaked_slot_holds_its_key() -> None:
    """Batches of other keys run; those of that key do when it has returned."""
    batcher = FakeBatcher(key=first, key_concurrency=1, concurrency=2, max_batch_size=1)
    calls = [batcher.submit(item) for item in ("a0", "a1", "b0")]
    await turn()
    end(batcher, ["b0"])
    batcher.runner.on_timeouts[0](BatchTimeoutError("timed out"))
    calls += [batcher.submit("b1")]
    await turn()
    end(batcher, ["b1"])
    await asyncio.sleep(5.0)
    assert batcher.batches == [["a0"], ["b0"], ["b1"]]
    with pytest.raises(BatchTimeoutError):
        await calls[0]
    batcher.runner.end()
    await turn()
    assert batcher.batches[3:] == [["a1"]]
    await finish(batcher)
    assert await asyncio.gather(*calls[1:]) == ["a1", "b0", "b1"]
    await batcher.stop()


async def test_a_key_waits_for_its_thread_that_timed_out() -> None:
    """In real threads: a batch of that key never runs beside another one."""
    release = threading.Event()
    active: set[str] = set()

    def process_batch(batch: list[str]) -> list[str]:
        key = batch[0][0]
        assert key not in active, "two batches of a key at a time"
        active.add(key)
        if batch == ["a0"]:
            assert release.wait(DEADLINE)
        active.discard(key)
        return batch

    async with make_batcher(
        process_batch,
        executor="thread",
        max_workers=3,
        key=first,
        key_concurrency=1,
        max_queue_time=0,
        batch_timeout=0.02,
    ) as batcher:
        with pytest.raises(BatchTimeoutError):
            await batcher.process("a0")
        waiting = batcher.submit("a1")
        while True:
            try:  # it, too, may take longer than that on a busy machine
                assert await batcher.process("b0") == "b0"
                break
            except BatchTimeoutError:
                continue
        assert not waiting.done()
        release.set()
        with contextlib.suppress(BatchTimeoutError):
            assert await waiting == "a1"


# --- the queue's size, and limits


@virtual
async def test_max_queue_size_is_for_all_keys() -> None:
    """A key has no capacity of its own."""
    batcher = FakeBatcher(key=first, key_concurrency=1, concurrency=4, max_queue_size=3)
    calls = [batcher.submit("a0")]
    await turn()
    calls += [batcher.submit(item) for item in ("a1", "a2", "a3")]
    with pytest.raises(QueueFullException, match="3 items queued, max_queue_size=3"):
        batcher.submit("b0")
    with pytest.raises(QueueFullException):
        await batcher.process_many(["a4"])
    await finish(batcher)
    await asyncio.gather(*calls)
    await batcher.stop()


@virtual
@pytest.mark.parametrize("kind", ["single", "bulk", "map"])
async def test_callers_of_all_keys_wait_for_capacity(kind: str) -> None:
    """First come, first served over all keys."""
    batcher = FakeBatcher(
        key=first, max_queue_size=2, max_batch_size=2, concurrency=2, when_full="wait"
    )
    Autopilot(batcher, 0.5)
    rng = random.Random(5)  # noqa: S311 - a test
    items = [rng.choice("abcd") + str(number) for number in range(40)]
    assert await process_as(kind, batcher, items) == items
    assert max(len(batch) for batch in batcher.batches) <= 2
    assert lanes(batcher) == {}
    await batcher.stop()


@virtual
async def test_a_rate_is_for_all_keys() -> None:
    """The key with the oldest item has the next turn; none starves."""
    batcher = FakeBatcher(
        key=first, limits=[Limit(rate=(2, 1.0))], concurrency=-1, key_concurrency=1
    )
    pilot = Autopilot(batcher)
    items = ["a0", "a1", "a2", "b0", "a3", "c0", "a4", "b1"]
    assert await batcher.process_many(items) == items
    assert [batch for _, batch in pilot.starts] == [
        ["a0", "a1"], ["a2", "a3"], ["b0", "b1"], ["c0"], ["a4"],
    ]  # fmt: skip
    pilot.check_rate(2, 1.0, len)
    assert batcher.stats().rate_limited == 6
    await batcher.stop()


@virtual
@pytest.mark.parametrize("comes_back", [False, True])
async def test_an_older_item_is_due_while_a_rate_holds_another_key(comes_back: bool) -> None:
    """It leaves when its window ends, since it fits the rate."""
    batcher = FakeBatcher(
        key=first,
        limits=[Limit(lambda item: item[1], rate=(10, 4.0))],
        concurrency=-1,
        max_batch_size=2,
        max_queue_time=0.3,
    )
    calls = [batcher.submit(("x", 3)), batcher.submit(("x", 3))]
    await turn()
    assert batcher.runner.running
    old = batcher.submit(("old", 1))
    if comes_back:
        await asyncio.sleep(0.3)
        batcher.runner.end(1, Later(0.1))
    else:
        await asyncio.sleep(0.01)
    calls += [old, batcher.submit(("big", 4)), batcher.submit(("big", 4))]
    await turn()
    batcher.runner.end()
    assert not batcher.runner.running
    await asyncio.sleep(0.401)
    assert batcher.batches[-1] == [("old", 1)]
    batcher.runner.end()
    await asyncio.sleep(8.0)
    end(batcher, [("big", 4), ("big", 4)])
    assert await asyncio.gather(*calls)
    await batcher.stop()


@virtual
async def test_stop_drains_all_keys() -> None:
    """One batch of a key after the other; a forced stop fails them."""
    for force in (False, True):
        batcher = FakeBatcher(key=first, key_concurrency=1, max_batch_size=1, max_queue_time=60.0)
        Autopilot(batcher, 1.0)
        items = ["a0", "b0", "a1", "b1"]
        calls = [batcher.submit(item) for item in items]
        await batcher.stop(force=force)
        results = await asyncio.gather(*calls, return_exceptions=True)
        if force:
            assert {type(result) for result in results} == {BatcherStoppedError}
        else:
            assert results == items


# --- who learns the key


@virtual
async def test_records_and_batches_have_the_key() -> None:
    """`BatchRecord.key`; what a runner gets for `current_batch`."""
    records: list[BatchRecord] = []
    batcher = FakeBatcher(key=first, concurrency=-1, on_batch=records.append)
    Autopilot(batcher)
    await batcher.process_many(["a0", "b0", "a1"])
    await turn()
    assert [(record.key, record.size) for record in records] == [("a", 2), ("b", 1)]
    assert [facts and facts[0] for facts in batcher.runner.facts] == ["a", "b"]
    await batcher.stop()


def keys_of_batches(batch: list[str]) -> list[Any]:
    """Return the key of this batch for each item; runs anywhere."""
    info = current_batch()
    assert info is not None
    assert all(item[0] == info.key for item in batch)
    return [info.key] * len(batch)


@pytest.mark.parametrize(
    "executor", ["loop", "thread", pytest.param("process", marks=pytest.mark.slow)]
)
async def test_current_batch_has_the_key(executor: str) -> None:
    """Where a batch runs: on the loop, in a thread, in a worker process."""

    async def on_loop(batch: list[str]) -> list[Any]:
        return keys_of_batches(batch)

    if executor == "loop":
        batcher = make_batcher(on_loop, key=first, max_queue_time=0)
    else:
        batcher = make_batcher(keys_of_batches, key=first, executor=executor, max_workers=2)
    async with batcher:
        assert await batcher.process_many(["a0", "b0", "a1"]) == ["a", "b", "a"]
        assert await batcher.process("c0") == "c"


@pytest.mark.slow
async def test_keys_in_a_worker_pool() -> None:
    """Batches of one key never run at the same time in two processes."""
    async with (
        WorkerPool(2) as pool,
        make_batcher(
            note_interval, key=first, key_concurrency=1, executor=pool, max_batch_size=2
        ) as batcher,
    ):
        items = [key + str(number) for number in range(10) for key in "abc"]
        intervals = await batcher.process_many(items)
        streamed = [result async for result in batcher.map(items)]
    for results in (intervals, streamed):
        assert [item for item, _, _ in results] == items
        for key in "abc":
            of_key = sorted({(start, end) for item, start, end in results if item[0] == key})
            assert len(of_key) >= 5
            for (_, ended), (started, _) in itertools.pairwise(of_key):
                assert ended <= started


def note_interval(batch: list[str]) -> list[tuple[str, float, float]]:
    """Return for each item when its batch began and ended; runs in a worker."""
    import time

    start = time.monotonic()
    end_ = time.monotonic()
    return [(item, start, end_) for item in batch]
