"""What all plots have in common: style, colors, axes and the legend."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from benchmarks.libraries import names

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

STYLE: Any = {
    "svg.hashsalt": "async_batcher",  # makes the files reproducible
    "svg.fonttype": "none",
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "lines.markersize": 4.5,
}
COLORS = {
    names.OURS: "#1f77b4",
    names.OURS_IN_THREADS: "#7fc1e8",
    names.ONE_BY_ONE: "#4b6fd6",
    names.OURS_ISOLATING: "#08306b",
    names.OLD: "#d62728",
    **dict.fromkeys((names.STANDARD_POOL, names.PROCESSES_BY_HAND), "#ff7f0e"),
    **dict.fromkeys((names.THREADS, names.THREADS_BY_HAND), "#8c564b"),
    "loky": "#2ca02c",
    names.RAY_SERVE: "#0b7a75",
    "pebble": "#9467bd",
    "aiomultiprocess": "#c49c94",
    "joblib": "#17becf",
    names.BATCHED: "#e377c2",
    names.AIODATALOADER: "#bcbd22",
    **dict.fromkeys((names.BY_HAND, names.INLINE), "#7f7f7f"),  # both are no batching
    names.BARE_FUTURES: "#bdbdbd",
    names.BARE_PIPE: "#4d4d4d",
    names.BARE_LOOP: "#a6a6a6",
    names.BARE_LOOP_AHEAD: "#8f8f8f",
    names.BEST_OF_GRID: "#636363",
    names.MEMORY_COPY: "#c7c7c7",
}
OTHER_COLOR = "0.4"


def distances(spreads: Sequence[Mapping[str, float]]) -> list[list[float]]:
    """Return how far the quartiles are from the medians."""
    below = [one["median"] - one["q1"] for one in spreads]
    return [below, [one["q3"] - one["median"] for one in spreads]]


def micro(written: str) -> str:
    """Write microseconds as the axes do."""
    return written.replace(" us", " µs")


def color(name: str) -> str:
    """Return the color of a library."""
    return COLORS.get(name, OTHER_COLOR)


def set_unit(axis: Any, measure: str) -> None:
    """Label an axis with seconds or bytes, if the measure is one of these."""
    from matplotlib.ticker import EngFormatter, NullFormatter

    unit = "s" if "seconds" in measure else "B" if "bytes" in measure else None
    if unit is not None:
        axis.set_major_formatter(EngFormatter(unit))
        axis.set_minor_formatter(NullFormatter())


def set_few_decades(axes: Any, low: float, high: float) -> None:
    """Make the horizontal axis of a narrow panel logarithmic, with few labels."""
    from matplotlib.ticker import LogLocator, NullLocator

    axes.set(xscale="log", xlim=(low, high))
    axes.xaxis.set_major_locator(LogLocator(numticks=3))
    axes.xaxis.set_minor_locator(NullLocator())


def set_loads(axes: Any, loads: Sequence[float]) -> None:
    """Make the horizontal axis logarithmic, with a label at each load that was measured."""
    from matplotlib.ticker import NullLocator

    axes.set_xscale("log")
    axes.set_xticks(sorted(set(loads)))
    axes.xaxis.set_minor_locator(NullLocator())
    set_unit(axes.xaxis, "seconds")


def set_percent(axis: Any) -> None:
    """Label an axis of values from 0 to 100 in percent."""
    from matplotlib.ticker import PercentFormatter

    axis.set_major_formatter(PercentFormatter(decimals=0))


def add_legend(figure: Any) -> None:
    """Add one legend for all panels, of what is drawn. Panels that name each bar have none."""
    handles: dict[str, Any] = {}
    for axes in figure.axes:
        found, labels = axes.get_legend_handles_labels()
        handles.update(zip(labels, found, strict=True))
    if handles:
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4)
