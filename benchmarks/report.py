"""The saved results as tables: ``python -m benchmarks.report`` renders BENCHMARK.md, ``--check`` only compares.

A page holds pairs of marks, ``<!-- begin NAME.BLOCK -->`` and ``<!-- end NAME.BLOCK -->``; what stands between them is
generated: BLOCK, a key of `BLOCKS`, from ``results/NAME.json``. No figure is typed.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "BENCHMARK.md"
RESULTS = Path(__file__).parent / "results"
OURS = "async_batcher"

_MARKED = re.compile(r"(<!-- begin (?P<name>\w+)\.(?P<block>\w+) -->\n).*?(<!-- end (?P=name)\.(?P=block) -->)", flags=re.DOTALL)

Results: TypeAlias = dict[str, Any]  # a file of pytest-benchmark


@dataclass(frozen=True)
class Goal:
    """A bound that a question's figure is held against; it is reported, and nothing fails on it.

    Attributes:
        question: Of which question.
        rival: Against whom, as a ratio; None: the bound is in seconds.
        bound: At most this.
        measure: Which measure, where it is not the question's own.
        places: Where batches run, where that matters.
    """

    question: str
    rival: str | None
    bound: float
    measure: str | None = None
    places: tuple[str, ...] | None = None


GOALS = (
    Goal("clients", "async-batcher 0.2.2", 0.30),
    Goal("clients", "aiodataloader", 1.0),
    Goal("gather", "async-batcher 0.2.2", 0.40),
    Goal("lone_item", None, 0.0005, measure="excess_seconds"),
    Goal("stop", None, 0.010),
    Goal("import", "import asyncio", 1.25),
)

TITLES = {
    "clients": "64 clients, an item",
    "gather": "one gather, an item",
    "lone_item": "a lone item",
    "stop": "stop of an idle batcher",
    "idle": "an idle batcher",
    "import": "the import",
}


def render(page: str, results: dict[str, Results]) -> str:
    """Fill in a page.

    Args:
        page: Its text, with marks.
        results: By name, the files' content.

    Returns:
        The text with every marked block generated anew.

    Raises:
        KeyError: A mark names a block or a file that does not exist.
    """

    def filled(match: re.Match[str]) -> str:
        block = BLOCKS[match["block"]](results[match["name"]])
        return f"{match[1]}{block}\n{match[4]}"

    return _MARKED.sub(filled, page)


def load() -> dict[str, Results]:
    """The saved results, by the files' names."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*.json"))}


def main(arguments: list[str]) -> int:
    """Render BENCHMARK.md, or with ``--check`` say whether it is as it would be rendered."""
    before = PAGE.read_text(encoding="utf-8")
    after = render(before, load())
    if arguments == ["--check"]:
        print("BENCHMARK.md agrees with the results" if after == before else "BENCHMARK.md is stale: python -m benchmarks.report")
        return int(after != before)
    PAGE.write_text(after, encoding="utf-8")
    return 0


def _machine(results: Results) -> str:
    """What the figures were measured on, and with which versions."""
    machine, commit = results["machine_info"], results["commit_info"]
    versions = {}
    for _, facts in _answers(results):
        for name, rival in facts["rivals"].items():
            if "version" in rival and rival["version"] != "-":
                versions[name.removesuffix(f" {rival['version']}")] = rival["version"]
            if str(rival.get("loop", "")).startswith("uvloop"):
                versions["uvloop"] = rival["loop"].partition(" ")[2]
    versions.pop("import asyncio", None)
    lines = [
        f"- Machine: {machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB",
        f"- System: {machine['system']} {machine['release']}, {machine['machine']}",
        f"- Python: {machine['python_implementation']} {machine['python_version']}",
        f"- Versions: {', '.join(f'{name} {version}' for name, version in sorted(versions.items()))}",
        f"- Commit: {commit['id'][:12]}{', with changes on top' if commit['dirty'] else ''}; measured {results['datetime'][:10]}",
    ]
    if any(facts["quick"] for _, facts in _answers(results)):
        lines.append("- **A quick run: it shows that the benchmarks work, not how fast anything is.**")
    return "\n".join(lines)


