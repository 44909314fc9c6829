"""The plots of the pages, from the saved results, one for each file of them; drawn by ``python -m benchmarks.report``."""

from __future__ import annotations

import hashlib
import json
from statistics import median
from typing import TYPE_CHECKING, Any

from benchmarks.children import BATCHED, BY_HAND, OLD, ONE_BY_ONE, OURS, OURS_IN_THREADS, OURS_ISOLATING, RAY_SERVE, STANDARD_POOL
from benchmarks.crossings import INLINE, crossing, ratios
from benchmarks.figures import answers
from benchmarks.questions import JOBS, QUESTIONS
from benchmarks.tables import BASELINES, in_order

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    from benchmarks.figures import Facts, Results

_LOOP = "asyncio"  # of the two, the one that is drawn
_MANY = 6  # groups of bars whose labels still fit beside one another
_STYLE: Any = {
    "svg.hashsalt": "async_batcher",  # or the same figures give another file each time
    "svg.fonttype": "none",
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "lines.markersize": 4,
}
_COLORS = {
    OURS: "#1f77b4",
    OURS_IN_THREADS: "#7fc1e8",
    ONE_BY_ONE: "#7fc1e8",
    OURS_ISOLATING: "#7fc1e8",
    OLD: "#d62728",
    STANDARD_POOL: "#ff7f0e",
    "ProcessPoolExecutor by hand": "#ff7f0e",
    "ThreadPoolExecutor by hand": "#8c564b",
    "ThreadPoolExecutor": "#8c564b",
    "loky": "#2ca02c",
    "pebble": "#9467bd",
    "aiomultiprocess": "#e377c2",
    "joblib": "#17becf",
    "aiodataloader": "#bcbd22",
    BATCHED: "#e377c2",
    RAY_SERVE: "#2ca02c",
}
_GREYS = {"bare pipe": "0.6", "bare loop": "0.6", "memory copy": "0.8", "bare futures": "0.8", BY_HAND: "0.6", "inline": "0.6"}


def draw(files: Mapping[str, Results], folder: Path) -> None:
    """Draw every plot whose results are there, as SVG."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    folder.mkdir(exist_ok=True)
    with mpl.rc_context(_STYLE):
        for name, plot in PLOTS.items():
            if name in files:
                figure = Figure(figsize=(7.2, 2.9), layout="constrained")
                found = in_order(answers([files[name]]))
                plot([facts for facts in found if facts["loop"] in (_LOOP, "none")], figure)
                about = {"Date": None, "Creator": None, "Description": seal(files[name])}
                figure.savefig(folder / f"{name}.svg", metadata=about)


def seal(results: Results) -> str:
    """What a plot says of the results that it was drawn from, so that a stale one shows."""
    content = json.dumps(answers([results]), sort_keys=True).encode()
    return f"results {hashlib.sha256(content).hexdigest()[:16]}"


def _crossing(found: Sequence[Facts], figure: Any) -> None:
    """The share of what two cores could do, by the work of an item; and where processes overtake threads and a plain call."""
    for axes, (job, words) in zip(figure.subplots(1, 2, sharey=True), JOBS.items(), strict=True):
        cases = [facts for facts in found if facts["load"]["job"] == job]
        for name in _rivals(cases):
            had = _those_of(name, cases)
            xs = [facts["load"]["item_us"] / 1e6 for facts in had]
            at_best = [x / facts["load"]["workers"] for x, facts in zip(xs, had, strict=True)]
            spreads = [facts["rivals"][name]["spread"]["seconds_per_item"] for facts in had]
            axes.plot(xs, [best / one["median"] for best, one in zip(at_best, spreads, strict=True)], **_line(name))
            low, high = ([best / one[q] for best, one in zip(at_best, spreads, strict=True)] for q in ("q3", "q1"))
            axes.fill_between(xs, low, high, color=_color(name), alpha=0.15, linewidth=0)
        for name in (OURS_IN_THREADS, INLINE):
            points = ratios(cases, job, _LOOP, name)
            if points and (at := crossing(points)):
                axes.axvline(at, color=_color(name), linewidth=0.8, linestyle=":")
        axes.set(xscale="log", ylim=(0, None), xlabel="work of an item", title=words)
        _in_units(axes.xaxis, "s")
    figure.axes[0].set_ylabel("of what the cores can do")
    _explain(figure)


def _front_end(found: Sequence[Facts], figure: Any) -> None:
    """What an item costs, in every way of asking."""
    cases = {
        (f"{facts['load']['clients']:,} clients" if "clients" in facts["load"] else QUESTIONS[facts["question"]].title): facts
        for facts in found
        if facts["question"] in ("clients", "gather", "many")
    }
    _bars(figure.subplots(), figure, cases, "seconds_per_item", "time per item")


def _trips(found: Sequence[Facts], figure: Any) -> None:
    """A trip there and back, by what is sent."""
    cases = {facts["load"]["payload"]: facts for facts in found if facts["question"] == "round_trip"}
    _bars(figure.subplots(), figure, cases, "seconds", "there and back")


def _cores(found: Sequence[Facts], figure: Any) -> None:
    """The share of the cores' time that is spent in batches, by how long a batch is."""
    workers = max((facts["load"]["workers"] for facts in found), default=0)
    cases = [facts for facts in found if facts["load"]["workers"] == facts["load"]["in_flight"] == workers]
    axes = figure.subplots()
    for name in _rivals(cases):
        had = _those_of(name, cases)
        spreads = [facts["rivals"][name]["spread"]["busy"] for facts in had]
        xs = [facts["load"]["batch_ms"] / 1e3 for facts in had]
        axes.plot(xs, [one["median"] for one in spreads], **_line(name))
        axes.fill_between(
            xs, [one["q1"] for one in spreads], [one["q3"] for one in spreads], color=_color(name), alpha=0.15, linewidth=0
        )
    axes.set(xscale="log", ylim=(0, 1.02), xlabel="time of a batch", ylabel=f"{workers} cores kept busy")
    _in_units(axes.xaxis, "s")
    _explain(figure)


