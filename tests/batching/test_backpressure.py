"""Deadlines, callers that leave, and a full queue, on a virtual clock and with a runner that does what the test says."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from async_batcher import AsyncBatcher
from async_batcher.exceptions import BatcherStoppedError, BatchTimeoutError, ItemTimeoutError, QueueFullException
from tests.support.virtual_clock import FAKE, VirtualLoop
from tests.support.virtual_clock import FakeBatcher as Rig

pytestmark = pytest.mark.virtual_clock

NO_LIMIT = sys.maxsize


def now() -> float:
    """Virtual seconds."""
    return asyncio.get_running_loop().time()


def timers() -> int:
    """Timers that are set."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)
    return loop.timers()


async def turn(times: int = 3) -> None:
    """Let the loop go round."""
    for _ in range(times):
        await asyncio.sleep(0)


# ---- deadlines


@pytest.mark.parametrize("ways", [{"item_timeout": 5.0}, {"timeout": 5.0}, {"item_timeout": 1000.0, "timeout": 5.0}])
@pytest.mark.parametrize("call", ["process", "submit"])
async def test_a_queued_item_leaves_at_its_deadline_and_is_never_run(ways: dict[str, float], call: str) -> None:
    """Its caller gets ItemTimeoutError, which is a TimeoutError and says that it has not run, at that very time."""
    rig = Rig(**{name: value for name, value in ways.items() if name == "item_timeout"})
    first = rig.submit("first", timeout=1000.0)
    await turn()
    began = now()
    with pytest.raises(ItemTimeoutError, match=r"5\.0 seconds: it was still queued, and is never run") as caught:
        await getattr(rig, call)("late", **{name: value for name, value in ways.items() if name == "timeout"})
    assert now() == began + 5.0
    assert isinstance(caught.value, TimeoutError)
    rig.runner.end()
    assert await first == "first"
    await turn()
    assert rig.batches == [["first"]]
    await rig.stop()
    assert timers() == 0


async def test_the_waiter_of_a_running_item_is_told_at_once() -> None:
    """The others in its batch are untouched."""
    rig = Rig(max_batch_size=3)
    patient, hasty, patient_too = rig.call(0), rig.call(1, timeout=2.0), rig.call(2)
    with pytest.raises(ItemTimeoutError, match="still running"):
        await hasty
    assert not patient.done()
    assert rig.runner.cancelled == []
    rig.runner.end()
    assert [await patient, await patient_too] == [0, 2]
    await rig.stop()


async def test_nothing_is_begun_after_its_deadline_though_the_timer_is_late() -> None:
    """A loop that was held up looks at deadlines before it looks at what is due."""
    rig = Rig(max_queue_time=10.0)
    late = rig.call("late", timeout=10.0)
    other = rig.call("other", timeout=30.0)
    await turn()
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)
    loop._clock_selector.now += 20.0
    with pytest.raises(ItemTimeoutError):
        await late
    await turn()
    assert rig.batches == [["other"]]
    rig.runner.end()
    assert await other == "other"
    await rig.stop()


async def test_a_deadline_with_the_end_of_the_window() -> None:
    """The deadline counts: what has no time left is not begun."""
    rig = Rig(max_queue_time=1.0)
    with pytest.raises(ItemTimeoutError):
        await rig.process(0, timeout=1.0)
    assert rig.batches == []
    await rig.stop()


async def test_an_answer_in_time() -> None:
    """A deadline that is not reached changes nothing, and a stopped batcher has no timer."""
    rig = Rig(item_timeout=5.0)
    call = rig.call("item")
    await asyncio.sleep(4.999)
    rig.runner.end()
    assert await call == "item"
    await rig.stop()
    assert timers() == 0


async def test_no_timer_is_left_when_nobody_waits() -> None:
    """However far the deadlines were."""
    rig = Rig(item_timeout=1000.0)
    futures = [rig.submit(0), rig.submit(1, timeout=500.0)]
    await turn()
    assert timers() == 1
    rig.runner.end()
    assert await asyncio.gather(*futures) == [0, 1]
    assert timers() == 0
    later = rig.submit(2, timeout=5.0)
    with pytest.raises(ItemTimeoutError):
        await later
    assert timers() == 0
    await rig.stop(force=True)


