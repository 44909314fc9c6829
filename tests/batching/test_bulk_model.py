"""Bulk calls, single calls and streams in any order."""

from __future__ import annotations

import asyncio
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hypothesis import given, settings
from hypothesis import strategies as st

from async_batcher.exceptions import BatcherStoppedError, ItemTimeoutError, QueueFullException
from async_batcher.failures import isolate
from tests.support.polling import turn
from tests.support.virtual_clock import FakeBatcher, VirtualLoop, now, virtual_loop

if TYPE_CHECKING:
    from collections.abc import Iterator

NO_LIMIT = sys.maxsize


@dataclass
class Call:
    """A call for some items.

    Attributes:
        kind: "one", "strict" (many), "mixed" (many, with exceptions among the results) or "stream".
        items: The numbers of its items; a stream adds them as it reads.
        deadline: When its timeout passes.
        window: The window of a stream; 0 for other calls.
        results: The results that the consumer of a stream has got.
        task: The caller.
        after_stop: Whether a stop had begun before the call.
    """

    kind: str
    items: list[int]
    deadline: float
    window: int = 0
    results: list[Any] = field(default_factory=list)
    task: asyncio.Task[Any] | None = None
    after_stop: bool = False


TIMES = st.sampled_from([None, 0.5, 1.0, 3.0])


EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("one"), st.just(1), TIMES),
        st.tuples(st.sampled_from(["strict", "mixed"]), st.integers(1, 9), TIMES),
        st.tuples(st.just("stream"), st.integers(0, 12), st.integers(1, 6)),
        st.tuples(st.just("cancel"), st.integers(0, 12), st.none()),
        st.tuples(st.just("sleep"), st.sampled_from([0, 1, 2, 4, 8]), st.none()),
        st.tuples(st.just("end"), st.integers(0, 5), st.none()),
        st.tuples(st.just("raise"), st.integers(0, 5), st.none()),
        st.tuples(st.just("spoil"), st.integers(0, 5), st.none()),
        st.tuples(st.just("yield"), st.integers(0, 5), st.integers(1, 4)),
        st.tuples(st.just("spoil next"), st.integers(0, 5), st.integers(1, 4)),
        st.tuples(st.just("stop"), st.just(0), st.booleans()),
    ),
    max_size=50,
)


class Scenario:
    """Calls of all kinds, in any order, and the rules that always hold."""

    def __init__(
        self,
        batcher: FakeBatcher,
        *,
        size: int,
        slots: int,
        capacity: int,
        isolates: bool,
        item_timeout: float | None,
    ) -> None:
        self.batcher = batcher
        self.size, self.slots, self.capacity = (
            limit if limit > 0 else NO_LIMIT for limit in (size, slots, capacity)
        )
        self.isolates = isolates
        self.item_timeout = item_timeout
        self.calls: list[Call] = []
        self.call_of: dict[int, Call] = {}
        self.started: list[int] = []
        self.failed: set[int] = set()
        self.stops: list[asyncio.Task[None]] = []
        self._run, batcher.runner.submit = batcher.runner.submit, self.run  # type: ignore[assignment, method-assign]

    @property
    def has_streams(self) -> bool:
        """Return whether any call is a stream."""
        return any(call.window for call in self.calls)

    def run(self, batch: list[Any], *callbacks: Any) -> Any:
        """Check that a batch may start, and start it."""
        assert 0 < len(batch) <= self.size
        for item in batch:
            call = self.call_of[item]
            assert call.task is not None
            assert not call.task.done(), "started after its call was resolved"
            assert call.window or now() < call.deadline, "started after its deadline"
            if not self.has_streams:  # a stream's feeder may run before its cancellation
                assert not call.task.cancelling(), "started for a cancelled caller"
        fresh = [item for item in batch if item not in self.started]
        assert self.isolates or fresh == batch, "run twice"
        self.started += fresh
        return self._run(batch, *callbacks)

    def call(self, kind: str, count: int, extra: Any) -> None:
        """Make a call."""
        is_stream = kind == "stream"
        seconds = self.item_timeout if extra is None or is_stream else extra
        call = Call(
            kind,
            [],
            now() + (NO_LIMIT if seconds is None else seconds),
            window=extra if is_stream else 0,
        )
        call.after_stop = bool(self.stops)
        self.calls.append(call)
        numbers = self._numbers(call, count)
        if is_stream:
            call.task = asyncio.create_task(self._consume(call, numbers, ordered=bool(count % 2)))
            return
        items = list(numbers)
        if kind == "one":
            call.task = self.batcher.call(items[0], timeout=extra)
        else:
            call.task = self.batcher.call_many(
                items, return_exceptions=kind == "mixed", timeout=extra
            )

    def _numbers(self, call: Call, count: int) -> Iterator[int]:
        for _ in range(count):
            number = len(self.call_of)
            self.call_of[number] = call
            call.items.append(number)
            assert not call.window or len(call.items) - len(call.results) <= call.window, (
                "read beyond the window"
            )
            yield number

    async def _consume(self, call: Call, numbers: Iterator[int], *, ordered: bool) -> None:
        async for result in self.batcher.map(
            numbers, ordered=ordered, window=call.window, return_exceptions=True
        ):
            call.results.append(result)
            await asyncio.sleep(0.25 * (len(call.results) % 3))

    def spoil(self, index: int, count: int | None) -> None:
        """Finish a batch, or yield ``count`` results: an exception for every other item."""
        batch = self.batcher.runner.running[index][0][:count]
        self.failed.update(batch[::2])
        results = [
            item if place % 2 else ZeroDivisionError(item) for place, item in enumerate(batch)
        ]
        if count is None:
            self.batcher.runner.end(index, results)
        else:
            self.batcher.runner.yield_results(count, index=index, results=results)

    def check_limits(self) -> None:
        """Check the limits and the counts."""
        assert len(self.batcher.runner.running) <= self.slots
        stats = self.batcher.stats()
        assert stats.queued <= self.capacity
        assert stats.rejected == sum(len(c.items) for c in self.calls if self._is_refused(c))

    @staticmethod
    def _is_refused(call: Call) -> bool:
        task = call.task
        assert task is not None
        return (
            task.done()
            and not task.cancelled()
            and isinstance(task.exception(), QueueFullException)
        )

    async def finish(self, *, force: bool) -> None:
        """Stop, and check that every caller has an outcome that is true."""
        self.stops.append(asyncio.create_task(self.batcher.stop(force=force)))
        await turn()
        while self.batcher.runner.running:
            self.batcher.runner.end()
            await turn(1)
            self.check_limits()
        await asyncio.gather(*self.stops)
        await asyncio.sleep(10.0)  # consumers pause between results
        if not self.has_streams:
            assert self.started == sorted(self.started), "not first in, first out"
        for call in self.calls:
            assert call.task is not None
            assert call.task.done(), "a caller is still pending"
            if not call.task.cancelled():
                self._check(call, call.task)
        stats = self.batcher.stats()
        assert stats.queued == stats.blocked == stats.running == 0
        if not self.has_streams:  # items that a stopped stream has read are not counted
            accepted = sum(
                len(call.items)
                for call in self.calls
                if not call.after_stop and not self._is_refused(call)
            )
            assert stats.done + stats.failed + stats.cancelled + stats.timed_out == accepted
        assert virtual_loop().timers() == 0

    def _check(self, call: Call, task: asyncio.Task[Any]) -> None:
        error = task.exception()
        if call.window:
            assert error is None or isinstance(error, BatcherStoppedError)
            results = call.results
            self._check_results(
                call,
                sorted(results, key=lambda result: result if type(result) is int else -1),
                is_sorted=True,
            )
        elif error is not None:
            self._check_error(call, error, call.items)
        else:
            self._check_results(call, [task.result()] if call.kind == "one" else task.result())

    def _check_results(self, call: Call, results: list[Any], *, is_sorted: bool = False) -> None:
        if is_sorted:
            plain = [result for result in results if type(result) is int]
            assert len(set(plain)) == len(plain)
            assert set(plain) <= set(call.items) & set(self.started)
            assert len(results) <= len(call.items)
            for result in results[: len(results) - len(plain)]:
                self._check_error(call, result, call.items)
            return
        for item, result in zip(call.items, results, strict=True):
            if isinstance(result, Exception):
                assert call.kind == "mixed"
                self._check_error(call, result, [item])
            else:
                assert result == item
                assert item in self.started

    def _check_error(self, call: Call, error: BaseException, items: list[int]) -> None:
        if isinstance(error, ItemTimeoutError):
            assert call.window or now() >= call.deadline
        elif isinstance(error, ZeroDivisionError):
            assert set(items) & self.failed
        elif isinstance(error, BatcherStoppedError):
            assert self.stops
        else:
            assert isinstance(error, QueueFullException)


