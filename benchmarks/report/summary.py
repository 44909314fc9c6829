"""The summary of BENCHMARK.md, and the few figures that the README shows (pure)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks.libraries.names import OLD, OURS, OURS_IN_THREADS, STANDARD_POOL
from benchmarks.report import text
from benchmarks.report.break_even import break_evens
from benchmarks.report.goals import is_behind
from benchmarks.report.results import read
from benchmarks.report.topics import LOOP, TOPICS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from benchmarks.report.results import Files, Record

SUMMARY_HEAD = ("scenario", f"**{OURS}**", "best other", text.RATIO, "ahead")


class Headline(NamedTuple):
    """A figure in a sentence with ``{ours}`` and ``{its}``."""

    scenario: str
    where: Mapping[str, Any]
    against: str
    sentence: str


HEADLINES = (
    Headline(
        "clients",
        {"clients": 64},
        OLD,
        "With 64 clients, queueing and handing out results takes {ours} per item; in async-batcher "
        "0.2.2 it takes {its}.",
    ),
    Headline(
        "round_trip",
        {"payload": "10 MB array"},
        STANDARD_POOL,
        "A 10 MB array goes to a worker and back in {ours}, and with `ProcessPoolExecutor` in "
        "{its}.",
    ),
    Headline(
        "job",
        {"job": "texts"},
        OURS_IN_THREADS,
        "A text classifier of scikit-learn takes {ours} per text in two processes, and {its} in "
        "two threads.",
    ),
)


def headlines(records: Sequence[Record]) -> str:
    """Write a line for each headline that was measured, and the break-evens under the GIL."""
    on_loop = [record for record in records if record.loop == LOOP]
    lines = [f"- {found}" for one in HEADLINES if (found := _sentence(one, on_loop)) is not None]
    under_gil = [
        one for one in on_loop if one.scenario == "crossing" and one.load["job"] == "python"
    ]
    return "\n".join([*lines, break_evens(under_gil)] if under_gil else lines)


def _sentence(headline: Headline, records: Sequence[Record]) -> str | None:
    scenario, where, name, sentence = headline
    for record in records:
        has_load = all(record.load.get(key) == value for key, value in where.items())
        if record.scenario == scenario and has_load and record.ratio(name) is not None:
            ours, its = (text.figure(record.measure, record.median(one)) for one in (OURS, name))
            return sentence.format(ours=ours, its=its)
    return None


def summary(files: Files) -> str:
    """Write a row for each figure of the topics that is named in the summary."""
    rows = []
    for name, topic in TOPICS.items():
        records = read([files[name]]) if name in files else []
        for row in topic.rows:
            record = row.find(records) if row.summary else None
            other = None if record is None else row.other(record)
            if record is None or other is None:
                continue
            ratios = row.ratio(record)
            ours, its = (row.figure(record, one) for one in (OURS, other))
            written = "-" if ratios is None else text.ratio(ratios)
            rows.append((row.summary, ours, f"{other}: {its}", written, _ahead(ratios, other)))
    return text.markdown_table(SUMMARY_HEAD, rows)


def _ahead(ratios: Mapping[str, float] | None, other: str) -> str:
    """Return who is ahead outside the noise: in three of four rounds."""
    if ratios is None:
        return "-"
    if ratios["q3"] < 1:
        return f"**{OURS}**"
    return other if is_behind(ratios) else "neither"
