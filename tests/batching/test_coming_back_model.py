"""Items that come back under random interleavings of events: `Later`, `retry` and `isolate`."""

from __future__ import annotations

import asyncio
import sys
from collections import Counter
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from async_batcher import Later, Limit, isolate, retry
from async_batcher._batching.queue.limit_state import state_of
from async_batcher.exceptions import (
    BatchError,
    BatcherStoppedError,
    ItemTimeoutError,
    QueueFullException,
)
from tests.support.polling import turn
from tests.support.virtual_clock import FakeBatcher, VirtualLoop, now, virtual_loop

NO_LIMIT = sys.maxsize
MAX_ATTEMPTS = 3

POLICIES: dict[str, list[Any]] = {
    "none": [],
    "retry": [retry(attempts=MAX_ATTEMPTS, backoff=0.5, budget=None)],
    "isolate": [isolate()],
    "both": [
        retry(OSError, Later, attempts=MAX_ATTEMPTS, backoff=0.0, budget=None),
        isolate(ZeroDivisionError),
    ],
    "budget": [retry(budget=0.0, backoff=0.25), isolate()],
}
ERRORS: list[Any] = [ZeroDivisionError, OSError]
DELAYS = st.sampled_from([0.0, 0.25, 1.0, None])

LIMITS: dict[str, Any] = {
    "none": {},
    "per_batch": {"by": lambda item: item % 3, "per_batch": 2},
    "queued": {"queued": 2},
    "rate": {"rate": (2, 0.5)},
}

# Of each item of a batch, in turn: its result, a `Later`, or an exception.
OUTCOMES = st.lists(
    st.one_of(st.none(), st.tuples(st.just("later"), DELAYS), st.sampled_from(ERRORS)),
    min_size=1,
    max_size=4,
)
BATCH = st.integers(0, 3)
EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("call"), st.sampled_from([None, 0.5, 3.0])),
        st.tuples(st.just("submit"), st.sampled_from([None, 0.5, 3.0])),
        st.tuples(st.just("many"), st.tuples(st.integers(1, 5), st.booleans())),
        st.tuples(st.just("map"), st.tuples(st.integers(1, 5), st.booleans())),
        st.tuples(st.just("cancel"), st.integers(0, 20)),
        st.tuples(st.just("sleep"), st.sampled_from([0.0, 0.25, 0.5, 2.0])),
        st.tuples(st.just("end"), st.tuples(BATCH, OUTCOMES)),
        st.tuples(st.just("yield"), st.tuples(BATCH, OUTCOMES)),
        st.tuples(st.just("raise"), st.tuples(BATCH, st.sampled_from(ERRORS))),
        st.tuples(st.just("later"), st.tuples(BATCH, DELAYS)),
    ),
    max_size=50,
)


