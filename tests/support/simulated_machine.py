"""A machine on which `tune` searches without measuring: clients, a queue, workers, an event loop."""

from __future__ import annotations

import heapq
import math
import random
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from async_batcher._batching.records.batch_cost import BatchCost
from async_batcher.cli.tune.model import Config, Measurement
from async_batcher.cli.tune.plan import COSTS_SHARE, Plan, make_plan, next_size
from async_batcher.cli.tune.search import Search

if TYPE_CHECKING:
    from async_batcher.cli.tune.model import Mode, Trial

CLIENTS = [1, 4, 16, 256]
_CYCLES = 8  # calls of each client
_MAX_BATCHES = 300  # in one simulation: it repeats itself by then

_EXACT: dict[tuple[object, ...], Measurement] = {}  # machines that differ by noise are the same


@dataclass
class SimulatedMachine:
    """Runs a function whose batches of n items take ``fixed + per_item * n`` seconds.

    Args:
        fixed: Seconds for each batch.
        per_item: Seconds for each item.
        cores: Cores, and workers at most.
        holds_gil: Whether threads take turns.
        sleeps: Whether a batch needs no core.
        start: Seconds until a worker process has started.
        noise: Standard deviation of what is measured, relative.
        disturbed: The share of trials that another program slows down, by up to half.
        seed: Of the noise.
        loop_item: Seconds of the event loop for each item.
    """

    fixed: float
    per_item: float
    cores: int = 16
    holds_gil: bool = True
    sleeps: bool = False
    start: float = 0.1
    noise: float = 0.0
    disturbed: float = 0.0
    seed: int = 0
    loop_item: float = 8e-6
    started: list[tuple[Mode, int]] = field(default_factory=list)

    def __post_init__(self) -> None:  # noqa: D105
        self._random = random.Random(self.seed)  # noqa: S311 - no secret

    def costs(self, seconds: float) -> tuple[list[BatchCost], float]:
        """Return the costs of the function alone, and the seconds that this took."""
        costs: list[BatchCost] = []
        took, size = 0.0, 1
        while size:
            cost = self.fixed + self.per_item * size
            costs.append(BatchCost(size, cost * self._factor()))
            took += 5 * cost
            size = next_size(costs, seconds / 6) or 0
        return costs, min(took, seconds)

    def search(
        self, seconds: float = 60.0, target: float | None = None, clients: list[int] = CLIENTS
    ) -> tuple[Search, Plan, float]:
        """Search for the best options, and return the search, its plan, and the seconds left."""
        costs, took = self.costs(COSTS_SHARE * seconds)
        left = seconds - self.start - took
        plan = make_plan(costs, self.cores, clients, self.start, left, target)
        for pool in plan.pools:
            left -= self._start(pool)
        search = Search(costs, plan, clients, self.cores, target)
        trials = search.run(left)
        trial = next(trials, None)
        while trial is not None:
            left -= self._start(trial.config.pool)
            exact = self.exact(trial.config, trial.clients)
            left -= trial.seconds + trial.clients / exact.throughput
            try:
                trial = trials.send((self.measure(trial), left))
            except StopIteration:
                trial = None
        return search, plan, left

    def measure(self, trial: Trial) -> Measurement:
        """Return what a trial shows, with noise."""
        exact, factor = self.exact(trial.config, trial.clients), self._factor()
        return Measurement(exact.throughput / factor, exact.p50 * factor, exact.p99 * factor)

    def exact(self, config: Config, clients: int) -> Measurement:
        """Return what a long trial without noise shows."""
        key = (*self._truth(), config, clients)
        if key not in _EXACT:
            _EXACT[key] = _simulate(self, config, clients)
        return _EXACT[key]

    def best(self, clients: int) -> float:
        """Return the best throughput of an exhaustive grid."""
        counts = sorted({1, 2, 4, 8, self.cores})
        return max(
            self.exact(Config(mode, count, size, wait), clients).throughput
            for mode in ("threads", "processes")
            for count in counts
            if count <= self.cores
            for size in {*(1 << n for n in range(9)), clients, -(-clients // count)}
            for wait in (0.0, 0.002)
        )

    def duration(self, config: Config, size: int, running: int) -> float:
        """Return the seconds of a batch, beside others that run."""
        seconds = self.fixed + self.per_item * size
        if config.mode == "threads" and self.holds_gil:
            seconds *= running
        elif not self.sleeps:
            seconds *= max(1.0, (running + 0.2) / self.cores)
        return seconds + (5e-5 if config.mode == "threads" else 2e-4 + 3e-6 * size)

    def _truth(self) -> tuple[float, ...]:
        """Return all that a long trial without noise depends on."""
        function = (self.fixed, self.per_item, self.holds_gil, self.sleeps)
        return (*function, self.cores, self.loop_item)

    def _factor(self) -> float:
        factor = math.exp(self._random.gauss(0.0, self.noise))
        if self._random.random() < self.disturbed:
            factor *= self._random.uniform(1.0, 2.0)
        return factor

    def _start(self, pool: tuple[Mode, int]) -> float:
        if pool[0] == "threads" or pool in self.started:
            return 0.0
        self.started.append(pool)
        return self.start


def _simulate(machine: SimulatedMachine, config: Config, clients: int) -> Measurement:
    """Simulate clients that call again as soon as the event loop has their results."""
    queue = deque([(0.0, clients)])  # when they called, how many
    running: list[tuple[float, int, list[tuple[float, int]]]] = []  # a heap, by end
    waits: list[tuple[float, int]] = []
    now = loop_free = 0.0
    number = done = 0
    while number < _MAX_BATCHES and done < _CYCLES * clients:
        # Dispatch what is due.
        queued = sum(count for _, count in queue)
        while queue and len(running) < config.workers:
            is_due = queued >= config.batch_size or now >= queue[0][0] + config.queue_time - 1e-12
            if not is_due:
                break
            taken = _take(queue, config.batch_size)
            size = sum(count for _, count in taken)
            queued -= size
            number += 1
            end = now + machine.duration(config, size, len(running) + 1)
            heapq.heappush(running, (end, number, taken))
        # Go on to the next event.
        timer = math.inf
        if queue and len(running) < config.workers:
            timer = queue[0][0] + config.queue_time
        if running and running[0][0] <= timer:
            end, _, taken = heapq.heappop(running)
            size = sum(count for _, count in taken)
            loop_free = now = max(now, end, loop_free) + machine.loop_item * size
            waits += [(now - called, count) for called, count in taken]
            queue.append((now, size))
            done += size
        else:
            now = max(now, timer)
    ranked = sorted(waits)
    total = sum(count for _, count in ranked)

    def quantile(share: float) -> float:
        seen = 0
        for wait, count in ranked:
            seen += count
            if seen >= share * total:
                return wait
        raise AssertionError

    return Measurement(done / now, quantile(0.5), quantile(0.99))


def _take(queue: deque[tuple[float, int]], size: int) -> list[tuple[float, int]]:
    taken: list[tuple[float, int]] = []
    while queue and size:
        called, count = queue.popleft()
        some = min(count, size)
        taken.append((called, some))
        size -= some
        if some < count:
            queue.appendleft((called, count - some))
    return taken
