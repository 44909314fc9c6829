"""The plot of ``tune``: throughput against latency, a line for each configuration."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from async_batcher.cli._errors import CommandError
from async_batcher.cli.tune.model import config_label

if TYPE_CHECKING:
    from async_batcher.cli.tune.model import Measurement, Mode
    from async_batcher.cli.tune.report import TuneReport

_SUFFIXES = (".svg", ".png")
_STYLE: Any = {
    "svg.hashsalt": "async_batcher",  # the same figures give the same file
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
_COLORS: dict[Mode, str] = {"threads": "Oranges", "processes": "Blues"}  # darker: more workers
_LIGHTEST, _DARKEST = 0.45, 0.95  # of a colour map; lighter ones cannot be seen on white


def check_plot(path: str) -> None:
    """Find out what would fail, before anything is measured."""
    file = Path(path)
    why = ""
    if file.suffix not in _SUFFIXES:
        why = f" {path!r}: must be a file whose name ends in {' or '.join(_SUFFIXES)}"
    elif not file.parent.is_dir():
        why = f" {path!r}: there is no folder {str(file.parent)!r}"
    elif file.is_dir():
        why = f" {path!r}: is a folder"
    elif not os.access(file if file.exists() else file.parent, os.W_OK):
        why = f" {path!r}: cannot be written"
    elif importlib.util.find_spec("matplotlib") is None:
        why = ": matplotlib is not installed; pip install 'async-batcher[tune]'"
    if why:
        msg = f"--plot{why}"
        raise CommandError(msg)


def draw(report: TuneReport, path: str) -> None:
    """Draw it, as SVG or PNG, by the suffix of the file.

    Raises:
        OSError: The file cannot be written.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(8, 4), layout="constrained")
        axes = figure.subplots()
        for mode, colors in _COLORS.items():
            counts = sorted({point.workers for point in report.points if point.mode == mode})
            step = (_DARKEST - _LIGHTEST) / max(1, len(counts) - 1)
            for lighter, workers in enumerate(reversed(counts)):
                points = [p for p in report.points if p.config == (mode, workers)]
                color = mpl.colormaps[colors](_DARKEST - lighter * step)
                _line(axes, points, config_label(mode, workers), color)
        _finish(axes, report)
        is_svg = path.endswith(".svg")
        metadata = {"Date": None, "Creator": None} if is_svg else {"Software": None}
        figure.savefig(path, metadata=metadata, dpi=150)


def _line(axes: Any, points: list[Measurement], label: str, color: Any) -> None:
    """Connect points in the order of their sizes, each of which is written beside its point."""
    at = [(1000 * point.latency, point.throughput) for point in points]
    axes.plot(*zip(*at, strict=True), color=color, marker=".", label=label)
    for point, position in zip(points, at, strict=True):
        axes.annotate(
            f"{point.batch_size}", position, xytext=(3, 3), textcoords="offset points",
            color=color, fontsize=7,
        )  # fmt: skip


def _finish(axes: Any, report: TuneReport) -> None:
    """Add what is recommended, what it is compared with, and the axes."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    point = report.advice.point
    axes.plot(
        1000 * point.latency, point.throughput, marker="o", markersize=11, fillstyle="none",
        color="tab:red", linestyle="none", label="recommended",
    )  # fmt: skip
    thin = {"linewidth": 0.8}
    inline = max((p for p in report.points if p.mode == "inline"), key=lambda p: p.throughput)
    label = f"inline, batches of {inline.batch_size}"
    axes.axhline(inline.throughput, color="0.6", linestyle="--", label=label, **thin)
    if report.target_latency is not None:
        target = 1000 * report.target_latency
        axes.axvline(target, color="tab:red", linestyle=":", label="target", **thin)
    title = f"{report.function.name}, by batch size"
    axes.set(xscale="log", yscale="log", xlabel="latency, ms", ylabel="items a second", title=title)
    for axis, subs in ((axes.xaxis, (1, 2, 5)), (axes.yaxis, (1, 1.5, 2, 3, 5, 7))):
        axis.set_major_locator(LogLocator(subs=subs))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
        axis.set_minor_locator(NullLocator())
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