async def test_a_batch_that_is_late_after_a_forced_stop() -> None:
    """Its callers have been told, and its end is nobody's."""
    rig = Rig()
    future = rig.submit(0)
    await turn()
    stopping = asyncio.create_task(rig.stop(force=True))
    await asyncio.sleep(0)
    assert isinstance(future.exception(), BatcherStoppedError)
    rig.runner.late[0](BatchTimeoutError("too long"))
    rig.runner.end()
    await stopping


async def test_a_drain_does_not_wait_for_what_is_late() -> None:
    """An item that leaves the queue at its deadline holds up no stop."""
    rig = Rig()
    running = rig.call(0)
    await turn()
    queued = rig.call(1, timeout=1.0)
    await turn()
    stopping = asyncio.create_task(rig.stop())
    await asyncio.sleep(2.0)
    rig.runner.end()
    await stopping
    assert await running == 0
    assert isinstance(queued.exception(), ItemTimeoutError)
    assert rig.batches == [[0]]


@pytest.mark.parametrize("value", [0, -1, float("nan"), "1", True])
async def test_a_timeout_that_is_none(value: Any) -> None:
    """It is refused before anything is queued."""
    rig = Rig()
    with pytest.raises((TypeError, ValueError), match="timeout="):
        await rig.process(0, timeout=value)
    with pytest.raises((TypeError, ValueError), match="timeout="):
        rig.submit(0, timeout=value)
    assert not await rig.is_running()


async def test_endless_timeouts() -> None:
    """Infinity, and more than a loop's timers take."""
    rig = Rig(item_timeout=float("inf"))
    calls = [rig.call(0), rig.call(1, timeout=1e12)]
    await turn()
    rig.runner.end()
    assert await asyncio.gather(*calls) == [0, 1]
    await rig.stop()


async def test_a_caller_who_is_cancelled_in_the_turn_in_which_his_time_is_over() -> None:
    """He leaves once: nobody else's place in the queue is taken for his."""
    rig = Rig(max_queue_time=10.0)
    first = rig.call("first")
    await turn()

    async def hasty() -> None:
        async with asyncio.timeout(5.0 + 1e-10):  # later than the item's, in the same turn
            await rig.process("hasty", timeout=5.0)

    hasty_ones = [asyncio.create_task(hasty()) for _ in range(3)]
    last = rig.call("last")
    outcomes = await asyncio.gather(*hasty_ones, return_exceptions=True)
    assert [isinstance(outcome, TimeoutError) for outcome in outcomes] == [True] * 3
    await asyncio.sleep(6.0)
    assert rig.batches == [["first", "last"]]
    rig.runner.end()
    assert [await first, await last] == ["first", "last"]
    assert rig.stats().timed_out == 3
    await rig.stop()


# ---- those who have gone


@pytest.mark.parametrize("ends", [True, False])
async def test_a_batch_whose_callers_have_all_gone(ends: bool) -> None:  # noqa: FBT001 - a parameter
    """It is ended if it may be; otherwise only if it has not begun. By the last one, not before."""
    rig = Rig(max_batch_size=3, cancel_abandoned=ends)
    calls = [rig.call(0), rig.call(1, timeout=3.0)]
    future = rig.submit(2)
    await turn()
    assert rig.batches == [[2, 0, 1]]
    calls[0].cancel()
    await asyncio.sleep(4.0)
    assert isinstance(calls[1].exception(), ItemTimeoutError)
    assert rig.runner.cancelled == []
    future.cancel()
    await turn()
    assert rig.runner.cancelled == [([2, 0, 1], ends)]
    assert bool(rig.runner.running) is not ends
    following = rig.call("next")
    await turn()
    assert rig.batches[1:] == ([["next"]] if ends else [])
    rig.runner.end()
    await turn()
    if not ends:
        rig.runner.end()
    assert await following == "next"
    await rig.stop()


