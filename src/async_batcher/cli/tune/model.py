"""From measurements to a recommendation: what a batch costs, and which options suit (pure).

::

    BatchCost: the function alone --> fit_cost_model --> CostModel: a + b n --> plan
                                                                                 |
    Recommendation <-- recommend <-- Measurement: throughput and latency <-------'

Rules:

- Only what was measured is recommended. The model chooses what is measured.
- The latency of an item is the longest that it takes while the batcher keeps up with its callers:
  the first item of a batch waits until the batch is full, at the throughput that was measured, and
  then until it has run, which is taken to be as long as 95 % of the batches took.
- Fewer workers and smaller batches are preferred to what is better by no more than a few percent.
"""

from __future__ import annotations

import math
from statistics import median
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

Mode: TypeAlias = Literal["inline", "threads", "processes"]
Verdict: TypeAlias = Literal[
    "processes pay", "no more than inline", "threads do as well", "one thread does as well",
    "too cheap", "no time for a trip", "out of reach",
]  # fmt: skip

MAX_BATCH_SIZE = 1024  # a batch's own share of a trip, some 0.2 ms, is then below that of its items
MAX_MODEL_ERROR = 0.25  # relative; a model that is off by more is not relied on
NEAR_THE_BEST = 0.95  # of the best throughput: what a smaller batch must reach
PAYS_PER_WORKER = 0.05  # more throughput for each worker that is added
# Times the throughput of one process: where a function does so much inline, trips cost the most.
TOO_CHEAP = 2.0
AS_WELL = 0.9  # of the throughput of processes: enough for threads, which need no pickling


class BatchCost(NamedTuple):
    """What the function takes for a batch, alone in one worker, without the trip.

    The mean over batches that hold the same items at every size; of several rounds the median.
    """

    batch_size: int
    seconds: float

    @property
    def per_item(self) -> float:
        return self.seconds / self.batch_size


class CostModel(NamedTuple):
    """A batch of n items costs ``fixed + per_item * n`` seconds; ``error`` is relative, at most."""

    fixed: float
    per_item: float
    error: float

    @property
    def holds(self) -> bool:
        return self.error <= MAX_MODEL_ERROR

    def seconds(self, batch_size: int) -> float:
        return self.fixed + self.per_item * batch_size


class Measurement(NamedTuple):
    """What was measured of one way to run batches.

    ``"inline"``: the function alone, called with one batch after the other. Otherwise a batch takes
    from when it leaves the queue until its results are there.
    """

    mode: Mode
    workers: int
    batch_size: int
    throughput: float  # items per second
    batch_seconds: float  # 95 % took no longer
    median_batch_seconds: float

    @property
    def config(self) -> tuple[Mode, int]:
        return self.mode, self.workers

    @property
    def fill_seconds(self) -> float:
        """Until a batch is full, when items arrive as fast as they are processed."""
        return self.batch_size / self.throughput

    def figures(self) -> dict[str, Any]:
        """All numbers, with their units in their names."""
        return {
            "mode": self.mode,
            "workers": self.workers,
            "batch_size": self.batch_size,
            "items_per_second": self.throughput,
            "latency_seconds": self.latency,
            "batch_seconds_p50": self.median_batch_seconds,
            "batch_seconds_p95": self.batch_seconds,
        }

    @property
    def cost(self) -> BatchCost:
        return BatchCost(self.batch_size, self.fill_seconds)

    @property
    def latency(self) -> float:
        """Seconds from the call for the first item of a batch to its result."""
        return self.fill_seconds + self.batch_seconds


class BatchSample(NamedTuple):
    """A batch of a trial: when it ended, on any clock, its items, and how long it took."""

    at: float
    size: int
    seconds: float


