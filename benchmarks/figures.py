"""How figures are found in a results file and how they are written (pure)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

from benchmarks.children import DISTRIBUTION, OURS
from benchmarks.questions import QUESTIONS
from benchmarks.spread import spread

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

Results: TypeAlias = dict[str, Any]  # a file of pytest-benchmark
Facts: TypeAlias = dict[str, Any]  # what a `Contest` recorded of one benchmark
Rival: TypeAlias = dict[str, Any]  # the same of one rival in it


def answers(results: Iterable[Results], question: str | None = None) -> list[Facts]:
    """The facts of each contest of some files, in the order in which they ran; the rows of rivals have none."""
    found = [benchmark["extra_info"] for one in results for benchmark in one["benchmarks"]]
    return [facts for facts in found if "question" in facts and question in (None, facts["question"])]


def title(facts: Facts) -> str:
    """Which benchmark it is."""
    case = of_its_question(facts)
    return ", ".join([QUESTIONS[facts["question"]].title, *([case] if case else [])])


def of_its_question(facts: Facts) -> str:
    """Which of its question's benchmarks it is."""
    parts = QUESTIONS[facts["question"]].parts
    loop = [] if facts["loop"] == "none" else [facts["loop"]]
    return ", ".join([*(part.said(facts["load"]) for part in parts), *loop])


def called(name: str, rival: Rival) -> str:
    """A rival's name and version; ours stands out."""
    version = rival.get("version", "-")
    if name == OURS:
        return f"**{OURS} {version}**"
    is_said = version in ("-", *name.split()) or rival.get("distribution") == DISTRIBUTION  # or is another of our own ways
    return name if is_said else f"{name} {version}"


def ratio(facts: Facts, name: str, measure: str | None = None) -> dict[str, float] | None:
    """The spread of the rounds' ratios of our figure to a rival's.

    Args:
        facts: Of which benchmark.
        name: Which rival.
        measure: Which figure; None: the one that is compared.

    Returns:
        None where it is not available.
    """
    rival = facts["rivals"][name]
    if "unavailable" in rival:
        return None
    if measure in (None, facts["measure"]):
        return dict(rival["ours_to_it"])
    ours, its = facts["rivals"][OURS]["data"][measure], rival["data"][measure]
    return spread([own / other for own, other in zip(ours, its, strict=True)])


def median(facts: Facts, name: str, measure: str | None = None) -> float:
    """The median of a rival's rounds."""
    return float(facts["rivals"][name]["spread"][measure or facts["measure"]]["median"])


def compared(ratios: dict[str, float]) -> str:
    """A ratio with its quartiles."""
    return f"{number(ratios['median'])} ({number(ratios['q1'])} to {number(ratios['q3'])})"


def figure(measure: str, value: float) -> str:
    """A value as its measure wants it: seconds, bytes, counts, or shares."""
    if "seconds" in measure:
        return seconds(value)
    if "bytes" in measure:
        return f"{value / 1e6:.1f} MB"
    return f"{value:g}" if value == int(value) else number(value)


def number(value: float) -> str:
    """Two places, or one significant digit."""
    return f"{value:.2f}" if abs(value) >= 0.01 else f"{value:.1g}"


def seconds(value: float) -> str:
    """Three significant digits in a unit that suits."""
    factor, unit = _unit(value)
    return f"{_digits(value * factor)} {unit}"


def within(measure: str, known: dict[str, float]) -> str:
    """The median with its quartiles, in the median's unit."""
    middle, low, high = (known[name] for name in ("median", "q1", "q3"))
    if "seconds" in measure:
        factor, unit = _unit(middle)
        return f"{_digits(middle * factor)} {unit} ({_digits(low * factor)} to {_digits(high * factor)})"
    return f"{figure(measure, middle)} ({figure(measure, low)} to {figure(measure, high)})"


def _unit(value: float) -> tuple[float, str]:
    return next(((f, u) for f, u in ((1.0, "s"), (1e3, "ms")) if abs(value) * f >= 1), (1e6, "us"))


def _digits(value: float) -> str:
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:.{digits}f}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
