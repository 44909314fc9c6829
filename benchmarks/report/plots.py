"""The plots of the pages, one for each file of results."""

from __future__ import annotations

import functools
import hashlib
import json
import textwrap
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks.libraries import names
from benchmarks.report.break_even import break_even, ratios_to
from benchmarks.report.metrics import WORK_NAMES
from benchmarks.report.results import all_measured, in_order, read

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from benchmarks.report.results import Files, Record, Results

    Spread = Mapping[str, float]

LOOP = "asyncio"  # the loop that is drawn
MAX_GROUPS = 6  # of bars with labels of the usual size
LABEL_LETTERS = 11  # in a line of a label
_STYLE: Any = {
    "svg.hashsalt": "async_batcher",  # makes the files reproducible
    "svg.fonttype": "none",
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "lines.markersize": 4,
}
_COLORS = {
    names.OURS: "#1f77b4",
    **dict.fromkeys((names.OURS_IN_THREADS, names.ONE_BY_ONE, names.OURS_ISOLATING), "#7fc1e8"),
    names.OLD: "#d62728",
    **dict.fromkeys((names.STANDARD_POOL, names.PROCESSES_BY_HAND), "#ff7f0e"),
    **dict.fromkeys((names.THREADS, names.THREADS_BY_HAND), "#8c564b"),
    **dict.fromkeys(("loky", names.RAY_SERVE), "#2ca02c"),
    "pebble": "#9467bd",
    **dict.fromkeys(("aiomultiprocess", names.BATCHED), "#e377c2"),
    "joblib": "#17becf",
    names.AIODATALOADER: "#bcbd22",
    **dict.fromkeys((names.BARE_PIPE, names.BARE_LOOP, names.BY_HAND, names.INLINE), "0.6"),
    **dict.fromkeys((names.MEMORY_COPY, names.BARE_FUTURES, names.BARE_LOOP_AHEAD), "0.8"),
}


class Bars(NamedTuple):
    """A panel with a group of bars for each case of some scenarios, and a bar for each library."""

    scenarios: tuple[str, ...]
    measure: str
    label: str
    scale: str = "linear"
    width: int = 1  # relative to the other panels
    case: str = ""  # empty: the load or the title


BARS = {
    "front_end": [
        Bars(("clients", "gather", "many"), "seconds_per_item", "time per item", "log"),
    ],
    "trips": [Bars(("round_trip",), "seconds", "there and back", "log")],
    "failures": [
        Bars(("poison",), "hurt", "other callers with an error, of 63", width=3),
        Bars(("killed",), "failed_calls", "failed calls", case="a killed worker"),
        Bars(("killed",), "back_seconds", "until every slot works", case="a killed worker"),
    ],
    "idle": [
        Bars(("start",), "first_seconds", "start to first result", case="two workers"),
        Bars(("start",), "worker_bytes", "bytes of a worker", case="two workers"),
        Bars(("idle",), "cpu_seconds", "CPU time of ten idle seconds", "log", width=2),
    ],
    "jobs": [
        Bars(("job",), "seconds_per_item", "time per item"),
        Bars(("job",), "p99_seconds", "p99 of a request"),
    ],
}


def draw(files: Files, folder: Path) -> None:
    """Draw the plot of each file of results, as SVG."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    folder.mkdir(exist_ok=True)
    with mpl.rc_context(_STYLE):
        for name, plot in PLOTS.items():
            if name in files:
                figure = Figure(figsize=(7.2, 2.9), layout="constrained")
                records = in_order(read([files[name]]))
                plot([record for record in records if record.loop in (LOOP, "none")], figure)
                _add_legend(figure)
                about = {"Date": None, "Creator": None, "Description": seal(files[name])}
                figure.savefig(folder / f"{name}.svg", metadata=about)


def seal(results: Results) -> str:
    """Return what a plot says of its results, so that a stale plot is recognised."""
    content = json.dumps([record.info for record in read([results])], sort_keys=True).encode()
    return f"results {hashlib.sha256(content).hexdigest()[:16]}"


def _draw_bars(panels: Sequence[Bars], records: Sequence[Record], figure: Any) -> None:
    widths = [panel.width for panel in panels]
    row = figure.subplots(1, len(panels), width_ratios=widths, squeeze=False)[0]
    for axes, panel in zip(row, panels, strict=True):
        shown = [record for record in records if record.scenario in panel.scenarios]
        _draw_panel(axes, panel, {panel.case or _case(record): record for record in shown})


def _case(record: Record) -> str:
    parts = record.metric.parts
    return parts[0].phrase(record.load) if parts else record.metric.title


def _draw_panel(axes: Any, panel: Bars, cases: Mapping[str, Record]) -> None:
    libraries = all_measured(cases.values(), baselines_last=True)
    width = 0.8 / max(1, len(libraries))
    for place, name in enumerate(libraries):
        found = [record.spread(name, panel.measure) for record in cases.values()]
        known = [(group, one) for group, one in enumerate(found) if one is not None]
        below = [one["median"] - one["q1"] for _, one in known]
        above = [one["q3"] - one["median"] for _, one in known]
        axes.bar(
            [group + (place - (len(libraries) - 1) / 2) * width for group, _ in known],
            [one["median"] for _, one in known],
            width,
            yerr=[below, above],
            color=_color(name),
            label=name,
            error_kw={"linewidth": 0.7},
        )
    labels = [textwrap.fill(case, LABEL_LETTERS, break_long_words=False) for case in cases]
    axes.set(yscale=panel.scale, ylabel=panel.label, xticks=range(len(cases)), xticklabels=labels)
    if len(cases) > MAX_GROUPS:
        axes.tick_params(axis="x", labelsize="x-small")
    if "seconds" in panel.measure or "bytes" in panel.measure:
        _set_unit(axes.yaxis, "s" if "seconds" in panel.measure else "B")


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
        for name in (names.OURS_IN_THREADS, names.INLINE):
            points = ratios_to(name, cases)
            if points and (at := break_even(points)):
                axes.axvline(at, color=_color(name), linewidth=0.8, linestyle=":")
        axes.set(xscale="log", ylim=(0, None), xlabel="work of an item", title=words)
        _set_unit(axes.xaxis, "s")
    panels[0].set_ylabel("of what the cores can do")


def _cores(records: Sequence[Record], figure: Any, *, per_worker: int = 1) -> None:
    """Draw the share of the cores' time that is spent in batches, by their length."""
    found = [record for record in records if record.scenario == "cores_busy"]
    workers = max((record.load["workers"] for record in found), default=0)
    loads = (workers, per_worker * workers)
    cases = [one for one in found if (one.load["workers"], one.load["in_flight"]) == loads]
    axes = figure.subplots()
    _draw_lines(axes, cases, lambda record: record.load["batch_ms"] / 1e3, _spread_of("busy"))
    axes.set(xscale="log", ylim=(0, 1.02), xlabel="length of a batch")
    axes.set_ylabel(f"share of {workers} cores")
    _set_unit(axes.xaxis, "s")