class Recommendation(NamedTuple):
    """The options that suit the target.

    ``point`` is what was measured with these options, but for ``max_queue_time``. If its latency
    does not meet the target, it comes nearest.
    """

    verdict: Verdict
    point: Measurement
    max_queue_time: float
    meets_target: bool

    @property
    def executor(self) -> Literal["thread", "process"] | None:
        """The option. None: the event loop's own thread for batches."""
        if self.point.mode == "processes":
            return "process"
        return "thread" if self.point.workers > 1 else None


def config_label(mode: Mode, workers: int) -> str:
    if mode == "inline":
        return mode
    singular = {"threads": "thread", "processes": "process"}[mode]
    return f"{workers:,} {mode if workers != 1 else singular}"


def fit_cost_model(costs: Sequence[BatchCost]) -> CostModel:
    """Fit by least squares of the relative errors, with no coefficient below 0.

    Relative, since a batch of 1024 costs a thousand times what a batch of 1 does, and would count a
    million times as much. This minimises the sum of (fixed * u + per_item * v - 1) ** 2, where
    u = 1 / cost and v = n / cost.
    """
    if not costs:
        msg = "there is nothing to fit"
        raise ValueError(msg)
    pairs = [(1 / cost.seconds, cost.batch_size / cost.seconds) for cost in costs]
    su, sv = (sum(column) for column in zip(*pairs, strict=True))
    uu, uv, vv = (
        sum(u * u for u, _ in pairs),
        sum(u * v for u, v in pairs),
        sum(v * v for _, v in pairs),
    )
    choices = [(0.0, sv / vv), (su / uu, 0.0)]  # the best ones with either coefficient 0
    determinant = uu * vv - uv * uv
    if determinant > 1e-12 * uu * vv:  # several sizes
        both = ((vv * su - uv * sv) / determinant, (uu * sv - uv * su) / determinant)
        choices = [both] if min(both) >= 0 else choices

    def errors(choice: tuple[float, float]) -> list[float]:
        return [choice[0] * u + choice[1] * v - 1 for u, v in pairs]

    best = min(choices, key=lambda choice: sum(error * error for error in errors(choice)))
    return CostModel(*best, error=max(map(abs, errors(best))))


