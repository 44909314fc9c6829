"""``limits``: what a batch, the queue and a span of time may hold; on a virtual clock."""

from __future__ import annotations

import asyncio
import math
import time
from decimal import Decimal
from typing import Any

import pytest

from async_batcher import AsyncBatcher
from async_batcher._batching.queue.limit_state import LimitStates
from async_batcher._batching.scheduler import Scheduler
from async_batcher.exceptions import (
    BatcherStoppedError,
    BatchTimeoutError,
    ItemTimeoutError,
    QueueFullException,
)
from async_batcher.failures import Later, isolate
from async_batcher.limits import Limit
from tests.support.autopilot import Autopilot, process_as
from tests.support.batchers import make_batcher
from tests.support.polling import turn
from tests.support.virtual_clock import FakeBatcher, VirtualLoop, now, virtual_loop

pytestmark = pytest.mark.virtual_clock

MARGIN = 0.002  # seconds that are added to the span of a rate


def cost(item: Any) -> Any:
    """Return the item."""
    return item


async def end_all(batcher: FakeBatcher) -> None:
    """Finish batches until none runs."""
    while batcher.runner.running:
        batcher.runner.end()
        await turn()


async def occupy(batcher: FakeBatcher, item: Any = 0) -> asyncio.Future[Any]:
    """Occupy the only slot."""
    future = batcher.submit(item)
    batcher.scheduler.callers.flush()
    await turn()
    assert batcher.runner.running
    return future


# --- per_batch


@pytest.mark.parametrize("kind", ["single", "submit", "bulk", "map"])
async def test_a_batch_costs_at_most_per_batch(kind: str) -> None:
    """Items are in order; no later item joins a batch because it costs less."""
    costs: list[Any] = [3, 4, 5, 1, 9, 2, 2, 2, 2, 2, 2, 20, 1]
    batcher = FakeBatcher(limits=[Limit(cost, per_batch=10)], concurrency=-1)
    pilot = Autopilot(batcher)
    assert await process_as(kind, batcher, costs) == costs
    assert [batch for _, batch in pilot.starts] == [
        [3, 4], [5, 1], [9], [2] * 5, [2], [20], [1],
    ]  # fmt: skip
    await batcher.stop()


async def test_a_batch_that_uses_up_a_limit_leaves_at_once() -> None:
    """Without the window; so does one that the next item would exceed."""
    batcher = FakeBatcher(limits=[Limit(cost, per_batch=10)], concurrency=-1, max_queue_time=5.0)
    start = now()
    calls = [batcher.submit(item) for item in (4, 6)]
    assert batcher.batches == [[4, 6]]
    calls += [batcher.submit(item) for item in (4, 7)]
    assert batcher.batches == [[4, 6], [4]]
    await asyncio.sleep(4.99)
    assert batcher.batches == [[4, 6], [4]]
    await asyncio.sleep(0.02)
    assert batcher.batches == [[4, 6], [4], [7]]
    assert now() < start + 6
    assert batcher.stats().batches.full == 2
    await end_all(batcher)
    assert await asyncio.gather(*calls) == [4, 6, 4, 7]
    await batcher.stop()


async def test_an_item_that_costs_more_than_per_batch_runs_alone() -> None:
    """Also one with an infinite cost; items that cost nothing do not join it."""
    batcher = FakeBatcher(limits=[Limit(cost, per_batch=10)], concurrency=-1)
    pilot = Autopilot(batcher)
    costs = [0, math.inf, 0, 11, 0, 10, 0, 0]
    assert await batcher.process_many(costs) == costs
    assert [batch for _, batch in pilot.starts] == [[0], [math.inf], [0], [11], [0, 10, 0, 0]]
    # The infinite cost has not stayed in the sums.
    batcher.submit(math.inf)
    assert await asyncio.gather(*map(batcher.submit, [math.inf, 3, 7])) == [math.inf, 3, 7]
    await batcher.stop()


async def test_an_infinite_cost_leaves_the_queue_as_it_was() -> None:
    """The queue has capacity again, also if it was never empty meanwhile."""
    batcher = FakeBatcher(limits=[Limit(cost, per_batch=10)])
    running = await occupy(batcher)
    calls = [batcher.submit(item) for item in (math.inf, 1)]
    batcher.runner.end()
    assert batcher.batches == [[0], [math.inf]]
    calls.append(batcher.submit(2))
    await end_all(batcher)
    assert await asyncio.gather(running, *calls) == [0, math.inf, 1, 2]
    await batcher.stop()


async def test_an_item_that_leaves_makes_space_in_the_next_batch() -> None:
    """A cancelled item, and one that timed out."""
    batcher = FakeBatcher(limits=[Limit(cost, per_batch=10)], max_queue_time=1.0)
    running = await occupy(batcher)
    calls = [batcher.submit(item) for item in (5, 4, 3, 2, 1)]
    calls[1].cancel()
    expired = batcher.submit(1.5, timeout=2.0)
    calls.append(batcher.submit(0.5))
    with pytest.raises(ItemTimeoutError):
        await expired
    batcher.runner.end()
    await turn()
    assert batcher.batches == [[0], [5, 3, 2]]
    batcher.runner.end()
    await turn()
    assert batcher.batches[2:] == [[1, 0.5]]
    await end_all(batcher)
    await asyncio.gather(running, *calls[:1], *calls[2:])
    await batcher.stop()


