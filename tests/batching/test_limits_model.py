"""Calls of all kinds with limits and keys under random interleavings of events."""

from __future__ import annotations

import asyncio
import math
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from async_batcher._batching.queue.lane_queue import LaneQueue
from async_batcher.exceptions import BatcherStoppedError, ItemTimeoutError, QueueFullException
from async_batcher.failures import isolate
from async_batcher.limits import Limit
from tests.support.polling import turn
from tests.support.virtual_clock import FakeBatcher, VirtualLoop, now, virtual_loop

NO_LIMIT = sys.maxsize
TOO_MUCH = 99  # more than a queue or a rate ever allows


class Item:
    """An item of a call.

    Attributes:
        deadline: When it times out.
        cancelled: Whether its caller was cancelled.
        starts: How often it was started.
    """

    def __init__(self, number: int, key: int, cost: int) -> None:
        self.number = number
        self.key = key
        self.cost = cost
        self.deadline = math.inf
        self.cancelled = False
        self.starts = 0

    def __repr__(self) -> str:
        """Its number, key and cost."""
        return f"{self.number}: key {self.key}, cost {self.cost}"


class Call:
    """A call, with its items and what it returns."""

    def __init__(self, items: list[Item], future: asyncio.Future[Any], *, strict: bool) -> None:
        self.items = items
        self.future = future
        self.strict = strict
        self.is_refused = False  # at once


class Options:
    """The options of one example.

    Attributes:
        rates: Each rate, with what a batch costs.
    """

    def __init__(self, draw: Any) -> None:
        def choose(*values: Any) -> Any:
            return draw(st.sampled_from(values))

        self.size = choose(1, 2, 4, -1)
        self.slots = choose(1, 2, -1)
        self.capacity = choose(2, 6, -1)
        self.per_batch = choose(None, 5)
        self.queued = choose(None, 8)
        cost_rate = choose(None, (4, 1.0), (6, 2.0))
        batch_rate = choose(None, (1, 0.5), (2, 2.0))
        self.rates: list[Any] = []
        self.limits: list[Limit] = []
        if self.per_batch or self.queued or cost_rate:
            limits = {"per_batch": self.per_batch, "queued": self.queued, "rate": cost_rate}
            self.limits.append(Limit(lambda item: item.cost, **limits))
        if cost_rate:
            self.rates.append((cost_rate, lambda batch: sum(item.cost for item in batch)))
        if batch_rate:
            self.limits.append(Limit("batches", rate=batch_rate))
            self.rates.append((batch_rate, lambda _: 1))
        self.has_keys = draw(st.booleans())
        self.key_concurrency = choose(None, 1, 2) if self.has_keys else None
        self.waits = draw(st.booleans())
        self.isolates = draw(st.booleans())
        self.item_timeout = choose(None, 0.75, 2.0)

    def refuses(self, item: Item) -> bool:
        """Whether an item costs too much for ever."""
        return item.cost == TOO_MUCH and any(
            limit.queued or limit.rate for limit in self.limits if limit.by != "batches"
        )

    def make_batcher(self) -> FakeBatcher:
        """Make the batcher."""
        return FakeBatcher(
            max_batch_size=self.size,
            concurrency=self.slots,
            max_queue_size=self.capacity,
            limits=self.limits,
            key=(lambda item: item.key) if self.has_keys else None,
            key_concurrency=self.key_concurrency,
            when_full="wait" if self.waits else "raise",
            on_failure=[isolate()] if self.isolates else [],
            item_timeout=self.item_timeout,
            max_queue_time=0.25,
        )


