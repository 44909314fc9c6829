"""From measurements to advice: what a batch costs, and which options suit a target (pure).

::

    Cost: the function alone, batch by batch --> fit --> Line: a + b n --> sizes_to_try
                                                                               |
    Advice <-- advise <-- Point: throughput and latency of a batcher <---------'

Rules:

- Advice names only what was measured. The line chooses what is measured, and says in words what a batch costs.
- The latency of an item is the longest that it takes while the batcher keeps up with its callers: the first item of a batch
  waits until the batch is full, at the throughput that was measured, and then until it has run, which is taken to be as long
  as 95 % of the batches took.
- Fewer workers and smaller batches are preferred to what is better by no more than a few percent.
"""

from __future__ import annotations

import math
from statistics import median
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

Mode: TypeAlias = Literal["inline", "threads", "processes"]
Verdict: TypeAlias = Literal[
    "processes pay",
    "no more than inline",
    "threads do as well",
    "one thread does as well",
    "too cheap",
    "no time for a trip",
    "out of reach",
]

MAX_BATCH_SIZE = 1024  # a batch's own share of a trip to a worker, some 0.2 ms, is then below the cost of handing over its items

HOLDS_WITHIN = 0.25  # of what was measured; a line that is off by more is not relied on
NEAR_THE_BEST = 0.95  # of the best throughput: what a smaller batch must reach
PAYS_PER_WORKER = 0.05  # more throughput for each worker that is added
TOO_CHEAP = 2.0  # times the throughput of one process: where a function does so much inline, most of the time goes on the way
AS_WELL = 0.9  # of the throughput of processes: what threads must reach, since nothing has to cross to them

_STILL_FALLS = 0.97  # cost per item after two doublings: by less than this it no longer falls
_LONG_BATCH = 0.005  # seconds; of such a batch a trip to a worker is some percent
_MOST_SIZES = 6  # to be tried with each number of workers: more would leave too little time for each
_MARGIN = 0.85  # of a target latency, for what the line does not know: the trip, and that batches differ
_ALIKE = 1.2  # of two sizes closer than this, one is enough


class Cost(NamedTuple):
    """What the function takes for a batch, alone in one worker; the way there is not counted.

    Attributes:
        batch_size: Items in the batch.
        seconds: The mean over batches that hold the same items at every size; of several such rounds the median.
    """

    batch_size: int
    seconds: float

    @property
    def per_item(self) -> float:
        """Seconds for each item."""
        return self.seconds / self.batch_size


class Line(NamedTuple):
    """A batch of n items costs ``fixed + per_item * n`` seconds.

    Attributes:
        fixed: Seconds for each batch.
        per_item: Seconds for each item.
        error: How far it is off at most, relative to what was measured.
    """

    fixed: float
    per_item: float
    error: float

    @property
    def holds(self) -> bool:
        """Whether it may be relied on."""
        return self.error <= HOLDS_WITHIN

    def seconds(self, batch_size: int) -> float:
        """What a batch costs."""
        return self.fixed + self.per_item * batch_size


class Point(NamedTuple):
    """What was measured of one way to run batches.

    Attributes:
        mode: ``"inline"``: the function called with one batch after the other, without a batcher.
        workers: Threads, or processes.
        batch_size: Items in a batch.
        throughput: Items a second.
        batch_seconds: From when a batch leaves the queue until its answers are there: 95 % of the batches took no longer.
        median_batch_seconds: Half of the batches took no longer.
    """

    mode: Mode
    workers: int
    batch_size: int
    throughput: float
    batch_seconds: float
    median_batch_seconds: float

    @property
    def fill_seconds(self) -> float:
        """Until a batch is full, when items arrive as fast as they are worked off."""
        return self.batch_size / self.throughput

    @property
    def latency(self) -> float:
        """Seconds from the call for the first item of a batch to its answer; see the head of this module."""
        return self.fill_seconds + self.batch_seconds


class Ended(NamedTuple):
    """A batch that was run in a trial.

    Attributes:
        at: When it had ended, in seconds of any clock.
        size: Its items.
        seconds: How long it took.
    """

    at: float
    size: int
    seconds: float


class Advice(NamedTuple):
    """The options that suit the target.

    Attributes:
        verdict: Whether processes pay, and if not, why not: they do more than threads, but no more than the function inline;
            threads do as well; the function is so cheap that nothing pays; batches in processes take longer than the target; or
            all do (then ``point`` comes nearest to it).
        point: What was measured with these options, but for ``max_queue_time``.
        max_queue_time: Seconds.
        meets_target: Whether the latency of ``point`` is within the target, if there is one.
    """

    verdict: Verdict
    point: Point
    max_queue_time: float
    meets_target: bool

    @property
    def executor(self) -> Literal["thread", "process"] | None:
        """The option; None: the event loop's own thread for batches."""
        if self.point.mode == "processes":
            return "process"
        return "thread" if self.point.workers > 1 else None