def _latency(found: Sequence[Facts], figure: Any) -> None:
    """What callers wait for below the capacity, and what comes in time above it."""
    below, above = figure.subplots(1, 2)
    cases = [facts for facts in found if facts["question"] == "latency" and facts["load"]["job"] == "python"]
    for name in _rivals(cases):
        had = _those_of(name, cases)
        spreads = [facts["rivals"][name]["spread"] for facts in had]
        xs = [facts["load"]["of_capacity"] for facts in had]
        below.plot(xs, [one["p99_seconds"]["median"] for one in spreads], **_line(name))
        below.plot(xs, [one["p50_seconds"]["median"] for one in spreads], **{**_line(name), "label": None, "linestyle": ":"})
    below.set(yscale="log", xlabel="load, of the capacity", ylabel="p99 (dotted: p50)")
    _in_units(below.yaxis, "s")
    below.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    for facts in (facts for facts in found if facts["question"] == "overload"):
        for name, color in ((OURS, _color(OURS)), ("without deadlines and limits", "#d62728")):
            data = facts["rivals"][name]["data"]
            seconds = range(1, facts["load"]["seconds"] + 1)
            label = "with deadlines and limits" if name == OURS else name
            above.plot(seconds, [median(data[f"good_{one - 1}"]) for one in seconds], color=color, marker="o", label=label)
    above.axhline(1.0, color="0.7", linewidth=0.8)
    above.set(xlabel="second of twice the load", ylabel="answers in time, of capacity", ylim=(0, 1.4))
    _explain(figure)


def _failures(found: Sequence[Facts], figure: Any) -> None:
    """Who is hurt by a bad item, and how long a killed worker is felt."""
    hurt, failed, felt = figure.subplots(1, 3, width_ratios=(3, 1, 1))
    cases = {_place(facts): facts for facts in found if facts["question"] == "poison"}
    _bars(hurt, figure, cases, "hurt", "innocent callers hurt, of 63", scale="linear")
    killed = _only("a killed worker", found, "killed")
    _bars(failed, figure, killed, "failed_calls", "calls that failed", scale="linear")
    _bars(felt, figure, killed, "back_seconds", "until all is as before", scale="linear")


