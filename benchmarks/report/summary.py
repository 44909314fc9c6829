"""The few figures that the README shows (pure)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks.libraries.names import OLD, OURS, OURS_IN_THREADS, STANDARD_POOL
from benchmarks.report import text
from benchmarks.report.break_even import break_evens

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from benchmarks.report.results import Record

LOOP = "asyncio"


class Headline(NamedTuple):
    """A figure in a sentence with ``{ours}``, ``{its}`` and ``{ratio}``."""

    scenario: str
    where: Mapping[str, Any]
    against: str
    sentence: str


HEADLINES = (
    Headline(
        "clients",
        {"clients": 64},
        OLD,
        "The front end takes {ours} per item with 64 clients, {ratio} of 0.2.2's time ({its}).",
    ),
    Headline(
        "many", {}, OLD, "`process_many` takes {ours} per item, {ratio} of 0.2.2's time ({its})."
    ),
    Headline(
        "round_trip",
        {"payload": "64 small ints"},
        STANDARD_POOL,
        "The round trip of 64 small ints to a worker takes {ours}, {ratio} of the time of "
        "`ProcessPoolExecutor` ({its}).",
    ),
    Headline(
        "round_trip",
        {"payload": "10 MB array"},
        STANDARD_POOL,
        "The round trip of a 10 MB array takes {ours}, {ratio} of the time of "
        "`ProcessPoolExecutor` ({its}).",
    ),
    Headline(
        "job",
        {"job": "texts"},
        OURS_IN_THREADS,
        "A text classifier of scikit-learn takes {ours} per text in two processes, {ratio} of the "
        "time in two threads ({its}).",
    ),
)


def headlines(records: Sequence[Record]) -> str:
    """Write a line for each headline that was measured, and the break-evens, on asyncio."""
    on_loop = [record for record in records if record.loop == LOOP]
    lines = [f"- {found}" for one in HEADLINES if (found := _sentence(one, on_loop)) is not None]
    crossing = [record for record in on_loop if record.scenario == "crossing"]
    return "\n".join([*lines, break_evens(crossing)] if crossing else lines)


def _sentence(headline: Headline, records: Sequence[Record]) -> str | None:
    scenario, where, name, sentence = headline
    for record in records:
        ratios = record.ratio(name)
        has_load = all(record.load.get(key) == value for key, value in where.items())
        if record.scenario == scenario and has_load and ratios is not None:
            ours, its = (text.figure(record.measure, record.median(one)) for one in (OURS, name))
            return sentence.format(ours=ours, its=its, ratio=text.number(ratios["median"]))
    return None