def _losses(results: Results) -> str:
    """Everyone who was faster than us, the worst first, and every goal that was missed."""
    worse = [
        (rival, name, facts)
        for _, facts in _answers(results)
        for name, rival in facts["rivals"].items()
        if facts["question"] not in ("idle", "import") and _ratio(rival) > 1
    ]
    lines = []
    for rival, name, facts in sorted(worse, key=lambda loss: -_ratio(loss[0])):
        medians = f"{_seconds(_median(facts, name))}, ours {_seconds(_median(facts, OURS))}"
        lines.append(f"- {_title(facts)}: {_called(name, rival)} is faster, with a median of {medians}; {_compared(rival)}.")
    missed = [
        f"- {text}: {value}, where the goal is at most {bound}." for text, value, bound, met in _goal_rows(results) if not met
    ]
    return "\n".join([*lines, *missed]) or "Nowhere in these figures."


def _goals(results: Results) -> str:
    """The goals and what was measured."""
    rows = [(text, value, bound, "yes" if met else "**no**") for text, value, bound, met in _goal_rows(results)]
    return _table(("figure", "measured", "goal: at most", "met"), rows)


def _comparison(question: str) -> Callable[[Results], str]:
    """A table of the question's own measure."""

    def block(results: Results) -> str:
        rows = []
        for loop, facts in _answers(results, question):
            for name, rival in _ranked(facts):
                place = (facts["load"]["place"],) if question == "stop" else ()
                rows.append((*place, *_loop(loop), _called(name, rival), *_cells(rival, facts["measure"])))
        head = [*(["place"] if question == "stop" else []), *([] if question == "import" else ["loop"])]
        return _table((*head, "", "median", "min", "quartiles", "ours / it (its quartiles)"), rows)

    return block


def _lone_item(results: Results) -> str:
    """The wait, the bare timer beside it, and the difference."""
    rows = []
    for loop, facts in _answers(results, "lone_item"):
        for name, rival in _ranked(facts):
            if "unavailable" in rival:
                cells: tuple[str, ...] = (f"not available: {rival['unavailable']}", "", "", "")
            else:
                spread = rival["spread"]
                medians = [_seconds(spread[key]["median"]) for key in ("wait_seconds", "timer_seconds", "excess_seconds")]
                cells = (*medians, _quartiles(spread["excess_seconds"]))
            rows.append((loop, _called(name, rival), *cells))
    return _table(("loop", "", "waits", "a bare timer", "difference", "its quartiles"), rows)


def _idle(results: Results) -> str:
    """Wake-ups and CPU time in the time that is given."""
    rows = []
    for loop, facts in _answers(results, "idle"):
        seconds = facts["load"]["seconds"]
        for name, rival in _ranked(facts, by_time=False):
            if "unavailable" in rival:
                cells: tuple[str, ...] = (f"not available: {rival['unavailable']}", "", "", "")
            else:
                spread = rival["spread"]
                turns = f"{spread['turns']['median']:g}" if "turns" in spread else "not counted"
                cpu = spread["cpu_seconds"]
                cells = (turns, f"{spread['wakes']['median']:g}", _seconds(cpu["median"]), _quartiles(cpu))
            rows.append((facts["load"]["place"], loop, _called(name, rival), f"{seconds:g} s", *cells))
    return _table(("place", "loop", "", "idle for", "turns of the loop", "wakes", "CPU time", "quartiles"), rows)


BLOCKS: dict[str, Callable[[Results], str]] = {
    "machine": _machine,
    "losses": _losses,
    "goals": _goals,
    "clients": _comparison("clients"),
    "gather": _comparison("gather"),
    "lone_item": _lone_item,
    "stop": _comparison("stop"),
    "idle": _idle,
    "import": _comparison("import"),
}


