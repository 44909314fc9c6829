"""The report of `tune`: tables, reasons, and the generated code."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from async_batcher.cli._import_string import ImportedFunction
from async_batcher.cli.tune.model import BatchCost, Measurement, fit_cost_model, recommend
from async_batcher.cli.tune.report import TuneReport, duration
from tests.support.measurements import INLINE, a_point, on_a_line

if TYPE_CHECKING:
    from collections.abc import Callable


def _named(
    module: str, path: str, *, is_batcher: bool = False, setup: Callable[[], Any] | None = None
) -> ImportedFunction:
    return ImportedFunction(f"{module}:{path}", module, print, setup, is_batcher)


def a_report(
    points: list[Measurement],
    target: float | None = None,
    costs: list[BatchCost] | None = None,
    **changes: object,
) -> TuneReport:
    """Return the report on such points."""
    costs = costs or on_a_line(0.0003, 0.00005)
    report = TuneReport(
        function=_named("parsing", "parse"),
        each=False,
        source="docs.jsonl",
        items=1000,
        cores=2,
        loop="asyncio",
        seconds=59.8,
        target_latency=target,
        costs=costs,
        model=fit_cost_model(costs),
        points=points,
        spread=0.05,
        load=0.3,
        advice=recommend(points, target),
    )
    return report._replace(**changes)  # type: ignore[arg-type]


PAYING = [
    *INLINE,
    a_point("threads", 1, 16, 1900.0),
    a_point("threads", 2, 16, 1800.0),
    a_point("processes", 1, 16, 1900.0),
    a_point("processes", 2, 16, 3700.0),
]


def test_the_table_has_every_point() -> None:
    """The tables show throughput and latency of each point, and mark the recommended one."""
    text = a_report(PAYING).text()
    lines = [" ".join(line.split()) for line in text.splitlines()]
    for line in (
        "items/s, batches of 16", "inline 2,000", "1 thread 1,900", "2 threads 1,800", "1 process 1,900", "2 processes * 3,700",
        "latency, batches of 16", "inline 16 ms", "1 thread 16.8 ms", "2 threads 26.7 ms", "2 processes * 13 ms",
    ):  # fmt: skip
        assert line in lines
    assert text.count("*") == 2


SLOW = [a_point("processes", workers, 16, 1900.0) for workers in (1, 2)]


@pytest.mark.parametrize(
    ("report", "words"),
    [
        (
            a_report(PAYING),
            "A batch costs 300 us + 50 us for each item; the line is within 0 % of what was measured.",
        ),
        (
            a_report(PAYING, costs=[BatchCost(1, 0.5)]),
            "A batch of one item costs 500 ms; larger ones take too long",
        ),
        (
            a_report(PAYING, costs=[BatchCost(1, 1.0), BatchCost(2, 1.0), BatchCost(4, 16.0)]),
            "An item costs 1 s alone, and 4 s in a batch of 4.",
        ),
        (a_report(PAYING), "The way to a worker process and back adds 7.32 ms to a batch of 16."),
        (
            a_report(PAYING),
            "processes pay: 1.85 x what the function does inline, 1.95 x what 1 thread does.",
        ),
        (a_report(PAYING), "max_workers=2: 1.95 x what 1 process does."),
        (a_report(PAYING[:3] + PAYING[4:5]), "1 thread; no more were tried, which --workers does."),
        (a_report([*PAYING[:4], *SLOW]), "1 thread; more of them do not add 5 % for each."),
        (
            a_report(PAYING),
            "max_batch_size=16: the smallest batch that comes within 5 % of the best throughput.",
        ),
        (
            a_report(PAYING, 0.014),
            "max_queue_time=0.0053: what a batch, which runs for 8.65 ms, leaves of the target.",
        ),
        (
            a_report(PAYING, 0.001),
            "no batch stays within 1 ms, in threads or in processes; this comes nearest to it.",
        ),
        (
            a_report(PAYING, 0.001),
            "max_batch_size=16: the one with the least latency, which is more than 1 ms.",
        ),
        (
            a_report(PAYING, spread=0.4),
            "The machine does other things too: trials of the same differ by 40 %. Take",
        ),
        (
            a_report(PAYING, load=1.5),
            "The machine does other things too: the load was 1.5 on 2 cores when this began. Take",
        ),
    ],
)
def test_what_is_said(report: TuneReport, words: str) -> None:
    """The text states the cost of a batch, and the reasons for the advice."""
    assert words in report.text()


def test_no_warning_without_a_reason() -> None:
    """Small differences between trials give no warning."""
    assert "other things" not in a_report(PAYING).text()


@pytest.mark.parametrize(
    ("function", "each", "lines"),
    [
        (_named("parsing", "parse"), False, ["from parsing import parse", "    parse,"]),
        (_named("a.b", "Parser.parse"), False, ["from a.b import Parser", "    Parser.parse,"]),
        (_named("parsing", "batched"), False, ["import parsing", "    parsing.batched,"]),
        (
            _named("parsing", "parse"),
            True,
            ["    return [parse(item) for item in batch]", "    process_batch,"],
        ),
        (
            _named("parsing", "parser", is_batcher=True),
            False,
            ["from parsing import parser", "    parser.process_batch,"],
        ),
        (
            _named("parsing", "parser", is_batcher=True, setup=print),
            False,
            ["    parser.process_batch,", "    setup_worker=parser.setup_worker,"],
        ),
    ],
)
def test_the_code_to_paste_names_the_function(
    function: ImportedFunction, each: bool, lines: list[str]
) -> None:
    """The code imports and names the function; with ``--each`` it defines a batch function."""
    code = a_report(PAYING, function=function, each=each).code()
    compile(code, "code", "exec")
    for line in [*lines, '    executor="process",', "    max_workers=2,", "    max_batch_size=16,"]:
        assert line in code.splitlines()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0 us"),
        (1.234e-6, "1.23 us"),
        (0.0009999, "1 ms"),
        (0.0123, "12.3 ms"),
        (1.0, "1 s"),
        (1234.5, "1,234 s"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    """Durations have three digits, and a unit that suits them."""
    assert duration(seconds) == text
