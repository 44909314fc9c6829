"""How figures and tables are written (pure)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence


RATIO = "ratio (lower is better)"  # ours divided by another
SHARES = frozenset({"busy", "goodput", "gap_share"})  # measures that are written in percent


def figure(measure: str, value: float) -> str:
    """Write a value in the unit of its measure: seconds, bytes, a share in percent or a count."""
    if "seconds" in measure:
        return seconds(value)
    if measure in SHARES:
        return f"{value:.0%}"
    if "bytes" in measure:
        return f"{value / 1e6:.1f} MB"
    return f"{value:g}" if value == int(value) else number(value)


def number(value: float) -> str:
    """Write a number with two decimals, or with one significant digit if it is small."""
    return f"{value:.2f}" if abs(value) >= 0.01 else f"{value:.1g}"


def seconds(value: float) -> str:
    """Write a time with three significant digits in s, ms or us."""
    factor, unit = _unit(value)
    return f"{_digits(value * factor)} {unit}"


def with_quartiles(measure: str, spread: Mapping[str, float]) -> str:
    """Write a median and its quartiles, all in the unit of the median."""
    middle, low, high = (spread[name] for name in ("median", "q1", "q3"))
    if "seconds" in measure:
        factor, unit = _unit(middle)
        median = f"{_digits(middle * factor)} {unit}"
        return f"{median} ({_digits(low * factor)} to {_digits(high * factor)})"
    return f"{figure(measure, middle)} ({figure(measure, low)} to {figure(measure, high)})"


def ratio(spread: Mapping[str, float]) -> str:
    """Write a median ratio with its quartiles."""
    return f"{number(spread['median'])} ({number(spread['q1'])} to {number(spread['q3'])})"


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Write a table."""
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Write rows as columns of equal width, for a terminal."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for cells in rows:
        padded = [cell.ljust(width) for cell, width in zip(cells, widths, strict=True)]
        yield "  ".join(padded).rstrip()


def _unit(value: float) -> tuple[float, str]:
    units = ((1.0, "s"), (1e3, "ms"))
    return next((found for found in units if abs(value) * found[0] >= 1), (1e6, "us"))


def _digits(value: float) -> str:
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:.{digits}f}"
