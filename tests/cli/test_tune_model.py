"""The model of `tune`: costs of a batch, the plan of the trials, and the recommendation."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from async_batcher.cli.tune.model import (
    MAX_BATCH_SIZE,
    NEAR_THE_BEST,
    PAYS_PER_WORKER,
    BatchCost,
    BatchSample,
    CostModel,
    Measurement,
    fit_cost_model,
    measure_trial,
    median_trials,
    recommend,
    scales,
    spread,
)
from async_batcher.cli.tune.plan import (
    allocate_rounds,
    allocate_time,
    configurations,
    minimum_time,
    next_size,
    sizes_to_try,
)
from tests.support.measurements import INLINE, SIZES, a_point, on_a_line

if TYPE_CHECKING:
    from async_batcher.cli.tune.model import Mode

SECONDS = st.floats(1e-7, 10.0)


COSTS = st.integers(1, len(SIZES)).flatmap(
    lambda count: st.lists(SECONDS, min_size=count, max_size=count).map(
        lambda seconds: [BatchCost(size, cost) for size, cost in zip(SIZES, seconds, strict=False)]
    )
)


# The line.


@given(
    fixed=SECONDS | st.just(0.0), per_item=SECONDS | st.just(0.0), count=st.integers(2, len(SIZES))
)
def test_the_line_of_exact_costs_is_found(fixed: float, per_item: float, count: int) -> None:
    """Costs on a line give that line, and the model holds."""
    if fixed == per_item == 0:
        return
    line = fit_cost_model(on_a_line(fixed, per_item, SIZES[:count]))
    assert line.fixed == pytest.approx(fixed, rel=1e-4, abs=1e-6 * (fixed + per_item))
    assert line.per_item == pytest.approx(per_item, rel=1e-4, abs=1e-6 * (fixed + per_item))
    assert line.error < 1e-6
    assert line.holds


@given(costs=COSTS)
def test_a_line_of_whatever_costs(costs: list[BatchCost]) -> None:
    """The fit is finite and not negative, and no line with one coefficient 0 is nearer."""
    line = fit_cost_model(costs)
    assert line.fixed >= 0
    assert line.per_item >= 0
    assert 0 <= line.error < math.inf
    assert line.error == pytest.approx(
        max(abs(line.seconds(cost.batch_size) / cost.seconds - 1) for cost in costs), abs=1e-9
    )

    def distance(fixed: float, per_item: float) -> float:
        return sum(((fixed + per_item * cost.batch_size) / cost.seconds - 1) ** 2 for cost in costs)

    for cost in costs:
        assert (
            distance(line.fixed, line.per_item) <= distance(cost.seconds, 0.0) * (1 + 1e-6) + 1e-9
        )
        assert (
            distance(line.fixed, line.per_item) <= distance(0.0, cost.per_item) * (1 + 1e-6) + 1e-9
        )


@given(costs=COSTS, factor=st.floats(0.01, 100.0))
def test_the_unit_of_time_does_not_matter(costs: list[BatchCost], factor: float) -> None:
    """Costs scaled by a factor give the model scaled by that factor."""
    line = fit_cost_model(costs)
    other = fit_cost_model([BatchCost(cost.batch_size, factor * cost.seconds) for cost in costs])
    assert other.error == pytest.approx(line.error, rel=1e-4, abs=1e-6)
    for cost in costs:
        assert other.seconds(cost.batch_size) == pytest.approx(
            factor * line.seconds(cost.batch_size), rel=1e-4
        )


def test_costs_that_lie_on_no_line_are_said_not_to() -> None:
    """The model does not hold for costs that grow with the square of the size."""
    assert not fit_cost_model([BatchCost(size, 1e-6 * size**2) for size in SIZES]).holds


def test_nothing_has_no_line() -> None:
    """A fit without costs is an error."""
    with pytest.raises(ValueError, match="nothing"):
        fit_cost_model([])


# What is measured.


def sizes_measured(fixed: float, per_item: float, most_seconds: float = math.inf) -> list[int]:
    """Return the sizes whose costs are measured of a function with exactly that line."""
    costs = on_a_line(fixed, per_item, [1])
    while (size := next_size(costs, most_seconds)) is not None:
        costs += on_a_line(fixed, per_item, [size])
    return [cost.batch_size for cost in costs]


@pytest.mark.parametrize(
    ("fixed", "per_item", "most_seconds", "sizes"),
    [
        (0.0, 1e-6, math.inf, SIZES),  # a trip to a worker counts at every size
        (1.0, 1e-6, math.inf, SIZES),  # the larger, the cheaper
        (0.0, 1.0, math.inf, [1, 2, 4]),
        (0.0, 0.001, math.inf, [1, 2, 4, 8]),  # of 4 ms the trip is a part
        (0.0, 0.001, 0.002, [1, 2]),
        (0.0, 1.0, 0.1, [1]),
    ],
)
def test_sizes_grow_while_there_is_something_to_learn(
    fixed: float, per_item: float, most_seconds: float, sizes: list[int]
) -> None:
    """Sizes double until an item gets no cheaper, a trip is negligible, or batches get too long."""
    assert sizes_measured(fixed, per_item, most_seconds) == sizes


@given(costs=COSTS, workers=st.integers(1, 64), target=st.none() | SECONDS)
def test_few_sizes_are_tried(costs: list[BatchCost], workers: int, target: float | None) -> None:
    """At most seven distinct sizes are tried, of which the model adds one at most."""
    sizes = sizes_to_try(costs, workers, target)
    assert sizes == sorted(set(sizes))
    assert sizes[0] == 1
    assert sizes[-1] <= MAX_BATCH_SIZE
    measured = {cost.batch_size for cost in costs}
    assert len(sizes) <= 7
    assert len(set(sizes) - measured) <= (target is not None)
    if target is None:
        assert sizes[-1] == costs[-1].batch_size


@given(
    fixed=SECONDS,
    per_item=SECONDS,
    workers=st.integers(1, 64),
    targets=st.tuples(SECONDS, SECONDS).map(sorted),
)
def test_sizes_follow_the_target(
    fixed: float, per_item: float, workers: int, targets: list[float]
) -> None:
    """Predicted latencies stay within the target; a longer target allows larger batches."""
    costs = on_a_line(fixed, per_item)
    tight, loose = (sizes_to_try(costs, workers, target) for target in targets)
    assert max(tight) <= max(loose)
    for sizes, target in ((tight, targets[0]), (loose, targets[1])):
        assert all(
            (fixed + per_item * size) * (1 + 1 / workers) <= target * (1 + 1e-6)
            for size in sizes
            if size > 1
        )


def test_a_target_is_met_closely() -> None:
    """The model adds a size between measured ones that uses the time of the target."""
    sizes = sizes_to_try(on_a_line(0.0, 0.001), 4, 0.12)  # 96 at most
    assert 64 in sizes
    assert any(64 < size <= 96 for size in sizes)


# The plan.


@pytest.mark.parametrize(
    ("most", "counts"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])]
)
def test_numbers_of_workers(most: int, counts: list[int]) -> None:
    """Powers of two and the maximum are tried, in threads and in processes."""
    ways = configurations(most)
    assert [count for mode, count in ways if mode == "threads"] == counts
    assert [count for mode, count in ways if mode == "processes"] == counts


@given(
    costs=COSTS,
    workers=st.integers(1, 16),
    target=st.none() | SECONDS,
    start=st.floats(0.0, 5.0),
    seconds=st.floats(0.0, 100.0),
)
def test_the_time_is_shared_out(
    costs: list[BatchCost], workers: int, target: float | None, start: float, seconds: float
) -> None:
    """All trials fit into the given time, unless it is too short for batches of one item."""
    ways = configurations(workers)
    rounds, sizes = allocate_rounds(costs, target, ways, start, seconds)
    assert rounds in (1, 2, 3)
    assert 1 in sizes
    assert set(sizes) <= set(sizes_to_try(costs, workers, target))
    there_is = seconds / (rounds * len(ways)) - start
    plan = allocate_time("processes", workers, sizes, costs, there_is)
    assert list(plan.sizes) == sizes
    assert all(busy > 0 for busy in plan.sizes.values())
    if len(sizes) > 1:
        assert plan.seconds <= (there_is + 0.02 * len(sizes)) * (1 + 1e-6)


def test_everything_is_tried_several_times() -> None:
    """There are up to three rounds if time allows; no size is dropped for another round."""
    cheap, ways = on_a_line(0.0, 1e-6), configurations(2)
    assert allocate_rounds(cheap, None, ways, 0.1, 1.0)[0] == 1
    assert allocate_rounds(cheap, None, ways, 0.1, 8.0)[0] == 2
    assert allocate_rounds(cheap, None, ways, 0.1, 1000.0)[0] == 3
    costly = on_a_line(0.0, 0.5, [1, 2, 4])
    assert allocate_rounds(costly, None, ways, 0.1, 48.0) == (1, [1, 2])
    assert allocate_rounds(costly, None, ways, 0.1, 100.0) == (1, [1, 2, 4])
    assert allocate_rounds(costly, None, ways, 0.1, 1000.0) == (3, [1, 2, 4])


def test_there_is_time_for_what_least_seconds_says() -> None:
    """The minimum time counts the slowest items and the starts of the workers."""
    ways = configurations(2)
    assert minimum_time(1.0, 0.0, ways) == 3 + 6 + 3 + 3
    assert minimum_time(0.0, 0.5, ways) == 1.0


# What a trial has shown.


@given(
    workers=st.integers(1, 5),
    size=st.integers(1, 100),
    seconds=st.floats(0.01, 1.0),
    busy=st.floats(0.001, 5.0),
    began=st.floats(0.0, 1e6),
)
def test_throughput_counts_what_was_done(
    workers: int, size: int, seconds: float, busy: float, began: float
) -> None:
    """Equal batches give the exact throughput, wherever the trial ends."""
    rounds = math.ceil(busy / seconds) + 2
    ended = [
        BatchSample(began + turn * seconds, size, seconds)
        for turn in range(1, rounds + 1)
        for _ in range(workers)
    ]
    found = measure_trial("processes", workers, size, began, began + busy, ended)
    assert found.throughput == pytest.approx(workers * size / seconds, rel=1e-4)
    assert found.batch_seconds == found.median_batch_seconds == seconds
    assert found.latency == pytest.approx(seconds + seconds / workers, rel=1e-4)


def test_how_long_batches_take() -> None:
    """A measurement has the median and the 95th percentile."""
    found = measure_trial(
        "threads", 1, 1, 0.0, 100.0, [BatchSample(float(n), 1, float(n)) for n in range(1, 101)]
    )
    assert (found.median_batch_seconds, found.batch_seconds) == (50.0, 95.0)


def test_workers_that_bring_nothing_end_the_search() -> None:
    """More workers are tried only if the last ones added throughput."""
    one, same, better = (
        a_point("threads", 1, 8, 100.0),
        a_point("threads", 2, 8, 101.0),
        a_point("threads", 2, 1, 150.0),
    )
    assert scales([one], "threads", 1)
    assert not scales([one, same], "threads", 2)
    assert scales([one, same, better], "threads", 2)
    assert scales([one, a_point("processes", 2, 8, 90.0)], "processes", 2)


def test_several_trials_of_the_same() -> None:
    """The median trial counts; the spread is the difference from best to worst."""
    trials = [a_point("threads", 1, 8, throughput) for throughput in (100.0, 50.0, 90.0)]
    assert median_trials([*trials, a_point("threads", 2, 8, 7.0)]) == [
        trials[2],
        a_point("threads", 2, 8, 7.0),
    ]
    assert spread(trials) == 0.5
    assert spread(trials[:1]) == 0.0


# The advice.


POINTS = st.lists(
    st.builds(
        Measurement,
        st.sampled_from(["inline", "threads", "processes"]),
        st.sampled_from([1, 2, 4]),
        st.sampled_from([1, 4, 16, 64]),
        st.floats(1e-2, 1e7),
        SECONDS,
        SECONDS,
    ),
    max_size=30,
).map(
    lambda points: [
        a_point("inline", 1, 1, 10.0), a_point("threads", 1, 1, 10.0), a_point("processes", 1, 1, 9.0),
        *(point._replace(workers=1 if point.mode == "inline" else point.workers) for point in points),
    ]
)  # fmt: skip


@given(points=POINTS, target=st.floats(1e-6, 100.0))
def test_the_advice_never_breaks_the_target(points: list[Measurement], target: float) -> None:
    """A target that is reported as met is met; otherwise no process meets it."""
    advice = recommend(points, target)
    assert advice.point in points
    assert advice.point.mode != "inline"
    assert 0 <= advice.max_queue_time < math.inf
    if advice.meets_target:
        assert advice.point.latency <= target
        assert advice.max_queue_time + advice.point.batch_seconds <= target * (1 + 1e-9)
    else:
        assert advice.max_queue_time == 0 or advice.point.latency > target
        assert advice.verdict in ("out of reach", "too cheap")
        rivals = [point for point in points if point.mode == "threads" and point.workers == 1]
        if advice.verdict == "out of reach":
            rivals = [point for point in points if point.mode != "inline"]
        assert all(advice.point.latency <= rival.latency for rival in rivals)
        assert all(rival.latency > target for rival in rivals)


@given(points=POINTS, target=st.none() | st.floats(1e-6, 100.0))
def test_the_advice_is_near_the_best(points: list[Measurement], target: float | None) -> None:
    """No smaller batch comes near the best, and more workers would not pay."""
    advice = recommend(points, target)
    if not advice.meets_target:
        return
    chosen = advice.point
    within = [
        p for p in points if p.mode == chosen.mode and (target is None or p.latency <= target)
    ]
    alike = [
        p for p in within if p.workers == (1 if advice.verdict == "too cheap" else chosen.workers)
    ]
    most = max(p.throughput for p in alike)
    assert chosen.throughput >= NEAR_THE_BEST * most
    assert all(
        p.throughput < NEAR_THE_BEST * most for p in alike if p.batch_size < chosen.batch_size
    )
    if advice.verdict == "too cheap":
        return
    for p in within:
        added = p.workers - chosen.workers
        assert added <= 0 or p.throughput < most * (1 + PAYS_PER_WORKER * added)


@given(points=POINTS, targets=st.tuples(st.floats(1e-6, 100.0), st.floats(1e-6, 100.0)).map(sorted))
def test_a_target_that_is_met_is_met_with_more_time(
    points: list[Measurement], targets: list[float]
) -> None:
    """A longer target never makes the advice out of reach."""
    tight, loose = (recommend(points, target) for target in targets)
    if tight.verdict == "out of reach":
        return
    assert loose.verdict != "out of reach"


ONE_PROCESS = a_point("processes", 1, 1, 1500.0)


@pytest.mark.parametrize(
    ("points", "target", "verdict", "chosen", "executor"),
    [
        (
            [("threads", 1, 16, 1900), ("threads", 2, 16, 1800), ("processes", 1, 16, 1900), ("processes", 2, 16, 3700)],
            None, "processes pay", ("processes", 2, 16), "process",
        ),
        (  # two processes add less than 5 %
            [("threads", 1, 16, 1000), ("processes", 1, 16, 2100), ("processes", 2, 16, 2150)],
            None, "processes pay", ("processes", 1, 16), "process",
        ),
        (  # the smaller batch comes near
            [("threads", 1, 16, 1000), ("processes", 1, 16, 1900), ("processes", 2, 16, 3700), ("processes", 2, 64, 3800)],
            None, "processes pay", ("processes", 2, 16), "process",
        ),
        (
            [("threads", 1, 16, 1900), ("threads", 2, 16, 3600), ("processes", 1, 16, 1900), ("processes", 2, 16, 3700)],
            None, "threads do as well", ("threads", 2, 16), "thread",
        ),
        (
            [("threads", 1, 16, 2100), ("threads", 2, 16, 2100), ("processes", 1, 16, 1900), ("processes", 2, 16, 2100)],
            None, "one thread does as well", ("threads", 1, 16), None,
        ),
        (
            [("threads", 1, 16, 300), ("threads", 2, 16, 500), ("processes", 1, 16, 200), ("processes", 2, 16, 400)],
            None, "too cheap", ("threads", 1, 16), None,
        ),
        (
            [("threads", 1, 16, 1000), ("threads", 2, 16, 1000), ("processes", 1, 16, 1500), ("processes", 2, 16, 1950)],
            None, "no more than inline", ("processes", 2, 16), "process",
        ),
        (  # cores that have other things to do: the function is not to blame
            [("threads", 1, 16, 1980), ("threads", 2, 16, 1980), ("processes", 1, 16, 1900), ("processes", 2, 16, 1950)],
            None, "one thread does as well", ("threads", 1, 16), None,
        ),
        (  # where only one process was tried, that it does a little less says nothing
            [("threads", 1, 16, 1900), ("processes", 1, 16, 1900)],
            None, "one thread does as well", ("threads", 1, 16), None,
        ),
        (
            [("threads", 1, 16, 300), ("processes", 1, 16, 200)],
            None, "too cheap", ("threads", 1, 16), None,
        ),
        (  # a batch of 16 takes 8.6 ms, and as long again to fill with one worker
            [("threads", 1, 1, 990), ("processes", 1, 1, 900), ("processes", 2, 1, 1800), ("processes", 2, 16, 3700)],
            0.004, "processes pay", ("processes", 2, 1), "process",
        ),
        (
            [("threads", 1, 1, 990), ("threads", 1, 16, 1900), ("processes", 1, 16, 1900), ("processes", 2, 16, 3700)],
            0.004, "no time for a trip", ("threads", 1, 1), None,
        ),
        (
            [("threads", 1, 1, 990), ("threads", 1, 16, 1900), ("processes", 1, 1, 900), ("processes", 2, 16, 3700)],
            0.0001, "out of reach", ("threads", 1, 1), None,
        ),
    ],
)  # fmt: skip
def test_verdicts(
    points: list[tuple[Mode, int, int, float]],
    target: float | None,
    verdict: str,
    chosen: tuple[str, int, int],
    executor: str | None,
) -> None:
    """Processes, threads or neither are recommended, with as few workers and items as suffice."""
    advice = recommend([*INLINE, *(a_point(*values) for values in points)], target)
    assert (advice.verdict, advice.point[:3], advice.executor) == (verdict, chosen, executor)
    assert advice.meets_target == (verdict != "out of reach")


def test_how_long_a_batch_waits() -> None:
    """The queue time is the run time of a batch, limited by the target, and 0 for one item."""
    points = [
        *INLINE,
        a_point("threads", 1, 16, 1000.0),
        ONE_PROCESS,
        a_point("processes", 2, 16, 3200.0, 0.0101),
    ]
    assert recommend(points).max_queue_time == 0.01
    assert recommend(points, 0.0157).max_queue_time == 0.0055
    assert (
        recommend(
            [
                *INLINE,
                a_point("threads", 1, 1, 1000.0),
                ONE_PROCESS,
                a_point("processes", 2, 1, 3200.0),
            ]
        ).max_queue_time
        == 0.0
    )


def test_a_model_says_what_a_batch_costs() -> None:
    """A batch costs ``fixed + per_item * n``."""
    assert CostModel(1.0, 0.5, 0.0).seconds(4) == 3.0
