"""Compare two commits: ``python -m benchmarks.harness.compare A B [--pairs 15] [--only NAME]``.

::

    A, B --> sources in temporary folders --> for each case, pairs of runs, each in a new process:
                                              A B, A A | B A, A A | A B, A A | ...
         --> median of the ratios B / A with a bootstrap interval, and the same for A / A

Noise that lasts longer than a pair affects both of its runs and cancels in the ratio. The pairs of
A with itself show how large a ratio noise alone can make. ``.`` is the working tree.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from typing import TYPE_CHECKING, NamedTuple

from benchmarks.harness.cases import CASES
from benchmarks.harness.checkouts import CheckoutError, checked_out, run_against
from benchmarks.harness.sampling import bootstrap_interval
from benchmarks.report import text

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from benchmarks.harness.cases import Case

PAIRS = 15  # about ten minutes for all cases
LEVEL = 0.95


class Pairs(NamedTuple):
    """The figures of one case, a value for each pair."""

    a: list[float]
    b: list[float]
    control: list[float]  # the ratios of A to itself

    @property
    def ratios(self) -> list[float]:
        """The ratio B / A of each pair."""
        return [b / a for a, b in zip(self.a, self.b, strict=True)]


def pair_order(number: int) -> tuple[int, int]:
    """Return which of two sources runs first and second in a pair: A B, B A, A B and so on."""
    return (0, 1) if number % 2 == 0 else (1, 0)


def measure(name: str, sources: Sequence[Path], pairs: int) -> Pairs:
    """Run a case in interleaved pairs.

    Args:
        name: A key of `CASES`.
        sources: The sources of A and B.
        pairs: Pairs of A and B, and as many of A with itself.
    """

    def run_pair(number: int, pair: Sequence[Path]) -> tuple[float, float]:
        values = [0.0, 0.0]
        for place in pair_order(number):
            values[place] = _run(name, pair[place])
        return values[0], values[1]

    for source in sources:
        _run(name, source)  # compiles the source, and fails early
    found, control = [], []
    for number in range(pairs):
        print(f"\r{name}: pair {number + 1} of {pairs} ", end="", file=sys.stderr, flush=True)
        found.append(run_pair(number, sources))
        first, second = run_pair(number, [sources[0], sources[0]])
        control.append(second / first)
    print(file=sys.stderr)
    return Pairs([a for a, _ in found], [b for _, b in found], control)


def _run(name: str, source: Path) -> float:
    return float(json.loads(run_against(source, "-m", "benchmarks.harness.cases", name)))


def row(case: Case, pairs: Pairs) -> list[str]:
    """Write the row of a case: the medians, and both ratios with their intervals."""
    write = text.seconds if case.unit == "s" else text.number
    medians = [write(statistics.median(values)) for values in (pairs.a, pairs.b)]
    return [case.text, *medians, _ratio(pairs.ratios), _ratio(pairs.control), case.better]


def _ratio(ratios: Sequence[float]) -> str:
    low, high = bootstrap_interval(ratios, level=LEVEL)
    return f"{statistics.median(ratios):.3f} ({low:.3f} to {high:.3f})"


def main(arguments: list[str] | None = None) -> int:
    """Run the cases and print their ratios.

    Returns:
        The exit status: 0; 1 if a case failed; 2 if a revision does not exist.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.harness.compare", description="Compare two commits."
    )
    parser.add_argument("a", metavar="A", help="the commit before; . is the working tree")
    parser.add_argument("b", metavar="B", help="the commit after")
    parser.add_argument(
        "--pairs", type=int, default=PAIRS, help="pairs for each case (%(default)s)"
    )
    parser.add_argument(
        "--only", action="append", choices=CASES, metavar="NAME", help=f"of {', '.join(CASES)}"
    )
    given = parser.parse_args(arguments)
    if given.pairs < 1:
        parser.error("--pairs must be at least 1")
    rows = [["case", "A", "B", "B / A", "A / A", "better"]]
    try:
        with checked_out([given.a, given.b]) as sources:
            rows += [
                row(CASES[name], measure(name, sources, given.pairs))
                for name in given.only or CASES
            ]
    except CheckoutError as exc:
        print(exc, file=sys.stderr)
        return 2
    except RuntimeError as exc:
        print(exc, file=sys.stderr)
        return 1
    print(f"A is {given.a}, B is {given.b}; {given.pairs} pairs of new processes for each ratio.")
    print(f"Ratios are medians with a {LEVEL:.0%} bootstrap interval. For times lower is better.")
    print()
    print("\n".join(text.aligned(rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
