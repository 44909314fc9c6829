"""The plots of the pages, one for each file of results.

Each library has one color in all plots. Bars have a linear axis that starts at 0; what needs a
logarithmic axis is drawn as points.
"""

from __future__ import annotations

import functools
import hashlib
import json
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks.libraries import names
from benchmarks.report import text
from benchmarks.report.axes import (
    STYLE,
    add_legend,
    color,
    distances,
    micro,
    set_few_decades,
    set_loads,
    set_percent,
    set_unit,
)
from benchmarks.report.break_even import break_even, ratios_to
from benchmarks.report.metrics import WORK_NAMES
from benchmarks.report.results import all_measured, in_order, read
from benchmarks.report.topics import LOOP, TOPICS, Row

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from benchmarks.report.results import Files, Record, Results

    Spread = Mapping[str, float]

WIDTH, HEIGHT = 7.4, 3.2  # inches


class Panel(NamedTuple):
    """A panel with a bar for each library, or a point on a logarithmic axis."""

    title: str
    row: Row
    is_log: bool = False


PANELS = {
    "failures": (
        Panel(
            "other callers with an error\nfrom one bad item, of 63",
            Row("", "poison", {"place": "coroutine"}, "hurt"),
        ),
        Panel(
            "failed calls after a kill\n(eight clients)", Row("", "killed", measure="failed_calls")
        ),
        Panel("time until every\nslot works again", Row("", "killed")),
    ),
    "idle": (
        Panel("start of the pool\nto the first result", Row("", "start")),
        Panel("memory of a worker\n(proportional share)", Row("", "start", measure="worker_bytes")),
        Panel(
            "CPU time of ten idle\nseconds (logarithmic)",
            Row("", "idle", {"place": "coroutine"}),
            is_log=True,
        ),
    ),
    "jobs": (
        Panel("source files:\ntime per item", Row("", "job", {"job": "sources"})),
        Panel("source files:\np99 of a request", Row("", "job", {"job": "sources"}, "p99_seconds")),
        Panel("texts:\ntime per item", Row("", "job", {"job": "texts"})),
        Panel("texts:\np99 of a request", Row("", "job", {"job": "texts"}, "p99_seconds")),
    ),
}


def draw(files: Files, folder: Path) -> None:
    """Draw the plot of each file of results, as SVG."""
    import matplotlib as mpl

    folder.mkdir(exist_ok=True)
    with mpl.rc_context(STYLE):
        for name in PLOTS:
            if name in files:
                about = {"Date": None, "Creator": None, "Description": seal(files[name])}
                plot(name, files[name]).savefig(folder / f"{name}.svg", metadata=about)


