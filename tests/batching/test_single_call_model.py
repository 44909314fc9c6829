"""Single calls under random interleavings of events."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from async_batcher.exceptions import BatcherStoppedError, ItemTimeoutError, QueueFullException
from async_batcher.failures import isolate
from tests.support.polling import turn
from tests.support.virtual_clock import FakeBatcher, VirtualLoop, now, virtual_loop

NO_LIMIT = sys.maxsize


EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("call"), st.sampled_from([None, 0.5, 1.0, 3.0])),
        st.tuples(st.just("submit"), st.sampled_from([None, 0.5, 1.0, 3.0])),
        st.tuples(st.just("cancel"), st.integers(0, 40)),
        st.tuples(st.just("sleep"), st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0])),
        st.tuples(st.just("end"), st.integers(0, 5)),
        st.tuples(st.just("raise"), st.integers(0, 5)),
        st.tuples(st.just("yield"), st.integers(0, 5)),
        st.tuples(st.just("stop"), st.booleans()),
    ),
    max_size=60,
)


@settings(max_examples=200)
@given(
    EVENTS,
    st.sampled_from([1, 2, 4, -1]),
    st.sampled_from([1, 2, -1]),
    st.sampled_from([1, 3, -1]),
    st.booleans(),
    st.booleans(),
    st.sampled_from([None, 0.75, 2.0]),
    st.booleans(),
)
def test_random_single_calls_keep_all_rules(
    events: list[tuple[str, Any]],
    size: int,
    slots: int,
    capacity: int,
    waits: bool,
    isolates: bool,
    item_timeout: float | None,
    force: bool,
) -> None:
    """Calls, cancellations, timeouts, failures and stops in any order.

    Every caller is resolved once, with its own result or a true error; no cancelled or expired item
    starts; first in, first out; limits are kept.
    """

    async def scenario() -> None:
        batcher = FakeBatcher(
            max_batch_size=size,
            concurrency=slots,
            max_queue_size=capacity,
            when_full="wait" if waits else "raise",
            on_failure=[isolate()] if isolates else [],
            item_timeout=item_timeout,
            max_queue_time=0.25,
        )
        calls: list[asyncio.Future[Any]] = []
        deadlines: dict[int, float] = {}
        cancelled: set[int] = set()
        failed: set[int] = set()
        started: list[int] = []
        stops: list[asyncio.Task[None]] = []
        after_stop: set[int] = set()  # items of calls after a stop
        seen = 0

        def check_limits() -> None:
            nonlocal seen
            for batch in batcher.batches[seen:]:
                assert 0 < len(batch) <= (size if size > 0 else NO_LIMIT)
                for item in batch:
                    assert item not in cancelled, "started after its cancellation"
                    assert now() < deadlines[item], "started after its deadline"
                fresh = [item for item in batch if item not in started]
                if not isolates:
                    assert fresh == batch, "run twice"
                started.extend(fresh)
            seen = len(batcher.batches)
            assert len(batcher.runner.running) <= (slots if slots > 0 else NO_LIMIT)
            stats = batcher.stats()
            assert stats.queued <= (capacity if capacity > 0 else NO_LIMIT)
            resolved = stats.done + stats.failed + stats.cancelled + stats.timed_out
            accepted = len(calls) - stats.rejected - len(after_stop)
            assert stats.queued + stats.blocked + stats.running + resolved == accepted, stats

        for kind, value in events:
            if kind in ("call", "submit"):
                item = len(calls)
                if stops:
                    after_stop.add(item)
                limit = item_timeout if value is None else value
                deadlines[item] = now() + (NO_LIMIT if limit is None else limit)
                if kind == "call":
                    calls.append(batcher.call(item, timeout=value))
                    await asyncio.sleep(0)
                else:
                    try:
                        calls.append(batcher.submit(item, timeout=value))
                    except (QueueFullException, BatcherStoppedError) as exc:
                        refused: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
                        refused.set_exception(exc)
                        calls.append(refused)
            elif kind == "cancel" and value < len(calls):
                if calls[value].cancel():
                    cancelled.add(value)
                await asyncio.sleep(0)
            elif kind == "sleep":
                for _ in range(int(value / 0.25)):
                    await asyncio.sleep(0.25)
                    check_limits()
                await asyncio.sleep(0)
            elif kind == "end" and value < len(batcher.runner.running):
                batcher.runner.end(value)
            elif kind == "yield" and value < len(batcher.runner.running):
                batcher.runner.yield_results(1 + value, index=value)
            elif kind == "stop":
                stops.append(asyncio.create_task(batcher.stop(force=value)))
                await asyncio.sleep(0)
            elif kind == "raise" and value < len(batcher.runner.running):
                failed.update(batcher.runner.running[value][0])
                batcher.runner.end(value, ZeroDivisionError("batch"))
            check_limits()
        stops.append(asyncio.create_task(batcher.stop(force=force)))
        await turn()
        while batcher.runner.running:
            batcher.runner.end()
            await turn(1)
            check_limits()
        await asyncio.gather(*stops)
        await turn()
        assert started == sorted(started) or any(kind == "submit" for kind, _ in events), (
            "not first in, first out"
        )
        for item, call in enumerate(calls):
            assert call.done(), "a caller is still pending"
            if call.cancelled():
                assert item in cancelled
                continue
            error = call.exception()
            if error is None:
                assert call.result() == item
                assert item in started
            elif isinstance(error, ItemTimeoutError):
                assert now() >= deadlines[item]
                assert ("was removed" in str(error)) == (item not in started)
            elif isinstance(error, ZeroDivisionError):
                assert item in failed
            elif isinstance(error, BatcherStoppedError):
                assert stops
            else:
                assert isinstance(error, QueueFullException)
        assert virtual_loop().timers() == 0
        stats = batcher.stats()
        kept = [call for call in calls if not call.cancelled()]
        succeeded = sum(call.exception() is None for call in kept)
        expired = sum(type(call.exception()) is ItemTimeoutError for call in kept)
        # A caller cancelled just after its outcome was set is counted by that outcome.
        assert stats.cancelled <= len(calls) - len(kept)
        assert (
            stats.done - succeeded + stats.timed_out - expired
            <= len(calls) - len(kept) - stats.cancelled
        )
        assert stats.done >= succeeded
        assert stats.timed_out >= expired
        assert stats.queued == stats.blocked == stats.running == 0

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(scenario())