async def test_several_limits_hold_together() -> None:
    """With `max_batch_size`: what is used up first ends the batch."""
    limits = [Limit(lambda item: item[0], per_batch=10), Limit(lambda item: item[1], per_batch=3)]
    batcher = FakeBatcher(limits=limits, max_batch_size=4, concurrency=-1)
    pilot = Autopilot(batcher)
    items = [(1, 1), (9, 1), (1, 1), (0, 2), (0, 3), *[(1, 0)] * 6]
    assert await batcher.process_many(items) == items
    assert [batch for _, batch in pilot.starts] == [
        [(1, 1), (9, 1)], [(1, 1), (0, 2)], [(0, 3), *[(1, 0)] * 3], [(1, 0)] * 3,
    ]  # fmt: skip
    await batcher.stop()


async def test_a_limit_may_be_given_alone() -> None:
    """``limits`` takes one `Limit`, too; None counts items."""
    batcher = FakeBatcher(limits=Limit(per_batch=2), concurrency=-1)
    pilot = Autopilot(batcher)
    await batcher.process_many(list("abc"))
    assert [batch for _, batch in pilot.starts] == [["a", "b"], ["c"]]
    await batcher.stop()


def test_a_steady_load_below_a_rate_is_never_held_back() -> None:
    """However many dispatches there are, and however close together."""
    limits = LimitStates([Limit(by=float, rate=(100, 10.0))])
    for number in range(40_000):
        now = number * 0.0005
        assert limits.free_at((0.004,), now) == now
        limits.dispatch((0.004,), now)


# --- queued


async def test_a_full_queue_names_the_limit() -> None:
    """What is queued, and the limit; not `max_queue_size`."""
    batcher = FakeBatcher(limits=[Limit(cost, queued=10)])
    running = await occupy(batcher)
    first = batcher.submit(7)
    for call in (batcher.process(4), batcher.process_many([2, 2])):
        with pytest.raises(QueueFullException, match=r"7 queued, queued=10 of a Limit"):
            await call
    with pytest.raises(QueueFullException, match=r"7 queued, queued=10 of a Limit"):
        batcher.submit(4)
    assert batcher.stats().rejected == 4
    fitting = batcher.submit(3)
    await end_all(batcher)
    assert await asyncio.gather(*[running, first, fitting]) == [0, 7, 3]
    await batcher.stop()


async def test_a_full_queue_names_max_queue_size() -> None:
    """If the number of items is what exceeds a limit."""
    batcher = FakeBatcher(limits=[Limit(cost, queued=10)], max_queue_size=1)
    await occupy(batcher)
    batcher.submit(1)
    with pytest.raises(QueueFullException, match="1 item queued, max_queue_size=1"):
        batcher.submit(1)
    await batcher.stop(force=True)


async def test_a_bulk_call_is_queued_as_a_whole_or_not() -> None:
    """With ``when_full="raise"``."""
    batcher = FakeBatcher(limits=[Limit(cost, queued=10)])
    running = await occupy(batcher)
    with pytest.raises(QueueFullException, match="4 more items"):
        await batcher.process_many([3, 3, 3, 3])
    assert batcher.stats().queued == 0
    call = batcher.call_many([3, 3, 4])
    await turn()
    assert batcher.stats().queued == 3
    await end_all(batcher)
    assert await call == [3, 3, 4]
    assert batcher.batches == [[0], [3, 3, 4]]
    await running
    await batcher.stop()


@pytest.mark.parametrize("rest", [(9, 1), (9, 9)])
async def test_callers_get_capacity_in_order(rest: tuple[int, ...]) -> None:
    """No later caller overtakes one that waits, because its item costs less."""
    limit = Limit(cost, queued=10)
    batcher = FakeBatcher(limits=[limit], max_batch_size=1, when_full="wait")
    running = await occupy(batcher)
    calls = [batcher.call(item) for item in (5, *rest)]
    await turn()
    late = [batcher.call(1), batcher.call_many([1, 1])]
    await turn()
    assert (batcher.stats().queued, batcher.stats().blocked) == (1, 5)
    with pytest.raises(QueueFullException, match=r"queued=10 of a Limit"):
        batcher.submit(1)
    await end_all(batcher)
    await asyncio.gather(running, *calls, *late)
    assert batcher.batches == [[0], [5], *([item] for item in rest), [1], [1], [1]]
    await batcher.stop()


async def test_a_bulk_call_waits_for_capacity_in_parts() -> None:
    """With ``when_full="wait"``, and in any case with `map`."""
    for bulk in (True, False):
        batcher = FakeBatcher(
            limits=[Limit(cost, queued=10)], when_full="wait" if bulk else "raise"
        )
        running = await occupy(batcher)
        kind = "bulk" if bulk else "map"
        call = asyncio.create_task(process_as(kind, batcher, [6, 6, 3, 2]))
        await turn(6)
        assert (batcher.stats().queued, batcher.stats().blocked) == (1, 3)
        batcher.runner.end()
        await turn()
        assert batcher.batches == [[0], [6]]
        assert (batcher.stats().queued, batcher.stats().blocked) == (2, 1)
        await end_all(batcher)
        assert await call == [6, 6, 3, 2]
        await running
        await batcher.stop()


