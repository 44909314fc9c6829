"""Batchers that share a rate, with random calls on a virtual clock."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from async_batcher._batching.scheduler import Scheduler
from async_batcher.failures import Later, isolate
from async_batcher.limits import Limit
from tests.support.polling import turn
from tests.support.virtual_clock import FakeBatcher, VirtualLoop, now

RATE, SPAN = 10, 20.0
MAX_PUMPS = 50  # for one event; a few per batcher are enough

which = st.integers(0, 2)
events = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), which, st.lists(st.integers(0, RATE), min_size=1, max_size=1)),
        st.tuples(st.just("submit"), which, st.lists(st.integers(0, 4), min_size=2, max_size=4)),
        st.tuples(st.just("cancel"), which, st.integers(0, 9)),
        st.tuples(st.just("end"), which, st.booleans()),
        st.tuples(st.just("fail"), which, st.booleans()),
        st.tuples(st.just("put off"), which, st.sampled_from([0.0, 3.0, 60.0])),
        st.tuples(st.just("sleep"), st.just(0), st.sampled_from([0.01, 1.0, 7.0, SPAN + 0.1])),
        st.tuples(st.just("stop"), which, st.booleans()),
    ),
    min_size=5,
    max_size=40,
)


class World:
    """Three batchers and their callers."""

    def __init__(self, window: float, *, has_keys: bool) -> None:
        limit = Limit(lambda item: item, rate=(RATE, SPAN))
        self.batchers = [
            FakeBatcher(
                limits=[limit],
                key=(lambda cost: cost % 2) if has_keys else None,
                concurrency=-1,
                max_queue_time=window,
                max_batch_size=2 if has_keys else -1,
                on_failure=[isolate()],
            )
            for _ in range(3)
        ]
        self.calls: list[list[asyncio.Future[Any]]] = [[], [], []]
        self.stops: dict[int, asyncio.Future[None]] = {}
        self.dispatched: list[tuple[float, int]] = []
        self.pumps = 0
        for batcher in self.batchers:
            submit = batcher.runner.submit

            def check(batch: list[Any], *args: Any, submit: Any = submit) -> Any:
                self.dispatched.append((now(), sum(batch)))
                used = sum(cost for at, cost in self.dispatched if at > now() - SPAN)
                assert used <= RATE, "exceeded the rate"
                return submit(batch, *args)

            batcher.runner.submit = check  # type: ignore[assignment,method-assign]

    async def act(self, kind: str, index: int, value: Any) -> None:
        """Do what an event says, and let the loop do what follows."""
        batcher, runner = self.batchers[index], self.batchers[index].runner
        self.pumps = 0
        if kind == "submit" and index not in self.stops:
            self.calls[index] += [batcher.submit(cost) for cost in value]
        elif kind == "cancel" and self.calls[index]:
            self.calls[index][-1 - value % len(self.calls[index])].cancel()
        elif kind == "end" and runner.running:
            runner.end()
        elif kind == "fail" and runner.running:
            runner.end(outcome=ValueError("no"))
        elif kind == "put off" and runner.running:
            runner.end(outcome=Later(value))
        elif kind == "sleep":
            await asyncio.sleep(value)
        elif kind == "stop" and index not in self.stops:
            self.stops[index] = asyncio.ensure_future(batcher.stop(force=value))
        await turn(6)

    def check(self) -> None:
        """Check that nothing waits that could go on, and that the timers are set."""
        assert self.pumps < MAX_PUMPS, "they wake each other for ever"
        for batcher in self.batchers:
            session = batcher._lifecycle.session
            if session is not None and not session.forced:
                count, armed_for = len(self.dispatched), session._queue_timer.armed_for
                session.pump(now(), now())
                assert len(self.dispatched) == count, "this would wait for another event"
                assert armed_for <= session.queue.next_wakeup, "the timer is late"

    async def finish(self) -> None:
        """Let everything end."""
        for _ in range(200):
            for batcher in self.batchers:
                while batcher.runner.running:
                    batcher.runner.end()
                    await turn()
            if all(call.done() for calls in self.calls for call in calls):
                break
            await asyncio.sleep(SPAN / 2)
        for calls in self.calls:
            assert all(call.done() for call in calls), "a caller waits for ever"
            await asyncio.gather(*calls, return_exceptions=True)
        for index, batcher in enumerate(self.batchers):
            await (self.stops[index] if index in self.stops else batcher.stop())


@given(events=events, window=st.sampled_from([0.0, 0.5, 10.0]), has_keys=st.booleans())
@settings(max_examples=300)
def test_batchers_that_share_a_rate(
    events: list[tuple[str, int, Any]], window: float, has_keys: bool
) -> None:
    """Nothing waits for another event, no rate is exceeded, and every call ends."""

    async def scenario() -> None:
        world = World(window, has_keys=has_keys)
        pump = Scheduler.pump

        def counted(scheduler: Scheduler, until: float, at: float) -> None:
            world.pumps += 1
            assert world.pumps < MAX_PUMPS, "they wake each other for ever"
            pump(scheduler, until, at)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Scheduler, "pump", counted)
            for kind, index, value in events:
                await world.act(kind, index, value)
                world.check()
        await world.finish()

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(scenario())