def new_measurement(
    mode: Mode, workers: int, size: int, throughput: float, seconds: Iterable[float]
) -> Measurement:
    """Make a measurement of a throughput, and of the ``seconds`` that each batch took."""
    times = sorted(seconds)
    p50, p95 = (times[-(-len(times) * percent // 100) - 1] for percent in (50, 95))
    return Measurement(mode, workers, size, throughput, p95, p50)


def measure_trial(
    mode: Mode, workers: int, size: int, began: float, until: float, batches: Sequence[BatchSample]
) -> Measurement:
    """Evaluate a trial, in which all workers were kept busy from ``began`` to ``until``.

    What a batch that ended later had done by then counts in proportion to its time, so that long
    batches need no longer trial.
    """
    until = max(until, min(batch.at for batch in batches))
    done = sum(batch.size * _share_before(batch, until) for batch in batches)
    times = (batch.seconds for batch in batches)
    return new_measurement(mode, workers, size, done / (until - began), times)


def _share_before(batch: BatchSample, until: float) -> float:
    if batch.at <= until:
        return 1.0
    return max(0.0, 1 - (batch.at - until) / batch.seconds) if batch.seconds > 0 else 0.0


def scales(points: Iterable[Measurement], mode: Mode, workers: int) -> bool:
    """Tell whether so many workers do more than fewer; if not, still more need not be tried."""
    same = [point for point in points if point.mode == mode]
    fewer = [point.throughput for point in same if point.workers < workers]
    most = max(point.throughput for point in same if point.workers == workers)
    return not fewer or most >= (1 + PAYS_PER_WORKER) * max(fewer)


def median_trials(points: Iterable[Measurement]) -> list[Measurement]:
    """Of several trials of the same choose the one in the middle, by throughput."""
    return [same[len(same) // 2] for same in _trials_of_the_same(points)]


def spread(points: Iterable[Measurement]) -> float:
    """Tell by how much trials of the same typically differ, relative to the best of them."""
    trials = _trials_of_the_same(points)
    return median(1 - same[0].throughput / same[-1].throughput for same in trials)


def _trials_of_the_same(points: Iterable[Measurement]) -> list[list[Measurement]]:
    """Group trials, each group from the lowest throughput to the highest."""
    trials: dict[tuple[Mode, int, int], list[Measurement]] = {}
    for point in points:
        trials.setdefault((*point.config, point.batch_size), []).append(point)
    return [sorted(same, key=lambda point: point.throughput) for same in trials.values()]


def recommend(points: Sequence[Measurement], target_latency: float | None = None) -> Recommendation:
    """Choose options for a target: the best throughput, within the latency if there is one.

    Args:
        points: What was measured, of every mode with one worker at least.
        target_latency: Seconds that an item may take. None: throughput is the target.
    """
    inline, threads, processes = (
        [point for point in points if point.mode == mode]
        for mode in ("inline", "threads", "processes")
    )
    by_itself = _best(inline, target_latency) or _fastest(inline)
    in_threads, in_processes = _best(threads, target_latency), _best(processes, target_latency)
    one_process = _fastest([point for point in processes if point.workers == 1])
    is_more_inline = by_itself.throughput >= (in_processes or _fastest(processes)).throughput
    verdict: Verdict
    if is_more_inline and by_itself.throughput >= TOO_CHEAP * one_process.throughput:
        verdict = "too cheap"
        one_thread = [point for point in threads if point.workers == 1]
        chosen = _best(one_thread, target_latency) or _quickest(one_thread)
    elif in_processes is None:
        verdict = "out of reach" if in_threads is None else "no time for a trip"
        chosen = in_threads or _quickest(threads + processes)
    elif in_threads is None or in_threads.throughput < AS_WELL * in_processes.throughput:
        verdict = "no more than inline" if is_more_inline else "processes pay"
        chosen = in_processes
    else:
        verdict = "threads do as well" if in_threads.workers > 1 else "one thread does as well"
        chosen = in_threads
    meets_target = target_latency is None or chosen.latency <= target_latency
    return Recommendation(verdict, chosen, _queue_time(chosen, target_latency), meets_target)


def _best(points: Sequence[Measurement], target_latency: float | None) -> Measurement | None:
    """Choose the fewest workers that pay, and the smallest batch that is near their best."""
    within = [p for p in points if target_latency is None or p.latency <= target_latency]
    if not within:
        return None
    most: dict[int, float] = {}
    for p in within:
        most[p.workers] = max(p.throughput, most.get(p.workers, 0.0))
    workers = min(
        few
        for few in most
        if all(most[n] < most[few] * (1 + PAYS_PER_WORKER * (n - few)) for n in most if n > few)
    )
    least = NEAR_THE_BEST * most[workers]
    near = [p for p in within if p.workers == workers and p.throughput >= least]
    return min(near, key=lambda point: point.batch_size)


def _fastest(points: Sequence[Measurement]) -> Measurement:
    return max(points, key=lambda point: point.throughput)


def _quickest(points: Sequence[Measurement]) -> Measurement:
    return min(points, key=lambda point: point.latency)


def _queue_time(point: Measurement, target_latency: float | None) -> float:
    """Choose how long an item may wait for its batch to fill.

    About as long as a batch runs: within that time it fills if the batcher has much to do, and
    while all workers are busy items collect anyway. With a target no longer than that leaves.
    """
    if point.batch_size == 1:
        return 0.0
    seconds = max(point.batch_seconds, point.fill_seconds)
    if target_latency is not None:
        seconds = min(seconds, target_latency - point.batch_seconds)
    if seconds < 1e-6:
        return 0.0
    digits = 1 - math.floor(math.log10(seconds))  # rounded down to two that count
    return math.floor(seconds * 10.0**digits) / 10.0**digits