@pytest.mark.parametrize("how", ["dispatch", "cancel", "timeout", "bulk cancel", "bulk failure"])
async def test_what_leaves_the_queue_frees_its_cost(how: str) -> None:
    """Another caller is admitted at once."""
    batcher = FakeBatcher(limits=[Limit(cost, queued=10)], max_batch_size=1, when_full="wait")
    running = await occupy(batcher)
    first: Any
    if how == "bulk failure":
        running = batcher.call_many([0, 9])
        await turn()
        batcher.runner.end()
        await turn()
        assert batcher.batches == [[0], [0]]
    elif how == "bulk cancel":
        first = batcher.call_many([4, 5])
    else:
        first = batcher.call(9, timeout=1.0 if how == "timeout" else None)
    await turn()
    waiting = batcher.call(8)
    await turn()
    assert batcher.stats().blocked == 1
    if how == "dispatch":
        batcher.runner.end()
    elif how == "timeout":
        await asyncio.sleep(1.0)
    elif how == "bulk failure":
        batcher.runner.end(outcome=ValueError("no"))
    else:
        first.cancel()
    await turn()
    assert batcher.stats().blocked == 0
    await end_all(batcher)
    assert await waiting == 8
    if how != "dispatch":
        assert [9] not in batcher.batches
    await asyncio.gather(running, return_exceptions=True)
    await batcher.stop(force=True)


async def test_an_item_that_can_never_be_queued_is_a_value_error() -> None:
    """Also with ``when_full="wait"``: it would wait for ever."""
    batcher = FakeBatcher(limits=[Limit(cost, queued=10)], when_full="wait")
    pilot = Autopilot(batcher)
    for kind in ("single", "submit", "bulk", "map"):
        good, bad = await process_as(kind, batcher, [10, 11])
        assert good == 10
        assert type(bad) is ValueError
        assert "costs 11, more than queued=10" in str(bad)
    assert len(pilot.starts) == 4
    await batcher.stop()


# --- rate


@pytest.mark.parametrize("kind", ["single", "submit", "bulk", "map"])
@pytest.mark.parametrize("slots", [1, 3, -1])
@pytest.mark.parametrize("size", [1, 4, -1])
async def test_no_span_has_more_than_a_rate_allows(kind: str, slots: int, size: int) -> None:
    """Of items, of costs, and of batches; what is held back is held back no longer than that."""
    limits = [
        Limit(rate=(6, 1.0)),
        Limit(cost, rate=(20, 2.0)),
        Limit("batches", rate=(3, 1.5)),
    ]
    batcher = FakeBatcher(limits=limits, concurrency=slots, max_batch_size=size)
    pilot = Autopilot(batcher, 0.05)
    costs = [1, 5, 3, 0, 20, 2, 2, 7, 9, 1, 4] * 3
    assert await process_as(kind, batcher, costs) == costs
    pilot.check_rate(6, 1.0, len)
    pilot.check_rate(20, 2.0, sum)
    pilot.check_rate(3, 1.5, lambda _: 1)
    assert [item for _, batch in pilot.starts for item in batch] == costs
    assert pilot.starts[-1][0] < 33
    assert batcher.stats().rate_limited > 0
    await batcher.stop()


async def test_a_rate_is_used_up_exactly() -> None:
    """``n`` at once, and the next as soon as the span has passed."""
    batcher = FakeBatcher(limits=[Limit(rate=(2, 1.0))], max_batch_size=1, concurrency=-1)
    pilot = Autopilot(batcher)
    await batcher.process_many(range(6))
    assert pilot.starts == [
        (0.0, [0]), (0.0, [1]),
        (1 + MARGIN, [2]), (1 + MARGIN, [3]),
        (2 + 2 * MARGIN, [4]), (2 + 2 * MARGIN, [5]),
    ]  # fmt: skip
    assert batcher.stats().rate_limited == 4
    await batcher.stop()


async def test_a_rate_is_kept_when_a_timer_fires_early() -> None:
    """A batch that left a little before its time counts as if it had left then."""
    limit = Limit("batches", rate=(1, 1.0))
    batcher = FakeBatcher(limits=[limit], max_batch_size=1, concurrency=-1, max_queue_time=0.5)
    calls = [batcher.submit(0)]
    batcher.scheduler.pump(now() + 0.001, now() + 0.001)
    calls.append(batcher.submit(1))
    await turn()
    assert batcher.batches == [[0]]
    await asyncio.sleep(1.01)
    assert batcher.batches == [[0], [1]]
    await end_all(batcher)
    await asyncio.gather(*calls)
    await batcher.stop()


async def test_a_batch_that_a_rate_holds_back_stays_in_the_queue() -> None:
    """It holds no slot, fills up, and loses items that are cancelled or time out."""
    batcher = FakeBatcher(
        limits=[Limit("batches", rate=(1, 10.0))], max_batch_size=4, concurrency=1
    )
    first = await occupy(batcher)
    batcher.runner.end()
    calls = [batcher.submit(item) for item in (1, 2, 3)]
    expired = batcher.submit(4, timeout=2.0)
    await asyncio.sleep(1.0)
    stats = batcher.stats()
    assert (stats.queued, stats.running) == (4, 0)
    assert batcher.scheduler.queue.running == 0
    calls[1].cancel()
    with pytest.raises(ItemTimeoutError, match="was removed"):
        await expired
    calls += [batcher.submit(item) for item in (5, 6)]
    await asyncio.sleep(8.1)
    assert batcher.batches == [[0], [1, 3, 5, 6]]
    assert batcher.stats().rate_limited == 4
    await end_all(batcher)
    await asyncio.gather(first, calls[0], *calls[2:])
    await batcher.stop()


