"""The saved results as tables and plots: ``python -m benchmarks.report`` renders BENCHMARK.md, ``--check`` only compares it.

A page holds pairs of marks, ``<!-- begin NAME.BLOCK -->`` and ``<!-- end NAME.BLOCK -->``; what stands between them is
generated: BLOCK, a key of `BLOCKS`, from ``results/NAME.json``. No figure is typed.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from benchmarks.children import OURS
from benchmarks.figures import (
    Facts,
    Results,
    Rival,
    answers,
    called,
    compared,
    figure,
    median,
    quartiles,
    ranked,
    ratio,
    seconds,
    table,
    title,
)
from benchmarks.plots import draw
from benchmarks.questions import GOALS, QUESTIONS, Goal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "BENCHMARK.md"
RESULTS = Path(__file__).parent / "results"
PLOTS_FOLDER = Path(__file__).parent / "plots"

_MARKED = re.compile(r"(<!-- begin (?P<name>\w+)\.(?P<block>\w+) -->\n).*?(<!-- end (?P=name)\.(?P=block) -->)", flags=re.DOTALL)


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
    draw(load(), PLOTS_FOLDER)
    return 0


# The tables of single questions.


class _Column(NamedTuple):
    """A column of what was measured: its head, and a rival's cell in it."""

    head: str
    cell: Callable[[Facts, str, Rival], str]


def _median(head: str, measure: str | None = None, otherwise: str = "") -> _Column:
    """The median of the rounds; what is said instead where a rival did not measure it."""

    def cell(facts: Facts, _: str, rival: Rival) -> str:
        key = measure or facts["measure"]
        return figure(key, rival["spread"][key]["median"]) if key in rival["spread"] else otherwise

    return _Column(head, cell)


def _least(head: str) -> _Column:
    return _Column(head, lambda facts, _, rival: figure(facts["measure"], rival["spread"][facts["measure"]]["min"]))


def _quartiles(head: str, measure: str | None = None) -> _Column:
    def cell(facts: Facts, _: str, rival: Rival) -> str:
        key = measure or facts["measure"]
        return quartiles(key, rival["spread"][key])

    return _Column(head, cell)


def _ratio(head: str, measure: str | None = None) -> _Column:
    return _Column(head, lambda facts, name, _: compared(ratio(facts, name, measure) or {}))


def _load(head: str, key: str, text: str) -> _Column:
    return _Column(head, lambda facts, _, __: text.format(facts["load"][key]))


_USUAL = (_median("median"), _least("min"), _quartiles("quartiles"), _ratio("ours / it (its quartiles)"))


def _table(
    question: str, *columns: _Column, by_measure: bool = True, always: tuple[_Column, ...] = ()
) -> Callable[[Results], str]:
    """A table with a row for each rival of each benchmark of a question.

    Args:
        question: Which one.
        *columns: What was measured.
        by_measure: The best rival first; False: in the order in which they were asked.
        always: Columns before those, which a rival that is not available has too.
    """
    parts = QUESTIONS[question].parts

    def block(results: Results) -> str:
        found = answers(results, question)
        has_loop = any(facts["loop"] != "none" for facts in found)
        rows = []
        for facts in found:
            start = [*(part.cell(facts["load"]) for part in parts), *([facts["loop"]] if has_loop else [])]
            for name, rival in ranked(facts, by_measure=by_measure):
                if "unavailable" in rival:
                    cells = [f"not available: {rival['unavailable']}", *[""] * (len(columns) - 1)]
                else:
                    cells = [column.cell(facts, name, rival) for column in columns]
                rows.append([*start, called(name, rival), *(column.cell(facts, name, rival) for column in always), *cells])
        heads = [
            *(part.head for part in parts),
            *(["loop"] if has_loop else []),
            "",
            *(column.head for column in (*always, *columns)),
        ]
        return table(heads, rows)

    return block


# What is said of a whole file.


def _machine(results: Results) -> str:
    """What the figures were measured on, and with which versions."""
    machine, commit = results["machine_info"], results["commit_info"]
    versions = {}
    for facts in answers(results):
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
    if any(facts["quick"] for facts in answers(results)):
        lines.append("- **A quick run: it shows that the benchmarks work, not how fast anything is.**")
    return "\n".join(lines)


