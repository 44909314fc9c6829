"""The trials of a search: what they have shown so far, and how candidates compare (pure)."""

from __future__ import annotations

from collections import defaultdict
from statistics import median
from typing import TYPE_CHECKING

from async_batcher.cli.tune.model import predict_throughput, spread, typical

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from async_batcher._batching.records.batch_cost import BatchCost
    from async_batcher.cli.tune.model import Config, Measurement


class TrialRecords:
    """All trials, in time order.

    Args:
        costs: Of the function alone.
        deciding: The number of clients that decides.
        target_latency: Seconds for the 99th percentile with that number of clients. None: only
            throughput counts.

    Attributes:
        rounds: By configuration and number of the round; see `Search`.
    """

    def __init__(
        self, costs: Sequence[BatchCost], deciding: int, target_latency: float | None
    ) -> None:
        self.deciding = deciding
        self.rounds: dict[Config, dict[int, Measurement]] = defaultdict(dict)
        self._trials: dict[tuple[Config, int], list[Measurement]] = defaultdict(list)
        self._costs = costs
        self._target = target_latency

    def __len__(self) -> int:
        return sum(map(len, self._trials.values()))

    def add(self, config: Config, clients: int, measurement: Measurement) -> None:
        self._trials[config, clients].append(measurement)

    def of(self, config: Config, clients: int | None = None) -> list[Measurement]:
        """Return the trials of a configuration; by default with the deciding number of clients."""
        return self._trials.get((config, clients or self.deciding), [])

    def figures(self, config: Config, clients: int | None = None) -> Measurement:
        return typical(self.of(config, clients))

    def throughput(self, config: Config) -> float:
        return self.figures(config).throughput

    def expected_latency(self, config: Config, clients: int) -> float:
        """Return the seconds of a call, as measured or else as predicted."""
        if trials := self.of(config, clients):
            return clients / median(trial.throughput for trial in trials)
        return config.queue_time + clients / predict_throughput(self._costs, config, clients)

    def configs(self) -> list[Config]:
        """List what was tried with the deciding number of clients."""
        return [config for config, clients in self._trials if clients == self.deciding]

    def loads(self, config: Config, clients: Iterable[int]) -> dict[int, Measurement]:
        """Return the figures of a configuration by number of clients, as far as it was tried."""
        return {count: self.figures(config, count) for count in clients if self.of(config, count)}

    def meets_target(self, figures: Measurement) -> bool:
        return self._target is None or figures.p99 <= self._target

    def usable(self, configs: Iterable[Config]) -> list[Config]:
        """Return those that meet the target; if none does, the one that comes nearest."""
        figures = {config: self.figures(config) for config in configs}
        within = [config for config, found in figures.items() if self.meets_target(found)]
        return within or [min(figures, key=lambda config: figures[config].p99)]

    def ratio(self, config: Config, other: Config) -> float:
        """Compare the throughput of the same rounds, so that noise affects both."""
        mine, its = self.rounds.get(config, {}), self.rounds.get(other, {})
        if common := mine.keys() & its.keys():
            return median(mine[n].throughput / its[n].throughput for n in common)
        return self.throughput(config) / self.throughput(other)

    def leader(self) -> Config:
        """Return the best of the last round, by all its rounds."""
        last = max(max(rounds) for rounds in self.rounds.values() if rounds)
        current = self.usable(config for config, rounds in self.rounds.items() if last in rounds)
        leader = max(current, key=self.throughput)
        # Candidates that joined later have had other rounds.
        return max(current, key=lambda config: self.ratio(config, leader))

    def spread(self) -> float:
        """Tell how much successive rounds of the leader differ; see `model.spread`."""
        rounds = self.rounds[self.leader()]
        return spread([rounds[number].throughput for number in sorted(rounds)])
