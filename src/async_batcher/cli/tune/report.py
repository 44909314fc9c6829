"""What ``tune`` shows: figures, tables, the advice in words, and the code to paste (pure)."""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING, Any, NamedTuple

from async_batcher.cli._terminal import table
from async_batcher.cli.tune.model import NEAR_THE_BEST, PAYS_PER_WORKER, config_label

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from async_batcher.cli._import_string import ImportedFunction
    from async_batcher.cli.tune.model import BatchCost, CostModel, Measurement, Recommendation

_NOISY_SPREAD = 0.2  # of the throughput; trials on an idle machine differ by half of that
_BUSY_LOAD = 0.5  # of the cores; below that, what is measured has nearly all of them
# Times what one thread does: a function that holds the GIL gains little from a second one.
_RELEASES_GIL = 1.3

_LATENCY = (
    "latency: until a batch is full, at that throughput, and then until it has run, as long as "
    "95 % of them take."
)
_OUR_NAMES = ("batched", "batcher", "process_batch")  # in the code to paste


class TuneReport(NamedTuple):
    """All that was measured, and what follows."""

    function: ImportedFunction
    each: bool  # whether it takes one item
    source: str  # the input
    items: int  # of it that were used
    cores: int
    loop: str
    seconds: float  # that it all took
    target_latency: float | None  # None: throughput is the target
    costs: Sequence[BatchCost]  # of the function alone
    model: CostModel
    points: Sequence[Measurement]  # of every mode
    spread: float  # see `model.spread`
    load: float  # average, at the beginning
    advice: Recommendation

    def figures(self) -> dict[str, Any]:
        """All numbers, with their units in their names."""
        advice, model = self.advice, self.model
        return {
            "function": self.function.name,
            "input": self.source,
            "items": self.items,
            "python": platform.python_version(),
            "loop": self.loop,
            "cores": self.cores,
            "seconds": self.seconds,
            "target": "throughput" if self.target_latency is None else "latency",
            "target_latency_seconds": self.target_latency,
            "costs": [cost._asdict() for cost in self.costs],
            "fit": {
                "fixed_seconds": model.fixed,
                "seconds_per_item": model.per_item,
                "largest_error_percent": 100 * model.error,
                "holds": model.holds,
            },
            "spread_percent": 100 * self.spread,
            "load_at_start": self.load,
            "points": [point.figures() for point in self.points],
            "advice": {
                "verdict": advice.verdict,
                "meets_target": advice.meets_target,
                "executor": advice.executor,
                "max_workers": advice.point.workers if advice.executor else None,
                "max_batch_size": advice.point.batch_size,
                "max_queue_time": advice.max_queue_time,
                "measured": advice.point.figures(),
                "why": self.reasons(),
                "code": self.code(),
            },
        }

    def text(self) -> str:
        """The tables, what a batch costs, the advice, and the code."""
        point = self.advice.point
        where = f"Python {platform.python_version()}, {self.loop}, {_count(self.cores, 'core')}"
        measured = f"measured for {self.seconds:.0f} s"
        items = "the first item" if self.items == 1 else f"the first {self.items:,} items"
        target = "throughput"
        if self.target_latency is not None:
            target = f"a latency of {duration(self.target_latency)}"
        options = self._options() if self.advice.executor else ["no executor", *self._options()]
        return "\n".join(
            [
                f"{self.function.name} on {items} of {self.source}; {where}; {measured}",
                "",
                *self._grid("items/s, batches of", lambda point: f"{point.throughput:,.0f}"),
                "",
                *self._grid("latency, batches of", lambda point: duration(point.latency)),
                "",
                _LATENCY,
                "inline: the function called with one batch after the other, without a batcher.",
                "",
                self._costs(),
                *self._trip(),
                *self._warnings(),
                "",
                f"Recommended for {target}: {', '.join(options)}",
                f"{point.throughput:,.0f} items/s, latency {duration(point.latency)}. Why:",
                *(f"- {reason}" for reason in self.reasons()),
                "",
                self.code().rstrip(),
            ]
        )

    def reasons(self) -> list[str]:
        """Why the advice is what it is, a sentence or two for each option."""
        workers = self._explain_workers()
        return [self._explain_mode(), *workers, self._explain_size(), self._explain_time()]

    def code(self) -> str:
        """A module that makes the batcher."""
        module, name = self.function.module, self.function.path
        first, _, _ = name.partition(".")
        head = f"from {module} import {first}"
        if first in _OUR_NAMES:
            head, name = f"import {module}", f"{module}.{name}"
        setup = [f"setup_worker={name}.setup_worker"] if self.function.setup else []
        if self.function.is_batcher:
            name = f"{name}.process_batch"
        imports = ["from async_batcher import batched", head]
        lines = [*sorted(imports, key=lambda line: line.split()[1]), ""]
        if self.each:
            body = f"    return [{name}(item) for item in batch]"
            lines += ["", "def process_batch(batch):", body, "", ""]
            name = "process_batch"
        options = [f"    {option}," for option in (name, *setup, *self._options())]
        call = "# in each task: result = await batcher(item)"
        return "\n".join([*lines, "batcher = batched(", *options, ")", "", call, ""])

    def _options(self) -> list[str]:
        advice, point = self.advice, self.advice.point
        where = [f'executor="{advice.executor}"', f"max_workers={point.workers}"]
        return [
            *(where if advice.executor else []),
            f"max_batch_size={point.batch_size}",
            f"max_queue_time={advice.max_queue_time:g}",
        ]

    def _grid(self, title: str, show: Callable[[Measurement], str]) -> list[str]:
        """A row for each configuration, a column for each size; the recommended one is marked."""
        sizes = sorted({point.batch_size for point in self.points if point.mode != "inline"})
        rows: dict[Any, dict[int, str]] = {}
        for point in self.points:
            mark = "* " if point == self.advice.point else ""
            rows.setdefault(point.config, {})[point.batch_size] = mark + show(point)
        head = [title, *(f"{size:,}" for size in sizes)]
        return table([
            head,
            *([config_label(*config), *(row.get(size, "-") for size in sizes)]
              for config, row in rows.items()),
        ])  # fmt: skip

    def _costs(self) -> str:
        model, first, last = self.model, self.costs[0], self.costs[-1]
        error = f"{100 * model.error:.0f} %"
        if len(self.costs) == 1:
            too_long = "larger ones take too long to be measured in that time"
            return f"A batch of one item costs {duration(first.seconds)}; {too_long}."
        if model.holds:
            return (
                f"A batch costs {duration(model.fixed)} + {duration(model.per_item)} for each "
                f"item; the line is within {error} of what was measured."
            )
        return (
            f"No line a + b n fits what a batch costs: the nearest is off by up to {error}. An "
            f"item costs {duration(first.per_item)} alone, and {duration(last.per_item)} in a "
            f"batch of {last.batch_size:,}."
        )

    def _trip(self) -> list[str]:
        """What is added by the way to a worker and back."""
        costs = {cost.batch_size: cost.seconds for cost in self.costs}
        one = [p for p in self.points if p.config == ("processes", 1) and p.batch_size in costs]
        if not one:
            return []
        size = max(point.batch_size for point in one)
        seconds = next(p.median_batch_seconds for p in one if p.batch_size == size) - costs[size]
        added = duration(seconds) if seconds > 0 else "nothing that could be measured"
        return [f"The way to a worker process and back adds {added} to a batch of {size:,}."]

    def _warnings(self) -> list[str]:
        """Signs that the figures are not to be relied on."""
        signs = []
        if self.spread > _NOISY_SPREAD:
            signs.append(f"trials of the same differ by {100 * self.spread:.0f} %")
        if self.load > _BUSY_LOAD * self.cores:
            cores = _count(self.cores, "core")
            signs.append(f"the load was {self.load:.1f} on {cores} when this began")
        if not signs:
            return []
        careful = "Take these figures with care, or measure when it is idle."
        return [f"The machine does other things too: {', '.join(signs)}. {careful}"]

    def _most(self, mode: str) -> Measurement:
        """The best throughput of a mode, within the target if that is possible."""
        points = [point for point in self.points if point.mode == mode]
        target = self.target_latency
        within = [point for point in points if target is None or point.latency <= target]
        return max(within or points, key=lambda point: point.throughput)

    def _explain_mode(self) -> str:
        inline, threads, processes = map(self._most, ("inline", "threads", "processes"))
        chosen = self.advice.point.throughput
        share = f"{chosen / processes.throughput:.2f} x of what {_does(processes)}"
        target = duration(self.target_latency or 0.0)
        one_thread = max(p.throughput for p in self.points if p.config == ("threads", 1))
        releases_gil = chosen >= _RELEASES_GIL * one_thread
        gil = "the function releases the GIL, and " if releases_gil else ""
        return {
            "processes pay": (
                f"processes pay: {chosen / inline.throughput:.2f} x what the function does inline, "
                f"{chosen / threads.throughput:.2f} x what {_does(threads)}."
            ),
            "no more than inline": (
                "of all batchers processes do most, but no more than the function inline, "
                f"{inline.throughput:,.0f} items/s: the machine is busy with other things, or what "
                "crosses is large."
            ),
            "threads do as well": (
                f"processes do not pay: threads do as well, {share}: {gil}nothing has to cross."
            ),
            "one thread does as well": (
                f"processes do not pay: one thread does {share}. It shares the GIL with the event "
                "loop, though: where that has much else to do, a process may pay."
            ),
            "too cheap": (
                "processes do not pay: the function is too cheap. Inline it does "
                f"{inline.throughput:,.0f} items/s, {config_label(*processes.config)} "
                f"{processes.throughput:,.0f}: to hand an item over costs more than to share the "
                "work gains. Where you have lists, call it with them; the batcher below is for "
                "single calls."
            ),
            "no time for a trip": (
                f"processes do not pay: no batch in a process stays within {target}."
            ),
            "out of reach": (
                f"no batch stays within {target}, in threads or in processes; this comes nearest "
                "to it."
            ),
        }[self.advice.verdict]

    def _explain_workers(self) -> list[str]:
        point = self.advice.point
        if self.advice.verdict in ("too cheap", "out of reach"):
            return []
        same = [other for other in self.points if other.mode == point.mode]
        one = max(other.throughput for other in same if other.workers == 1)
        start = config_label(*point.config)
        if point.workers > 1:
            times = f"{point.throughput / one:.2f} x"
            does = f"{config_label(point.mode, 1)} does"
            start = f"max_workers={point.workers}: {times} what {does}"
        if point.workers < max(other.workers for other in same):
            return [f"{start}; more of them do not add {100 * PAYS_PER_WORKER:.0f} % for each."]
        if point.mode == "threads" or point.workers == 1:
            return [f"{start}; no more were tried, which --workers does."]
        return [f"{start}."]

    def _explain_size(self) -> str:
        start = f"max_batch_size={self.advice.point.batch_size}: "
        target = self.target_latency
        if not self.advice.meets_target:
            most = duration(target or 0.0)
            return f"{start}the one with the least latency, which is more than {most}."
        within = "" if target is None else f" within {duration(target)}"
        near = f"{100 - round(100 * NEAR_THE_BEST)} %"
        best = f"the best throughput{within}"
        return f"{start}the smallest batch that comes within {near} of {best}."

    def _explain_time(self) -> str:
        seconds, point = self.advice.max_queue_time, self.advice.point
        start = f"max_queue_time={seconds:g}: "
        if point.batch_size == 1:
            return f"{start}a batch of one item has nothing to wait for."
        if not self.advice.meets_target:
            return f"{start}there is no time to wait."
        usual = max(point.batch_seconds, point.fill_seconds)
        if self.target_latency is not None and seconds < 0.9 * usual:
            runs = duration(point.batch_seconds)
            return f"{start}what a batch, which runs for {runs}, leaves of the target."
        why = "a longer wait gains nothing, since items collect while workers are busy"
        return f"{start}about as long as a batch runs; {why}."


def duration(seconds: float) -> str:
    """Write a duration with a unit that suits it."""
    for unit, name in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= 0.9995 * unit:
            value = seconds / unit
            return f"{value:.3g} {name}" if value < 999.5 else f"{value:,.0f} {name}"
    return f"{seconds * 1e6:.3g} us"


def _does(point: Measurement) -> str:
    return f"{config_label(*point.config)} {'does' if point.workers == 1 else 'do'}"


def _count(count: int, one: str) -> str:
    return f"{count:,} {one}{'' if count == 1 else 's'}"
