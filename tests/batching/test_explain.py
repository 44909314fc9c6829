"""`explain`: what limits throughput, and what a change of the options should gain."""

from __future__ import annotations

import asyncio
import heapq
import random
import re
import sys
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from async_batcher import WorkerPool, batched
from async_batcher._batching.batch import Batch
from async_batcher._batching.instance import LIFECYCLE_ATTR
from async_batcher._batching.queue.base import NEVER
from async_batcher._batching.queue.batch_queue import BatchQueue
from async_batcher._batching.records.explain import MIN_BATCHES, explain
from async_batcher._batching.records.in_effect import options_in_effect
from async_batcher._batching.records.measured import OptionsInEffect
from async_batcher._batching.records.recorder import StatsRecorder
from async_batcher.stats import Bottleneck, Explanation, Reason
from tests.support.polling import turn
from tests.support.virtual_clock import FakeBatcher

if TYPE_CHECKING:
    from async_batcher._batching.records.measured import EndedBatch


class Load(NamedTuple):
    """Callers, each of which calls, awaits the result, and calls again some time later.

    Attributes:
        callers: How many there are.
        pause: Mean seconds until a caller calls again.
        fixed: Seconds that each batch takes,
        per_item: and each item of it.
        ramp: How many batches there are before with a fifth of the callers.
    """

    callers: int
    pause: float
    fixed: float
    per_item: float
    ramp: int = 0

    def run(self, options: OptionsInEffect) -> Outcome:
        """Simulate the load."""
        batches: list[EndedBatch] = []
        if self.ramp:
            few = self._replace(callers=max(1, self.callers // 5))
            batches = _simulate(few, options, self.ramp).batches
        return _simulate(self, options, 300, batches)


class Outcome(NamedTuple):
    """What a load shows; the throughput and the mean time of a call are without the ramp."""

    batches: list[EndedBatch]
    throughput: float
    call_time: float


def _simulate(
    load: Load, options: OptionsInEffect, count: int, before: list[EndedBatch] | None = None
) -> Outcome:
    queue: BatchQueue[float, None] = BatchQueue(
        max_batch_size=options.max_batch_size or sys.maxsize,
        max_queue_time=options.max_queue_time,
        max_queue_size=options.max_queue_size or sys.maxsize,
        concurrency=options.slots or sys.maxsize,
        workers=1,
    )
    ended = before or []
    first, start = len(ended), max((at + (took or 0.0) for at, took, *_ in ended), default=0.0)
    pauses = random.Random(0)  # noqa: S311 - no secret
    events: list[tuple[float, int, Any]] = []  # a heap: when, a number, a batch that ends

    def plan(at: float, batch: Any = None) -> None:
        heapq.heappush(events, (at, pauses.getrandbits(60), batch))

    def call_later(now: float) -> None:
        plan(now + (pauses.expovariate(1 / load.pause) if load.pause else 0.0), "call")

    for _ in range(load.callers):
        call_later(start)
    call_time = 0.0
    while len(ended) < first + count:
        now, _, event = heapq.heappop(events)
        if event == "call":
            if queue.add(now, now, None) is None:
                call_later(now + 1e-3)
        elif event is not None:
            queue.release_slot(now)
            run_time = now - event.started_at
            sample = event.enqueued_at[:: -(-event.size // 16)]
            ended.append((event.started_at, run_time, event.size, event.reason, sample))
            for came in event.items:
                call_time += now - came
                call_later(now)
        while queue.next_wakeup <= now + 1e-12:
            batch = queue.get_batch()
            batch.started_at = now
            plan(now + load.fixed + load.per_item * batch.size, batch)
        if now < queue.next_wakeup < NEVER:
            plan(queue.next_wakeup)
    items = sum(batch[2] for batch in ended[first:])
    return Outcome(ended, items / (now - start), call_time / items)


def changed(options: OptionsInEffect, explanation: Explanation) -> OptionsInEffect:
    """Return the options as the suggestion has them."""
    assert explanation.option is not None
    assert explanation.suggestion is not None
    found = re.search(rf"\b{explanation.option}=(\d+)", explanation.suggestion)
    assert found, explanation.suggestion
    change: dict[str, Any] = {explanation.option.replace("max_workers", "workers"): int(found[1])}
    return options._replace(**change)


@pytest.mark.parametrize(
    ("load", "options", "bottleneck", "option"),
    [
        pytest.param(
            Load(64, 0.001, 0.01, 0.0001, ramp=60),
            OptionsInEffect(max_batch_size=8, workers=1),
            "size",
            "max_batch_size",
            id="fixed cost, no core free",
        ),
        pytest.param(
            Load(64, 0.001, 0.01, 0.0001, ramp=60),
            OptionsInEffect(max_batch_size=8, workers=2, cores=8),
            "size",
            "max_batch_size",
            id="fixed cost, cores free",
        ),
        pytest.param(
            Load(12, 0.001, 0.01, 0.0001, ramp=60),
            OptionsInEffect(max_batch_size=4, workers=1),
            "size",
            "max_batch_size",
            id="fixed cost, few callers",
        ),
        pytest.param(
            Load(64, 0.001, 0.001, 0.0005, ramp=60),
            OptionsInEffect(max_batch_size=4, workers=2, cores=2),
            "size",
            "max_batch_size",
            id="some fixed cost, no core free",
        ),
        pytest.param(
            Load(40, 0.002, 0.01, 0.0001, ramp=60),
            OptionsInEffect(max_batch_size=64, max_queue_size=8, workers=1),
            "limit",
            "max_queue_size",
            id="fixed cost, a small queue",
        ),
        pytest.param(
            Load(64, 0.001, 0.0005, 0.001, ramp=60),
            OptionsInEffect(max_batch_size=8, workers=2, cores=6),
            "workers",
            "max_workers",
            id="cost per item, cores free",
        ),
        pytest.param(
            Load(6, 0.001, 0.001, 0.01),
            OptionsInEffect(max_batch_size=1, workers=2, cores=16),
            "workers",
            "max_workers",
            id="more cores than callers",
        ),
        pytest.param(
            Load(64, 0.001, 0.0, 0.001),
            OptionsInEffect(max_batch_size=8, concurrency=1, runs_in="coroutines"),
            "slots",
            "concurrency",
            id="coroutines",
        ),
        pytest.param(
            Load(64, 0.001, 0.0, 0.001),
            OptionsInEffect(max_batch_size=8, concurrency=1, runs_in="threads", cores=4),
            "slots",
            "concurrency",
            id="the loop's threads",
        ),
        pytest.param(
            Load(64, 0.001, 0.0, 0.001),
            OptionsInEffect(max_batch_size=8, concurrency=1, workers=3, cores=8),
            "slots",
            "concurrency",
            id="fewer slots than workers",
        ),
        pytest.param(
            Load(1, 0.0, 0.001, 0.0),
            OptionsInEffect(max_queue_time=0.01, concurrency=1),
            "window",
            "max_queue_time",
            id="a lone caller waits",
        ),
        pytest.param(
            Load(20, 0.05, 0.001, 0.0001),
            OptionsInEffect(max_batch_size=64, max_queue_time=0.05, concurrency=2),
            "window",
            "max_queue_time",
            id="batches are collected for long",
        ),
        pytest.param(
            Load(40, 0.02, 0.004, 0.0),
            OptionsInEffect(max_batch_size=64, max_queue_time=0.05),
            "window",
            "max_queue_time",
            id="a window without a limit of slots",
        ),
    ],
)
def test_a_change_gains_what_is_expected(
    load: Load, options: OptionsInEffect, bottleneck: Bottleneck, option: str
) -> None:
    """A simulation with the changed option gains that, within a factor of 1.5."""
    before = load.run(options)
    explanation = explain(before.batches, options)
    assert (explanation.bottleneck, explanation.option) == (bottleneck, option)
    after = load.run(changed(options, explanation))
    gain = after.throughput / before.throughput
    if bottleneck == "window":
        gain = before.call_time / after.call_time
    assert explanation.expected_gain is not None
    assert gain > 1.1
    assert gain / 1.5 < explanation.expected_gain < gain * 1.5


@pytest.mark.parametrize(
    ("load", "options", "bottleneck", "option"),
    [
        pytest.param(
            Load(64, 0.001, 0.0001, 0.001, ramp=60),
            OptionsInEffect(max_batch_size=8, workers=2, cores=2),
            "workers",
            None,
            id="cost per item, no core free",
        ),
        pytest.param(
            Load(64, 0.001, 0.0001, 0.001),
            OptionsInEffect(workers=2, cores=2),
            "workers",
            None,
            id="no limit of the size",
        ),
        pytest.param(
            Load(32, 0.0, 0.002, 0.0002),
            OptionsInEffect(workers=2, cores=2),
            "workers",
            None,
            id="no limit of the size, and no pause",
        ),
        pytest.param(
            Load(64, 0.001, 0.01, 0.0001),
            OptionsInEffect(max_batch_size=8, workers=2, cores=2),
            "workers",
            "max_batch_size",
            id="one size only, so nothing tells the fixed cost",
        ),
        pytest.param(
            Load(64, 0.02, 0.001, 0.0),
            OptionsInEffect(max_batch_size=64, max_queue_time=0.05, max_queue_size=4, workers=1),
            "limit",
            "max_queue_size",
            id="the queue is full long before the window ends",
        ),
        pytest.param(
            Load(4, 0.1, 0.001, 0.0),
            OptionsInEffect(workers=2, cores=2),
            "callers",
            None,
            id="workers that are mostly idle",
        ),
        pytest.param(
            Load(1, 0.0, 0.01, 0.0),
            OptionsInEffect(max_batch_size=1, workers=1),
            "callers",
            None,
            id="a lone caller that waits for nothing but its own batch",
        ),
        pytest.param(
            Load(4, 0.1, 0.001, 0.0),
            OptionsInEffect(max_batch_size=1, workers=4),
            "callers",
            None,
            id="batches that are full at once",
        ),
        pytest.param(
            Load(100, 0.0, 0.1, 0.0),
            OptionsInEffect(max_queue_time=0.01, concurrency=1, runs_in="coroutines"),
            "callers",
            None,
            id="a window that is short beside the batch",
        ),
    ],
)
def test_what_has_no_expected_gain(
    load: Load, options: OptionsInEffect, bottleneck: Bottleneck, option: str | None
) -> None:
    """Where nothing helps, or it is unknown what it gains."""
    explanation = explain(load.run(options).batches, options)
    assert (explanation.bottleneck, explanation.option) == (bottleneck, option)
    assert explanation.expected_gain is None
    assert (explanation.suggestion is None) is (bottleneck == "callers")


def steady(count: int = 40) -> list[EndedBatch]:
    """Return batches of 4 items that ran for 2 s each, in turn, and waited for 1 to 3 s."""
    return [(10.0 + 4 * n, 2.0, 4, "full", [9.0 + 4 * n, 7.0 + 4 * n]) for n in range(count)]


def test_the_numbers() -> None:
    """Means, shares and rates are those of the batches."""
    explanation = explain(steady(), OptionsInEffect(max_batch_size=16, workers=2))
    assert explanation.batches == 40
    assert explanation.mean_size == 4
    assert explanation.mean_fill == 0.25
    assert explanation.mean_wait == 2.0
    assert explanation.mean_run_time == 2.0
    assert explanation.busy_share == pytest.approx(80 / (2 * 158))
    assert explanation.items_per_second == pytest.approx(160 / 158)
    unlimited = explain(steady(), OptionsInEffect())
    assert (unlimited.mean_fill, unlimited.busy_share) == (None, None)
    assert "had 1 item on average" in str(
        explain([(0.0, 1.0, 1, "full", [])] * 20, OptionsInEffect())
    )


def test_reruns_and_the_drain_only_keep_slots_busy() -> None:
    """So do not count as batches; those that were taken back count for nothing."""
    options = OptionsInEffect(max_batch_size=4, workers=1)
    alone = explain(steady(), options)
    reasons: list[Reason] = ["isolation", "drain"]
    reruns: list[EndedBatch] = [
        (12.0 + 4 * n, 2.0, 1, reason, []) for n, reason in enumerate(reasons * 20)
    ]
    taken_back: EndedBatch = (1.0, None, 4, "full", [0.0])
    both = explain([*steady(), *reruns, taken_back], options)
    assert (both.batches, both.mean_size, both.mean_wait) == (40, 4, 2.0)
    assert alone.busy_share == pytest.approx(80 / 158)
    assert both.busy_share == 1.0


def test_a_rate_that_most_items_waited_for() -> None:
    """It comes before all else."""
    options = OptionsInEffect(max_batch_size=4, workers=1)
    batches = steady()
    half = len(batches) // 2

    def held_back(count: int) -> list[EndedBatch]:
        return [(*batch[:3], "rate", batch[4]) for batch in batches[:count]] + batches[count:]

    assert explain(held_back(half), options).bottleneck != "rate"
    explanation = explain(held_back(half + 1), options)
    assert (explanation.bottleneck, explanation.option) == ("rate", "limits")
    assert "A rate limits throughput" in str(explanation)


@pytest.mark.parametrize("limits_keys", [True, False])
def test_items_that_wait_although_slots_are_free(limits_keys: bool) -> None:
    """For other batches of their key, or for their time."""
    batches: list[EndedBatch] = [(4.0 * n, 1.0, 2, "full", [4.0 * n - 3] * 2) for n in range(40)]
    options = OptionsInEffect(max_batch_size=2, workers=4, limits_keys=limits_keys)
    explanation = explain(batches, options)
    assert explanation.bottleneck == "limit"
    assert explanation.option == ("key_concurrency" if limits_keys else None)
    assert "slots are free" in str(explanation)


def test_batches_that_use_up_a_cost() -> None:
    """If items wait for slots, and batches are full with fewer items than ``max_batch_size``."""
    batches: list[EndedBatch] = [
        (2.0 * n, 2.0, 4, "full", [2.0 * n - 6, 2.0 * n - 5]) for n in range(40)
    ]
    options = OptionsInEffect(max_batch_size=64, workers=1, limits_cost=True)
    explanation = explain(batches, options)
    assert (explanation.bottleneck, explanation.option) == ("limit", "limits")
    assert "per_batch" in str(explanation)
    assert explain(batches, options._replace(limits_cost=False)).option != "limits"


@pytest.mark.parametrize("count", [0, 1, MIN_BATCHES - 1])
def test_too_few_batches(count: int) -> None:
    """Then it says how many there are, and how many are needed."""
    explanation = explain(steady(count), OptionsInEffect(max_batch_size=4))
    assert explanation.bottleneck == "unknown"
    assert explanation.batches == count
    assert (explanation.option, explanation.expected_gain, explanation.suggestion) == (None,) * 3
    noun = "1 batch has run" if count == 1 else f"{count} batches have run"
    assert noun in str(explanation)
    assert f"At least {MIN_BATCHES} batches are needed." in str(explanation)
    assert explain(steady(MIN_BATCHES), OptionsInEffect()).bottleneck != "unknown"


def test_the_paragraph() -> None:
    """It has the numbers with their units, the bottleneck, and the option with its value."""
    options = OptionsInEffect(max_batch_size=8, workers=2, cores=4)
    text = str(explain(Load(64, 0.0, 0.0, 0.001).run(options).batches, options))
    assert text == (
        "The last 300 batches had 7.95 items on average, 99 % of max_batch_size, and the "
        "throughput was 2,000 items/s. An item waited for 23.7 ms and a batch ran for 7.95 ms on "
        "average, and the slots were busy for 100 % of the time. The workers limit throughput: items wait "
        "because all workers are busy. max_workers=4 should raise the throughput by a factor of up "
        "to 2, if 4 cores are free for it."
    )


ENDED_BATCHES = st.tuples(
    st.floats(0, 1e6),
    st.none() | st.sampled_from([0.0, 1e-320, 1.0]) | st.floats(0, 1e6),
    st.integers(1, 5000),
    st.sampled_from(get_args(Reason)),
    st.lists(st.floats(0, 1e6), max_size=3),
)
LIMITS = st.none() | st.integers(1, 5000)


@pytest.mark.slow
@given(
    st.lists(ENDED_BATCHES, max_size=5),
    st.sampled_from([1, 5, 20]),
    st.builds(
        OptionsInEffect,
        max_batch_size=LIMITS,
        max_queue_time=st.sampled_from([0.0, 0.01]) | st.floats(0, 1e6),
        max_queue_size=LIMITS,
        concurrency=LIMITS,
        workers=LIMITS,
        runs_in=st.sampled_from(["processes", "threads", "coroutines"]),
        cores=st.integers(1, 200),
    ),
)
def test_it_never_fails(batches: list[EndedBatch], times: int, options: OptionsInEffect) -> None:
    """For any batches the text is a few sentences, and names the option."""
    explanation = explain(batches * times, options)
    text = str(explanation)
    assert explanation.bottleneck in get_args(Bottleneck)
    sentences = re.split(r"(?<=\.) (?=[A-Z]|max_|concurrency)", text)
    assert 2 <= len(sentences) <= 6
    assert all(sentence.endswith(".") for sentence in sentences)
    assert "nan" not in text
    assert "inf" not in text.split()
    if explanation.suggestion is not None:
        assert explanation.suggestion in text
        assert explanation.bottleneck != "unknown"
    if explanation.option is not None:
        assert explanation.option in {*OptionsInEffect._fields, "max_workers", "limits"}
        assert re.search(rf"\b{explanation.option}\b", explanation.suggestion or "")
    if explanation.expected_gain is not None:
        assert explanation.option is not None
        assert explanation.expected_gain >= 1.1
    if explanation.busy_share is not None:
        assert 0 <= explanation.busy_share <= 1


def an_executor(name: str) -> Any:
    """Return an executor that has not started."""
    kinds: dict[str, Any] = {
        "pool": lambda: WorkerPool(3),
        "threads": lambda: ThreadPoolExecutor(3),
        "processes": lambda: ProcessPoolExecutor(3),
    }
    return kinds[name]() if name in kinds else name or None


@pytest.mark.parametrize(
    ("executor", "options", "runs_in", "workers", "concurrency", "slots_option"),
    [
        ("", {}, "threads", None, 1, "concurrency"),
        ("", {"concurrency": 4}, "threads", None, 4, "concurrency"),
        ("", {"concurrency": -1}, "threads", None, None, "concurrency"),
        ("thread", {"max_workers": 5}, "threads", 5, None, "max_workers"),
        ("process", {"max_workers": 1}, "processes", 1, None, "max_workers"),
        ("process", {"max_workers": 5, "concurrency": 2}, "processes", 5, 2, "concurrency"),
        ("pool", {"concurrency": 4}, "processes", 3, 4, "max_workers"),
        ("threads", {}, "threads", None, 1, "concurrency"),
        ("threads", {"concurrency": 3}, "threads", None, 3, "concurrency"),
        ("processes", {}, "processes", 3, None, "max_workers"),
    ],
)
def test_the_options_in_effect(
    executor: str, options: dict[str, Any], runs_in: str, workers: int | None,
    concurrency: int | None, slots_option: str,
) -> None:  # fmt: skip
    """What ``concurrency`` and the executor mean for the number of slots."""
    batcher: Any = batched(lambda batch: batch, executor=an_executor(executor), **options)
    lifecycle = getattr(batcher, LIFECYCLE_ATTR)
    found = options_in_effect(lifecycle, is_coroutine=False)
    assert (found.runs_in, found.workers, found.concurrency) == (runs_in, workers, concurrency)
    assert found.slots_option == slots_option
    assert (found.max_batch_size, found.max_queue_size) == (None, None)
    assert found.max_queue_time == batcher.max_queue_time


def test_a_batcher_that_has_not_run() -> None:
    """It explains that nothing was measured."""
    explanation = batched(lambda batch: batch).explain()
    assert (explanation.bottleneck, explanation.batches) == ("unknown", 0)


def test_batches_before_a_change_of_the_options_are_left_out() -> None:
    """As long as they are among the last 1,024, and no longer."""
    recorder = StatsRecorder()
    batch: Batch[int, None] = Batch([0], [None], [0.0], [], "full")
    recorder.options_changed()
    for before, expected in ((10, 10), (1, 1), (1023, 1024), (2, 1024)):
        for _ in range(before):
            recorder.batch_finished(batch, 0, None, 1.0)
        assert len(recorder.ended_batches()) == expected
        if before == 10:
            recorder.options_changed()
            assert recorder.ended_batches() == []


@pytest.mark.virtual_clock
async def test_a_batcher_that_waits_for_the_window() -> None:
    """One call after the other waits for ``max_queue_time``."""
    batcher = FakeBatcher(max_queue_time=0.01, concurrency=2)
    for item in range(MIN_BATCHES):
        assert batcher.explain().bottleneck == "unknown"
        future = batcher.submit(item)
        await asyncio.sleep(0.01)
        await turn()
        await asyncio.sleep(0.002)
        batcher.runner.end()
        await future
    explanation = batcher.explain()
    assert (explanation.bottleneck, explanation.option) == ("window", "max_queue_time")
    assert explanation.expected_gain == pytest.approx(6.0)
    assert explanation.mean_wait == pytest.approx(0.01)
    assert explanation.mean_run_time == pytest.approx(0.002)
    await batcher.stop()
    assert batcher.explain() == explanation


@pytest.mark.virtual_clock
async def test_a_batcher_whose_slot_is_busy() -> None:
    """Items wait while full batches run one after the other; a change of options starts anew."""
    batcher = FakeBatcher(max_batch_size=4, concurrency=1)
    futures = [batcher.submit(item) for item in range(16)]
    for _ in range(40):
        await asyncio.sleep(0.01)
        batcher.runner.end()
        futures += [batcher.submit(0) for _ in range(4)]
    explanation = batcher.explain()
    assert (explanation.bottleneck, explanation.option) == ("slots", "concurrency")
    assert explanation.expected_gain == 2.0
    assert explanation.mean_fill == 1.0
    assert explanation.busy_share == pytest.approx(1.0)
    assert explanation.items_per_second == pytest.approx(400)
    assert "concurrency=2" in str(explanation)
    batcher.max_batch_size = 8
    changed_now = batcher.explain()
    assert (changed_now.bottleneck, changed_now.batches) == ("unknown", 0)
    for _ in range(MIN_BATCHES):
        await asyncio.sleep(0.01)
        batcher.runner.end()
        futures += [batcher.submit(0) for _ in range(8)]
    assert batcher.explain().batches == MIN_BATCHES
    assert batcher.stats().run_times.count == 40 + MIN_BATCHES
    await batcher.stop(force=True)
    await asyncio.wait(futures)