def _latency(records: Sequence[Record], figure: Any) -> None:
    """Draw the waits of callers below the capacity, and the results in time above it."""
    below, above = figure.subplots(1, 2)
    cases = [one for one in records if one.scenario == "latency" and one.load["job"] == "python"]
    dotted = {"label": None, "linestyle": ":"}
    for measure, changes in (("p99_seconds", {}), ("p50_seconds", dotted)):
        _draw_lines(
            below,
            cases,
            lambda record: record.load["of_capacity"],
            _spread_of(measure),
            has_band=False,
            **changes,
        )
    below.set(yscale="log", xlabel="load, of the capacity", ylabel="p99 (dotted: p50)")
    _set_unit(below.yaxis, "s")
    below.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    limited, unlimited = "with deadlines and limits", "without deadlines and limits"
    lines = ((names.OURS, limited, _color(names.OURS)), (unlimited, unlimited, "#d62728"))
    for record in (record for record in records if record.scenario == "overload"):
        times = range(1, record.load["seconds"] + 1)
        for name, label, color in lines:
            good = [median(record.rounds(name, f"good_{time - 1}")) for time in times]
            above.plot(times, good, color=color, marker="o", label=label)
    above.axhline(1.0, color="0.7", linewidth=0.8)
    above.set(xlabel="second of twice the capacity", ylim=(0, 1.4))
    above.set_ylabel("results in time, of capacity")


def _draw_lines(
    axes: Any,
    records: Sequence[Record],
    x: Callable[[Record], float],
    y: Callable[[Record, str], Spread | None],
    *,
    has_band: bool = True,
    **changes: Any,
) -> None:
    """Draw a line of medians for each library, with a band of quartiles."""
    for name in all_measured(records, baselines_last=True):
        known = [(x(record), found) for record in records if (found := y(record, name))]
        xs = [one for one, _ in known]
        low, middle, high = ([one[key] for _, one in known] for key in ("q1", "median", "q3"))
        style = {
            "color": _color(name),
            "label": name,
            "marker": "o",
            "linestyle": "--" if name in names.BASELINES else "-",
            "zorder": 3 if name == names.OURS else 2,
        }
        axes.plot(xs, middle, **{**style, **changes})
        if has_band:
            axes.fill_between(xs, low, high, color=_color(name), alpha=0.15, linewidth=0)


def _spread_of(measure: str) -> Callable[[Record, str], Spread | None]:
    return lambda record, name: record.spread(name, measure)


def _color(name: str) -> str:
    return _COLORS.get(name, "0.4")


def _set_unit(axis: Any, unit: str) -> None:
    from matplotlib.ticker import EngFormatter, NullFormatter

    axis.set_major_formatter(EngFormatter(unit))
    axis.set_minor_formatter(NullFormatter())


def _add_legend(figure: Any) -> None:
    """Add one legend for all panels."""
    handles: dict[str, Any] = {}
    for axes in figure.axes:
        found, labels = axes.get_legend_handles_labels()
        handles.update(zip(labels, found, strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside right")


PLOTS: dict[str, Callable[[Sequence[Record], Any], None]] = {
    "crossing": _crossing,
    "cores": _cores,
    "pool": functools.partial(_cores, per_worker=2),
    "latency": _latency,
    **{name: functools.partial(_draw_bars, panels) for name, panels in BARS.items()},
}