def _answers(results: Results, question: str | None = None) -> list[tuple[str, dict[str, Any]]]:
    """Loop and facts of each benchmark, in the order in which they ran."""
    found = [benchmark["extra_info"] for benchmark in results["benchmarks"]]
    return [(facts["loop"], facts) for facts in found if question in (None, facts["question"])]


def _goal_rows(results: Results) -> list[tuple[str, str, str, bool]]:
    rows = []
    for goal in GOALS:
        for _, facts in _answers(results, goal.question):
            if goal.places is not None and facts["load"]["place"] not in goal.places:
                continue
            measure = goal.measure or facts["measure"]
            if goal.rival is None:
                value = facts["rivals"][OURS]["spread"][measure]["median"]
                what = ": longer than a bare timer" if measure == "excess_seconds" else ""
                rows.append((f"{_title(facts)}{what}", _seconds(value), _seconds(goal.bound), value <= goal.bound))
            elif "unavailable" not in facts["rivals"][goal.rival]:
                value = _ratio(facts["rivals"][goal.rival])
                rows.append((f"{_title(facts)}: ours / {goal.rival}", f"{value:.2f}", f"{goal.bound:.2f}", value <= goal.bound))
    return rows


def _title(facts: dict[str, Any]) -> str:
    parts = [TITLES[facts["question"]]]
    if facts["question"] in ("stop", "idle"):
        parts.append(facts["load"]["place"])
    if facts["loop"] != "none":
        parts.append(facts["loop"])
    return ", ".join(parts)


def _loop(loop: str) -> tuple[str, ...]:
    return () if loop == "none" else (loop,)


def _ranked(facts: dict[str, Any], *, by_time: bool = True) -> list[tuple[str, dict[str, Any]]]:
    """The rivals, the fastest first; those that are not available last."""
    rivals = list(facts["rivals"].items())
    if not by_time:
        return rivals
    measure = facts["measure"]
    return sorted(rivals, key=lambda rival: rival[1]["spread"][measure]["median"] if "spread" in rival[1] else float("inf"))


def _called(name: str, rival: dict[str, Any]) -> str:
    version = rival.get("version", "-")
    if name == OURS:
        return f"**{OURS} {version}**"
    return name if version == "-" or version in name or name == "import asyncio" else f"{name} {version}"


def _cells(rival: dict[str, Any], measure: str) -> tuple[str, ...]:
    if "unavailable" in rival:
        return (f"not available: {rival['unavailable']}", "", "", "")
    spread = rival["spread"][measure]
    compared = _compared(rival).removeprefix("ours / it ")
    return (_seconds(spread["median"]), _seconds(spread["min"]), _quartiles(spread), compared)


def _compared(rival: dict[str, Any]) -> str:
    ratio = rival["ours_to_it"]
    return f"ours / it {_number(ratio['median'])} ({_number(ratio['q1'])} to {_number(ratio['q3'])})"


def _ratio(rival: dict[str, Any]) -> float:
    """The median of the rounds' ratios of our time to its own; 0 where it is not available."""
    return float(rival["ours_to_it"]["median"]) if "ours_to_it" in rival else 0.0


def _median(facts: dict[str, Any], name: str) -> float:
    return float(facts["rivals"][name]["spread"][facts["measure"]]["median"])


def _quartiles(spread: dict[str, float]) -> str:
    return f"{_seconds(spread['q1'])} to {_seconds(spread['q3'])}"


def _number(value: float) -> str:
    return f"{value:.2f}" if value >= 0.01 else f"{value:.1g}"


def _seconds(value: float) -> str:
    """Three significant digits in a unit that suits."""
    factor, unit = next(((f, u) for f, u in ((1.0, "s"), (1e3, "ms")) if abs(value) * f >= 1), (1e6, "us"))
    scaled = value * factor
    digits = 0 if abs(scaled) >= 100 else 1 if abs(scaled) >= 10 else 2
    return f"{scaled:.{digits}f} {unit}"


def _table(head: tuple[str, ...], rows: list[Any]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
