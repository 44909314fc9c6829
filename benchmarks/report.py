"""The saved results as tables and plots: ``python -m benchmarks.report`` renders the pages, ``--check`` only compares them.

A page holds pairs of marks, ``<!-- begin NAME.BLOCK -->`` and ``<!-- end NAME.BLOCK -->``; what stands between them is
generated: BLOCK, a key of `BLOCKS`, from ``results/NAME.json``, or from all of them where NAME is ``all``. No figure is typed.

What was measured on another machine is in ``results/elsewhere``: it is shown where it is named, and not in what is said of all.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.crossings import crossings
from benchmarks.figures import answers
from benchmarks.headlines import headlines
from benchmarks.plots import draw, seal
from benchmarks.provenance import machine, noise
from benchmarks.tables import TABLES, in_order
from benchmarks.verdicts import goals, losses

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from benchmarks.figures import Results

    Files = Mapping[str, Results]

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "BENCHMARK.md", ROOT / "README.md")
# What the pages have a place for: every file of benchmarks but one, which is for pytest-benchmark alone.
NAMES = sorted({path.stem.removeprefix("test_") for path in Path(__file__).parent.glob("test_*.py")} - {"executors"})
RESULTS = Path(__file__).parent / "results"
ELSEWHERE = RESULTS / "elsewhere"
PLOTS_FOLDER = Path(__file__).parent / "plots"
ALL = "all"

_MARKED = re.compile(r"(<!-- begin (?P<name>\w+)\.(?P<block>\w+) -->\n).*?(<!-- end (?P=name)\.(?P=block) -->)", flags=re.DOTALL)
_NOT_MEASURED = "Not measured."

BLOCKS: dict[str, Callable[[Files], str]] = {
    "machine": machine,
    "noise": noise,
    "headlines": lambda files: headlines(answers(files.values())),
    "losses": lambda files: losses(answers(files.values())),
    "rivals_ahead": lambda files: losses(answers(files.values()), to_baselines=False),
    "goals": lambda files: goals(answers(files.values())),
    "crossings": lambda files: crossings(answers(files.values(), "crossing")),
}


def render(page: str, files: Files, elsewhere: Files | None = None) -> str:
    """Fill in a page.

    Args:
        page: Its text, with marks.
        files: By name, the results.
        elsewhere: By name, those of another machine.

    Returns:
        The text with every marked block generated anew; one of a file that does not exist says that nothing was measured.

    Raises:
        KeyError: A mark names a block that does not exist.
    """

    def filled(match: re.Match[str]) -> str:
        name, block = match["name"], match["block"]
        known = {**(elsewhere or {}), **files}
        of = dict(files) if name == ALL else {name: known[name]} if name in known else {}
        return f"{match[1]}{_block(block, of)}\n{match[4]}"

    return _MARKED.sub(filled, page)


def _block(block: str, files: Files) -> str:
    if block in BLOCKS:
        return BLOCKS[block](files) if files else _NOT_MEASURED
    write, found = TABLES[block], answers(files.values(), block)
    return write(in_order(found)) if found else _NOT_MEASURED


def load(folder: Path = RESULTS) -> dict[str, Results]:
    """The saved results, by the files' names."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}


def main(arguments: list[str]) -> int:
    """Render the pages and plots, or with ``--check`` say whether they are made of these results."""
    files, stale = load(), []
    for path in PAGES:
        before = path.read_text(encoding="utf-8")
        after = render(before, files, load(ELSEWHERE))
        if after != before:
            stale.append(path.name)
            if arguments != ["--check"]:
                path.write_text(after, encoding="utf-8")
    if arguments == ["--check"]:
        for name, results in files.items():
            plot = PLOTS_FOLDER / f"{name}.svg"
            if not plot.is_file() or seal(results) not in plot.read_text(encoding="utf-8"):
                stale.append(plot.name)
        print(f"stale: {', '.join(stale)}; python -m benchmarks.report" if stale else "pages and plots agree with the results")
        return int(bool(stale))
    draw(files, PLOTS_FOLDER)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