async def test_cancelled_items_do_not_count_as_rate_limited() -> None:
    """Nor do items that came after them and were not held back."""
    batcher = FakeBatcher(limits=[Limit(rate=(1, 1.0))], concurrency=2)
    running = await occupy(batcher)
    held = batcher.submit(1)
    await turn()
    held.cancel()
    await asyncio.sleep(2.0)
    last = batcher.submit(2)
    await turn()
    assert batcher.batches == [[0], [2]]
    assert batcher.stats().rate_limited == 0
    await end_all(batcher)
    await asyncio.gather(running, last)
    await batcher.stop()


async def test_a_cancelled_item_lets_a_cheaper_batch_leave() -> None:
    """What is held back by its cost only."""
    batcher = FakeBatcher(limits=[Limit(cost, rate=(10, 5.0))], concurrency=-1)
    first = await occupy(batcher, 5)
    dear, cheap = batcher.submit(6), batcher.submit(4)
    await turn()
    assert batcher.batches == [[5]]
    dear.cancel()
    await turn()
    assert batcher.batches == [[5], [4]]
    await end_all(batcher)
    await asyncio.gather(first, cheap)
    await batcher.stop()


async def test_an_item_that_a_rate_never_allows_is_a_value_error() -> None:
    """It would wait for ever."""
    batcher = FakeBatcher(limits=[Limit(cost, rate=(10, 1.0))])
    Autopilot(batcher)
    for kind in ("single", "submit", "bulk", "map"):
        good, bad = await process_as(kind, batcher, [10, 10.5])
        assert good == 10
        assert type(bad) is ValueError
        assert "costs 10.5, more than rate=10" in str(bad)
    await batcher.stop()


async def test_stop_drains_the_queue_at_the_rate() -> None:
    """No batch leaves sooner because the batcher stops."""
    batcher = FakeBatcher(limits=[Limit(rate=(2, 1.0))], concurrency=-1)
    pilot = Autopilot(batcher)
    call = batcher.call_many(range(7))
    await turn()
    start = now()
    await batcher.stop()
    assert now() == pytest.approx(start + 3 * (1 + MARGIN))
    pilot.check_rate(2, 1.0, len)
    assert await call == list(range(7))


async def test_a_forced_stop_fails_what_a_rate_holds_back() -> None:
    """At once; so does a stop whose timeout passes."""
    for force in (True, False):
        batcher = FakeBatcher(limits=[Limit(rate=(2, 10.0))], concurrency=-1)
        Autopilot(batcher)
        call = batcher.call_many(range(7))
        await turn()
        start = now()
        if force:
            await batcher.stop(force=True)
        else:
            with pytest.raises(TimeoutError):
                await batcher.stop(timeout=1.0)
        assert now() == start + (0 if force else 1.0)
        with pytest.raises(BatcherStoppedError):
            await call
        assert virtual_loop().timers() == 0


async def test_a_flush_keeps_the_rate() -> None:
    """It only ends the window."""
    batcher = FakeBatcher(limits=[Limit(rate=(2, 1.0))], concurrency=-1, max_queue_time=60.0)
    pilot = Autopilot(batcher)
    calls = [batcher.submit(item) for item in range(5)]
    await batcher.flush()
    assert [(at, len(batch)) for at, batch in pilot.starts] == [
        (0.0, 2), (1 + MARGIN, 2), (2 + 2 * MARGIN, 1),
    ]  # fmt: skip
    await asyncio.gather(*calls)
    await batcher.stop()


async def test_the_last_rate_counts_across_a_restart() -> None:
    """A stop and a start do not make a new budget."""
    limit = Limit("batches", rate=(1, 10.0))
    batcher = FakeBatcher(limits=[limit], concurrency=-1)
    pilot = Autopilot(batcher)
    await batcher.process(0)
    await batcher.stop()
    await batcher.start()
    await batcher.process(1)
    assert pilot.starts == [(0.0, [0]), (10 + MARGIN, [1])]
    await batcher.stop()


# --- what tells the cost


class Weight:
    """A number of a type of its own."""

    def __init__(self, value: float) -> None:
        self.value = value

    def __float__(self) -> float:
        """Return it."""
        return self.value


class Costs:
    """Costs by item, and how often each was asked for."""

    def __init__(self, **costs: Any) -> None:
        self.costs = costs
        self.asked: list[str] = []

    def __call__(self, item: str) -> Any:
        """Return the cost of an item, or raise it."""
        self.asked.append(item)
        value = self.costs[item]
        if isinstance(value, BaseException):
            raise value
        return value


@pytest.mark.parametrize("kind", ["single", "submit", "bulk", "map"])
@pytest.mark.parametrize(
    ("value", "error", "match"),
    [
        (ZeroDivisionError("own"), ZeroDivisionError, "own"),
        (math.nan, ValueError, "returned nan"),
        (Decimal("NaN"), ValueError, "NaN"),
        (None, TypeError, "returned None"),
        ("7", TypeError, "returned '7'"),
        (b"7", TypeError, "must return a number"),
        ([1], TypeError, "must return a number"),
        (1j, TypeError, "must return a number"),
        (-1, ValueError, "0 or more"),
        (-math.inf, ValueError, "0 or more"),
        (10**400, OverflowError, ""),
    ],
)
async def test_a_wrong_cost_fails_its_item_alone(
    kind: str, value: Any, error: type[Exception], match: str
) -> None:
    """In single and bulk calls; the others get their results."""
    costs = Costs(a=1, bad=value, b=2)
    batcher = FakeBatcher(limits=[Limit(costs, per_batch=10)])
    pilot = Autopilot(batcher)
    results = await process_as(kind, batcher, ["a", "bad", "b"])
    assert results[::2] == ["a", "b"]
    assert type(results[1]) is error
    assert match in str(results[1])
    assert [batch for _, batch in pilot.starts] == [["a", "b"]]
    assert costs.asked == ["a", "bad", "b"]
    stats = batcher.stats()
    assert (stats.done, stats.queued, stats.blocked, stats.running) == (2, 0, 0, 0)
    await batcher.stop()