def way(mode: Mode, workers: int) -> str:
    """A way to run batches, in words."""
    if mode == "inline":
        return mode
    return f"{workers:,} {mode if workers != 1 else {'threads': 'thread', 'processes': 'process'}[mode]}"


def fit(costs: Sequence[Cost]) -> Line:
    """The line that is nearest to the costs: least squares of the relative errors, neither coefficient below 0.

    Relative, since a batch of 1024 costs a thousand times what a batch of 1 does, and would count a million times as much.
    """
    if not costs:
        msg = "there is nothing to fit"
        raise ValueError(msg)
    # Minimise the sum of (fixed * u + per_item * v - 1) ** 2, where u = 1 / cost and v = n / cost.
    us = [1 / cost.seconds for cost in costs]
    vs = [cost.batch_size / cost.seconds for cost in costs]
    uu, vv, uv = _dot(us, us), _dot(vs, vs), _dot(us, vs)
    choices = [(0.0, sum(vs) / vv), (sum(us) / uu, 0.0)]  # the best ones with either coefficient 0
    determinant = uu * vv - uv * uv
    if determinant > 1e-12 * uu * vv:  # several sizes
        both = ((vv * sum(us) - uv * sum(vs)) / determinant, (uu * sum(vs) - uv * sum(us)) / determinant)
        if min(both) >= 0:
            choices.insert(0, both)

    def errors(choice: tuple[float, float]) -> list[float]:
        return [choice[0] * u + choice[1] * v - 1 for u, v in zip(us, vs, strict=True)]

    best = min(choices, key=lambda choice: _dot(errors(choice), errors(choice)))
    return Line(*best, error=max(map(abs, errors(best))))


def _dot(left: Iterable[float], right: Iterable[float]) -> float:
    return sum(a * b for a, b in zip(left, right, strict=True))


def next_size(costs: Sequence[Cost], most_seconds: float) -> int | None:
    """The size of the batches whose cost is to be measured next; None: that is enough.

    It is enough when batches get too long, or when an item has not become cheaper by two doublings, and a trip to a worker no
    longer counts.

    Args:
        costs: What was measured, at 1, 2, 4, ...
        most_seconds: What a batch may take.
    """
    last = costs[-1]
    size = 2 * last.batch_size
    if size > MAX_BATCH_SIZE or 2 * last.seconds > most_seconds:
        return None
    if last.seconds >= _LONG_BATCH and len(costs) > 2 and last.per_item >= _STILL_FALLS * costs[-3].per_item:
        return None
    return size


def sizes_to_try(costs: Sequence[Cost], workers: int, target_latency: float | None) -> list[int]:
    """The sizes of batches that are worth a trial, from the smallest: few, spread over those whose cost is known.

    With a target also the largest that ought to stay within it, by the line.
    """
    # Workers fill a batch together, in a part of the time that one of them runs it: latency = cost * (1 + 1 / workers).
    seconds = math.inf if target_latency is None else target_latency / (1 + 1 / workers)
    known = [cost.batch_size for cost in costs if cost.seconds <= seconds or cost is costs[0]]
    few = min(_MOST_SIZES, len(known))
    sizes = {known[round(step * (len(known) - 1) / max(1, few - 1))] for step in range(few)}
    line = fit(costs)
    if target_latency is not None and line.holds and line.per_item > 0:
        size = min(int((_MARGIN * seconds - line.fixed) / line.per_item), MAX_BATCH_SIZE)
        if size >= 1 and not any(1 / _ALIKE < size / other < _ALIKE for other in sizes):
            sizes.add(size)
    return sorted(sizes)


