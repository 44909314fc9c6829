"""The tables of single questions (pure): from the facts of its benchmarks to Markdown.

Either a row for each load, and a column for each rival, where one measure says it all; or a row for each rival, and a column for
each measure.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks.children import BY_HAND, OLD, OURS, OURS_IN_THREADS, STANDARD_POOL, THREADS
from benchmarks.figures import Facts, Rival, called, compared, figure, ratio, table, within
from benchmarks.questions import QUESTIONS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    Table = Callable[[Sequence[Facts]], str]


class _Column(NamedTuple):
    """What was measured: its head, the measure, and what is said of a rival that did not measure it."""

    head: str
    measure: str
    otherwise: str = ""

    def cell(self, rival: Rival) -> str:
        spread = rival["spread"].get(self.measure)
        return self.otherwise if spread is None else figure(self.measure, spread["median"])


def by_load(*against: str, measure: str | None = None) -> Table:
    """A row for each load: every rival's median and quartiles, and our ratio to some of them.

    Args:
        *against: To whom; with the quartiles of the rounds' ratios.
        measure: Which one; None: the one that is compared.
    """

    def block(found: Sequence[Facts]) -> str:
        names = _names(found)
        head = [*_load_heads(found), *(_headed(name, found) for name in names), *(f"ours / {name}" for name in against)]
        rows = [
            [
                *_load_cells(facts, found),
                *(_measured(facts, name, measure) for name in names),
                *(_compared(facts, name, measure) for name in against),
            ]
            for facts in found
        ]
        return "\n".join([table(head, rows), *_reasons(found)])

    return block


def by_rival(*columns: _Column) -> Table:
    """A row for each rival in each load: what it measured, the compared measure with its quartiles and our ratio.

    Args:
        *columns: Other measures.
    """

    def block(found: Sequence[Facts]) -> str:
        rows = [
            [
                *_load_cells(facts, found),
                called(name, rival),
                _measured(facts, name),
                *(column.cell(rival) for column in columns),
                _compared(facts, name),
            ]
            for facts in found
            for name, rival in facts["rivals"].items()
            if "spread" in rival
        ]
        measure = QUESTIONS[found[0]["question"]].measure
        head = [*_load_heads(found), "", measure, *(column.head for column in columns), "ours / it"]
        return "\n".join([table(head, rows), *_reasons(found)])

    return block


def _names(found: Sequence[Facts]) -> list[str]:
    """Every rival that has measured anything, ours first, in the order of the benchmarks."""
    names = dict.fromkeys(name for facts in found for name, rival in facts["rivals"].items() if "spread" in rival)
    return sorted(names, key=lambda name: name != OURS)


def _headed(name: str, found: Sequence[Facts]) -> str:
    return called(name, next(facts["rivals"][name] for facts in found if "spread" in facts["rivals"].get(name, {})))


def _load_heads(found: Sequence[Facts]) -> list[str]:
    return [*(part.head for part in QUESTIONS[found[0]["question"]].parts), *(["loop"] if _has_loops(found) else [])]


def _load_cells(facts: Facts, found: Sequence[Facts]) -> list[str]:
    parts = QUESTIONS[facts["question"]].parts
    return [*(part.cell(facts["load"]) for part in parts), *([facts["loop"]] if _has_loops(found) else [])]


def _has_loops(found: Iterable[Facts]) -> bool:
    return any(facts["loop"] != "none" for facts in found)


def _measured(facts: Facts, name: str, measure: str | None = None) -> str:
    rival, measure = facts["rivals"].get(name, {}), measure or facts["measure"]
    return within(measure, rival["spread"][measure]) if "spread" in rival else "-"


def _compared(facts: Facts, name: str, measure: str | None = None) -> str:
    ratios = ratio(facts, name, measure) if name in facts["rivals"] and name != OURS else None
    return "" if ratios is None else compared(ratios)


def _reasons(found: Sequence[Facts]) -> list[str]:
    """Who could not do it, and why; each reason once."""
    reasons = dict.fromkeys(
        (name, rival["unavailable"]) for facts in found for name, rival in facts["rivals"].items() if "unavailable" in rival
    )
    return ["", *(f"- Not in the table: {name}: {reason}." for name, reason in reasons)] if reasons else []


def in_order(found: Sequence[Facts]) -> list[Facts]:
    """The benchmarks by their questions and loads: numbers by size, all else as it came."""
    seen: list[Any] = []

    def rank(value: Any) -> float:
        if isinstance(value, int | float):
            return value
        if value not in seen:
            seen.append(value)
        return seen.index(value)

    def key(facts: Facts) -> list[float]:
        values = [facts["load"].get(part.key) for part in QUESTIONS[facts["question"]].parts]
        return [rank(facts["question"]), *map(rank, values), rank(facts["loop"])]

    return sorted(found, key=key)


TABLES: dict[str, Table] = {
    "crossing": by_load(OURS_IN_THREADS, OLD),
    "clients": by_load(OLD, "aiodataloader"),
    "gather": by_load(OLD, "aiodataloader"),
    "many": by_load(OLD, "aiodataloader"),
    "lone_item": by_rival(_Column("a bare timer", "timer_seconds"), _Column("difference", "excess_seconds")),
    "stream": by_rival(
        _Column("memory at its most, MB", "memory_most"),
        _Column("grown from the first twentieth to the last, MB", "memory_growth"),
    ),
    "round_trip": by_load(STANDARD_POOL),
    "hold_up": by_rival(
        _Column("of the first trip", "first_hold_up_seconds"),
        _Column("with nothing to do", "idle_seconds"),
        _Column("the trip", "trip_seconds"),
    ),
    "cores_busy": by_load(STANDARD_POOL, "bare loop", measure="busy"),
    "latency": by_rival(
        _Column("p50", "p50_seconds"),
        _Column("p95", "p95_seconds"),
        _Column("p99.9", "p999_seconds", "too few"),
        _Column("unanswered", "unanswered"),
    ),
    "overload": by_rival(
        _Column("answers in time, of capacity", "goodput"),
        _Column("late", "late"),
        _Column("refused, expired or cut off", "unanswered"),
        _Column("memory grown, MB", "memory_growth"),
    ),
    "poison": by_rival(
        _Column("of a batch without a bad item", "healthy_seconds"),
        _Column("innocent callers hurt", "hurt"),
        _Column("callers never told", "never_told"),
    ),
    "killed": by_rival(_Column("calls that failed", "failed_calls"), _Column("longest time without an answer", "lost_seconds")),
    "successor": by_load(STANDARD_POOL),
    "kills": by_rival(
        _Column("longest", "worst_seconds"),
        _Column("descriptors left", "more_descriptors"),
        _Column("threads left", "more_threads"),
        _Column("processes left", "more_processes"),
    ),
    "start": by_rival(
        _Column("until all workers have answered", "all_seconds"),
        _Column("from the interpreter's start", "program_seconds"),
        _Column("memory of a worker", "worker_bytes"),
    ),
    "stop": by_load(OLD),
    "idle": by_rival(_Column("turns of the loop", "turns", "not counted"), _Column("wakes", "wakes")),
    "import": by_load("import asyncio", OLD),
    "job": by_rival(
        _Column("p50", "p50_seconds"),
        _Column("p99", "p99_seconds"),
        _Column("workers busy", "busy"),
        _Column("the loop's lateness, p99", "late_seconds"),
    ),
}

BASELINES = frozenset({BY_HAND, THREADS, "bare futures", "bare pipe", "bare loop", "memory copy", "inline", "import asyncio"})