@pytest.mark.parametrize("value", [2, 2.0, True, Decimal(2), Weight(2.0)])
async def test_any_real_number_is_a_cost(value: Any) -> None:
    """What has ``__float__``."""
    batcher = FakeBatcher(limits=[Limit(lambda _: value, per_batch=2 * float(value))])
    pilot = Autopilot(batcher)
    await batcher.process_many(list("abc"))
    assert [len(batch) for _, batch in pilot.starts] == [2, 1]
    await batcher.stop()


async def test_a_numpy_scalar_is_a_cost(numpy: Any) -> None:
    """As a sum of an array returns it; an array is none."""
    limit = Limit(lambda item: item.sum(), per_batch=4)
    batcher = FakeBatcher(limits=[limit], concurrency=-1)
    pilot = Autopilot(batcher)
    arrays = [numpy.array(row, dtype="float32") for row in ([1, 2], [0.5, 0.5], [3, 0])]
    await batcher.process_many(arrays)
    assert [len(batch) for _, batch in pilot.starts] == [2, 1]
    await batcher.stop()
    batcher = FakeBatcher(limits=[Limit(cost, per_batch=4)])
    with pytest.raises(TypeError):
        await batcher.process(arrays[0])
    await batcher.stop()


async def test_a_strict_bulk_call_with_a_wrong_cost_raises_before_anything_runs() -> None:
    """None of its items is queued."""
    batcher = FakeBatcher(limits=[Limit(Costs(a=1, bad=None, b=2), per_batch=10)])
    with pytest.raises(TypeError, match="returned None"):
        await batcher.process_many(["a", "bad", "b"])
    await turn()
    assert batcher.batches == []
    stats = batcher.stats()
    assert (stats.queued, stats.blocked, stats.running) == (0, 0, 0)
    await batcher.stop()


@pytest.mark.parametrize("kind", ["bulk", "map"])
async def test_a_bulk_call_of_wrong_costs_only(kind: str) -> None:
    """It ends without a batch."""
    batcher = FakeBatcher(limits=[Limit(cost, per_batch=10)])
    results = await process_as(kind, batcher, [None, "x"])
    assert [type(result) for result in results] == [TypeError, TypeError]
    assert await batcher.process_many([None], return_exceptions=True, timeout=1.0)
    assert batcher.batches == []
    await batcher.stop()
    assert virtual_loop().timers() == 0


async def test_a_wrong_cost_in_a_call_that_is_rejected() -> None:
    """The rejection is that of all items; nothing else is counted."""
    batcher = FakeBatcher(limits=[Limit(cost, queued=10)])
    running = await occupy(batcher)
    queued = batcher.submit(9)
    with pytest.raises(QueueFullException):
        await batcher.process_many([1, None, 2], return_exceptions=True)
    stats = batcher.stats()
    assert (stats.rejected, stats.failed) == (2, 0)
    await end_all(batcher)
    await asyncio.gather(running, queued)
    await batcher.stop()


@pytest.mark.parametrize("ordered", [True, False])
async def test_a_wrong_cost_in_a_stream_whose_batcher_stops(ordered: bool) -> None:
    """The stream ends with the error, and does not wait for a result that was never due."""
    batcher = FakeBatcher(limits=[Limit(cost, per_batch=10)])
    Autopilot(batcher)

    results = []
    stream = batcher.map(
        [1, 2, 3, 4, None, 5, 6, 7], window=4, ordered=ordered, return_exceptions=True
    )
    with pytest.raises(BatcherStoppedError):  # noqa: PT012 - the stream raises at its end
        async for result in stream:
            results.append(result)
            if len(results) == 1:
                batcher.scheduler.closing = True
                batcher.scheduler.queue.close()
    assert results == [1, 2, 3, 4]
    await batcher.stop()


@pytest.mark.parametrize("kind", ["single", "bulk", "map"])
async def test_the_cost_of_an_item_is_asked_once(kind: str) -> None:
    """Also if the item waits for capacity and for the rate."""
    asked: list[int] = []

    def by(item: int) -> int:
        asked.append(item)
        return 1

    limits = [Limit(by, per_batch=3, queued=2, rate=(4, 1.0))]
    batcher = FakeBatcher(limits=limits, when_full="wait")
    Autopilot(batcher, 0.1)
    items = list(range(12))
    assert await process_as(kind, batcher, items) == items
    assert asked == items
    await batcher.stop()


# --- a `Limit` of several batchers


def sharing(limit: Limit, count: int = 2, **options: Any) -> list[FakeBatcher]:
    """Make batchers that share a limit."""
    return [FakeBatcher(limits=[limit], **options) for _ in range(count)]


async def test_batchers_share_the_rate_of_a_limit() -> None:
    """Together they dispatch no more, and each of them its part."""
    limit = Limit(rate=(2, 1.0))
    batchers = sharing(limit, 3, max_batch_size=1, concurrency=-1)
    pilots = [Autopilot(batcher) for batcher in batchers]
    calls = [batcher.call_many(range(10)) for batcher in batchers]
    await asyncio.sleep(7.5)
    counts = [len(pilot.starts) for pilot in pilots]
    assert sum(counts) == 16
    assert min(counts) >= 3, "a batcher starves"
    await asyncio.gather(*calls)
    starts = sorted(start for pilot in pilots for start in pilot.starts)
    for first, _ in starts:
        assert sum(first <= at < first + 1.0 for at, _ in starts) <= 2
    for batcher in batchers:
        await batcher.stop()


