"""How figures are found in a results file and how they are written (pure)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

from benchmarks.children import OURS
from benchmarks.questions import QUESTIONS
from benchmarks.spread import spread

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

Results: TypeAlias = dict[str, Any]  # a file of pytest-benchmark
Facts: TypeAlias = dict[str, Any]  # what a `Contest` recorded of one benchmark
Rival: TypeAlias = dict[str, Any]  # the same of one rival in it


def answers(results: Results, question: str | None = None) -> list[Facts]:
    """The facts of each benchmark, in the order in which they ran."""
    found = [benchmark["extra_info"] for benchmark in results["benchmarks"]]
    return [facts for facts in found if question in (None, facts["question"])]


def title(facts: Facts) -> str:
    """Which benchmark it is."""
    question = QUESTIONS[facts["question"]]
    loop = [] if facts["loop"] == "none" else [facts["loop"]]
    return ", ".join([question.title, *(part.said(facts["load"]) for part in question.parts), *loop])


def ranked(facts: Facts, *, by_measure: bool = True) -> list[tuple[str, Rival]]:
    """The rivals, the best first; those that are not available last."""
    rivals = list(facts["rivals"].items())
    if not by_measure:
        return rivals
    measure = facts["measure"]
    return sorted(rivals, key=lambda rival: rival[1]["spread"][measure]["median"] if "spread" in rival[1] else float("inf"))


def called(name: str, rival: Rival) -> str:
    """A rival's name and version; ours stands out."""
    version = rival.get("version", "-")
    if name == OURS:
        return f"**{OURS} {version}**"
    return name if version == "-" or version in name or name == "import asyncio" else f"{name} {version}"


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


def quartiles(measure: str, known: dict[str, float]) -> str:
    """From the first to the third."""
    return f"{figure(measure, known['q1'])} to {figure(measure, known['q3'])}"


def figure(measure: str, value: float) -> str:
    """A value as its measure wants it: seconds, counts, or shares."""
    if "seconds" in measure:
        return seconds(value)
    return f"{value:g}" if value == int(value) else number(value)


def number(value: float) -> str:
    """Two places, or one significant digit."""
    return f"{value:.2f}" if value >= 0.01 else f"{value:.1g}"


def seconds(value: float) -> str:
    """Three significant digits in a unit that suits."""
    factor, unit = next(((f, u) for f, u in ((1.0, "s"), (1e3, "ms")) if abs(value) * f >= 1), (1e6, "us"))
    scaled = value * factor
    digits = 0 if abs(scaled) >= 100 else 1 if abs(scaled) >= 10 else 2
    return f"{scaled:.{digits}f} {unit}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
