"""The search of `tune`, on simulated machines: how good the recommendation is, and in what time."""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING, Any

import pytest

from async_batcher.cli.tune.model import Config, Measurement
from tests.support.simulated_machine import CLIENTS, SimulatedMachine

if TYPE_CHECKING:
    from async_batcher.cli.tune.model import Choice

FUNCTIONS: dict[str, dict[str, Any]] = {
    "fixed cost": {"fixed": 7.8e-3, "per_item": 1e-5},
    "cost per item": {"fixed": 0.0, "per_item": 1e-3},
    "cheap": {"fixed": 0.0, "per_item": 1e-5},
    "GIL released": {"fixed": 5e-4, "per_item": 3e-4, "holds_gil": False},
    "sleeping": {"fixed": 2e-2, "per_item": 0.0, "holds_gil": False, "sleeps": True},
    "slow import": {"fixed": 1e-3, "per_item": 2e-4, "start": 2.0},
    "nothing": {"fixed": 1e-6, "per_item": 1e-7},
    "slow": {"fixed": 0.5, "per_item": 0.1},
}
SEEDS = range(9)
SECONDS = 60.0


def regret(machine: SimulatedMachine, choice: Choice) -> float:
    """Return how much less the recommendation does than the best of an exhaustive grid."""
    done = machine.exact(choice.config, choice.clients).throughput
    return 1 - done / machine.best(choice.clients)


@pytest.mark.parametrize("cores", [2, 16])
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(
    ("noise", "disturbed", "most"), [(0.02, 0.0, 0.05), (0.05, 0.0, 0.05), (0.05, 0.15, 0.05)]
)
def test_the_recommendation_is_near_the_best(
    function: str, cores: int, noise: float, disturbed: float, most: float
) -> None:
    """It is within 5 % of the best of a grid, typically, and never far from it."""
    found = []
    for seed in SEEDS:
        machine = SimulatedMachine(
            **FUNCTIONS[function], cores=cores, noise=noise, disturbed=disturbed, seed=seed
        )
        search, _, left = machine.search(SECONDS)
        # The last trial may take longer than predicted.
        assert left >= -0.1 * SECONDS
        found.append(regret(machine, search.choice()))
    assert median(found) <= most
    assert max(found) <= (0.1 if noise < 0.05 else 0.25)


@pytest.mark.parametrize("clients", [[1], [16], [3, 100], [1, 4, 16, 256, 1000]])
def test_other_numbers_of_clients(clients: list[int]) -> None:
    """The largest number decides, and each is reported."""
    machine = SimulatedMachine(2e-3, 1e-4, cores=6, noise=0.02)
    search, _, _ = machine.search(clients=clients)
    choice = search.choice()
    assert choice.clients == max(clients)
    assert sorted(choice.loads) == clients
    assert regret(machine, choice) <= 0.05


@pytest.mark.parametrize("seed", range(10))
def test_each_number_of_clients_is_measured_on_a_busy_machine(seed: int) -> None:
    """What is measured last does not change what was chosen before."""
    machine = SimulatedMachine(5e-4, 1e-4, cores=2, noise=0.3, seed=seed)
    search, _, _ = machine.search(SECONDS)
    assert sorted(search.choice().loads) == CLIENTS
    assert search.ratios()[search.choice().config._replace(queue_time=0.0)] == 1.0


def test_each_pool_of_processes_is_started_once() -> None:
    """A slow start is paid once for each number of workers."""
    machine = SimulatedMachine(**FUNCTIONS["slow import"], cores=16)
    machine.search(SECONDS)
    assert len(machine.started) == len(set(machine.started)) <= 4


def test_a_start_that_takes_too_long() -> None:
    """Threads are recommended, and it is said that processes were not measured."""
    machine = SimulatedMachine(1e-3, 2e-4, start=25.0)
    search, plan, _ = machine.search(SECONDS)
    assert plan.skips_processes
    assert search.choice().config.mode == "threads"
    assert machine.started == []