def plot(name: str, results: Results) -> Any:
    """Return the figure of a file of results."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        figure.suptitle(TOPICS[name].title, fontsize=10, fontweight="bold")
        records = in_order(read([results]))
        PLOTS[name]([record for record in records if record.loop in (LOOP, "none")], figure)
        add_legend(figure)
    return figure


def seal(results: Results) -> str:
    """Return what a plot says of its results, so that a stale plot is recognised."""
    content = json.dumps([record.info for record in read([results])], sort_keys=True).encode()
    return f"results {hashlib.sha256(content).hexdigest()[:16]}"


# --- A bar for each library


def _draw_panels(panels: Sequence[Panel], records: Sequence[Record], figure: Any) -> None:
    """Draw panels side by side. Neighbours with the same libraries share their names."""
    row = figure.subplots(1, len(panels), squeeze=False)[0]
    before: list[str] = []
    for axes, panel in zip(row, panels, strict=True):
        record = panel.row.find(records)
        if record is None:
            axes.set_axis_off()
            continue
        measure = panel.row.measure or record.measure
        known = all_measured([record], baselines_last=True)
        libraries = [name for name in known if record.spread(name, measure) is not None]
        _draw_panel(axes, panel, record, libraries, has_names=libraries != before)
        before = libraries


def _draw_panel(
    axes: Any, panel: Panel, record: Record, libraries: Sequence[str], *, has_names: bool
) -> None:
    measure = panel.row.measure or record.measure
    for place, name in enumerate(libraries):
        spread = record.spread(name, measure)
        assert spread is not None
        middle, ends = spread["median"], distances([spread])
        if panel.is_log:
            axes.errorbar([middle], [place], xerr=ends, fmt="o", color=color(name), linewidth=0.8)
        else:
            style = {"linewidth": 0.7}
            axes.barh([place], [middle], 0.7, xerr=ends, color=color(name), error_kw=style)
        label = micro(text.figure(measure, middle))
        offset = {"xytext": (4, 0), "textcoords": "offset points", "va": "center"}
        end = (spread["q3"], place)
        axes.annotate(label, end, fontsize="x-small", annotation_clip=False, **offset)
    axes.set_yticks(range(len(libraries)), libraries if has_names else [""] * len(libraries))
    axes.set(ylim=(len(libraries) - 0.4, -0.6), title=panel.title)
    axes.tick_params(axis="y", length=0)
    highest = max(found["q3"] for name in libraries if (found := record.spread(name, measure)))
    if panel.is_log:
        lowest = min(record.median(name, measure) for name in libraries)
        set_few_decades(axes, lowest / 2, highest * 12)  # the figures stand beside the points
        set_unit(axes.xaxis, measure)
    else:  # the figures stand beside the bars
        axes.set(xlim=(0, (highest or 1.0) * 1.35), xticks=[])
        axes.spines["bottom"].set_visible(False)


# --- Points for each library, a row for each case


def _draw_rows(
    rows: Sequence[Row],
    label: str,
    records: Sequence[Record],
    axes: Any,
    *,
    is_hollow: bool = False,
) -> None:
    """Draw medians with quartiles: the cases from top to bottom, the libraries in their order."""
    cases = [(row, record) for row in rows if (record := row.find(records))]
    if not cases:
        return
    libraries = all_measured([record for _, record in cases], baselines_last=True)
    step = 0.7 / max(1, len(libraries))
    for number, name in enumerate(libraries):
        known = [
            (place + (number - (len(libraries) - 1) / 2) * step, spread)
            for place, (row, record) in enumerate(cases)
            if (spread := record.spread(name, row.measure))
        ]
        if not known:
            continue
        axes.errorbar(
            [spread["median"] for _, spread in known],
            [place for place, _ in known],
            xerr=distances([spread for _, spread in known]),
            fmt="o",
            color=color(name),
            markerfacecolor="white" if is_hollow else color(name),
            linewidth=0.8,
            label=None if is_hollow else name,
            zorder=4 if name == names.OURS else 3,
        )
    for place in range(1, len(cases)):
        axes.axhline(place - 0.5, color="0.9", linewidth=0.7, zorder=0)
    axes.set_yticks(range(len(cases)), [row.label for row, _ in cases])
    axes.tick_params(axis="y", length=0)
    axes.set(xscale="log", ylim=(len(cases) - 0.5, -0.5), xlabel=label)
    axes.grid(axis="x", color="0.93", linewidth=0.7)
    axes.set_axisbelow(True)
    set_unit(axes.xaxis, "seconds")


def _points(topic: str, label: str, records: Sequence[Record], figure: Any) -> None:
    _draw_rows(TOPICS[topic].rows, label, records, figure.subplots())


def _latency(records: Sequence[Record], figure: Any) -> None:
    """Draw the waits of callers below the capacity, and the results in time above it."""
    below, above = figure.subplots(1, 2, width_ratios=(3, 2))
    cases = [one for one in records if one.scenario == "latency" and one.load["job"] == "python"]
    loads = sorted({record.load["of_capacity"] for record in cases})
    for measure, is_hollow in (("p99_seconds", False), ("p50_seconds", True)):
        rows = [
            Row(f"{load:.0%}", "latency", {"job": "python", "of_capacity": load}, measure)
            for load in loads
        ]
        label = "wait of a caller: p50 (hollow) and p99 (filled)"
        _draw_rows(rows, label, records, below, is_hollow=is_hollow)
    below.set(ylabel="arrivals, of the capacity", title="below the capacity")
    limits = (
        (names.OURS, "with deadlines\nand limits", "-", -20),
        (names.UNLIMITED, "without", "--", 6),
    )
    for record in (record for record in records if record.scenario == "overload"):
        times = range(1, record.load["seconds"] + 1)
        for name, label, line, offset in limits:
            good = [100 * median(record.rounds(name, f"good_{time - 1}")) for time in times]
            above.plot(times, good, color=color(names.OURS), marker="o", linestyle=line)
            above.text(times[-1], good[-1] + offset, label, ha="right")
        above.set(xticks=times)
    above.set(title="twice the capacity (async_batcher)", xlabel="second of the run", ylim=(0, 125))
    above.set_ylabel("results in time, of the capacity")
    set_percent(above.yaxis)


# --- Lines


def _crossing(records: Sequence[Record], figure: Any) -> None:
    """Draw the share of what two cores can do, by the work of an item, and the break-evens."""

    def share(record: Record, name: str) -> Spread | None:
        best, spread = record.load["item_us"] / 1e6 / record.load["workers"], record.spread(name)
        swapped = {"median": "median", "q1": "q3", "q3": "q1"}
        return spread and {key: best / spread[other] for key, other in swapped.items()}

    panels = figure.subplots(1, 2, sharey=True)
    for axes, (job, words) in zip(panels, WORK_NAMES.items(), strict=True):
        cases = [record for record in records if record.load["job"] == job]
        _draw_lines(axes, cases, lambda record: record.load["item_us"] / 1e6, share)
        points = ratios_to(names.INLINE, cases)
        if points and (at := break_even(points)):
            axes.axvline(at, color=color(names.INLINE), linewidth=0.8, linestyle=":")
            label = f" break-even with inline:\n {micro(text.seconds(at))}"
            axes.text(at, 115, label, fontsize="x-small", va="top")
        axes.set(ylim=(0, 115), xlabel="work of an item", title=words)
        set_loads(axes, [record.load["item_us"] / 1e6 for record in cases])
    panels[0].set_ylabel("share of the time of two cores")
    set_percent(panels[0].yaxis)


def _cores(records: Sequence[Record], figure: Any, *, per_worker: int = 1) -> None:
    """Draw the share of the cores' time that is spent in batches, by their length."""
    found = [record for record in records if record.scenario == "cores_busy"]
    workers = min((one.load["workers"] for one in found if one.load["workers"] > 1), default=0)
    loads = (workers, per_worker * workers)
    cases = [one for one in found if (one.load["workers"], one.load["in_flight"]) == loads]
    axes = figure.subplots()
    _draw_lines(axes, cases, lambda record: record.load["batch_ms"] / 1e3, _busy)
    axes.set(ylim=(0, 105), xlabel="length of a batch")
    axes.set_ylabel(f"share of the time of {workers} cores")
    set_loads(axes, [record.load["batch_ms"] / 1e3 for record in cases])
    set_percent(axes.yaxis)