async def test_all_callers_of_a_batch_go_at_once() -> None:
    """It is ended once."""
    rig = Rig(max_batch_size=100, cancel_abandoned=True)
    calls = [rig.call(item) for item in range(100)]
    await turn()
    for call in calls:
        call.cancel()
    await turn()
    assert rig.runner.cancelled == [([*range(100)], True)]
    assert not rig.runner.running
    await rig.stop()


async def test_a_coroutine_that_nobody_waits_for_is_cancelled() -> None:
    """The batch itself, and its slot is free."""
    cancelled: list[list[int]] = []

    class Slow(AsyncBatcher[int, int]):
        async def process_batch(self, batch: list[int]) -> list[int]:
            try:
                await asyncio.sleep(100.0 if batch == [0] else 0.0)
            except asyncio.CancelledError:
                cancelled.append(batch)
                raise
            return batch

    batcher = Slow(max_batch_size=1, cancel_abandoned=True)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(batcher.process(0), 1.0)
    began = now()
    assert await batcher.process(1) == 1
    assert now() < began + 1.0
    assert cancelled == [[0]]
    await batcher.stop()


async def test_a_batch_that_fails_for_nobody_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """Unless it was ended for that reason."""
    for ends in (False, True):
        rig = Rig(cancel_abandoned=ends)
        future = rig.submit(0)
        await turn()
        future.cancel()
        await turn()
        while rig.runner.running:
            rig.runner.end(0, ZeroDivisionError())
        await rig.stop()
    assert [record.message for record in caplog.records] == [
        f"{FAKE}: a batch of 1 items failed: ZeroDivisionError"
    ]


# ---- a full queue


async def fill(rig: Rig) -> list[asyncio.Future[Any]]:
    """One item runs, and two wait: as many as may."""
    running = rig.submit("running")
    await turn()
    return [running, rig.submit("a"), rig.submit("b")]


async def test_callers_wait_for_room_and_come_in_order() -> None:
    """First come, first served; nobody is refused, and the queue is never longer than it may be."""
    rig = Rig(max_queue_size=2, max_batch_size=1, when_full="wait")
    first = await fill(rig)
    calls = [rig.call(item) for item in range(4)]
    await turn()
    while rig.runner.running:
        assert len(rig.scheduler.queue) <= 2
        rig.runner.end()
    assert await asyncio.gather(*first, *calls) == ["running", "a", "b", 0, 1, 2, 3]
    assert rig.batches == [["running"], ["a"], ["b"], [0], [1], [2], [3]]
    await rig.stop()


async def test_the_window_begins_in_the_queue() -> None:
    """An item that waits for room does not wait for its batch to fill as well; one that gets room does."""
    rig = Rig(max_queue_size=1, max_queue_time=10.0, concurrency=-1, when_full="wait")
    calls = [rig.call(0)]
    await asyncio.sleep(6.0)
    calls.append(rig.call(1))
    await asyncio.sleep(4.0)
    await turn()
    assert rig.batches == [[0]]
    await asyncio.sleep(9.9)
    assert rig.batches == [[0]]
    await asyncio.sleep(0.1)
    await turn()
    assert rig.batches == [[0], [1]]
    rig.runner.end()
    rig.runner.end()
    assert await asyncio.gather(*calls) == [0, 1]
    await rig.stop()


async def test_submit_cannot_wait() -> None:
    """It raises whatever `when_full` says; so does everybody where that is "raise"."""
    for when_full in ("wait", "raise"):
        rig = Rig(max_queue_size=2, max_batch_size=1, when_full=when_full)
        await fill(rig)
        with pytest.raises(QueueFullException):
            rig.submit("c")
    with pytest.raises(QueueFullException):
        await rig.process("c")
    await rig.stop(force=True)


async def test_one_who_waits_for_room_may_leave() -> None:
    """Cancelled, or past his deadline, which the waiting for room counts towards; those behind him move up."""
    rig = Rig(max_queue_size=2, max_batch_size=1, when_full="wait")
    first = await fill(rig)
    cancelled, late, last = rig.call("cancelled"), rig.call("late", timeout=3.0), rig.call("last")
    await turn()
    cancelled.cancel()
    began = now()
    with pytest.raises(ItemTimeoutError, match="never run"):
        await late
    assert now() == began + 3.0
    for _ in range(4):
        rig.runner.end()
    assert await asyncio.gather(*first, last) == ["running", "a", "b", "last"]
    assert rig.batches == [["running"], ["a"], ["b"], ["last"]]
    await rig.stop()


