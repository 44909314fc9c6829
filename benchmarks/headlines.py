"""The few figures that the README names (pure)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks.children import OLD, OURS, OURS_IN_THREADS, STANDARD_POOL
from benchmarks.crossings import crossings
from benchmarks.figures import figure, median, number, ratio

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from benchmarks.figures import Facts

_LOOP = "asyncio"


class _Headline(NamedTuple):
    """A figure: of which benchmark, against whom, and the words around ``{ours}``, ``{its}`` and ``{ratio}``."""

    question: str
    where: Mapping[str, Any]
    rival: str
    text: str


HEADLINES = (
    _Headline(
        "clients",
        {"clients": 64},
        OLD,
        "An item's way through the batcher costs {ours} with 64 clients: {ratio} of what 0.2.2 takes ({its}).",
    ),
    _Headline("many", {}, OLD, "With `process_many` an item costs {ours}: {ratio} of what 0.2.2 takes ({its})."),
    _Headline(
        "round_trip",
        {"payload": "64 small ints"},
        STANDARD_POOL,
        "64 small ints are at a worker and back in {ours}: {ratio} of what `ProcessPoolExecutor` takes ({its}).",
    ),
    _Headline(
        "round_trip",
        {"payload": "10 MB array"},
        STANDARD_POOL,
        "An array of 10 MB is there and back in {ours}: {ratio} of what `ProcessPoolExecutor` takes ({its}).",
    ),
    _Headline(
        "job",
        {"job": "texts"},
        OURS_IN_THREADS,
        "A text classifier of scikit-learn takes {ours} a text in two processes: {ratio} of what two threads take ({its}).",
    ),
)


def headlines(found: Sequence[Facts]) -> str:
    """A line for each figure that was measured, on asyncio."""
    lines = [f"- {text}" for headline in HEADLINES if (text := _said(headline, found)) is not None]
    crossing = [facts for facts in found if facts["question"] == "crossing" and facts["loop"] == _LOOP]
    return "\n".join([*lines, crossings(crossing)] if crossing else lines)


def _said(headline: _Headline, found: Sequence[Facts]) -> str | None:
    for facts in found:
        is_it = facts["question"] == headline.question and facts["loop"] == _LOOP
        if is_it and all(facts["load"].get(key) == value for key, value in headline.where.items()):
            ratios = ratio(facts, headline.rival)
            if ratios is not None:
                ours, its = median(facts, OURS), median(facts, headline.rival)
                measure = facts["measure"]
                return headline.text.format(ours=figure(measure, ours), its=figure(measure, its), ratio=number(ratios["median"]))
    return None