class Calls:
    """The calls of one run, and what may be said of them at any time.

    Attributes:
        futures: Of each call, with its items and the seconds that it has.
        pause: When the batcher may start batches again.
        not_before: When an item that was put off may run again.
        cancelled: Items of cancelled calls.
        keys: The number of keys, of each of which one batch may run; 0: items have none.
        ran: The items of each batch that has started, with keys.
        maps: The calls of `map`, which read their items later.
        limit: Of `LIMITS`.
        dispatched: When batches have started, and how many items they had.
    """

    def __init__(
        self, batcher: FakeBatcher, size: int, slots: int, policy: str, keys: int, limit: str
    ) -> None:
        self.batcher = batcher
        batcher.runner.on_begin = self.on_start
        self.size = size if size > 0 else NO_LIMIT
        self.slots = slots if slots > 0 else NO_LIMIT
        self.keys = keys
        self.ran: list[set[int]] = []
        self.maps: set[asyncio.Future[Any]] = set()
        self.limit = limit
        self.dispatched: list[tuple[float, int]] = []
        self.is_limited = policy in ("retry", "both")
        self.futures: list[tuple[asyncio.Future[Any], list[int], float]] = []
        self.items = 0
        self.pause = 0.0
        self.not_before: dict[int, float] = {}
        self.cancelled: set[int] = set()
        self.starts: Counter[int] = Counter()
        self.error: AssertionError | None = None
        self.failures: set[int] = set()  # items that had an exception, at any time
        self.put_off: set[int] = set()  # items that had a `Later`

    def take(self, count: int, timeout: float | None, default: float | None) -> list[int]:
        """Return new items."""
        items = list(range(self.items, self.items + count))
        self.items += count
        limit = default if timeout is None else timeout
        self.deadline = now() + (NO_LIMIT if limit is None else limit)
        return items

    def results(self, items: list[int], outcomes: list[Any]) -> list[Any]:
        """Return the results of a batch, or of a part of it."""
        results: list[Any] = []
        for index, item in enumerate(items):
            outcome = outcomes[index % len(outcomes)]
            if outcome is None:
                results.append(item)
            elif isinstance(outcome, tuple):
                results.append(Later(outcome[1]))
                self.put_off.add(item)
                self.not_before[item] = now() + (outcome[1] or 0.0)
            else:
                results.append(outcome(item))
                self.failures.add(item)
        return results

    def add(self, future: asyncio.Future[Any], items: list[int]) -> None:
        """Add a call."""
        future.add_done_callback(lambda done: done.cancelled() or done.exception())
        self.futures.append((future, items, self.deadline))

    def on_start(self, batch: list[int], facts: Any) -> None:
        """Check a batch that starts."""
        try:
            self.check_start(batch, facts)
        except AssertionError as exc:  # raised by `check`, in the test itself
            self.error = self.error or exc

    def check_start(self, batch: list[int], facts: Any) -> None:
        """Check that each item may run now."""
        others = (left for left, _ in self.batcher.runner.running if left is not batch)
        running = {item for left in others for item in left}
        assert running.isdisjoint(batch), "an item runs twice at a time"
        assert len(set(batch)) == len(batch)
        assert 0 < len(batch) <= self.size
        assert now() >= self.pause, "started in a pause"
        for item in batch:
            self.starts[item] += 1
            call = next((call for call in self.futures if item in call[1]), None)
            # If it is None, it is a new one. What has waited for a worker may lose some of its callers.
            if call is not None and not self.batcher.runner.begins_at_most:
                if call[0] not in self.maps:
                    assert now() < call[2], "started after its deadline"
                assert not call[0].done(), "started, but has its result"
                assert item not in self.cancelled, "started after its cancellation"
            assert now() >= self.not_before.get(item, 0.0), "started before its time"
        if self.keys:
            self.check_order(batch, running)
        if self.limit == "per_batch":
            assert len(batch) == 1 or sum(item % 3 for item in batch) <= 2
        if self.limit == "rate" and not self.batcher.runner.begins_at_most:
            self.dispatched.append((now(), len(batch)))
            assert sum(count for at, count in self.dispatched if at > now() - 0.5) <= 2
        attempt = 1 if facts is None else facts[1]
        assert attempt <= max(self.starts[item] for item in batch)
        assert attempt <= MAX_ATTEMPTS or not self.is_limited

    def check_order(self, batch: list[int], running: set[int]) -> None:
        """Check that no earlier item of the key runs, or is still to run."""
        (key,) = {item % self.keys for item in batch}
        assert all(item % self.keys != key for item in running), "two batches of a key run"
        mapped = {
            item for future, items, _ in self.futures if future in self.maps for item in items
        }
        ordered = [item for item in batch if item not in mapped]  # those come when they are read
        assert ordered == sorted(ordered)
        for item in ordered:
            later = {other for other in self.starts if other > item and other % self.keys == key}
            later -= mapped
            together = set[int]().union(*(ran for ran in self.ran if item in ran), batch)
            assert later <= together, "an item has overtaken another of its key"
        self.ran.append(set(batch))

    def check(self) -> None:
        """Check what has started, and the counts."""
        if self.error is not None:
            raise self.error
        runner = self.batcher.runner
        ahead = runner.full_batches_ahead(self.slots)
        assert len(runner.running) <= self.slots + ahead
        stats = self.batcher.stats()
        accepted = self.items - stats.rejected
        resolved = stats.done + stats.failed + stats.cancelled + stats.timed_out
        counted = stats.queued + stats.blocked + stats.running + resolved
        assert counted <= accepted if self.maps else counted == accepted, stats