async def test_the_deadline_of_one_who_got_room() -> None:
    """It goes on from the call."""
    rig = Rig(max_queue_size=2, max_batch_size=1, when_full="wait")
    await fill(rig)
    late = rig.call("late", timeout=3.0)
    await asyncio.sleep(2.0)
    rig.runner.end()
    began = now()
    with pytest.raises(ItemTimeoutError, match="never run"):
        await late
    assert now() == began + 1.0
    assert len(rig.scheduler.queue) == 1
    await rig.stop(force=True)


async def test_room_by_one_who_leaves_the_queue() -> None:
    """Cancelled in the queue, he makes room; so does one whose time is over."""
    rig = Rig(max_queue_size=2, max_batch_size=1, when_full="wait")
    _, a, _ = await fill(rig)
    calls = [rig.call(0), rig.call(1, timeout=5.0), rig.call(2)]
    await turn()
    a.cancel()
    assert len(rig.scheduler.queue) == 2
    await asyncio.sleep(6.0)
    assert isinstance(calls[1].exception(), ItemTimeoutError)
    for _ in range(4):
        rig.runner.end()
    assert [await calls[0], await calls[2]] == [0, 2]
    assert rig.batches == [["running"], ["b"], [0], [2]]
    await rig.stop()


@pytest.mark.parametrize("force", [False, True])
async def test_stop_while_callers_wait_for_room(force: bool) -> None:  # noqa: FBT001 - a parameter
    """They fail at once with BatcherStoppedError; what is in the queue is run, unless forced."""
    rig = Rig(max_queue_size=2, max_batch_size=1, when_full="wait")
    first = await fill(rig)
    calls = [rig.call(item) for item in range(3)]
    await turn()
    stopping = asyncio.create_task(rig.stop(force=force))
    await turn()
    assert all(isinstance(call.exception(), BatcherStoppedError) for call in calls)
    while rig.runner.running:
        rig.runner.end()
    await stopping
    if not force:
        assert await asyncio.gather(*first) == ["running", "a", "b"]
    with pytest.raises(BatcherStoppedError):
        await rig.process("after")


async def test_when_every_slot_is_lost_nobody_waits_for_room() -> None:
    """Those who do are told, and so is who comes later."""
    rig = Rig(max_queue_size=2, max_batch_size=1, when_full="wait")
    await fill(rig)
    call = rig.call("in line")
    await turn()
    rig.runner.late[0](BatchTimeoutError("too long"))
    with pytest.raises(BatchTimeoutError, match="every batch that may run"):
        await call
    with pytest.raises(BatchTimeoutError, match="every batch that may run"):
        await rig.process("later")
    await rig.stop(force=True)


# ---- everything at once


EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("call"), st.sampled_from([None, 0.5, 1.0, 3.0])),
        st.tuples(st.just("submit"), st.sampled_from([None, 0.5, 1.0, 3.0])),
        st.tuples(st.just("cancel"), st.integers(0, 40)),
        st.tuples(st.just("sleep"), st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0])),
        st.tuples(st.just("end"), st.integers(0, 5)),
        st.tuples(st.just("raise"), st.integers(0, 5)),
        st.tuples(st.just("stop"), st.booleans()),
    ),
    max_size=60,
)


