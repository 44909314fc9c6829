"""``python -m tests.soak MINUTES``: random faults of every kind, and what became of every call.

Each event loop and start method gets an equal share of the time, in a process of its own. A seed
decides on calls and faults; it is printed, and ``--seed`` repeats it. When exactly they happen
differs from run to run.

The exit status is 1 if a call was lost or got something wrong, an item ran twice that may not, the
pool logged an internal error, or something was left behind.
"""

from __future__ import annotations

import argparse
import asyncio
import faulthandler
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from tests.soak.run import PATIENCE, Soak
from tests.support.worker_pools import METHODS

if TYPE_CHECKING:
    from collections import Counter

    from tests.soak.run import Totals, Use

LOOPS = ["asyncio", "uvloop"] if importlib.util.find_spec("uvloop") else ["asyncio"]
_SHOWN = 10  # troubles of each kind
_GROWTH = 60.0  # MB of memory after the first round; batches of this size come and go


def main() -> int:
    """Run the command, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("minutes", type=float, metavar="MINUTES")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 1_000_000)
    parser.add_argument("--loop", choices=LOOPS, action="append")
    parser.add_argument("--method", choices=METHODS, action="append")
    options = parser.parse_args()
    pairs = [
        (loop, method) for loop in options.loop or LOOPS for method in options.method or METHODS
    ]
    if len(pairs) == 1:
        return soak(options.minutes, options.seed, *pairs[0])
    status = 0
    for loop, method in pairs:
        command = [sys.executable, "-m", "tests.soak", str(options.minutes / len(pairs))]
        command += ["--seed", str(options.seed), "--loop", loop, "--method", method]
        status = max(status, abs(subprocess.run(command, check=False).returncode))
    return min(status, 1)


def soak(minutes: float, seed: int, loop: str, method: str) -> int:
    """Run one soak, print its report, and return the exit status."""
    faulthandler.dump_traceback_later(60 * minutes + 5 * PATIENCE, exit=True)
    warnings.simplefilter("ignore")  # of forks beside threads; no shared memory
    os.environ["PYTHONWARNINGS"] = "ignore"
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        run = Soak(seed, method, Path(folder))
        if loop == "uvloop":
            import uvloop

            uvloop.run(run.run(60 * minutes))
        else:
            asyncio.run(run.run(60 * minutes))
    faulthandler.cancel_dump_traceback_later()
    growth = run.uses[-1].memory - run.uses[min(1, len(run.uses) - 1)].memory
    if growth > _GROWTH:
        run.totals.troubles["left behind"].append(f"{growth:.0f} MB of memory")
    print(report(run.totals, run.uses, f"{loop}, {method}, seed {seed}"), flush=True)
    return 1 if any(run.totals.troubles.values()) else 0


def report(totals: Totals, uses: list[Use], title: str) -> str:
    """Return the report as plain text."""
    rows = [
        ("items", f"{totals.calls:,}"),
        ("outcomes", _counts(totals.outcomes)),
        ("faults", _counts(totals.faults)),
        *((name, str(len(found))) for name, found in totals.troubles.items()),
    ]
    moments = {"start": uses[0], "first round": uses[min(1, len(uses) - 1)], "end": uses[-1]}
    columns = "".join(f"{name:>14}" for name in moments)
    lines = [title, "-" * len(title), *(f"{name:<16}{value}" for name, value in rows)]
    lines.append(f"{'after':<16}{columns}")
    for name in ("memory", "descriptors", "threads", "children"):
        values = (getattr(use, name) for use in moments.values())
        cells = "".join(f"{value:>14.0f}" for value in values)
        lines.append(f"{name + (' (MB)' if name == 'memory' else ''):<16}{cells}")
    for name, found in totals.troubles.items():
        lines += [f"{name}: {text}" for text in found[:_SHOWN]]
    return "\n".join([*lines, ""])


def _counts(counter: Counter[str]) -> str:
    counts = (f"{name} {count:,}" for name, count in counter.most_common())
    return "\n                ".join(_wrapped(list(counts))) or "none"


def _wrapped(words: list[str]) -> list[str]:
    lines = [""]
    for word in words:
        if len(lines[-1]) + len(word) > 78:
            lines.append("")
        lines[-1] += f"{', ' if lines[-1] else ''}{word}"
    return lines


if __name__ == "__main__":
    sys.exit(main())
