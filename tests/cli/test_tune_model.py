"""The model of `tune`: costs of a batch, predictions, the plan, and how a trial is evaluated."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from async_batcher._batching.records.batch_cost import BatchCost, CostModel, fit_cost_model
from async_batcher.cli.tune.model import (
    BatchSample,
    Config,
    Measurement,
    Mode,
    batch_seconds,
    evaluate_trial,
    predict_throughput,
    spread,
    typical,
)
from async_batcher.cli.tune.plan import (
    first_config,
    make_plan,
    minimum_time,
    next_size,
    sizes_to_try,
)
from tests.support.measurements import SIZES, on_a_line

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
def test_a_line_of_any_costs(costs: list[BatchCost]) -> None:
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


# Predictions.


@given(fixed=SECONDS, per_item=SECONDS, size=st.integers(1, 5000))
def test_a_cost_between_measured_ones(fixed: float, per_item: float, size: int) -> None:
    """Costs on a line are predicted exactly, between measured sizes and beyond them."""
    predicted = batch_seconds(on_a_line(fixed, per_item), size)
    assert predicted == pytest.approx(fixed + per_item * size, rel=1e-3)


def test_a_measured_cost_is_not_predicted() -> None:
    """Costs that lie on no line are used as they were measured."""
    costs = [BatchCost(1, 1.0), BatchCost(2, 1.0), BatchCost(4, 16.0)]
    assert [batch_seconds(costs, size) for size in (1, 2, 3, 4)] == [1.0, 1.0, 8.5, 16.0]


@pytest.mark.parametrize(
    ("workers", "size", "clients", "throughput"),
    [
        (1, 256, 256, 256 / 0.0356),  # all in one batch
        (16, 256, 256, 256 / 0.0356),  # fifteen workers have nothing to do
        (16, 16, 256, 256 / 0.0116),
        (16, 8, 256, 128 / 0.0108),  # half of the clients wait for a worker
        (16, 16, 1, 1 / 0.0101),
    ],
)
def test_a_prediction(workers: int, size: int, clients: int, throughput: float) -> None:
    """Groups of clients share a batch, and each group keeps one worker busy."""
    config = Config("threads", workers, size)
    predicted = predict_throughput(on_a_line(0.0099, 0.0001), config, clients)
    assert predicted == pytest.approx(throughput, rel=1e-6)


def test_the_event_loop_limits_a_prediction() -> None:
    """A function that takes no time is not predicted to do more than the event loop can."""
    config = Config("processes", 16, 1024)
    assert predict_throughput(on_a_line(0.0, 1e-9), config, 100_000) <= 200_000


# The plan.


@given(workers=st.integers(1, 64), clients=st.integers(1, 2000))
def test_sizes_to_try(workers: int, clients: int) -> None:
    """Powers of two up to the number of clients, and the share of each worker."""
    sizes = sizes_to_try(workers, clients)
    assert sizes == sorted(set(sizes))
    assert (sizes[0], sizes[-1]) == (1, clients)
    assert all(later <= 3 * earlier for earlier, later in pairwise(sizes))
    assert -(-clients // workers) in sizes


def test_the_first_size_is_the_share_of_a_worker() -> None:
    """With a cost for each batch, larger batches would leave workers without one."""
    costs = on_a_line(0.0078, 1e-5)
    assert first_config(costs, "processes", 16, 256) == Config("processes", 16, 16)
    assert first_config(costs, "processes", 1, 256) == Config("processes", 1, 256)


def test_slow_starts_are_not_repeated() -> None:
    """Worker processes are started for other numbers of workers if that costs little."""
    costs = on_a_line(0.001, 1e-4)
    both: list[tuple[Mode, int]] = [
        ("threads", 1),
        ("threads", 8),
        ("processes", 1),
        ("processes", 8),
    ]
    assert make_plan(costs, 8, [1, 256], 0.1, 50.0)[:3] == (both, 256, True)
    slow = make_plan(costs, 8, [1, 256], 5.0, 50.0)
    assert slow == ([*both[:2], both[3]], 256, False, False)
    assert make_plan(costs, 1, [1], 5.0, 50.0).pools == [("threads", 1), ("processes", 1)]


def test_a_start_that_takes_the_time_is_skipped() -> None:
    """Only threads are measured if workers take too long to start."""
    plan = make_plan(on_a_line(0.001, 1e-4), 8, [1, 256], 30.0, 50.0)
    assert plan.skips_processes
    assert plan.pools == [("threads", 1), ("threads", 8)]


@pytest.mark.parametrize(
    ("per_item", "target", "clients"),
    [(1e-4, None, 256), (0.1, None, 16), (1.0, None, 4), (1e-4, 0.001, 16), (1e-4, 1e-6, 1)],
)
def test_the_clients_that_decide(per_item: float, target: float | None, clients: int) -> None:
    """The most that there is time for, and that may stay within the target."""
    costs = on_a_line(0.0, per_item, [1, 2, 4])
    assert make_plan(costs, 4, [1, 4, 16, 256], 0.1, 50.0, target).clients == clients


def test_the_least_time() -> None:
    """It is in proportion to what an item takes."""
    least = minimum_time(on_a_line(0.5, 0.5))
    assert 14 < least < 50
    assert minimum_time(on_a_line(5.0, 5.0)) == pytest.approx(10 * least)


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
    found = evaluate_trial(began, began + busy, ended, [seconds])
    assert found.throughput == pytest.approx(workers * size / seconds, rel=1e-4)


def test_the_seconds_of_calls() -> None:
    """Of the calls the median and the 99th percentile count."""
    found = evaluate_trial(0.0, 1.0, [BatchSample(1.0, 100, 1.0)], map(float, range(100, 0, -1)))
    assert found == Measurement(100.0, 50.0, 99.0)


def test_figures_of_several_trials() -> None:
    """The median of each figure counts."""
    trials = [Measurement(3.0, 1.0, 9.0), Measurement(1.0, 3.0, 8.0), Measurement(2.0, 2.0, 7.0)]
    assert typical(trials) == Measurement(2.0, 2.0, 8.0)


def test_the_spread_of_several_trials() -> None:
    """One trial that was disturbed does not count; a machine whose speed changes does."""
    assert spread([100.0]) == spread([]) == 0.0
    assert spread([100.0, 100.0, 50.0, 100.0, 100.0, 100.0]) == 0.0
    assert spread([100.0, 80.0, 100.0, 80.0]) == pytest.approx(math.log(1.25))


def test_a_model_says_what_a_batch_costs() -> None:
    """A batch costs ``fixed + per_item * n``."""
    assert CostModel(1.0, 0.5, 0.0).seconds(4) == 3.0
