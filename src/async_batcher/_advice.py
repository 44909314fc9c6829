"""What `tune` shows: the figures, the table, the advice in words, and the code to paste (pure)."""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING, Any, NamedTuple

from async_batcher._tuning import NEAR_THE_BEST, PAYS_PER_WORKER, Advice, Cost, Line, Point, way

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_DOUBTFUL = 0.2  # of the throughput; an idle machine gives half of that

_BUSY = 0.5  # of the cores: with less at work, what is measured has nearly all of them

_RELEASES_GIL = 1.3  # times what one thread does: a function that holds the GIL gains next to nothing from a second one

_OURS = ("batched", "batcher", "process_batch")  # names in the code to paste


class Named(NamedTuple):
    """How the code to paste gets the user's function.

    Attributes:
        module: Where it is imported from.
        path: From there on, with dots; it names the function, or a batcher.
        is_batcher: Whether it is a batcher, whose function is meant.
        has_setup: Whether that has a ``setup_worker``.
    """

    module: str
    path: str
    is_batcher: bool = False
    has_setup: bool = False


class Tuning(NamedTuple):
    """All that was measured, and what follows.

    Attributes:
        name: The function, as the user named it.
        named: The same for the code to paste.
        each: Whether it takes one item.
        source: The input.
        items: Of it that were used.
        cores: That this process may use.
        loop: The event loop's name.
        seconds: That it all took.
        target_latency: Seconds; None: throughput is the target.
        costs: Of the function alone.
        line: Their line.
        points: Of every mode.
        spread: By how much trials of the same typically differ, relative to the best; 0 where there was one of each.
        load: Processes that ran or wanted to when it began, on average.
        advice: What to do.
    """

    name: str
    named: Named
    each: bool
    source: str
    items: int
    cores: int
    loop: str
    seconds: float
    target_latency: float | None
    costs: Sequence[Cost]
    line: Line
    points: Sequence[Point]
    spread: float
    load: float
    advice: Advice

    def figures(self) -> dict[str, Any]:
        """All numbers, with their units in their names."""
        advice = self.advice
        return {
            "function": self.name,
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
                "fixed_seconds": self.line.fixed,
                "seconds_per_item": self.line.per_item,
                "largest_error_percent": 100 * self.line.error,
                "holds": self.line.holds,
            },
            "spread_percent": 100 * self.spread,
            "load_at_start": self.load,
            "points": [_figures_of(point) for point in self.points],
            "advice": {
                "verdict": advice.verdict,
                "meets_target": advice.meets_target,
                "executor": advice.executor,
                "max_workers": advice.point.workers if advice.executor else None,
                "max_batch_size": advice.point.batch_size,
                "max_queue_time": advice.max_queue_time,
                "measured": _figures_of(advice.point),
                "why": self.reasons(),
                "code": self.code(),
            },
        }

    def text(self) -> str:
        """The table, what a batch costs, the advice, and the code."""
        where = f"Python {platform.python_version()}, {self.loop}, {_count(self.cores, 'core')}"
        return "\n".join(
            [
                f"{self.name} on {_items(self.items)} of {self.source}; {where}; measured for {self.seconds:.0f} s",
                "",
                *_table(self._grid("items/s, batches of", lambda point: f"{point.throughput:,.0f}")),
                "",
                *_table(self._grid("latency, batches of", lambda point: duration(point.latency))),
                "",
                "latency: until a batch is full, at that throughput, and then until it has run, as long as 95 % of them take.",
                "inline: the function called with one batch after the other, without a batcher.",
                "",
                *self._costs(),
                "",
                f"Recommended for {self._target()}: {self._options()}",
                f"{self.advice.point.throughput:,.0f} items/s, latency {duration(self.advice.point.latency)}. Why:",
                *(f"- {reason}" for reason in self.reasons()),
                "",
                self.code().rstrip(),
            ]
        )

    def reasons(self) -> list[str]:
        """Why the advice is what it is, a sentence or two for each option."""
        return [self._why_there(), *self._why_so_many(), self._why_that_size(), self._why_that_time()]

    def code(self) -> str:
        """A module that makes the batcher."""
        first, _, _ = self.named.path.partition(".")
        if first in _OURS:
            head, function = f"import {self.named.module}", f"{self.named.module}.{self.named.path}"
        else:
            head, function = f"from {self.named.module} import {first}", self.named.path
        setup = [f"setup_worker={function}.setup_worker"] if self.named.has_setup else []
        if self.named.is_batcher:
            function = f"{function}.process_batch"
        lines = [*sorted(["from async_batcher import batched", head], key=lambda line: line.split()[1]), ""]
        if self.each:
            lines += ["", "def process_batch(batch):", f"    return [{function}(item) for item in batch]", "", ""]
            function = "process_batch"
        lines += ["batcher = batched(", *(f"    {option}," for option in [function, *setup, *self._keywords()]), ")"]
        return "\n".join([*lines, "", "# in each task: result = await batcher(item)", ""])

    def _keywords(self) -> list[str]:
        advice = self.advice
        where = [f'executor="{advice.executor}"', f"max_workers={advice.point.workers}"] if advice.executor else []
        return [*where, f"max_batch_size={advice.point.batch_size}", f"max_queue_time={advice.max_queue_time:g}"]

    def _options(self) -> str:
        return ", ".join(self._keywords() if self.advice.executor else ["no executor", *self._keywords()])

    def _target(self) -> str:
        return "throughput" if self.target_latency is None else f"a latency of {duration(self.target_latency)}"

    # Tables.

    def _grid(self, title: str, show: Callable[[Point], str]) -> list[list[str]]:
        """A line for each way to run batches, a column for each size; the recommended one is marked."""
        sizes = sorted({point.batch_size for point in self.points if point.mode != "inline"})
        shown = {(point.mode, point.workers, point.batch_size): self._mark(point) + show(point) for point in self.points}
        ways = dict.fromkeys((point.mode, point.workers) for point in self.points)
        return [
            [title, *(f"{size:,}" for size in sizes)],
            *([way(*how), *(shown.get((*how, size), "-") for size in sizes)] for how in ways),
        ]

    def _mark(self, point: Point) -> str:
        return "* " if point == self.advice.point else ""

    # Words.

    def _costs(self) -> list[str]:
        line, first, last = self.line, self.costs[0], self.costs[-1]
        words = f"A batch costs {duration(line.fixed)} + {duration(line.per_item)} for each item"
        if len(self.costs) == 1:
            words = f"A batch of one item costs {duration(first.seconds)}; larger ones take too long to be measured in that time."
        elif line.holds:
            words += f"; the line is within {100 * line.error:.0f} % of what was measured."
        else:
            words = (
                f"No line a + b n fits what a batch costs: the nearest is off by up to {100 * line.error:.0f} %. An item costs "
            )
            words += f"{duration(first.per_item)} alone, and {duration(last.per_item)} in a batch of {last.batch_size:,}."
        return [words, *self._trip(), *self._doubts()]

    def _trip(self) -> list[str]:
        """What is added by the way to a worker and back."""
        costs = {cost.batch_size: cost.seconds for cost in self.costs}
        there = [p for p in self.points if p.mode == "processes" and p.workers == 1 and p.batch_size in costs]
        if not there:
            return []
        point = max(there, key=lambda p: p.batch_size)
        seconds = point.median_batch_seconds - costs[point.batch_size]
        adds = f"adds {duration(seconds)}" if seconds > 0 else "adds nothing that could be measured"
        return [f"The way to a worker process and back {adds} to a batch of {point.batch_size:,}."]

    def _doubts(self) -> list[str]:
        """A warning where the figures are not to be relied on."""
        signs = []
        if self.spread > _DOUBTFUL:
            signs.append(f"trials of the same differ by {100 * self.spread:.0f} %")
        if self.load > _BUSY * self.cores:
            signs.append(f"the load was {self.load:.1f} on {_count(self.cores, 'core')} when this began")
        if not signs:
            return []
        return [
            f"The machine does other things too: {', '.join(signs)}. Take these figures with care, or measure when it is idle."
        ]

    def _most(self, mode: str) -> Point:
        """The best throughput of a mode, within the target where that can be."""
        points = [point for point in self.points if point.mode == mode]
        within = [point for point in points if self.target_latency is None or point.latency <= self.target_latency]
        return max(within or points, key=lambda point: point.throughput)

    def _why_there(self) -> str:
        inline, threads, processes = self._most("inline"), self._most("threads"), self._most("processes")
        chosen = self.advice.point
        share = f"{chosen.throughput / processes.throughput:.2f} x of what {_way_does(processes)}"
        if self.advice.verdict == "processes pay":
            return (
                f"processes pay: {chosen.throughput / inline.throughput:.2f} x what the function does inline, "
                f"{chosen.throughput / threads.throughput:.2f} x what {_way_does(threads)}."
            )
        if self.advice.verdict == "no more than inline":
            return (
                f"of all batchers processes do most, but no more than the function inline, {inline.throughput:,.0f} items/s: "
                "the machine is busy with other things, or what crosses is large."
            )
        if self.advice.verdict == "threads do as well":
            one = max(point.throughput for point in self.points if point.mode == "threads" and point.workers == 1)
            gil = "the function releases the GIL, and " if chosen.throughput >= _RELEASES_GIL * one else ""
            return f"processes do not pay: threads do as well, {share}: {gil}nothing has to cross."
        if self.advice.verdict == "one thread does as well":
            return (
                f"processes do not pay: one thread does {share}. "
                "It shares the GIL with the event loop, though: where that has much else to do, a process may pay."
            )
        if self.advice.verdict == "too cheap":
            return (
                f"processes do not pay: the function is too cheap. Inline it does {inline.throughput:,.0f} items/s, "
                f"{way('processes', processes.workers)} {processes.throughput:,.0f}: to hand an item over costs more than to "
                "share the work gains. Where you have lists, call it with them; the batcher below is for single calls."
            )
        if self.advice.verdict == "no time for a trip":
            return f"processes do not pay: no batch in a process stays within {self._target_seconds()}."
        return f"no batch stays within {self._target_seconds()}, in threads or in processes; this comes nearest to it."

    def _target_seconds(self) -> str:
        return duration(self.target_latency or 0.0)

    def _why_so_many(self) -> list[str]:
        point = self.advice.point
        if self.advice.verdict in ("too cheap", "out of reach"):
            return []
        same = [other for other in self.points if other.mode == point.mode]
        most, one = max(other.workers for other in same), max(other.throughput for other in same if other.workers == 1)
        start = way(point.mode, point.workers)
        if point.workers > 1:
            start = f"max_workers={point.workers}: {point.throughput / one:.2f} x what {way(point.mode, 1)} does"
        if point.workers < most:
            return [f"{start}; more of them do not add {100 * PAYS_PER_WORKER:.0f} % for each."]
        if point.mode == "threads" or point.workers == 1:
            return [f"{start}; no more were tried, which --workers does."]
        return [f"{start}."]

    def _why_that_size(self) -> str:
        point = self.advice.point
        start = f"max_batch_size={point.batch_size}: "
        if not self.advice.meets_target:
            return f"{start}the one with the least latency, which is more than {self._target_seconds()}."
        within = "" if self.target_latency is None else f" within {self._target_seconds()}"
        near = f"{100 - round(100 * NEAR_THE_BEST)} %"
        return f"{start}the smallest batch that comes within {near} of the best throughput{within}."

    def _why_that_time(self) -> str:
        advice, point = self.advice, self.advice.point
        start = f"max_queue_time={advice.max_queue_time:g}: "
        if point.batch_size == 1:
            return f"{start}a batch of one item has nothing to wait for."
        if not advice.meets_target:
            return f"{start}there is no time to wait."
        if self.target_latency is not None and advice.max_queue_time < 0.9 * max(point.batch_seconds, point.fill_seconds):
            return f"{start}what a batch, which runs for {duration(point.batch_seconds)}, leaves of the target."
        return f"{start}about as long as a batch runs; a longer wait gains nothing, since items collect while workers are busy."


def duration(seconds: float) -> str:
    """With a unit that suits it."""
    for unit, name in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= 0.9995 * unit:
            return f"{seconds / unit:.3g} {name}" if seconds < 999.5 * unit else f"{seconds / unit:,.0f} {name}"
    return f"{seconds * 1e6:.3g} us"


def _figures_of(point: Point) -> dict[str, Any]:
    return {
        "mode": point.mode,
        "workers": point.workers,
        "batch_size": point.batch_size,
        "items_per_second": point.throughput,
        "latency_seconds": point.latency,
        "batch_seconds_p50": point.median_batch_seconds,
        "batch_seconds_p95": point.batch_seconds,
    }


def _way_does(point: Point) -> str:
    return f"{way(point.mode, point.workers)} {'does' if point.workers == 1 else 'do'}"


def _items(count: int) -> str:
    return "the first item" if count == 1 else f"the first {count:,} items"


def _count(count: int, one: str) -> str:
    return f"{count:,} {one}{'' if count == 1 else 's'}"


def _table(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
