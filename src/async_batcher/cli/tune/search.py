"""The search for the best options: which trial comes next, and what is recommended (pure).

::

    predictions --> look: the best size of each pool, and its neighbours, once
                      |
                    rounds: all that may be the best, in turn; those that fall behind are dropped
                      |     the neighbours of the leader (half, double) join until they have fallen
                      |     behind too
                    loads: each number of clients; the choice among what is near the best
                      |
                    windows: max_queue_time 0 against others, in turn

`Search.run` is a generator: it yields a `Trial`, and gets its `Measurement` and the seconds that
are left. It has no clock, so tests drive it with a simulated machine.

Rules:

- Throughput with the deciding number of clients comes first. Of what is near the best, the one
  whose calls are shortest with the fewest clients is chosen, and of those the simplest.
- Candidates are compared by their ratio in the same rounds, so that noise affects both.
- While trials of the same differ much, rounds are repeated, as long as there is time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

from async_batcher.cli.tune.model import Choice, Config, Measurement, Trial
from async_batcher.cli.tune.plan import CYCLES_PER_TRIAL, first_config, sizes_to_try
from async_batcher.cli.tune.trials import TrialRecords
from async_batcher.cli.tune.windows import NEAR_THE_BEST, WINDOW_ROUNDS, best_window, window_seconds

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    from async_batcher._batching.records.batch_cost import BatchCost
    from async_batcher.cli.tune.model import Mode
    from async_batcher.cli.tune.plan import Plan

Trials: TypeAlias = "Generator[Trial, tuple[Measurement, float], None]"

BUSY_SPREAD = 0.1  # of successive trials of the same: too much to compare candidates
_QUIET_SPREAD = 0.04  # the same: few rounds suffice

# Shares of the time that must be left after each stage.
_LEFT_AFTER_LOOK = 0.6
_LEFT_AFTER_ROUNDS = 0.3

_TRIALS_PER_SEARCH = 100  # so that a trial takes that part of the time, or longer
_SHORTEST_TRIAL = 0.1  # seconds: a shorter one says more of how it began
_LONGEST_TRIAL = 1 / 8  # of the time

_HOPEFUL = 0.5  # of the best throughput, after one trial of the predicted size
_IN_ROUNDS = 0.8  # the same, after one trial of each size
_KEPT = (0.6, 0.8, 0.85, 0.9, 0.93)  # what a candidate needs after so many rounds
_MOST_KEPT = (8, 8, 6, 5, 4)
# Rounds of each neighbour of the leader, and of one that seems to be much worse: a single round may
# be disturbed.
_NEIGHBOUR_ROUNDS, _WORSE_NEIGHBOUR_ROUNDS = 3, 2
_LEAST_COMPARED = 2
_MIN_ROUNDS, _MAX_ROUNDS = 5, 15
_LOAD_ROUNDS = 3
_GAIN_ROUNDS = 7  # of windows, if one seems to be better
_FINALISTS = 3  # pools
_SAME_LATENCY = 1.1  # times the shortest p50
_SAME_THROUGHPUT = 0.98  # of the best: then the simplest one is chosen


class Search:
    """A search. ``costs`` are of the function alone; ``clients`` are the numbers to report."""

    def __init__(
        self,
        costs: Sequence[BatchCost],
        plan: Plan,
        clients: Sequence[int],
        max_workers: int,
        target_latency: float | None = None,
    ) -> None:
        self._records = TrialRecords(costs, plan.clients, target_latency)
        self._costs = costs
        self._plan = plan
        self._clients = sorted(clients)
        self._max_workers = max_workers
        self._target = target_latency
        self._seconds = self._left = 0.0
        # Decided once: later trials would change what they are compared by.
        self._finalists: list[Config] = []
        self._chosen: Config | None = None  # of the finalists; the window is decided at last
        self._windows: dict[Config, list[Measurement]] = {}  # by round, in turn

    def run(self, seconds: float) -> Trials:
        """Yield trials that take ``seconds`` in all; see the head of this module."""
        self._seconds = self._left = seconds
        yield from self._look()
        while self._steps_down():
            yield from self._look()
        yield from self._run_rounds()
        yield from self._measure_loads()
        yield from self._measure_windows()

    @property
    def rounds(self) -> int:
        """How many rounds there were."""
        return len(self._records.rounds[self._records.leader()])

    def choice(self) -> Choice:
        records = self._records
        config = self._best_window()
        loads = records.loads(config, self._clients)
        meets_target = records.meets_target(loads[records.deciding])
        return Choice(config, records.deciding, meets_target, loads, records.spread())

    def points(self) -> dict[Config, Measurement]:
        """Return what was measured with the deciding number of clients."""
        return {config: self._records.figures(config) for config in sorted(self._records.configs())}

    def ratios(self) -> dict[Config, float]:
        """Return the throughput of each, relative to what is recommended, of the same rounds."""
        chosen = self.choice().config._replace(queue_time=0.0)
        return {config: self._records.ratio(config, chosen) for config in self._records.configs()}

    def windows(self) -> dict[Config, dict[int, Measurement]]:
        """Return what was measured of each ``max_queue_time``, by number of clients."""
        compared = [*self._windows] or [self.choice().config]
        return {one: self._records.loads(one, self._clients) for one in compared}

    # --- trials

    def _measure(self, config: Config, clients: int | None = None, *, scale: float = 1.0) -> Trials:
        clients = clients or self._records.deciding
        trial = Trial(config, clients, self._length(config, clients, scale))
        measurement, self._left = yield trial
        self._records.add(config, clients, measurement)

    def _length(self, config: Config, clients: int, scale: float = 1.0) -> float:
        cycles = CYCLES_PER_TRIAL * self._records.expected_latency(config, clients)
        usual = scale * max(self._seconds / _TRIALS_PER_SEARCH, _SHORTEST_TRIAL)
        return min(max(usual, cycles), self._seconds * _LONGEST_TRIAL)

    def _takes(self, config: Config, clients: int | None = None) -> float:
        clients = clients or self._records.deciding
        return self._length(config, clients) + self._records.expected_latency(config, clients)

    # --- look

    def _look(self) -> Trials:
        """Try each pool with the size of the best prediction, then climb from there."""
        clients = self._records.deciding
        first = [first_config(self._costs, *pool, clients) for pool in self._plan.pools]
        for config in sorted(first, key=lambda c: self._records.expected_latency(c, clients)):
            yield from self._measure(config)
        for config in sorted(first, key=self._records.throughput, reverse=True):
            best = max(map(self._records.throughput, self._records.configs()))
            if self._records.throughput(config) >= _HOPEFUL * best:
                yield from self._climb(config.pool)

    def _climb(self, pool: tuple[Mode, int]) -> Trials:
        """Try half and double the best size of a pool, until neither is better."""
        while True:
            measured = [config for config in self._records.configs() if config.pool == pool]
            best = max(measured, key=self._records.throughput)
            new = [c for c in self._sizes_beside(best) if c not in measured]
            if not new:
                return
            for config in new:
                if self._left - self._takes(config) < _LEFT_AFTER_LOOK * self._seconds:
                    return
                yield from self._measure(config)

    def _steps_down(self) -> bool:
        """Let the next smaller number of clients decide if no candidate meets the target."""
        smaller = [count for count in self._clients if count < self._records.deciding]
        if self._target is None or not smaller or self._left < _LEFT_AFTER_LOOK * self._seconds:
            return False
        if any(
            self._records.meets_target(self._records.figures(c)) for c in self._records.configs()
        ):
            return False
        self._records.deciding = max(smaller)
        return True

    # --- rounds

    def _run_rounds(self) -> Trials:
        for number in range(_MAX_ROUNDS):
            candidates = self._affordable(self._candidates(number))
            if number and len(candidates) < _LEAST_COMPARED:
                return
            # Each is after another one in every second round.
            for config in candidates if number % 2 == 0 else reversed(candidates):
                yield from self._measure(config)
                self._records.rounds[config][number] = self._records.of(config)[-1]
            if number + 1 >= _MIN_ROUNDS and self._records.spread() <= _QUIET_SPREAD:
                return

    def _affordable(self, candidates: list[Config]) -> list[Config]:
        """Return the first ones, for which there is time; at least one."""
        left = self._left - _LEFT_AFTER_ROUNDS * self._seconds
        for count, config in enumerate(candidates):
            left -= self._takes(config)
            if left < 0:
                return candidates[: max(1, count)]
        return candidates

    def _candidates(self, number: int) -> list[Config]:
        """List what may be the best after so many rounds, and the neighbours of the leader."""
        if not number:
            ranked = sorted(
                self._records.usable(self._records.configs()),
                key=self._records.throughput,
                reverse=True,
            )
            least = _IN_ROUNDS * self._records.throughput(ranked[0])
            kept = [config for config in ranked if self._records.throughput(config) >= least]
            return self._with_neighbours(kept[: _MOST_KEPT[0]])
        step = min(number, len(_KEPT)) - 1
        leader = self._records.leader()
        usable = self._records.usable(self._records.rounds)
        kept = [
            config
            for config in sorted(usable, key=lambda c: self._records.ratio(c, leader), reverse=True)
            if number - 1 in self._records.rounds[config]
            and self._records.ratio(config, leader) >= _KEPT[step]
        ]
        return self._with_neighbours(list(dict.fromkeys([leader, *kept[: _MOST_KEPT[step]]])))

    def _with_neighbours(self, kept: list[Config]) -> list[Config]:
        leader = kept[0]
        beside = [*self._sizes_beside(leader), *self._workers_beside(leader)]
        for config in beside:
            rounds = self._records.rounds.get(config, {})
            is_worse = rounds and self._records.ratio(config, leader) < _KEPT[1]
            enough = _WORSE_NEIGHBOUR_ROUNDS if is_worse else _NEIGHBOUR_ROUNDS
            if config not in kept and len(rounds) < enough:
                kept.append(config)
        return kept

    def _sizes_beside(self, config: Config) -> list[Config]:
        sizes = sizes_to_try(config.workers, self._records.deciding)
        index = sizes.index(config.batch_size)
        beside = sizes[max(0, index - 1) : index] + sizes[index + 1 : index + 2]
        return [config._replace(batch_size=size) for size in beside]

    def _workers_beside(self, config: Config) -> list[Config]:
        """Half and double the workers, each with the size of the best prediction."""
        counts = {max(1, config.workers // 2), min(2 * config.workers, self._max_workers)}
        known = set(self._plan.pools)
        return [
            first_config(self._costs, config.mode, count, self._records.deciding)
            for count in sorted(counts - {config.workers})
            if config.mode == "threads"
            or self._plan.may_start_more
            or (config.mode, count) in known
        ]

    # --- loads

    def _measure_loads(self) -> Trials:
        """Measure what is near the best with the fewest clients, and then the best with each."""
        finalists = self._finalists = self._list_finalists()
        few = self._clients[0]
        for number in range(_LOAD_ROUNDS):
            for config in finalists if number % 2 == 0 else reversed(finalists):
                if number == 0 or self._left > self._takes(config, few):
                    yield from self._measure(config, few, scale=0.5)
        config = self._chosen = self._best_of_finalists()
        for clients in reversed(self._clients):
            has_time = self._left > self._takes(config, clients)
            if has_time and not self._records.of(config, clients):
                yield from self._measure(config, clients)

    def _list_finalists(self) -> list[Config]:
        """List the best of each pool that is near the best of all."""
        leader = self._records.leader()
        usable = self._records.usable(self._records.rounds)
        best = max(usable, key=lambda config: self._records.ratio(config, leader))
        found: dict[tuple[Mode, int], Config] = {}
        for config in sorted(
            usable, key=lambda config: self._records.ratio(config, best), reverse=True
        ):
            if self._records.ratio(config, best) >= NEAR_THE_BEST:
                found.setdefault(config.pool, config)
        return list(found.values())[:_FINALISTS]

    def _best_of_finalists(self) -> Config:
        finalists, few = self._finalists, self._clients[0]
        latency = {
            config: self._records.figures(config, few).p50
            for config in finalists
            if self._records.of(config, few)
        }
        if not latency:
            return finalists[0]
        shortest = min(latency.values())
        quick = [c for c in finalists if latency.get(c, 0.0) <= _SAME_LATENCY * shortest]
        same = [c for c in quick if self._records.ratio(c, quick[0]) >= _SAME_THROUGHPUT]
        return min(same, key=lambda config: (config.workers, config.mode == "processes"))

    # --- windows

    def _measure_windows(self) -> Trials:
        """Compare windows in turn: with the fewest clients once, then with the deciding number."""
        config = self._chosen
        if config is None or config.batch_size == 1:
            return
        others = [
            config._replace(queue_time=seconds) for seconds in window_seconds(self._records, config)
        ]
        same = [config, *others]
        self._windows = {one: [] for one in same}
        yield from self._measure_each(same, self._clients[0])
        for number in range(_GAIN_ROUNDS):
            if number >= WINDOW_ROUNDS and self._best_window() == config:
                break
            if self._left < sum(map(self._takes, same)):
                return
            for one in same if number % 2 == 0 else reversed(same):
                yield from self._measure(one)
                self._windows[one].append(self._records.of(one)[-1])
        for clients in reversed(self._clients):
            yield from self._measure_each(same, clients)

    def _measure_each(self, configs: Sequence[Config], clients: int) -> Trials:
        for one in configs:
            is_new = clients != self._records.deciding and not self._records.of(one, clients)
            if is_new and self._left > self._takes(one, clients):
                yield from self._measure(one, clients, scale=0.5)

    def _best_window(self) -> Config:
        assert self._chosen is not None  # noqa: S101 - `run` has ended
        if self._records.spread() > BUSY_SPREAD:  # what seems to be a gain is mostly noise
            return self._chosen
        return best_window(self._records, self._windows, self._chosen, self._clients[0])
