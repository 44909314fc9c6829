"""The tables of one scenario, and of a topic in BENCHMARK.md (pure)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.libraries.names import AGAIN, OURS
from benchmarks.report import text
from benchmarks.report.metrics import MISSING
from benchmarks.report.results import all_measured

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.report.results import Record
    from benchmarks.report.topics import Topic


def table(records: Sequence[Record]) -> str:
    """Write the table of a scenario's records, and below it which libraries could not run."""
    metric = records[0].metric
    has_loops = any(record.loop != "none" for record in records)
    head = [*(part.head for part in metric.parts), *(["loop"] if has_loops else [])]
    names = all_measured(records)
    if metric.columns:
        head += ["", metric.measure, *metric.columns, text.RATIO]
    else:
        head += [_heading(name, records) for name in names]
        against = [name for name in metric.against if name in names]
        head += [f"ratio to {name} (lower is better)" for name in against]
    rows = []
    for record in records:
        load = [part.cell(record.load) for part in metric.parts]
        load += [record.loop] if has_loops else []
        if metric.columns:
            rows += [[*load, *_row(record, name)] for name in record.measured()]
        else:
            figures = [_figure(record, name, metric.shown) or "-" for name in names]
            ratios = [_ratio(record, name) for name in against]
            rows.append([*load, *figures, *ratios])
    reasons = dict.fromkeys(reason for record in records for reason in record.reasons())
    notes = [f"- Not in the table: {name}: {reason}." for name, reason in reasons]
    return "\n".join([text.markdown_table(head, rows), *(["", *notes] if notes else [])])


def topic_table(topic: Topic, records: Sequence[Record]) -> str:
    """Write the table of a topic. A row that was not measured is left out."""
    found = [(row, record) for row in topic.rows if (record := row.find(records))]
    has_again = any(record.spread(AGAIN) for _, record in found)
    names = topic.libraries
    columns = names or ("compared with", "its figure")
    head = [topic.head, f"**{OURS}**", *columns, text.RATIO, *(["A / A"] if has_again else [])]
    rows = []
    for row, record in found:
        other = row.other(record)
        if names:
            figures = [row.figure(record, name) for name in names]
        else:
            figures = ["-", "-"] if other is None else [other, row.figure(record, other)]
        ratios = [row.ratio(record), *([record.ratio(AGAIN)] if has_again else [])]
        written = ["-" if one is None else text.ratio(one) for one in ratios]
        rows.append([row.label, row.figure(record, OURS), *figures, *written])
    return text.markdown_table(head, rows)


def _row(record: Record, name: str) -> list[str]:
    """Write a library's row: the compared measure, the others, and this project's ratio to it."""
    spreads = {key: record.spread(name, key) for key in record.metric.columns.values()}
    others = [
        MISSING.get(key, "") if spread is None else text.figure(key, spread["median"])
        for key, spread in spreads.items()
    ]
    return [record.named(name), _figure(record, name), *others, _ratio(record, name)]


def _figure(record: Record, name: str, measure: str | None = None) -> str:
    spread = record.spread(name, measure)
    return "" if spread is None else text.with_quartiles(measure or record.measure, spread)


def _ratio(record: Record, name: str) -> str:
    ratios = record.ratio(name) if name != OURS else None
    return "" if ratios is None else text.ratio(ratios)


def _heading(name: str, records: Sequence[Record]) -> str:
    return next(record.named(name) for record in records if name in record.measured())