class World:
    """A batcher, its calls, and the checks of what its runner gets."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.batcher = options.make_batcher()
        self.calls: list[Call] = []
        self.flushes: list[tuple[asyncio.Task[None], list[Call]]] = []
        self.stops: list[asyncio.Task[None]] = []
        self.failed: set[Item] = set()
        self.dispatched: list[tuple[float, list[Item]]] = []
        self.last_of_key: dict[int, int] = {}
        self._items = 0
        submit = self.batcher.runner.submit

        def check(batch: list[Any], *args: Any) -> Any:
            self.check_batch(list(batch))
            return submit(batch, *args)

        self.batcher.runner.submit = check  # type: ignore[assignment,method-assign]

    # --- events

    async def call(self, kind: str, facts: list[tuple[int, int]], timeout: float | None) -> None:  # noqa: ASYNC109 - of the items
        """Make a call of one kind."""
        items = []
        limit = self.options.item_timeout if timeout is None else timeout
        for key, cost in facts:
            item = Item(self._items, key, cost)
            item.deadline = now() + (math.inf if limit is None else limit)
            items.append(item)
            self._items += 1
        future: asyncio.Future[Any]
        strict = kind != "bulk"
        if kind == "submit":
            items = items[:1]
            try:
                future = self.batcher.submit(items[0], timeout=timeout)
            except (QueueFullException, BatcherStoppedError, ValueError) as exc:
                future = asyncio.get_running_loop().create_future()
                future.set_exception(exc)
        elif kind == "call":
            items = items[:1]
            future = self.batcher.call(items[0], timeout=timeout)
        else:
            future = self.batcher.call_many(
                items, timeout=timeout, return_exceptions=kind == "bulk"
            )
        call = Call(items, future, strict=strict)
        self.calls.append(call)
        await asyncio.sleep(0)
        call.is_refused = future.done() and future.exception() is not None

    async def act(self, kind: str, value: Any) -> None:
        """Let something else happen."""
        running = self.batcher.runner.running
        if kind == "cancel" and value < len(self.calls):
            call = self.calls[value]
            if call.future.cancel():
                for item in call.items:
                    item.cancelled = True
            await asyncio.sleep(0)
        elif kind == "sleep":
            for _ in range(int(value / 0.25)):
                await asyncio.sleep(0.25)
                self.check()
            await asyncio.sleep(0)
        elif kind == "flush":
            pending = [call for call in self.calls if not call.future.done()]
            self.flushes.append((asyncio.create_task(self.batcher.flush()), pending))
            await asyncio.sleep(0)
        elif kind == "stop":
            self.stops.append(asyncio.create_task(self.batcher.stop(force=value)))
            await asyncio.sleep(0)
        elif kind == "end" and value < len(running):
            self.batcher.runner.end(value)
        elif kind == "yield" and value < len(running):
            self.batcher.runner.yield_results(1 + value, index=value)
        elif kind == "raise" and value < len(running):
            self.failed.update(running[value][0])
            self.batcher.runner.end(value, ZeroDivisionError("batch"))

    async def finish(self, *, force: bool) -> None:
        """Stop, and let everything end."""
        await self.act("stop", force)
        for _ in range(4000):
            await turn()
            while self.batcher.runner.running:
                self.batcher.runner.end()
                await turn(1)
                self.check()
            if all(stop.done() for stop in self.stops):
                break
            await asyncio.sleep(0.25)
        await asyncio.gather(*self.stops)
        await turn()

    # --- checks

    def check_batch(self, batch: list[Item]) -> None:
        """Check a batch when it is dispatched."""
        options = self.options
        assert 0 < len(batch) <= (options.size if options.size > 0 else NO_LIMIT)
        cost = sum(item.cost for item in batch)
        assert len(batch) == 1 or cost <= (options.per_batch or math.inf)
        for item in batch:
            assert not item.cancelled, "started after its cancellation"
            assert now() < item.deadline, "started after its deadline"
            assert not options.refuses(item)
            assert options.isolates or not item.starts, "run twice"
        running = [left for left, _ in self.batcher.runner.running]
        assert len(running) < (options.slots if options.slots > 0 else NO_LIMIT)
        if options.has_keys:
            assert len({item.key for item in batch}) == 1
            # An item that is yielded is no longer left; the batch of it still runs.
            same = [left for left in running if left and left[0].key == batch[0].key]
            assert len(same) < (options.key_concurrency or NO_LIMIT)
        self.dispatched.append((now(), batch))
        for (most, seconds), of in options.rates:
            in_span = [of(items) for at, items in self.dispatched if at > now() - seconds]
            assert sum(in_span) <= most, "exceeded a rate"
        for item in batch:
            if not item.starts:
                lane = item.key if options.has_keys else 0
                assert self.last_of_key.get(lane, -1) < item.number, "not first in, first out"
                self.last_of_key[lane] = item.number
            item.starts += 1

    def check(self) -> None:
        """Check what holds at any time."""
        options, stats = self.options, self.batcher.stats()
        resolved = stats.done + stats.failed + stats.cancelled + stats.timed_out
        accepted = sum(len(call.items) for call in self.calls if not call.is_refused)
        assert stats.queued + stats.blocked + stats.running + resolved == accepted, stats
        session = self.batcher._lifecycle.session
        if session is None or not isinstance(session.queue, LaneQueue):
            return
        queue = session.queue
        entries = list(queue.items.entries.values())
        assert len(entries) <= (options.capacity if options.capacity > 0 else NO_LIMIT)
        for state, index in zip(queue.limits.states, range(2), strict=False):
            if state.limits_queue:
                used = sum(entry.costs[index] for entry in entries)
                assert used == state._queued
                assert used <= options.queued

    def check_nothing_is_forgotten(self) -> None:
        """Check that nothing waits that could go on, and that the timer is set."""
        session = self.batcher._lifecycle.session
        if session is not None and not session.forced:
            count, armed_for = len(self.dispatched), session._queue_timer.armed_for
            session.pump(now(), now())
            assert len(self.dispatched) == count, "this would wait for another event"
            assert armed_for <= session.queue.next_wakeup, "the timer is late"

    def check_flushes(self) -> None:
        """Check that flushes that have returned did so after the items that were there."""
        for flush, pending in self.flushes:
            if flush.done():
                assert all(call.future.done() for call in pending), "a flush returned too early"
                flush.result()

    def check_end(self) -> None:
        """Check what callers got."""
        assert all(flush.done() for flush, _ in self.flushes), "a flush is still pending"
        self.check_flushes()
        for call in self.calls:
            assert call.future.done(), "a caller is still pending"
            if call.future.cancelled():
                assert call.items[0].cancelled
                continue
            error = call.future.exception()
            if error is not None:
                self.check_error(call, error, call.items)
            elif call.future.result() in call.items:  # of a single call
                assert call.items[0].starts
            else:
                results = call.future.result()
                assert len(results) == len(call.items)
                for item, result in zip(call.items, results, strict=True):
                    if isinstance(result, BaseException):
                        assert not call.strict
                        self.check_error(call, result, [item])
                    else:
                        assert result is item
                        assert item.starts
        stats = self.batcher.stats()
        assert stats.queued == stats.blocked == stats.running == 0
        assert virtual_loop().timers() == 0

    def check_error(self, call: Call, error: BaseException, items: list[Item]) -> None:
        """Check that an error is true of an item of a call."""
        if type(error) is ValueError:
            assert any(map(self.options.refuses, items))
        elif isinstance(error, ItemTimeoutError):
            assert now() >= items[0].deadline
        elif isinstance(error, ZeroDivisionError):
            assert self.failed & set(items)
        elif isinstance(error, BatcherStoppedError):
            assert self.stops
        else:
            assert isinstance(error, QueueFullException)
            assert call.is_refused
            assert not any(item.starts for item in call.items)


ITEM = st.tuples(st.integers(0, 1), st.sampled_from([0, 1, 2, 3, 4, 1, 2, 1, 2, TOO_MUCH]))
CALL = st.tuples(
    st.sampled_from(["call", "submit", "bulk", "strict"]),
    st.lists(ITEM, min_size=1, max_size=5),
    st.sampled_from([None, None, None, 0.5, 1.0, 3.0]),
)
EVENT = st.one_of(
    CALL,
    CALL,
    st.tuples(st.just("sleep"), st.sampled_from([0.25, 0.5, 1.0, 2.0])),
    st.tuples(st.just("end"), st.integers(0, 1)),
    st.tuples(st.just("end"), st.integers(0, 1)),
    st.tuples(st.sampled_from(["raise", "yield"]), st.integers(0, 2)),
    st.tuples(st.just("cancel"), st.integers(0, 30)),
    st.tuples(st.just("flush"), st.none()),
)


@pytest.mark.slow
@settings(max_examples=300)
@given(
    st.lists(EVENT, min_size=10, max_size=60),
    st.lists(EVENT, max_size=6),
    st.data(),
    st.booleans(),
    st.booleans(),
)
def test_random_calls_keep_limits_and_keys(
    events: list[tuple[Any, ...]],
    after_stop: list[tuple[Any, ...]],
    data: st.DataObject,
    force: bool,
    force_at_end: bool,
) -> None:
    """No call is lost or resolved twice; limits, rates, keys and counts are right at any time."""

    async def scenario() -> None:
        world = World(Options(data.draw))
        for kind, *values in [*events, ("stop", force), *after_stop]:
            if kind in ("call", "submit", "bulk", "strict"):
                await world.call(kind, *values)
            else:
                await world.act(kind, *values)
            world.check()
            await turn()
            world.check_nothing_is_forgotten()
            world.check_flushes()
        await world.finish(force=force_at_end)
        world.check_end()

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(scenario())