@settings(max_examples=200)
@given(
    EVENTS,
    st.sampled_from([1, 2, 4, -1]),
    st.sampled_from([1, 2, -1]),
    st.sampled_from([2, -1]),
    st.booleans(),
    st.sampled_from(sorted(POLICIES)),
    st.sampled_from([None, 2.0]),
    st.sampled_from([0.0, 0.25]),
    st.sampled_from(["drain", "force", "timeout"]),
    st.sampled_from([0, 1, 2]),
    st.booleans(),
    st.sampled_from([0, 0, 1, 2]),
    st.sampled_from(sorted(LIMITS)),
)
def test_nothing_is_lost_or_delivered_twice(
    events: list[tuple[str, Any]],
    size: int,
    slots: int,
    capacity: int,
    waits: bool,
    policy: str,
    item_timeout: float | None,
    window: float,
    how: str,
    workers: int,
    recalls_late: bool,
    keys: int,
    limit_name: str,
) -> None:
    """Each caller has one outcome, its own; an item runs once at a time, and at its time.

    Counts are right at all times, and everything ends after a stop.
    """

    async def scenario() -> None:
        limit = Limit(**LIMITS[limit_name]) if limit_name != "none" else None
        batcher = FakeBatcher(
            max_batch_size=size,
            concurrency=slots,
            max_queue_size=capacity,
            when_full="wait" if waits else "raise",
            on_failure=POLICIES[policy],
            item_timeout=item_timeout,
            max_queue_time=window,
            limits=[limit] if limit else [],
            **({"key": lambda item: item % keys, "key_concurrency": 1} if keys else {}),
        )
        runner = batcher.runner
        runner.begins_at_most, runner.recalls_late = workers, recalls_late
        calls = Calls(batcher, size, slots, policy, keys, limit_name)
        for kind, value in events:
            if kind == "call":
                items = calls.take(1, value, item_timeout)
                task = batcher.call(items[0], timeout=value)
                calls.add(task, items)
                await asyncio.sleep(0)
            elif kind == "submit":
                items = calls.take(1, value, item_timeout)
                try:
                    future = batcher.submit(items[0], timeout=value)
                except QueueFullException as exc:
                    future = asyncio.get_running_loop().create_future()
                    future.set_exception(exc)
                calls.add(future, items)
            elif kind == "many":
                items = calls.take(value[0], None, item_timeout)
                task = batcher.call_many(items, return_exceptions=value[1])
                calls.add(task, items)
                await asyncio.sleep(0)
            elif kind == "map":
                items = calls.take(value[0], None, item_timeout)
                task = asyncio.create_task(mapped(batcher, items, return_exceptions=value[1]))
                calls.maps.add(task)
                calls.add(task, items)
                await asyncio.sleep(0)
            elif kind == "cancel" and value < len(calls.futures):
                future, items, _ = calls.futures[value]
                future.cancel()
                await turn(2)
                if future.cancelled():
                    calls.cancelled.update(items)
            elif kind == "sleep":
                for _ in range(int(value / 0.25)):
                    await asyncio.sleep(0.25)
                    calls.check()
                await asyncio.sleep(0)
            elif kind in ("end", "yield", "raise", "later") and value[0] < runner.begun:
                index, outcome = value
                left = runner.running[index][0]
                if kind == "end":
                    runner.end(index, calls.results(left, outcome))
                elif kind == "yield":
                    results = calls.results(left[: len(outcome)], outcome)
                    runner.yield_results(len(results), index=index, results=results)
                elif kind == "raise":
                    calls.failures.update(left)
                    runner.end(index, outcome("batch"))
                else:
                    callers = [call for call in calls.futures if not call[0].done()]
                    if any(item in call[1] for call in callers for item in left):
                        calls.pause = max(calls.pause, now() + (outcome or 0.0))
                    calls.put_off.update(left)
                    runner.end(index, Later(outcome))
            calls.check()
        if how == "drain":
            stop = asyncio.create_task(batcher.stop())
        else:
            options: dict[str, Any] = {"force": True} if how == "force" else {"timeout": 0.125}
            stop = asyncio.create_task(batcher.stop(**options))
        await turn()
        for _ in range(2000):
            calls.check()
            if runner.running:
                runner.end()
                await turn(1)
            elif stop.done():
                break
            else:
                await asyncio.sleep(0.0625)  # an exact fraction
        if how == "timeout":
            await asyncio.gather(stop, return_exceptions=True)
        else:
            await stop
        await turn()
        calls.check()
        for call in calls.futures:
            check_outcome(calls, call, stopped=how != "drain" or waits)
        assert virtual_loop().timers() == 0
        stats = batcher.stats()
        assert stats.queued == stats.blocked == stats.running == 0
        assert limit is None or state_of(limit).has_capacity(2), "all of it is free again"

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(scenario())


async def mapped(batcher: FakeBatcher, items: list[int], *, return_exceptions: bool) -> list[Any]:
    """Return all results of `map`."""
    results = batcher.map(items, return_exceptions=return_exceptions)
    return [result async for result in results]


def check_outcome(
    calls: Calls, call: tuple[asyncio.Future[Any], list[int], float], *, stopped: bool
) -> None:
    """Check what one caller got."""
    future, items, deadline = call
    assert future.done(), "a caller is still pending"
    if future.cancelled():
        assert future in calls.maps or calls.cancelled.issuperset(items)
        return
    error = future.exception()
    results = [error] * len(items) if error is not None else future.result()
    if not isinstance(results, list):
        results = [results]
    assert len(results) == len(items)
    for item, result in zip(items, results, strict=True):
        if isinstance(result, int):
            assert result == item
            assert calls.starts[item]
        elif isinstance(result, ItemTimeoutError):
            assert now() >= deadline
        elif isinstance(result, ZeroDivisionError | OSError):
            # A strict call fails with the first of its failures.
            assert not calls.failures.isdisjoint(items)
        elif isinstance(result, BatchError):
            assert not calls.put_off.isdisjoint(items)
            assert calls.is_limited or stopped
        elif isinstance(result, BatcherStoppedError):
            assert stopped or future in calls.maps
        else:
            assert isinstance(result, QueueFullException), result