@settings(max_examples=200, deadline=None)
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
def test_whatever_happens(
    events: list[tuple[str, Any]],
    size: int,
    slots: int,
    room: int,
    waits: bool,  # noqa: FBT001 - drawn
    isolates: bool,  # noqa: FBT001
    item_timeout: float | None,
    force: bool,  # noqa: FBT001
) -> None:
    """Arrivals, departures, deadlines, failures and stops in any order.

    Every waiter is settled once, with its own result or a true error; nothing is begun after its deadline or its cancellation;
    first in, first out; limits are kept.
    """

    async def scenario() -> None:
        rig = Rig(
            max_batch_size=size,
            concurrency=slots,
            max_queue_size=room,
            when_full="wait" if waits else "raise",
            isolate_failures=isolates,
            item_timeout=item_timeout,
            max_queue_time=0.25,
        )
        calls: list[asyncio.Future[Any]] = []
        deadlines: dict[int, float] = {}
        gone: set[int] = set()
        failed: set[int] = set()
        begun: list[int] = []
        stops: list[asyncio.Task[None]] = []
        too_late: set[int] = set()  # called after a stop
        seen = 0

        def look() -> None:
            nonlocal seen
            for batch in rig.batches[seen:]:
                assert 0 < len(batch) <= (size if size > 0 else NO_LIMIT)
                for item in batch:
                    assert item not in gone, "begun for one who had gone"
                    assert now() < deadlines[item], "begun after its deadline"
                fresh = [item for item in batch if item not in begun]
                if not isolates:
                    assert fresh == batch, "run twice"
                begun.extend(fresh)
            seen = len(rig.batches)
            assert len(rig.runner.running) <= (slots if slots > 0 else NO_LIMIT)
            stats = rig.stats()
            assert stats.queued <= (room if room > 0 else NO_LIMIT)
            settled = stats.done + stats.failed + stats.cancelled + stats.timed_out
            taken = len(calls) - stats.rejected - len(too_late)
            assert stats.queued + stats.blocked + stats.running + settled == taken, stats

        for kind, value in events:
            if kind in ("call", "submit"):
                item = len(calls)
                if stops:
                    too_late.add(item)
                limit = item_timeout if value is None else value
                deadlines[item] = now() + (NO_LIMIT if limit is None else limit)
                if kind == "call":
                    calls.append(rig.call(item, timeout=value))
                    await asyncio.sleep(0)
                else:
                    try:
                        calls.append(rig.submit(item, timeout=value))
                    except (QueueFullException, BatcherStoppedError) as exc:
                        refused: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
                        refused.set_exception(exc)
                        calls.append(refused)
            elif kind == "cancel" and value < len(calls):
                if calls[value].cancel():
                    gone.add(value)
                await asyncio.sleep(0)
            elif kind == "sleep":
                for _ in range(int(value / 0.25)):
                    await asyncio.sleep(0.25)
                    look()
                await asyncio.sleep(0)
            elif kind == "end" and value < len(rig.runner.running):
                rig.runner.end(value)
            elif kind == "stop":
                stops.append(asyncio.create_task(rig.stop(force=value)))
                await asyncio.sleep(0)
            elif kind == "raise" and value < len(rig.runner.running):
                failed.update(rig.runner.running[value][0])
                rig.runner.end(value, ZeroDivisionError("poison"))
            look()
        stops.append(asyncio.create_task(rig.stop(force=force)))
        await turn()
        while rig.runner.running:
            rig.runner.end()
            await turn(1)
            look()
        await asyncio.gather(*stops)
        await turn()
        assert begun == sorted(begun) or any(kind == "submit" for kind, _ in events), "first in, first out"
        for item, call in enumerate(calls):
            assert call.done(), "somebody waits in vain"
            if call.cancelled():
                assert item in gone
                continue
            error = call.exception()
            if error is None:
                assert call.result() == item
                assert item in begun
            elif isinstance(error, ItemTimeoutError):
                assert now() >= deadlines[item]
                assert ("never run" in str(error)) == (item not in begun)
            elif isinstance(error, ZeroDivisionError):
                assert item in failed
            elif isinstance(error, BatcherStoppedError):
                assert stops
            else:
                assert isinstance(error, QueueFullException)
        assert timers() == 0
        stats = rig.stats()
        kept = [call for call in calls if not call.cancelled()]
        answered = sum(call.exception() is None for call in kept)
        late = sum(type(call.exception()) is ItemTimeoutError for call in kept)
        # One who leaves just when the answer has come is counted by the answer.
        assert stats.cancelled <= len(calls) - len(kept)
        assert stats.done - answered + stats.timed_out - late <= len(calls) - len(kept) - stats.cancelled
        assert stats.done >= answered
        assert stats.timed_out >= late
        assert stats.queued == stats.blocked == stats.running == 0

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(scenario())