def test_the_choice_is_compared_with_its_neighbours() -> None:
    """Half and double the batch size and the workers were measured."""
    machine = SimulatedMachine(2e-3, 1e-3, cores=16, noise=0.02)
    search, _, _ = machine.search(SECONDS)
    config = search.choice().config
    measured = {one for one in search.points() if not one.queue_time}
    assert (config.mode, config.workers, config.queue_time) == ("processes", 16, 0.0)
    for size in (config.batch_size // 2, 2 * config.batch_size):
        assert config._replace(batch_size=size) in measured
    assert ("processes", 8) in {one.pool for one in measured}


def test_a_disturbed_first_trial_is_no_reason_to_drop_a_neighbour() -> None:
    """What seemed to be bad once is measured again beside the leader."""
    machine = SimulatedMachine(5e-3, 1e-4, cores=16)
    usual, number = machine.measure, 0

    def disturbed(trial: Any) -> Measurement:
        nonlocal number
        found = usual(trial)
        if trial.config == Config("processes", 16, 16):
            number += 1
            if number == 1:
                return Measurement(found.throughput / 3, found.p50 * 3, found.p99 * 3)
        return found

    machine.measure = disturbed  # type: ignore[method-assign]
    search, _, _ = machine.search(SECONDS)
    assert number > 3
    assert regret(machine, search.choice()) <= 0.05


# Windows.


def test_no_window_without_a_gain() -> None:
    """Noise alone does not give a window."""
    for seed in range(20):
        machine = SimulatedMachine(5e-3, 1e-4, cores=2, noise=0.05, seed=seed)
        search, _, _ = machine.search(SECONDS)
        assert search.choice().config.queue_time == 0.0
        assert len(search.windows()) == 3


def test_a_window_that_gains() -> None:
    """A window that was better in each round by more than 5 % is recommended."""
    machine = SimulatedMachine(5e-3, 1e-4, cores=2, noise=0.01)
    usual = machine.measure

    def measure(trial: Any) -> Measurement:
        found = usual(trial)
        gain = 1.2 if trial.config.queue_time and trial.clients == 256 else 1.0
        return found._replace(throughput=found.throughput * gain)

    machine.measure = measure  # type: ignore[method-assign]
    search, _, _ = machine.search(SECONDS)
    assert search.choice().config.queue_time > 0


@pytest.mark.parametrize(("delay", "noise"), [(3.0, 0.01), (1.0, 0.5)])
def test_a_window_that_gains_and_is_not_recommended(delay: float, noise: float) -> None:
    """Since a lone call takes three times as long, or the gain is within the noise."""
    machine = SimulatedMachine(5e-3, 1e-4, cores=2, noise=noise)
    usual = machine.measure

    def measure(trial: Any) -> Measurement:
        found = usual(trial)
        if not trial.config.queue_time:
            return found
        if trial.clients < 256:
            return found._replace(p50=found.p50 * delay)
        return found._replace(throughput=found.throughput * 1.3)

    machine.measure = measure  # type: ignore[method-assign]
    search, _, _ = machine.search(SECONDS)
    assert len(search.windows()) == 3
    assert search.choice().config.queue_time == 0.0


def test_windows_are_measured_with_each_number_of_clients() -> None:
    """So that the report can say what a window costs a lone caller."""
    machine = SimulatedMachine(5e-3, 1e-4, cores=2)
    search, _, _ = machine.search(SECONDS)
    assert all(sorted(loads) == CLIENTS for loads in search.windows().values())


# Ties.


def test_the_shortest_calls_decide_between_equals() -> None:
    """Threads and processes sleep equally fast: threads have shorter calls."""
    machine = SimulatedMachine(1e-4, 0.0, cores=4, holds_gil=False, sleeps=True, loop_item=2e-5)
    search, _, _ = machine.search(SECONDS)
    assert search.choice().config.mode == "threads"


def test_longer_calls_are_not_recommended_for_fewer_workers() -> None:
    """The same machine, if calls of a single client took longer in threads."""
    machine = SimulatedMachine(1e-2, 0.0, cores=4, holds_gil=False, sleeps=True)
    usual = machine.measure

    def measure(trial: Any) -> Measurement:
        found = usual(trial)
        is_slower = trial.clients == 1 and trial.config.mode == "threads"
        return found._replace(p50=3 * found.p50) if is_slower else found

    assert machine.search(SECONDS)[0].choice().config.mode == "threads"
    machine.measure = measure  # type: ignore[method-assign]
    assert machine.search(SECONDS)[0].choice().config.mode == "processes"


def test_fewer_workers_do_as_well() -> None:
    """Of options that are equal the one with the fewest workers is recommended."""
    # Threads take turns, and processes are not tried.
    machine = SimulatedMachine(0.0, 1e-4, cores=16, start=25.0, loop_item=0.0)
    search, _, _ = machine.search(SECONDS)
    assert search.choice().config.pool == ("threads", 1)


# A target.


@pytest.mark.parametrize("target", [0.001, 0.02, 0.5])
def test_a_target_that_can_be_met(target: float) -> None:
    """The most clients that stay within it decide, and p99 is within it."""
    machine = SimulatedMachine(1e-4, 1e-4, cores=8, noise=0.02)
    search, _, _ = machine.search(SECONDS, target)
    choice = search.choice()
    assert choice.meets_target
    assert choice.loads[choice.clients].p99 <= target
    assert choice.clients == {0.001: 16, 0.02: 256, 0.5: 256}[target]


def test_a_target_that_was_predicted_to_be_met() -> None:
    """If no trial meets it, the next smaller number of clients decides."""
    machine = SimulatedMachine(1e-4, 1e-4, cores=8)
    usual = machine.measure

    def measure(trial: Any) -> Measurement:
        found = usual(trial)
        return found._replace(p99=1.0) if trial.clients == 256 else found

    machine.measure = measure  # type: ignore[method-assign]
    choice = machine.search(SECONDS, 0.02)[0].choice()
    assert (choice.clients, choice.meets_target) == (16, True)


def test_a_target_that_is_out_of_reach() -> None:
    """What comes nearest is recommended, for the fewest clients."""
    machine = SimulatedMachine(1e-2, 1e-4, cores=8, noise=0.02)
    search, _, _ = machine.search(SECONDS, 0.005)
    choice = search.choice()
    assert not choice.meets_target
    assert choice.clients == 1


# A machine that is busy.


def test_a_busy_machine_is_measured_longer() -> None:
    """Rounds are repeated while trials of the same differ, and the spread says so in the end."""
    quiet, busy = (SimulatedMachine(5e-3, 1e-4, cores=2, noise=noise) for noise in (0.01, 0.3))
    searches = [machine.search(SECONDS)[0] for machine in (quiet, busy)]
    assert searches[0].choice().spread < 0.05
    assert searches[1].choice().spread > 0.1
    rounds = [search.rounds for search in searches]
    assert rounds[0] <= 5 < 8 <= rounds[1]