def point(mode: Mode, workers: int, batch_size: int, began: float, until: float, ended: Sequence[Ended]) -> Point:
    """What a trial has shown.

    Args:
        mode: How the batches were run.
        workers: By how many.
        batch_size: Items in each.
        began: When the first ones left the queue.
        until: Until when all workers were kept busy, or until the first batch had ended. What a batch had done by then counts in
            proportion to its time, so that long batches need no longer trial.
        ended: All batches.
    """
    until = max(until, min(batch.at for batch in ended))
    done = sum(batch.size * _share_before(batch, until) for batch in ended)
    times = sorted(batch.seconds for batch in ended)
    p50, p95 = (times[-(-len(times) * percent // 100) - 1] for percent in (50, 95))
    return Point(mode, workers, batch_size, done / (until - began), p95, p50)


def _share_before(batch: Ended, until: float) -> float:
    if batch.at <= until:
        return 1.0
    return max(0.0, 1 - (batch.at - until) / batch.seconds) if batch.seconds > 0 else 0.0


def pays(points: Iterable[Point], mode: Mode, workers: int) -> bool:
    """Whether so many workers have brought anything over fewer ones; if not, still more need not be tried."""
    most: dict[bool, float] = {}
    for point in points:
        if point.mode == mode and point.workers <= workers:
            is_fewer = point.workers < workers
            most[is_fewer] = max(point.throughput, most.get(is_fewer, 0.0))
    return True not in most or most[False] >= (1 + PAYS_PER_WORKER) * most[True]


def typical(points: Iterable[Point]) -> list[Point]:
    """Of several trials of the same the one in the middle, by throughput: the best may have been lucky, the worst unlucky."""
    return [same[len(same) // 2] for same in _trials_of_the_same(points)]


def spread(points: Iterable[Point]) -> float:
    """By how much trials of the same differ, relative to the best of them: the median over all of them."""
    return median(1 - same[0].throughput / same[-1].throughput for same in _trials_of_the_same(points))


def _trials_of_the_same(points: Iterable[Point]) -> list[list[Point]]:
    """Each from the least throughput to the most."""
    trials: dict[tuple[Mode, int, int], list[Point]] = {}
    for point in points:
        trials.setdefault((point.mode, point.workers, point.batch_size), []).append(point)
    return [sorted(same, key=lambda point: point.throughput) for same in trials.values()]


def advise(points: Sequence[Point], target_latency: float | None = None) -> Advice:
    """The options for a target.

    Args:
        points: What was measured, of every mode with one worker at least.
        target_latency: Seconds that an item may take; None: throughput is the target.

    Returns:
        For the best throughput, within the target if there is one. If nothing is within it, what comes nearest to it.
    """
    inline, threads, processes = (
        [point for point in points if point.mode == mode] for mode in ("inline", "threads", "processes")
    )
    by_itself = _best(inline, target_latency) or _best_of_all(inline)
    in_threads, in_processes = _best(threads, target_latency), _best(processes, target_latency)
    one_process = _best_of_all([point for point in processes if point.workers == 1])
    is_more_inline = by_itself.throughput >= (in_processes or _best_of_all(processes)).throughput
    verdict: Verdict
    if is_more_inline and by_itself.throughput >= TOO_CHEAP * one_process.throughput:
        verdict = "too cheap"
        one_thread = [point for point in threads if point.workers == 1]
        chosen = _best(one_thread, target_latency) or _quickest(one_thread)
    elif in_processes is None:
        verdict = "out of reach" if in_threads is None else "no time for a trip"
        chosen = in_threads or _quickest(threads + processes)
    elif in_threads is None or in_threads.throughput < AS_WELL * in_processes.throughput:
        verdict, chosen = "no more than inline" if is_more_inline else "processes pay", in_processes
    elif in_threads.workers > 1:
        verdict, chosen = "threads do as well", in_threads
    else:
        verdict, chosen = "one thread does as well", in_threads
    meets_target = target_latency is None or chosen.latency <= target_latency
    return Advice(verdict, chosen, _queue_time(chosen, target_latency), meets_target)


def _best(points: Sequence[Point], target_latency: float | None) -> Point | None:
    """The fewest workers that pay, and of their batches the smallest that comes near to the best throughput."""
    within = [point for point in points if target_latency is None or point.latency <= target_latency]
    if not within:
        return None
    most = {workers: max(p.throughput for p in within if p.workers == workers) for workers in {p.workers for p in within}}
    workers = min(
        few
        for few in most
        if all(most[more] < most[few] * (1 + PAYS_PER_WORKER * (more - few)) for more in most if more > few)
    )  # fmt: skip
    near = [point for point in within if point.workers == workers and point.throughput >= NEAR_THE_BEST * most[workers]]
    return min(near, key=lambda point: point.batch_size)


def _best_of_all(points: Sequence[Point]) -> Point:
    return max(points, key=lambda point: point.throughput)


def _quickest(points: Sequence[Point]) -> Point:
    return min(points, key=lambda point: point.latency)


def _queue_time(point: Point, target_latency: float | None) -> float:
    """How long an item may wait for its batch to fill.

    About as long as a batch runs: within that time it fills wherever the batcher has much to do, and while all workers are busy
    items go on collecting anyway. With a target no longer than it leaves.
    """
    if point.batch_size == 1:
        return 0.0
    seconds = max(point.batch_seconds, point.fill_seconds)
    if target_latency is not None:
        seconds = min(seconds, target_latency - point.batch_seconds)
    return _two_digits(seconds)


def _two_digits(seconds: float) -> float:
    """Rounded down to two digits that count; 0 for what is less than a microsecond."""
    if seconds < 1e-6:
        return 0.0
    digits = 1 - math.floor(math.log10(seconds))
    return math.floor(seconds * 10.0**digits) / 10.0**digits