def _losses(results: Results) -> str:
    """Everyone who did better than we, the worst first, and every goal that was missed."""
    worse = []
    for facts in answers(results):
        for name in facts["rivals"]:
            ratios = ratio(facts, name)
            if ratios is not None and ratios["median"] > 1 and QUESTIONS[facts["question"]].is_race:
                worse.append((ratios, name, facts))
    lines = []
    for ratios, name, facts in sorted(worse, key=lambda loss: -loss[0]["median"]):
        medians = f"{seconds(median(facts, name))}, ours {seconds(median(facts, OURS))}"
        who = f"{called(name, facts['rivals'][name])} {QUESTIONS[facts['question']].better}"
        lines.append(f"- {title(facts)}: {who}, with a median of {medians}; ours / it {compared(ratios)}.")
    missed = [f"- {text}: {value}, where the goal is {bound}." for text, value, bound, met in _held_against(results) if not met]
    return "\n".join([*lines, *missed]) or "Nowhere in these figures."


def _goals(results: Results) -> str:
    """The goals and what was measured."""
    rows = [(text, value, bound, "yes" if met else "**no**") for text, value, bound, met in _held_against(results)]
    return table(("figure", "measured", "goal", "met"), rows)


def _held_against(results: Results) -> Iterator[tuple[str, str, str, bool]]:
    """Each figure that has a goal: what it is, its value, the bound, and whether it is met."""
    for goal in GOALS:
        for facts in answers(results, goal.question):
            if all(facts["load"].get(key) == value for key, value in goal.where.items()):
                yield from _one_held_against(goal, facts)


def _one_held_against(goal: Goal, facts: Facts) -> Iterator[tuple[str, str, str, bool]]:
    measure = goal.measure or facts["measure"]
    name = ", ".join([title(facts), goal.figure] if goal.figure and goal.rival else [title(facts)])
    if goal.rival is None:
        value = median(facts, OURS, measure)
        what, written, bound = (
            (f"{name}: {goal.figure}" if goal.figure else name),
            figure(measure, value),
            figure(measure, goal.bound),
        )
    else:
        ratios = ratio(facts, goal.rival, measure)
        if ratios is None:
            return
        value = ratios["median"]
        what, written, bound = f"{name}: ours / {goal.rival}", f"{value:.2f}", f"{goal.bound:.2f}"
    met = value >= goal.bound if goal.at_least else value <= goal.bound
    yield what, written, f"at {'least' if goal.at_least else 'most'} {bound}", met


BLOCKS: dict[str, Callable[[Results], str]] = {
    "machine": _machine,
    "losses": _losses,
    "goals": _goals,
    "clients": _table("clients", *_USUAL),
    "gather": _table("gather", *_USUAL),
    "lone_item": _table(
        "lone_item",
        _median("waits", "wait_seconds"),
        _median("a bare timer", "timer_seconds"),
        _median("difference", "excess_seconds"),
        _quartiles("its quartiles", "excess_seconds"),
    ),
    "stop": _table("stop", *_USUAL),
    "idle": _table(
        "idle",
        _median("turns of the loop", "turns", otherwise="not counted"),
        _median("wakes", "wakes"),
        _median("CPU time", "cpu_seconds"),
        _quartiles("quartiles", "cpu_seconds"),
        by_measure=False,
        always=(_load("idle for", "seconds", "{:g} s"),),
    ),
    "import": _table("import", *_USUAL),
    "round_trip": _table("round_trip", *_USUAL),
    "cores_busy": _table(
        "cores_busy",
        _median("kept busy", "busy"),
        _quartiles("quartiles", "busy"),
        _median("processor time in batches", "processor"),
        _ratio("busy: ours / it (its quartiles)", "busy"),
    ),
    "hold_up": _table(
        "hold_up",
        _median("longest hold-up"),
        _quartiles("quartiles"),
        _median("of the first trip", "first_hold_up_seconds"),
        _median("with nothing to do", "idle_seconds"),
        _median("the trip", "trip_seconds"),
        _ratio("hold-up: ours / it (its quartiles)"),
    ),
    "many": _table("many", *_USUAL),
    "stream": _table(
        "stream",
        _median("median"),
        _quartiles("quartiles"),
        _median("memory at its most, MB", "memory_most"),
        _median("grown from the first 50,000 items to the last, MB", "memory_growth"),
    ),
    "overload": _table(
        "overload",
        _median("answers in time, of capacity", "goodput"),
        _quartiles("quartiles", "goodput"),
        _median("late", "late"),
        _median("refused, expired or cut off", "unanswered"),
        _median("memory grown, MB", "memory_growth"),
        always=(_load("for", "seconds", "{:g} s"),),
    ),
    "successor": _table("successor", *_USUAL),
    "kills": _table(
        "kills",
        _median("median until whole again"),
        _median("longest", "worst_seconds"),
        _median("descriptors left", "more_descriptors"),
        _median("threads left", "more_threads"),
        _median("processes left", "more_processes"),
        always=(_load("kills", "kills", "{:,}"),),
    ),
}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