@pytest.mark.parametrize(
    "how", ["dispatch", "cancel", "timeout", "bulk cancel", "bulk failure", "early", "stop"]
)
async def test_capacity_that_one_batcher_frees_admits_a_caller_of_another(how: str) -> None:
    """At once."""
    one, other = sharing(Limit(cost, queued=10), max_batch_size=1, when_full="wait")
    running: Any = await occupy(one)
    first: Any = None
    if how in ("bulk failure", "early"):
        one.runner.end()
        running = one.call_many([0, 9])
        await turn()
        assert one.batches == [[0], [0]]
    elif how == "bulk cancel":
        first = one.call_many([4, 5])
    else:
        first = one.call(9, timeout=1.0 if how == "timeout" else None)
    await turn()
    waiting = other.call(8)
    await turn()
    assert (one.stats().queued, other.stats().blocked) == (2 if how == "bulk cancel" else 1, 1)
    if how == "dispatch":
        one.runner.end()
    elif how == "timeout":
        await asyncio.sleep(1.0)
    elif how == "bulk failure":
        one.runner.end(outcome=ValueError("no"))
    elif how == "early":
        one.runner.yield_results(results=[ValueError("no")])
    elif how == "stop":
        await one.stop(force=True)
    else:
        first.cancel()
    await turn()
    assert other.stats().blocked == 0
    assert other.batches == [[8]]
    await end_all(other)
    assert await waiting == 8
    await asyncio.gather(running, *[first] if first else [], return_exceptions=True) if (
        how == "stop"
    ) else None
    await one.stop(force=True)
    await asyncio.gather(running, *[first] if first else [], return_exceptions=True)
    await other.stop()


async def test_a_shared_queue_is_full_for_all() -> None:
    """Together they hold no more than ``queued``."""
    one, other = sharing(Limit(cost, queued=10), max_batch_size=1)
    first, second = await occupy(one), await occupy(other)
    calls = [one.submit(6), other.submit(4)]
    for batcher in (one, other):
        with pytest.raises(QueueFullException, match="10 queued, queued=10 of a Limit"):
            batcher.submit(1)
    one.runner.end()
    calls += [other.submit(6)]
    await end_all(one)
    await end_all(other)
    await asyncio.gather(first, second, *calls)
    await one.stop()
    await other.stop()


async def test_callers_of_all_batchers_get_capacity() -> None:
    """A batcher with many callers does not keep the others from the shared queue."""
    one, other = sharing(Limit(queued=2), max_batch_size=1, when_full="wait")
    Autopilot(one, 0.1)
    Autopilot(other, 0.1)
    calls = [one.call(item) for item in range(50)]
    await turn()
    late = other.call("late")
    await turn()
    start = now()
    calls += [one.call(item) for item in range(50)]
    assert await late == "late"
    assert now() < start + 6.0
    await asyncio.gather(*calls)
    await one.stop()
    await other.stop()


@pytest.mark.parametrize("how", ["cancel", "before", "timeout", "stop"])
async def test_a_turn_of_a_rate_that_is_given_up(how: str) -> None:
    """Another batcher waited for it, and leaves at once: its batch fits the rate."""
    one, other = sharing(Limit(sum, rate=(10, 4.0)), concurrency=-1)
    first = other.submit([5])
    await turn()
    big = one.submit([9], timeout=0.5 if how == "timeout" else None)
    await asyncio.sleep(0.1)
    assert one.batches == []
    if how == "before":
        big.cancel()
        await turn()
    waiting = other.submit([3])
    await asyncio.sleep(0.1)
    if how == "stop":
        await one.stop(force=True)
    elif how == "timeout":
        await asyncio.sleep(0.3)
    elif how == "cancel":
        big.cancel()
    await asyncio.sleep(0.01)
    assert other.batches == [[[5]], [[3]]]
    await end_all(other)
    await asyncio.gather(first, waiting)
    await asyncio.gather(big, return_exceptions=True)
    await one.stop()
    await other.stop()


@pytest.mark.parametrize("stops", [False, True])
async def test_a_turn_of_parts_that_are_given_up(stops: bool) -> None:
    """They have failed too often. Another batcher waits neither for them nor the stop."""
    one, other = (
        FakeBatcher(limits=[limit], concurrency=-1, on_failure=[isolate()])
        for limit in [Limit(cost, rate=(10, 3600.0))] * 2
    )
    first = other.submit(0)
    await asyncio.sleep(0.1)
    other.runner.end()
    calls = [one.submit(item) for item in (2, 2, 1, 1)]
    await asyncio.sleep(0.1)
    one.runner.end(outcome=ValueError("no"))
    await turn()
    assert one.batches == [[2, 2, 1, 1], [2, 2]], "the rate holds the other part"
    waiting = [other.submit(0), other.submit(0)]
    await turn()
    stop = asyncio.ensure_future(one.stop()) if stops else None
    one.runner.crash_times.extend([time.monotonic()] * 1000)
    one.runner.end(outcome=BatchTimeoutError("again"))
    start = now()
    await asyncio.gather(*calls, return_exceptions=True)
    await turn()
    other.runner.end()
    await asyncio.gather(first, *waiting)
    assert now() < start + 1.0
    await (one.stop() if stop is None else stop)
    await other.stop()


