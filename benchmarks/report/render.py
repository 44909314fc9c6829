"""Render the pages and plots from the saved results: ``python -m benchmarks.report``.

BENCHMARK.md has the short tables, benchmarks/results/README.md the full ones, and README.md a few
lines.

With ``--check`` nothing is written; the exit status is 1 if a page or a plot is stale.

A page holds pairs of marks, ``<!-- begin NAME.BLOCK -->`` and ``<!-- end NAME.BLOCK -->``. What is
between them is generated: BLOCK, a key of `BLOCKS` or a scenario, from ``results/NAME.json``, or
from all results if NAME is ``all``. Results of other machines are in ``results/elsewhere``; they
count only where a mark names them.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

from benchmarks.harness.machine import ROOT
from benchmarks.report.break_even import break_evens
from benchmarks.report.environment import environment, machines, noise
from benchmarks.report.executors import executor_table
from benchmarks.report.first_screen import first_screen
from benchmarks.report.goals import goals, losses, losses_outside_noise, missed_goals
from benchmarks.report.metrics import METRICS
from benchmarks.report.plots import PLOTS, draw, seal
from benchmarks.report.results import in_order, read
from benchmarks.report.summary import headlines, summary
from benchmarks.report.tables import table, topic_table
from benchmarks.report.topics import TOPICS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from benchmarks.report.results import Files, Record, Results

SUITES = ROOT / "benchmarks" / "suites"
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (ROOT / "BENCHMARK.md", RESULTS / "README.md", ROOT / "README.md")
ELSEWHERE = RESULTS / "elsewhere"
PLOTS_FOLDER = ROOT / "benchmarks" / "plots"
NAMES = sorted(path.stem.removeprefix("test_") for path in SUITES.glob("test_*.py"))
ALL = "all"

_MARKED = re.compile(
    r"(<!-- begin (?P<name>\w+)\.(?P<block>\w+) -->\n)"
    r".*?"
    r"(<!-- end (?P=name)\.(?P=block) -->)",
    flags=re.DOTALL,
)
NOT_MEASURED = "Not measured."

BLOCKS: dict[str, Callable[[Files], str]] = {
    "machine": environment,
    "machines": machines,
    "noise": noise,
    "first_screen": lambda files: first_screen(read(files.values())) or NOT_MEASURED,
    "headlines": lambda files: headlines(read(files.values())),
    "summary": summary,
    "losses": lambda files: losses(read(files.values())),
    "losses_outside_noise": lambda files: losses_outside_noise(read(files.values())),
    "missed_goals": lambda files: missed_goals(read(files.values())),
    "topic": lambda files: "\n\n".join(_topic(name, files[name]) for name in files),
    "tables": lambda files: _tables(read(files.values())),
    "executors": lambda files: "\n\n".join(map(executor_table, files.values())),
    "goals": lambda files: goals(read(files.values())),
    "break_even": lambda files: break_evens(read(files.values(), "crossing")),
}


def render(page: str, files: Files, elsewhere: Files | None = None) -> str:
    """Generate every marked block of a page anew.

    Args:
        page: Its text.
        files: Results by name.
        elsewhere: Results of other machines by name.

    Raises:
        KeyError: A mark names a block that does not exist.
    """

    def generate(match: re.Match[str]) -> str:
        name, block = match["name"], match["block"]
        known = {**(elsewhere or {}), **files}
        chosen = dict(files) if name == ALL else {name: known[name]} if name in known else {}
        return f"{match[1]}{_block(block, chosen)}\n{match[4]}"

    return _MARKED.sub(generate, page)


def _block(block: str, files: Files) -> str:
    if block in BLOCKS:
        return BLOCKS[block](files) if files else NOT_MEASURED
    if block not in METRICS:
        raise KeyError(block)
    records = read(files.values(), block)
    return table(in_order(records)) if records else NOT_MEASURED


def _topic(name: str, results: Results) -> str:
    topic = TOPICS[name]
    plot = f"![{topic.title}]({PLOTS_FOLDER.relative_to(ROOT).as_posix()}/{name}.svg)"
    return f"{plot}\n\n{topic_table(topic, read([results]))}"


def _tables(records: Sequence[Record]) -> str:
    """Write the table of each scenario below its title."""
    found = {record.scenario: record.metric.title for record in records}
    return "\n\n".join(
        f"{title}:\n\n{table(in_order([one for one in records if one.scenario == scenario]))}"
        for scenario, title in found.items()
    )


def load(folder: Path = RESULTS) -> dict[str, Results]:
    """Return the saved results by name."""
    paths = sorted(folder.glob("*.json"))
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in paths}


def main(arguments: list[str]) -> int:
    """Render the pages and plots, or check them; return the exit status."""
    is_check = arguments == ["--check"]
    files, stale = load(), []
    for path in PAGES:
        before = path.read_text(encoding="utf-8")
        after = render(before, files, load(ELSEWHERE))
        if after != before:
            stale.append(path.name)
            if not is_check:
                path.write_text(after, encoding="utf-8")
    if not is_check:
        draw(files, PLOTS_FOLDER)
        return 0
    for name in sorted(PLOTS.keys() & files.keys()):
        plot = PLOTS_FOLDER / f"{name}.svg"
        if not plot.is_file() or seal(files[name]) not in plot.read_text(encoding="utf-8"):
            stale.append(plot.name)
    if stale:
        print(f"stale: {', '.join(stale)}; run python -m benchmarks.report")
        return 1
    print("pages and plots agree with the results")
    return 0
