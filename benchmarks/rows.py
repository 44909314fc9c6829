"""A contest as rows that `pytest-benchmark compare` shows: one for each library, in a group for each scenario (pure)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from benchmarks.children import OURS
from benchmarks.figures import title

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


def by_library(benchmark: dict[str, Any], summarize: Callable[[Sequence[float]], dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of one benchmark in a results file.

    Args:
        benchmark: The entry, with what a `Contest` recorded. One that is not of a contest is its own row.
        summarize: What pytest-benchmark says of the rounds: min, max, mean and so on.

    Returns:
        Our row, which keeps what was recorded, and a row for each rival that took part.
    """
    facts = benchmark["extra_info"]
    if "rivals" not in facts:
        return [benchmark]
    group = title(facts)
    rows = [{**benchmark, "group": group, "name": OURS}]
    for name, rival in facts["rivals"].items():
        if name == OURS or "data" not in rival:
            continue
        stats = {**summarize(rival["data"][facts["measure"]]), "iterations": 1}
        about = {"library": name, "version": rival.get("version", "-"), "mode": facts["mode"]}
        fullname = f"{benchmark['fullname']}[{name}]"
        rows.append({**benchmark, "group": group, "name": name, "fullname": fullname, "extra_info": about, "stats": stats})
    return rows
