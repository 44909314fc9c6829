"""The plot of `tune`: throughput against latency, a line for each way to run batches."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from async_batcher._tuning import way

if TYPE_CHECKING:
    from async_batcher._advice import Tuning
    from async_batcher._tuning import Mode, Point

_SUFFIXES = (".svg", ".png")
_STYLE: Any = {
    "svg.hashsalt": "async_batcher",  # or the same figures give another file each time
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
_COLORS: dict[Mode, str] = {"threads": "Oranges", "processes": "Blues"}  # the darker, the more workers
_LIGHTEST, _DARKEST = 0.45, 0.95  # of a colour map; lighter ones cannot be seen on white


def check_plot(path: str) -> None:
    """Find out what will fail before anything is measured.

    Raises:
        ValueError: It is no file that can be written, or of no known kind.
        ImportError: matplotlib is not installed.
    """
    file = Path(path)
    if file.suffix not in _SUFFIXES:
        msg = f"--plot {path!r}: must be a file whose name ends in {' or '.join(_SUFFIXES)}"
        raise ValueError(msg)
    if not file.parent.is_dir():
        msg = f"--plot {path!r}: there is no folder {str(file.parent)!r}"
        raise ValueError(msg)
    if file.is_dir() or not os.access(file if file.exists() else file.parent, os.W_OK):
        msg = f"--plot {path!r}: {'is a folder' if file.is_dir() else 'cannot be written'}"
        raise ValueError(msg)
    if importlib.util.find_spec("matplotlib") is None:
        msg = "--plot: matplotlib is not installed; pip install 'async-batcher[tune]'"
        raise ImportError(msg)


def draw(tuning: Tuning, path: str) -> None:
    """Draw it, as SVG or PNG, by the file's name.

    Raises:
        OSError: The file cannot be written.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(8, 4), layout="constrained")
        axes = figure.subplots()
        for mode, colors in _COLORS.items():
            counts = sorted({point.workers for point in tuning.points if point.mode == mode})
            for step, workers in enumerate(counts, 1):
                shade = _DARKEST - (_DARKEST - _LIGHTEST) * (len(counts) - step) / max(1, len(counts) - 1)
                points = [point for point in tuning.points if (point.mode, point.workers) == (mode, workers)]
                _line(axes, points, way(mode, workers), mpl.colormaps[colors](shade))
        _finish(axes, tuning)
        metadata = {"Date": None, "Creator": None} if path.endswith(".svg") else {"Software": None}
        figure.savefig(path, metadata=metadata, dpi=150)


def _line(axes: Any, points: list[Point], label: str, color: Any) -> None:
    """In the order of their sizes, each of which is written beside its point."""
    axes.plot(
        [1000 * point.latency for point in points], [point.throughput for point in points], color=color, marker=".", label=label
    )
    for point in points:
        at = (1000 * point.latency, point.throughput)
        axes.annotate(f"{point.batch_size}", at, xytext=(3, 3), textcoords="offset points", color=color, fontsize=7)


def _finish(axes: Any, tuning: Tuning) -> None:
    """What is recommended, what it is compared with, and the axes."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    point = tuning.advice.point
    at = (1000 * point.latency, point.throughput)
    axes.plot(*at, marker="o", markersize=11, fillstyle="none", color="tab:red", linestyle="none", label="recommended")
    inline = max((point for point in tuning.points if point.mode == "inline"), key=lambda point: point.throughput)
    axes.axhline(inline.throughput, color="0.6", linewidth=0.8, linestyle="--", label=f"inline, batches of {inline.batch_size}")
    if tuning.target_latency is not None:
        axes.axvline(1000 * tuning.target_latency, color="tab:red", linewidth=0.8, linestyle=":", label="target")
    axes.set(xscale="log", yscale="log", xlabel="latency, ms", ylabel="items a second", title=f"{tuning.name}, by batch size")
    for axis, subs in ((axes.xaxis, (1, 2, 5)), (axes.yaxis, (1, 1.5, 2, 3, 5, 7))):
        axis.set_major_locator(LogLocator(subs=subs))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
        axis.set_minor_locator(NullLocator())
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
