"""Where other libraries are ahead, and which goals this project meets (pure)."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

from benchmarks.libraries.names import AGAIN, OURS
from benchmarks.report import text
from benchmarks.report.metrics import GOALS
from benchmarks.report.topics import TOPICS, others

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from benchmarks.report.metrics import Goal
    from benchmarks.report.results import Record

NONE = "Nowhere in these figures."
HEAD = ("figure", "measured", "goal", "met", "A / A")


def losses(records: Sequence[Record]) -> str:
    """List everything with a better figure, the worst ratio first, and the missed goals.

    Baselines, limits and other configurations of this project are listed too.
    """
    worse: dict[tuple[str, str], list[tuple[float, Record]]] = {}
    for record in records:
        for name in record.measured():
            ratios = record.ratio(name)
            if ratios is not None and ratios["median"] > 1 and record.metric.better:
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
    noise = "" if is_behind(ratios) else ", which may be noise"
    return (
        f"- {metric.title}: {worst.named(name)} {metric.better}{often}{where}: "
        f"{its}, ours {ours}, ratio {text.ratio(ratios)}{noise}."
    )


def is_behind(ratios: Mapping[str, float]) -> bool:
    """Return whether this project is slower outside the noise: in three of four rounds."""
    return ratios["q1"] > 1


def losses_outside_noise(records: Sequence[Record]) -> str:
    """Write the table of figures in which a library is ahead outside the noise.

    Each scenario and measure has one row, with its worst case and all libraries that are ahead in
    some case. The measures are the compared one of each scenario, and those in BENCHMARK.md.
    """
    found: dict[tuple[str, str], _Figure] = {}
    for record in records:
        for measure in _measures(record) if record.metric.better else ():
            figure = found.setdefault((record.scenario, measure), _Figure())
            for name in others(record):
                if (ratios := record.ratio(name, measure)) is not None:
                    figure.add(record, name, ratios)
    behind = {key: figure for key, figure in found.items() if figure.ahead}
    rows = [
        behind[key].row(key[1]) for key in sorted(behind, key=lambda one: -behind[one].worst_ratio)
    ]
    head = ("figure", "worst case", f"**{OURS}**", "library ahead", text.RATIO, "ahead in")
    return text.markdown_table(head, rows) if rows else NONE


class _Figure:
    """A measure of a scenario, with the cases in which a library is ahead."""

    def __init__(self) -> None:
        self.total: Counter[str] = Counter()
        self.ahead: Counter[str] = Counter()
        self.worst: tuple[Record, str, Mapping[str, float]] | None = None

    @property
    def worst_ratio(self) -> float:
        """The largest median ratio outside the noise."""
        return 0.0 if self.worst is None else self.worst[2]["median"]

    def add(self, record: Record, name: str, ratios: Mapping[str, float]) -> None:
        """Count a case of a library."""
        self.total[name] += 1
        if is_behind(ratios):
            self.ahead[name] += 1
            if ratios["median"] > self.worst_ratio:
                self.worst = (record, name, ratios)

    def row(self, measure: str) -> tuple[str, ...]:
        """Write the row of the table."""
        assert self.worst is not None
        record, name, ratios = self.worst
        columns = {record.measure: record.metric.measure}
        columns |= {known: head for head, known in record.metric.columns.items()}
        its, ours = (text.figure(measure, record.median(one, measure)) for one in (name, OURS))
        ahead = [f"{one}: {count} of {self.total[one]} cases" for one, count in self.ahead.items()]
        what = f"{record.metric.title}: {columns[measure]}"
        other = f"{record.named(name)}: {its}"
        return (what, record.case, ours, other, text.ratio(ratios), ", ".join(ahead))


def _measures(record: Record) -> dict[str, None]:
    """Return the compared measure, and the others whose ratios BENCHMARK.md shows."""
    shown = [
        row.measure
        for topic in TOPICS.values()
        for row in topic.rows
        if row.scenario == record.scenario and row.measure is not None
    ]
    return dict.fromkeys([record.measure, *shown])


def missed_goals(records: Sequence[Record]) -> str:
    """Write how many goals are missed, with the scenarios."""
    checks = list(_checks(records))
    missed = Counter(check.scenario for check in checks if not check.met)
    if not missed:
        return f"All {len(checks)} goals of the project are met."
    scenarios = ", ".join(f"{scenario}: {count}" for scenario, count in missed.items())
    return f"Of {len(checks)} goals of the project, {missed.total()} are missed ({scenarios})."


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

    scenario: str  # its title
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
        what = f"{what}: {'relative' if goal.at_least else 'ratio'} to {goal.against}"
        written, bound = f"{value:.2f}", f"{goal.bound:.2f}"
    met = value >= goal.bound if goal.at_least else value <= goal.bound
    bound = f"at {'least' if goal.at_least else 'most'} {bound}"
    again = record.ratio(AGAIN, measure)
    yield _Check(
        record.metric.title, what, written, bound, met, "" if again is None else text.ratio(again)
    )