async def test_a_turn_of_a_rate_during_a_pause() -> None:
    """A batcher that is paused has none: another, which waited for it, leaves at once."""
    one, other = sharing(Limit(sum, rate=(10, 4.0)), concurrency=-1)
    paused = [one.submit([0])]
    await turn()
    first = other.submit([5])
    await turn()
    paused.append(one.submit([9]))
    await asyncio.sleep(0.1)
    assert one.batches == [[[0]]]
    waiting = other.submit([3])
    await asyncio.sleep(0.1)
    assert other.batches == [[[5]]]
    one.runner.end(outcome=Later(3600.0))
    await asyncio.sleep(0.1)
    assert other.batches == [[[5]], [[3]]]
    await end_all(other)
    await asyncio.gather(first, waiting)
    await one.stop(force=True)
    await asyncio.gather(*paused, return_exceptions=True)
    await other.stop()


@pytest.mark.parametrize("second", [1, 4])
async def test_batchers_whose_parts_wait_for_a_rate_do_not_wake_each_other(
    monkeypatch: pytest.MonkeyPatch, second: int
) -> None:
    """Parts that cost differently have turns of their own."""
    one, other = (
        FakeBatcher(limits=[limit], concurrency=-1, on_failure=[isolate()])
        for limit in [Limit(cost, rate=(10, 100.0))] * 2
    )
    calls = [other.submit(1)]
    await asyncio.sleep(0.1)
    other.runner.end()
    calls += [one.submit(4), one.submit(second)]
    await asyncio.sleep(1.0)
    calls += [other.submit(3 if second == 1 else 1), other.submit(1 if second == 1 else 0)]
    await asyncio.sleep(1.0)
    pumps: list[float] = []
    pump = Scheduler.pump

    def counted(scheduler: Scheduler, until: float, at: float) -> None:
        pumps.append(at)
        assert len(pumps) < 100, "they wake each other for ever"
        pump(scheduler, until, at)

    monkeypatch.setattr(Scheduler, "pump", counted)
    for batcher in (one, other):
        batcher.runner.end(outcome=ValueError("no"))
        await asyncio.sleep(0.5)
    for _ in range(4):
        await asyncio.sleep(101.0)
        await end_all(one)
        await end_all(other)
    await asyncio.gather(*calls)
    await one.stop()
    await other.stop()


async def test_a_turn_of_a_rate_that_becomes_earlier() -> None:
    """Another batcher had waited for it, and leaves as much earlier."""
    one, other = sharing(Limit(sum, rate=(12, 4.0)), concurrency=-1)
    starts = [Autopilot(batcher).starts for batcher in (one, other)]
    calls = [other.submit([5])]
    await asyncio.sleep(1.0)
    calls.append(other.submit([4]))
    await turn()
    cancelled = one.submit([6])
    calls.append(one.submit([6]))
    await turn()
    calls.append(other.submit([2]))
    await asyncio.sleep(1.0)
    cancelled.cancel()
    await asyncio.gather(*calls)
    assert [round(at, 1) for at, _ in starts[0]] == [4.0]
    assert [round(at, 1) for at, _ in starts[1]] == [0.0, 1.0, 4.0]
    await one.stop()
    await other.stop()


async def test_a_rate_is_kept_when_another_batcher_frees_capacity_meanwhile() -> None:
    """What was dispatched a moment ago counts with any time of a callback."""
    limit = Limit(rate=(1, 10.0), queued=1)
    one, other = sharing(limit, max_batch_size=1, concurrency=-1, when_full="wait")
    first = one.submit(0)
    await turn()
    held = one.submit(1)
    waiting = other.call(2)
    await turn()
    held.cancel()
    virtual_loop().advance(11.0)
    one.submit(3)
    assert one.batches == [[0], [3]]
    await turn()
    assert other.batches == []
    await asyncio.sleep(11.0)
    assert other.batches == [[2]]
    await end_all(other)
    await end_all(one)
    await asyncio.gather(first, waiting)
    await one.stop()
    await other.stop()


def test_a_limit_is_shared_on_one_event_loop_only() -> None:
    """Another loop while the first is open is an error; not once the batcher has stopped."""
    one, other = sharing(Limit(rate=(1, 1.0)))
    with (
        asyncio.Runner(loop_factory=VirtualLoop) as first,
        asyncio.Runner(loop_factory=VirtualLoop) as second,
    ):
        first.run(one.start())
        with pytest.raises(RuntimeError, match="on one event loop"):
            second.run(other.start())
        first.run(one.stop())
        second.run(other.start())
        second.run(other.stop())


@pytest.mark.parametrize("stops", [True, False])
@pytest.mark.parametrize("same", [True, False])
def test_a_limit_works_in_a_later_run_of_asyncio(stops: bool, same: bool) -> None:
    """What was queued on a loop that has closed does not count; nor does its clock."""
    one, other = sharing(Limit(cost, queued=10, rate=(10, 5.0)))
    later = one if same else other

    async def leave_things() -> None:
        await occupy(one, 10)
        one.submit(4)
        one.submit(5)
        await asyncio.sleep(0.5)
        if stops:
            await one.stop(force=True)
            await one.start()

    async def go_on() -> None:
        later.runner.running.clear()
        calls = [later.submit(item) for item in (5, 5)]
        with pytest.raises(QueueFullException, match="10 queued"):
            later.submit(1)
        await asyncio.sleep(6.0)
        assert later.batches[-1] == [5, 5]
        await end_all(later)
        assert await asyncio.gather(*calls) == [5, 5]
        await later.stop()

    for main in (leave_things, go_on):
        with asyncio.Runner(loop_factory=VirtualLoop) as runner:
            runner.run(main())


