"""The plots of the page, from the saved results; drawn by ``python -m benchmarks.report``."""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING, Any

from benchmarks.children import OURS
from benchmarks.figures import answers

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from benchmarks.figures import Results

_LOOP = "asyncio"  # of the two, the one that is drawn
_STYLE: Any = {
    "svg.hashsalt": "async_batcher",  # or the same figures give another file each time
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def draw(results: dict[str, Results], folder: Path) -> None:
    """Draw every plot whose results are there, as SVG."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    folder.mkdir(exist_ok=True)
    with mpl.rc_context(_STYLE):
        for name, plot in PLOTS.items():
            if name in results:
                figure = Figure(figsize=(7, 2.6), layout="constrained")
                plot(results[name], figure)
                figure.savefig(folder / f"{name}.svg", metadata={"Date": None, "Creator": None})


def _overload(results: Results, figure: Any) -> None:
    """Goodput and memory, second by second."""
    facts = next(facts for facts in answers(results, "overload") if facts["loop"] == _LOOP)
    goodput, memory = figure.subplots(1, 2)
    for name, color in ((OURS, "tab:blue"), ("without deadlines and limits", "tab:red")):
        data = facts["rivals"][name]["data"]
        label = "with deadlines and limits" if name == OURS else name
        seconds = range(1, facts["load"]["seconds"] + 1)
        goodput.plot(seconds, [median(data[f"good_{second - 1}"]) for second in seconds], color=color, label=label, marker=".")
        memory.plot(seconds, [median(data[f"memory_{second - 1}"]) for second in seconds], color=color, marker=".")
    goodput.axhline(1.0, color="0.7", linewidth=0.8)
    goodput.set(xlabel="second of the overload", ylabel="answers in time, of capacity", ylim=(0, 1.2))
    goodput.legend(loc="center right", frameon=False)
    memory.set(xlabel="second of the overload", ylabel="memory grown, MB", ylim=(0, None))


def _many(results: Results, figure: Any) -> None:
    """Memory, as a million items pass."""
    facts = next(facts for facts in answers(results, "stream") if facts["loop"] == _LOOP)
    axes = figure.subplots()
    for name, color in ((OURS, "tab:blue"), ("process_many, all at once", "tab:red")):
        data = facts["rivals"][name]["data"]
        held = [median(data[key]) for key in sorted((k for k in data if k.removeprefix("memory_").isdecimal()), key=_number)]
        passed = [facts["load"]["items"] * (part + 1) / len(held) for part in range(len(held))]
        axes.plot(passed, held, color=color, label="map" if name == OURS else name, marker=".")
    axes.set(xlabel="items whose results have been consumed", ylabel="memory grown, MB", xlim=(0, None), ylim=(0, None))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.legend(loc="center right", frameon=False)


def _number(key: str) -> int:
    return int(key.removeprefix("memory_"))


PLOTS: dict[str, Callable[[Results, Any], None]] = {"many": _many, "overload": _overload}