def _busy(record: Record, name: str) -> Spread | None:
    return record.spread(name, "busy")


def _draw_lines(
    axes: Any,
    records: Sequence[Record],
    x: Callable[[Record], float],
    share: Callable[[Record, str], Spread | None],
) -> None:
    """Draw a line of median shares in percent for each library, with a band of quartiles."""
    for name in all_measured(records, baselines_last=True):
        known = [(x(record), found) for record in records if (found := share(record, name))]
        if not known:
            continue
        xs = [one for one, _ in known]
        low, middle, high = ([100 * one[key] for _, one in known] for key in ("q1", "median", "q3"))
        line = "--" if name in names.BASELINES else "-"
        style = {"marker": "o", "linestyle": line, "zorder": 3 if name == names.OURS else 2}
        axes.plot(xs, middle, color=color(name), label=name, **style)
        axes.fill_between(xs, low, high, color=color(name), alpha=0.15, linewidth=0)


PLOTS: dict[str, Callable[[Sequence[Record], Any], None]] = {
    "crossing": _crossing,
    "cores": _cores,
    "pool": functools.partial(_cores, per_worker=2),
    "latency": _latency,
    "front_end": functools.partial(_points, "front_end", "time per item"),
    "trips": functools.partial(_points, "trips", "time there and back"),
    "tune": functools.partial(_points, "tune", "time per item"),
    **{name: functools.partial(_draw_panels, panels) for name, panels in PANELS.items()},
}
