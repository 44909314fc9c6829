"""Where this project loses, and which goals it meets (pure)."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from benchmarks.libraries.names import AGAIN, BASELINES, OURS
from benchmarks.report import text
from benchmarks.report.metrics import GOALS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from benchmarks.report.metrics import Goal
    from benchmarks.report.results import Record

NONE = "Nowhere in these figures."
HEAD = ("figure", "measured", "goal", "met", "A / A")


def losses(records: Sequence[Record], *, baselines: bool = True) -> str:
    """List the libraries with a better figure, the worst ratio first, and the missed goals.

    Args:
        records: What was measured.
        baselines: Whether baselines and limits are listed too.
    """
    worse: dict[tuple[str, str], list[tuple[float, Record]]] = {}
    for record in records:
        for name in record.measured():
            ratios = record.ratio(name)
            if ratios is None or ratios["median"] <= 1 or not record.metric.better:
                continue
            if baselines or name not in BASELINES:
                cases = worse.setdefault((record.scenario, name), [])
                cases.append((ratios["median"], record))
    by_worst = sorted(worse.items(), key=lambda one: -max(ratio for ratio, _ in one[1]))
    lines = [_loss(name, cases, records) for (_, name), cases in by_worst]
    missed = [
        f"- {check.what}: {check.value}, where the goal is {check.bound}."
        for check in _checks(records)
        if not check.met
    ]
    return "\n".join([*lines, *missed]) or NONE


def _loss(name: str, cases: list[tuple[float, Record]], records: Sequence[Record]) -> str:
    _, worst = max(cases, key=lambda case: case[0])
    ratios = worst.ratio(name)
    assert ratios is not None
    scenario, metric = worst.scenario, worst.metric
    total = sum(one.scenario == scenario and name in one.measured() for one in records)
    often = "" if total == 1 else f" in {len(cases)} of {total} cases; the worst"
    where = f" ({worst.case})" if worst.case else ""
    its, ours = (text.figure(worst.measure, worst.median(one)) for one in (name, OURS))
    may_be_noise = ratios["q1"] <= 1 and len(worst.rounds(name)) > 1
    noise = ", which may be noise" if may_be_noise else ""
    return (
        f"- {metric.title}: {worst.named(name)} {metric.better}{often}{where}: "
        f"{its}, ours {ours}, ratio {text.ratio(ratios)}{noise}."
    )


def goals(records: Sequence[Record]) -> str:
    """Write the table of goals with what was measured."""
    head, *rows = goal_rows(records)
    return text.markdown_table(head, rows)


def goal_rows(records: Sequence[Record]) -> list[tuple[str, ...]]:
    """Write the head and the rows of that table.

    The last column, if any figure was measured twice, is the ratio of its two measurements.
    """
    rows = [
        (check.what, check.value, check.bound, "yes" if check.met else "**no**", check.again)
        for check in _checks(records)
    ]
    width = len(HEAD) if any(again for *_, again in rows) else len(HEAD) - 1
    return [row[:width] for row in (HEAD, *rows)]


class _Check(NamedTuple):
    """A figure that has a goal."""

    what: str
    value: str
    bound: str
    met: bool
    again: str  # the ratio to a second measurement, empty if there is none


def _checks(records: Sequence[Record]) -> Iterator[_Check]:
    for goal in GOALS:
        for record in records:
            has_load = all(record.load.get(key) == it for key, it in goal.where.items())
            if record.scenario == goal.scenario and has_load:
                yield from _check(goal, record)


def _check(goal: Goal, record: Record) -> Iterator[_Check]:
    measure = goal.measure or record.measure
    what = f"{record.title}, {goal.figure}" if goal.figure else record.title
    if goal.against is None:
        value = record.median(OURS, measure)
        written, bound = text.figure(measure, value), text.figure(measure, goal.bound)
    else:
        ratios = record.ratio(goal.against, measure)
        if ratios is None:
            return
        value = ratios["median"]
        what = f"{what}: ours / {goal.against}"
        written, bound = f"{value:.2f}", f"{goal.bound:.2f}"
    met = value >= goal.bound if goal.at_least else value <= goal.bound
    bound = f"at {'least' if goal.at_least else 'most'} {bound}"
    again = record.ratio(AGAIN, measure)
    yield _Check(what, written, bound, met, "" if again is None else text.ratio(again))
