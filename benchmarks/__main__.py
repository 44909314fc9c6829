"""Run suites of benchmarks, each into its own file of results.

A quick run writes into a temporary folder. It shows that the benchmarks work, that the pages can
be rendered from their results, and that pytest-benchmark can compare them.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.harness.machine import ROOT
from benchmarks.libraries.names import ON_REQUEST
from benchmarks.report import plots, render

NOT_QUICK = ("tune",)  # suites that take minutes in any case
EXECUTORS = "benchmarks/test_executors.py"


def main(arguments: list[str] | None = None) -> int:
    """Run the suites that are named, or all.

    Returns:
        The exit status: 0, or that of the first suite that failed. The others run all the same.
    """
    names = render.NAMES
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Run suites of benchmarks."
    )
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--quick", action="store_true", help="one short round of each benchmark")
    modes.add_argument("--full", action="store_true", help="all loads and libraries, for a night")
    parser.add_argument(
        "--with",
        action="append",
        default=[],
        choices=ON_REQUEST,
        dest="requested",
        metavar="LIBRARY",
        help=f"measure this library too: {', '.join(ON_REQUEST)}",
    )
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"of {', '.join(names)}; the default is all"
    )
    given = parser.parse_args(arguments)
    if unknown := sorted(set(given.names) - set(names)):
        parser.error(f"unknown suites: {', '.join(unknown)} (there are {', '.join(names)})")
    chosen = [
        name
        for name in given.names or names
        if name in given.names or not given.quick or name not in NOT_QUICK
    ]
    suites = [f"benchmarks/suites/test_{name}.py" for name in chosen]
    options = [f"--with={library}" for library in given.requested]
    if not given.quick:
        options += ["--full"] if given.full else []
        return _measure(suites, options, render.RESULTS)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        status = _measure(suites, ["--quick", *options], folder) or _render_and_compare(folder)
        return status or (0 if given.names else _measure([EXECUTORS], ["--quick"], folder))


def _measure(suites: list[str], options: list[str], folder: Path) -> int:
    folder.mkdir(exist_ok=True)
    first = 0
    for suite in suites:
        saved = folder / f"{Path(suite).stem.removeprefix('test_')}.json"
        status = _run("pytest", suite, *options, f"--benchmark-json={saved}")
        first = first or status
    return first


def _render_and_compare(folder: Path) -> int:
    files = render.load(folder)
    for page in render.PAGES:
        render.render(page.read_text(encoding="utf-8"), files)
    plots.draw(files, folder)
    saved = [str(path) for path in sorted(folder.glob("*.json"))]
    return _run("pytest_benchmark", "compare", *saved, "--columns=median", "--sort=name")


def _run(module: str, *arguments: str) -> int:
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, cwd=ROOT, check=False).returncode  # noqa: S603 - our own


if __name__ == "__main__":
    sys.exit(main())
