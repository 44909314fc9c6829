"""The plot of ``tune``: throughput against batch size, a line for each pool."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from async_batcher.cli._errors import CommandError
from async_batcher.cli.tune.model import pool_label

if TYPE_CHECKING:
    from async_batcher.cli.tune.model import Mode
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
        points = {one: found for one, found in report.points.items() if not one.queue_time}
        for mode, colors in _COLORS.items():
            counts = sorted({config.workers for config in points if config.mode == mode})
            step = (_DARKEST - _LIGHTEST) / max(1, len(counts) - 1)
            for lighter, workers in enumerate(reversed(counts)):
                line = [
                    (config.batch_size, found.throughput)
                    for config, found in sorted(points.items())
                    if config.pool == (mode, workers)
                ]
                color = mpl.colormaps[colors](_DARKEST - lighter * step)
                label = pool_label(mode, workers)
                axes.plot(*zip(*line, strict=True), color=color, marker=".", label=label)
        _finish(axes, report)
        is_svg = path.endswith(".svg")
        metadata = {"Date": None, "Creator": None} if is_svg else {"Software": None}
        figure.savefig(path, metadata=metadata, dpi=150)


def _finish(axes: Any, report: TuneReport) -> None:
    """Add what is recommended, and the axes."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    choice = report.choice
    axes.plot(
        choice.config.batch_size, choice.loads[choice.clients].throughput, marker="o",
        markersize=11, fillstyle="none", color="tab:red", linestyle="none", label="recommended",
    )  # fmt: skip
    clients = f"{choice.clients:,} client{'' if choice.clients == 1 else 's'}"
    title = f"{report.function.name} with {clients}"
    axes.set(xscale="log", yscale="log", xlabel="max_batch_size", ylabel="items/s", title=title)
    axes.xaxis.set_major_locator(LogLocator(base=2))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
        axis.set_minor_locator(NullLocator())
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
