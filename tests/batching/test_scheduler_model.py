"""`Scheduler` under random interleavings of events."""

from __future__ import annotations

import asyncio
import contextlib
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from async_batcher._batching.callers import SubmitFuture
from async_batcher.exceptions import BatchError, BatcherStoppedError, QueueFullException
from tests.support.polling import turn
from tests.support.scheduler_rig import Rig
from tests.support.virtual_clock import VirtualLoop

pytestmark = pytest.mark.virtual_clock


ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("ask"), st.integers(1, 5)),
        st.tuples(st.just("cancel"), st.integers(0, 60)),
        st.tuples(st.just("end"), st.integers(0, 5)),
        st.tuples(st.just("fail"), st.integers(0, 5)),
        st.tuples(st.just("fail some"), st.integers(0, 5)),
        st.tuples(st.just("exit"), st.integers(0, 5)),
        st.tuples(st.sampled_from(["yield", "yield some"]), st.integers(0, 5)),
        st.tuples(st.just("sleep"), st.sampled_from([0.0, 0.5, 1.0, 5.0])),
        st.tuples(st.just("resize"), st.integers(1, 5)),
    ),
    max_size=40,
)


STOPS = st.lists(st.sampled_from(["drain", "timeout", "force", "cancel"]), max_size=3)


class CountingFuture(SubmitFuture):
    """A future that counts how often it is resolved."""

    __slots__ = ("resolved",)

    def set_result(self, result: Any) -> None:
        """Count, and set the result."""
        self.resolved = getattr(self, "resolved", 0) + 1
        super().set_result(result)

    def set_exception(self, exception: Any) -> None:
        """Count, and set the exception."""
        self.resolved = getattr(self, "resolved", 0) + 1
        super().set_exception(exception)


class Scenario:
    """A scheduler under a sequence of events, and the outcomes that each caller may get."""

    def __init__(self, size: int, slots: int, window: float) -> None:
        self.rig = Rig(size=size, slots=slots, window=window, capacity=20)
        self.size, self.slots, self.window = size, slots, window
        self.futures: list[CountingFuture] = []
        self.refused = 0
        self.cancelled_in_queue: set[int] = set()
        self.failed: dict[int, str] = {}  # messages by item

    def ask(self, count: int) -> None:
        """Submit new items."""
        for _ in range(count):
            item = len(self.futures)
            future = CountingFuture(loop=self.rig.loop)
            future.callers = self.rig.scheduler.callers
            try:
                future.handle = self.rig.scheduler.callers.enqueue(item, future)
            except QueueFullException:
                self.refused += 1
            except BatcherStoppedError:
                assert self.rig.scheduler.closing
            else:
                self.futures.append(future)

    def cancel(self, item: int) -> None:
        """Cancel one caller."""
        if item < len(self.futures):
            started = {one for batch in self.rig.batches for one in batch}
            if self.futures[item].cancel() and item not in started:
                self.cancelled_in_queue.add(item)

    def end(self, index: int, how: str) -> None:
        """Finish one batch, or give its next results."""
        running = self.rig.runner.running
        if not running:
            return
        index %= len(running)
        batch = running[index][0]
        if how.startswith("yield"):
            batch = batch[: 1 + index]
        outcome: Any = [("result of", item) for item in batch]
        if how == "fail":
            outcome = ValueError(f"batch {batch}")
            self.failed.update((item, f"batch {batch}") for item in batch)
        elif how == "exit":
            outcome = SystemExit(f"batch {batch}")
            self.failed.update((item, f"batch {batch}") for item in batch)
        elif how in ("fail some", "yield some"):
            outcome[::2] = [ValueError(f"item {item}") for item in batch[::2]]
            self.failed.update((item, f"item {item}") for item in batch[::2])
        if how.startswith("yield"):
            self.rig.runner.yield_results(len(batch), index=index, results=outcome)
        else:
            self.rig.runner.end(index, outcome)

    async def play(self, actions: list[tuple[str, Any]], *, stops: int = 0) -> None:
        """Play events; each of the stops beside them may have a timer."""
        for name, value in actions:
            if name == "ask":
                self.ask(value)
            elif name == "cancel":
                self.cancel(value)
            elif name == "sleep":
                await asyncio.sleep(value)
            elif name == "resize":
                self.rig.scheduler.resize(max_batch_size=value, max_queue_time=self.window)
            else:
                self.end(value, name)
            assert len(self.rig.runner.running) <= self.slots
            assert self.rig.loop.timers() <= 1 + stops

    async def stop(self, how: str) -> None:
        """Stop in one of four ways."""
        if how == "cancel":
            task = asyncio.create_task(self.rig.stop())
            await turn(1)
            task.cancel()
            await asyncio.wait([task])
        elif how == "timeout":
            with contextlib.suppress(TimeoutError):
                await self.rig.stop(timeout=3.0)
        else:
            await self.rig.stop(force=how == "force")

    def check(self) -> None:
        """Check that each caller has an outcome of its own, exactly once."""
        ran = [item for batch in self.rig.batches for item in batch]
        assert ran == sorted(set(ran)), "not first in, first out, or twice"
        assert not self.cancelled_in_queue & set(ran)
        for item, future in enumerate(self.futures):
            assert future.done()
            if future.cancelled():
                assert not hasattr(future, "resolved")
                continue
            assert future.resolved == 1
            error = future.exception()
            if error is None:
                assert future.result() == ("result of", item)
                assert item not in self.failed
            elif isinstance(error, ValueError):
                assert str(error) == self.failed[item]
            elif isinstance(error, BatchError):
                assert self.failed[item] in str(error)
                assert error.original_type == "builtins.SystemExit"
            else:
                assert isinstance(error, BatcherStoppedError)
        assert len(self.rig.queue) == 0
        assert self.rig.runner.running == []
        assert len(self.rig.runner.closed) == 1


async def play(
    before: list[tuple[str, Any]],
    during: list[tuple[str, Any]],
    stops: list[str],
    size: int,
    slots: int,
    window: float,
) -> None:
    """Play events, then stops with more events beside them, then the rest of the batches."""
    scenario = Scenario(size, slots, window)
    await scenario.play(before)
    tasks = [asyncio.create_task(scenario.stop(how)) for how in stops]
    await scenario.play(during, stops=len(stops))
    if "drain" in stops or not stops:
        tasks.append(asyncio.create_task(scenario.stop("drain")))
        await turn(1)
        while scenario.rig.runner.running:
            scenario.end(0, "end")
            await turn(1)
    await asyncio.gather(*tasks)
    scenario.check()
    assert asyncio.all_tasks() == {asyncio.current_task()}


@pytest.mark.slow
@settings(max_examples=200)
@given(
    before=ACTIONS,
    during=ACTIONS,
    stops=STOPS,
    size=st.integers(1, 5),
    slots=st.integers(1, 3),
    window=st.sampled_from([0.0, 1.0, 3.0, math.inf]),
)
def test_random_interleavings_resolve_every_caller_once(
    before: list[tuple[str, Any]],
    during: list[tuple[str, Any]],
    stops: list[str],
    size: int,
    slots: int,
    window: float,
) -> None:
    """In any order of calls, cancellations, outcomes and stops each gets its own outcome."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(play(before, during, stops, size, slots, window))