@settings(max_examples=150)
@given(
    EVENTS,
    st.sampled_from([1, 2, 4, -1]),
    st.sampled_from([1, 2, -1]),
    st.sampled_from([1, 3, 10, -1]),
    st.booleans(),
    st.booleans(),
    st.sampled_from([None, 0.75, 2.0]),
    st.booleans(),
)
def test_random_bulk_calls_and_streams_keep_all_rules(
    events: list[tuple[str, Any, Any]],
    size: int,
    slots: int,
    capacity: int,
    waits: bool,
    isolates: bool,
    item_timeout: float | None,
    force: bool,
) -> None:
    """Calls, streams, cancellations, timeouts, failures and stops in any order.

    Every caller gets each item's own result or a true error; no item of a cancelled or expired call
    starts; first in, first out; limits and windows are kept; the counts add up.
    """

    async def play() -> None:
        batcher = FakeBatcher(
            max_batch_size=size,
            concurrency=slots,
            max_queue_size=capacity,
            when_full="wait" if waits else "raise",
            on_failure=[isolate()] if isolates else [],
            item_timeout=item_timeout,
            max_queue_time=0.25,
        )
        scenario = Scenario(
            batcher,
            size=size,
            slots=slots,
            capacity=capacity,
            isolates=isolates,
            item_timeout=item_timeout,
        )
        for kind, value, extra in events:
            if kind in ("one", "strict", "mixed", "stream"):
                scenario.call(kind, value, extra)
                await asyncio.sleep(0)
            elif kind == "cancel" and value < len(scenario.calls):
                task = scenario.calls[value].task
                assert task is not None
                task.cancel()
                await asyncio.sleep(0)
            elif kind == "sleep":
                for _ in range(value):
                    await asyncio.sleep(0.25)
                    scenario.check_limits()
                await asyncio.sleep(0)
            elif kind == "stop":
                scenario.stops.append(asyncio.create_task(batcher.stop(force=extra)))
                await asyncio.sleep(0)
            elif kind not in ("cancel", "sleep", "stop") and value < len(batcher.runner.running):
                if kind.startswith("spoil"):
                    scenario.spoil(value, extra)
                elif kind == "yield":
                    batcher.runner.yield_results(extra, index=value)
                elif kind == "raise":
                    scenario.failed.update(batcher.runner.running[value][0])
                    batcher.runner.end(value, ZeroDivisionError("batch"))
                else:
                    batcher.runner.end(value)
            scenario.check_limits()
        await scenario.finish(force=force)

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(play())
