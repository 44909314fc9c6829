"""``python -m benchmarks [--quick | --full] [NAME ...]``: every question, or those named, each into a results file of its own.

A quick run leaves the saved results alone: it writes into a folder that it removes, and shows that the pages can be rendered from
what it has written, and that pytest-benchmark can compare it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import plots, report

_HERE = Path(__file__).parent


def main(arguments: list[str] | None = None) -> int:
    """Run them.

    Returns:
        The exit status: 0, or that of the first benchmarks that failed; the others are run all the same.
    """
    names = report.NAMES
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=(__doc__ or "").partition("\n")[0])
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--quick", action="store_true", help="little of each, once: shows that it works")
    modes.add_argument("--full", action="store_true", help="all loads and all rivals, for a night")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(names)}; all, where none is given")
    given = parser.parse_args(arguments)
    if unknown := sorted(set(given.names) - set(names)):
        parser.error(f"there is no benchmark {', '.join(unknown)}; there are {', '.join(names)}")
    names = given.names or names
    if given.quick:
        with tempfile.TemporaryDirectory() as folder:
            first = _measure(names, ["--quick"], Path(folder)) or _try_out(Path(folder))
            return first or (0 if given.names else _measure(["executors"], ["--quick"], Path(folder)))
    return _measure(names, ["--full"] if given.full else [], report.RESULTS)


def _measure(names: list[str], options: list[str], folder: Path) -> int:
    folder.mkdir(exist_ok=True)
    first = 0
    for name in names:
        saved = folder / f"{name}.json"
        command = ["pytest", str(_HERE / f"test_{name}.py"), *options, f"--benchmark-json={saved}"]
        status = subprocess.run([sys.executable, "-m", *command], cwd=_HERE.parent, check=False).returncode  # noqa: S603 - our own
        first = first or status
    return first


def _try_out(folder: Path) -> int:
    files = report.load(folder)
    for page in report.PAGES:
        report.render(page.read_text(encoding="utf-8"), files)
    plots.draw(files, folder)
    saved = [str(path) for path in sorted(folder.glob("*.json"))]
    command = ["pytest_benchmark", "compare", *saved, "--columns=median", "--sort=name"]
    return subprocess.run([sys.executable, "-m", *command], cwd=_HERE.parent, check=False).returncode  # noqa: S603 - our own


if __name__ == "__main__":
    sys.exit(main())