def _idle(found: Sequence[Facts], figure: Any) -> None:
    """What there is to pay before anything is done."""
    start, memory, idle = figure.subplots(1, 3, width_ratios=(1, 1, 2))
    started = _only("two workers", found, "start")
    _bars(start, figure, started, "first_seconds", "start to first result", scale="linear")
    _bars(memory, figure, started, "worker_bytes", "bytes of a worker", scale="linear")
    cases = {_place(facts): facts for facts in found if facts["question"] == "idle"}
    _bars(idle, figure, cases, "cpu_seconds", "CPU time of ten idle seconds")


def _jobs(found: Sequence[Facts], figure: Any) -> None:
    """How long an item takes in all, and what a caller waits for."""
    took, waited = figure.subplots(1, 2)
    parts = QUESTIONS["job"].parts
    cases = {parts[0].cell(facts["load"]): facts for facts in found}
    _bars(took, figure, cases, "seconds_per_item", "time per item", scale="linear")
    _bars(waited, figure, cases, "p99_seconds", "p99 of a call", scale="linear")


def _only(called: str, found: Sequence[Facts], question: str) -> dict[str, Facts]:
    """The one case of a question, if it was measured."""
    cases = [facts for facts in found if facts["question"] == question]
    return {called: cases[0]} if cases else {}


def _place(facts: Facts) -> str:
    return str(facts["load"]["place"])


# What they have in common.


def _bars(axes: Any, figure: Any, cases: Mapping[str, Facts], measure: str, label: str, *, scale: str = "log") -> None:
    """A group of bars for each case, a bar for each rival, with its quartiles."""
    names = _rivals(cases.values())
    width = 0.8 / max(1, len(names))
    for place, name in enumerate(names):
        spreads = [facts["rivals"].get(name, {}).get("spread", {}).get(measure) for facts in cases.values()]
        had = [(at, one) for at, one in enumerate(spreads) if one is not None]
        middle = [one["median"] for _, one in had]
        errors = [[one["median"] - one["q1"] for _, one in had], [one["q3"] - one["median"] for _, one in had]]
        at = [group + (place - (len(names) - 1) / 2) * width for group, _ in had]
        axes.bar(at, middle, width, yerr=errors, color=_color(name), label=name, error_kw={"linewidth": 0.7})
    axes.set(yscale=scale, ylabel=label, xticks=range(len(cases)), xticklabels=[_wrapped(case) for case in cases])
    if len(cases) > _MANY:
        axes.tick_params(axis="x", labelsize="x-small")
    if "seconds" in measure or "bytes" in measure:
        _in_units(axes.yaxis, "s" if "seconds" in measure else "B")
    _explain(figure)


def _in_units(axis: Any, unit: str) -> None:
    from matplotlib.ticker import EngFormatter, NullFormatter

    axis.set_major_formatter(EngFormatter(unit))
    axis.set_minor_formatter(NullFormatter())


def _explain(figure: Any) -> None:
    """One legend for all, beside them."""
    labels = {label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    for legend in figure.legends:
        legend.remove()
    figure.legend(labels.values(), labels.keys(), loc="outside right")


def _those_of(name: str, cases: Iterable[Facts]) -> list[Facts]:
    """The cases in which a rival has measured something."""
    return [facts for facts in cases if "spread" in facts["rivals"].get(name, {})]


def _rivals(cases: Iterable[Facts]) -> list[str]:
    """Who has measured something, ours first and the baselines last."""
    names = dict.fromkeys(name for facts in cases for name, rival in facts["rivals"].items() if "spread" in rival)
    return sorted(names, key=lambda name: (name in BASELINES, name != OURS))


def _line(name: str) -> dict[str, Any]:
    dashes = "--" if name in BASELINES else "-"
    return {"color": _color(name), "label": name, "marker": "o", "linestyle": dashes, "zorder": 3 if name == OURS else 2}


def _color(name: str) -> str:
    return _COLORS.get(name) or _GREYS.get(name, "0.4")


def _wrapped(text: str) -> str:
    """In lines of some ten letters."""
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) > 10 and lines[-1]:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)


PLOTS: dict[str, Callable[[Sequence[Facts], Any], None]] = {
    "crossing": _crossing,
    "front_end": _front_end,
    "trips": _trips,
    "cores": _cores,
    "latency": _latency,
    "failures": _failures,
    "idle": _idle,
    "jobs": _jobs,
}