# --- options


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({}, ValueError, "limits nothing"),
        ({"by": len}, ValueError, "limits nothing"),
        ({"by": 3, "per_batch": 1}, TypeError, "by=3: must be a function"),
        ({"by": "bytes", "per_batch": 1}, TypeError, "'batches'"),
        ({"by": "batches", "per_batch": 1}, ValueError, "counts batches"),
        ({"by": "batches", "queued": 1}, ValueError, "counts batches"),
        ({"per_batch": "1"}, TypeError, "per_batch='1' must be a number, not str"),
        ({"per_batch": True}, TypeError, "not bool"),
        ({"per_batch": 0}, ValueError, "per_batch=0 must be a finite number, at least 1"),
        ({"per_batch": 0.5}, ValueError, "at least 1"),
        ({"by": len, "per_batch": 0}, ValueError, "above 0"),
        ({"by": len, "queued": -1}, ValueError, "queued=-1"),
        ({"by": len, "queued": math.inf}, ValueError, "finite"),
        ({"by": len, "queued": math.nan}, ValueError, "finite"),
        ({"rate": 3}, TypeError, r"rate=3: must be \(n, seconds\)"),
        ({"rate": (1,)}, TypeError, "must be"),
        ({"rate": "ab"}, TypeError, "must be"),
        ({"rate": ("1", 1)}, TypeError, "n must be a number"),
        ({"rate": (0.5, 1)}, ValueError, "n must be a finite number, at least 1"),
        ({"by": "batches", "rate": (0.5, 1)}, ValueError, "at least 1"),
        ({"rate": (1, 0)}, ValueError, "seconds must be a finite number, above 0"),
        ({"rate": (1, None)}, TypeError, "seconds must be a number, not NoneType"),
    ],
)
def test_limit_checks_its_values(
    kwargs: dict[str, Any], error: type[Exception], match: str
) -> None:
    """The message says which, and what is allowed."""
    with pytest.raises(error, match=match):
        Limit(**kwargs)


def test_limit_takes_any_real_numbers() -> None:
    """Less than 1 with a function; a list as a rate."""
    rate: Any = [Decimal("0.5"), 2]
    limit = Limit(len, per_batch=0.25, queued=Decimal("0.5"), rate=rate)  # type: ignore[arg-type]
    assert limit.rate == tuple(rate)
    assert Limit(per_batch=1) != Limit(per_batch=1), "each has a budget of its own"


@pytest.mark.parametrize("value", [3, "abc", [Limit(per_batch=1), 3], Limit])
def test_limits_must_be_limits(value: Any) -> None:
    """One or several."""
    with pytest.raises(TypeError, match="must be a list of Limit objects"):
        FakeBatcher(limits=value)


def unpicklable() -> Any:
    """Return a function that cannot be pickled, and marks where it was called."""
    return lambda item: len(item["data"])


class WithLimits(AsyncBatcher[dict[str, str], int]):
    """Its options are functions that workers cannot get."""

    def __init__(self) -> None:
        super().__init__(
            executor="process",
            max_workers=1,
            limits=[Limit(unpicklable(), per_batch=4)],
            key=lambda item: item["key"],
            key_concurrency=1,
        )

    def process_batch(self, batch: list[dict[str, str]]) -> list[int]:
        """Return the size of the batch for each item."""
        assert len({item["key"] for item in batch}) == 1
        return [len(batch)] * len(batch)


@pytest.mark.slow
def test_limits_and_keys_stay_where_the_batcher_is() -> None:
    """They are not pickled for worker processes, nor is the `Limit`."""

    async def main() -> list[int]:
        async with WithLimits() as batcher:
            items = [
                {"key": key, "data": data} for key, data in zip("aabba", ["12"] * 5, strict=True)
            ]
            return await batcher.process_many(items)

    assert asyncio.run(main()) == [2, 2, 2, 2, 1]


async def test_limits_of_a_decorated_function() -> None:
    """With the usual runner; `Limit` is not used up by a batcher that never starts."""
    limit = Limit(len, per_batch=4, queued=8)
    make_batcher(limits=[limit])
    sizes: list[int] = []

    async def process_batch(batch: list[str]) -> list[str]:
        sizes.append(len(batch))
        return batch

    async with make_batcher(process_batch, limits=[limit], max_queue_time=0) as batcher:
        assert await batcher.process_many(["ab", "cd", "e"]) == ["ab", "cd", "e"]
    assert sizes == [2, 1]


async def test_all_slots_leaked_fails_those_who_wait_for_a_limit() -> None:
    """Nothing can run, so nothing waits."""
    batcher = FakeBatcher(limits=[Limit(cost, queued=10)], when_full="wait")
    running = await occupy(batcher)
    calls = [batcher.call(item) for item in (9, 8)]
    await turn()
    batcher.runner.on_timeouts[0](BatchTimeoutError("timed out"))
    await turn()
    results = await asyncio.gather(running, *calls, return_exceptions=True)
    assert [type(result) for result in results] == [BatchTimeoutError] * 3
    batcher.runner.end()
    call = batcher.call(10)
    await turn()
    batcher.runner.end()
    assert await call == 10
    await batcher.stop()
