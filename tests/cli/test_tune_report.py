"""The report of `tune`: tables, reasons, and the generated code."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from async_batcher._batching.records.batch_cost import BatchCost, fit_cost_model
from async_batcher._serialization.exception_text import duration
from async_batcher.cli._import_string import ImportedFunction
from async_batcher.cli.tune.model import Choice, Config, Measurement
from async_batcher.cli.tune.plan import Plan
from async_batcher.cli.tune.report import TuneReport
from async_batcher.cli.tune.words import wrapped
from tests.support.measurements import a_point, on_a_line

if TYPE_CHECKING:
    from collections.abc import Callable


def _named(
    module: str, path: str, *, is_batcher: bool = False, setup: Callable[[], Any] | None = None
) -> ImportedFunction:
    return ImportedFunction(f"{module}:{path}", module, print, setup, is_batcher)


PAYING = dict(
    [
        a_point("threads", 1, 256, 1900.0),
        a_point("threads", 2, 128, 1800.0),
        a_point("processes", 1, 256, 1850.0),
        a_point("processes", 2, 64, 3500.0),
        a_point("processes", 2, 128, 3700.0),
        a_point("processes", 2, 256, 1850.0),
    ]
)
BEST = Config("processes", 2, 128)
ONE_THREAD = Config("threads", 1, 256)
TWO_THREADS = Config("threads", 2, 128)
ONE_CLIENT = Measurement(900.0, 0.0011, 0.0013)
WINDOW = BEST._replace(queue_time=0.01)


def a_report(
    config: Config = BEST,
    points: dict[Config, Measurement] | None = None,
    *,
    clients: int = 256,
    meets_target: bool = True,
    spread: float = 0.02,
    **changes: object,
) -> TuneReport:
    """Return a report that recommends a configuration."""
    points = PAYING if points is None else points
    found = points.get(config._replace(queue_time=0.0), Measurement(3700.0, 0.07, 0.08))
    loads = {1: ONE_CLIENT, clients: found}
    report = TuneReport(
        function=_named("parsing", "parse"),
        each=False,
        source="docs.jsonl",
        items=1000,
        cores=2,
        loop="asyncio",
        seconds=59.8,
        start_seconds=0.2,
        target_latency=None,
        costs=on_a_line(0.0003, 0.0005),
        model=fit_cost_model(on_a_line(0.0003, 0.0005)),
        plan=Plan([("threads", 1)], clients, may_start_more=True, skips_processes=False),
        clients=[1, 256],
        points=points,
        ratios={one: its.throughput / found.throughput for one, its in points.items()},
        windows={
            config._replace(queue_time=0.0): loads,
            config._replace(queue_time=0.01): {
                1: ONE_CLIENT._replace(p50=0.0111),
                clients: found._replace(throughput=1.2 * found.throughput),
            },
        },
        load=0.3,
        choice=Choice(config, clients, meets_target, loads, spread),
    )
    if costs := changes.get("costs"):
        report = report._replace(model=fit_cost_model(costs))  # type: ignore[arg-type]
    return report._replace(**changes)  # type: ignore[arg-type]


def test_the_tables() -> None:
    """One shows the best size of each pool, the other each number of clients."""
    text = a_report().text()
    lines = [" ".join(line.split()) for line in text.splitlines()]
    for line in (
        "parsing:parse on the first 1,000 items of docs.jsonl",
        "with 256 clients max_batch_size items/s of the chosen one's",
        "2 processes 128 3,700 100 %",
        "1 thread 256 1,900 51 %",
        "1 process 256 1,850 50 %",
        "2 threads 128 1,800 49 %",
        "Recommended for throughput with 256 clients:",
        'executor="process", max_workers=2, max_batch_size=128, max_queue_time=0',
        "clients items/s p50 p99",
        "1 900 1.1 ms 1.3 ms",
        "256 3,700 69.2 ms 69.2 ms",
    ):
        assert line in lines
    assert lines.index("2 processes 128 3,700 100 %") < lines.index("1 thread 256 1,900 51 %")


def test_no_line_is_wider_than_a_terminal() -> None:
    """All text fits 80 columns."""
    report = a_report(spread=0.4, load=7.0, meets_target=False, target_latency=0.001)
    report = report._replace(items=1, source="a/long/path/" * 4 + "docs.jsonl")
    assert max(map(len, report.text().splitlines())) <= 80


@pytest.mark.parametrize(
    ("report", "words"),
    [
        (a_report(), "The function alone: 300 us a batch + 500 us an item (within 0 % of what was"),
        (
            a_report(costs=[BatchCost(1, 0.5)]),
            "A batch of one item costs 500 ms; larger ones take too long",
        ),
        (
            a_report(costs=[BatchCost(1, 1.0), BatchCost(2, 1.0), BatchCost(4, 16.0)]),
            "The function alone: 1 s an item in a batch of one, 4 s in a batch of 4.",
        ),
        (a_report(), "processes: 1.95 x the throughput of 1 thread."),
        (a_report(ONE_THREAD, {**PAYING, BEST: Measurement(1950.0, 0.1, 0.1)}), "no executor: within 5 % of the throughput of 2 processes, and with 1 client a call takes no longer."),
        (a_report(TWO_THREADS, {**PAYING, TWO_THREADS: Measurement(4000.0, 0.1, 0.1)}), "threads: 1.08 x the throughput of 2 processes. The function releases the GIL."),
        (a_report(), "max_workers=2: 1 does 50 % of that."),
        (a_report(ONE_THREAD), "one thread: 2 do 95 % of that."),
        (a_report(), "max_batch_size=128: 64 does 95 %, 256 does 50 % of that."),
        (a_report(ONE_THREAD), "max_batch_size=256: no other size was measured."),
        (a_report(), "max_queue_time=0: 0.01 did not raise the throughput by 5 %."),
        (a_report(windows={BEST: {}}), "max_queue_time=0: there was no time to measure others."),
        (a_report(WINDOW), "max_queue_time=0.01: 1.20 x the throughput of 0; with 1 client p50 is 11.1 ms instead of 1.1 ms."),
        (a_report(Config("threads", 1, 1), dict([a_point("threads", 1, 1, 900.0)])), "max_queue_time=0: a batch of one item has nothing to wait for."),
        (a_report(ONE_THREAD, costs=on_a_line(1e-5, 1e-6)), "Called directly with lists of 256, the function does 962,406 items/s: it is cheap, and"),
        (
            a_report(plan=Plan([], 256, may_start_more=False, skips_processes=True), start_seconds=25.0),
            "processes were not measured: a worker takes 25 s to start, which is too much",
        ),
        (a_report(clients=16), "16 clients decide: with more, a call takes too long to compare options in the time."),
        (a_report(clients=16, target_latency=0.1), "16 clients decide: with more, a call takes longer than 100 ms."),
        (a_report(clients=16), "Not measured, for lack of time: 256 clients; see --time."),
        (a_report(target_latency=0.1), "Recommended for a p99 within 100 ms with 256 clients:"),
        (
            a_report(meets_target=False, target_latency=0.001),
            "No options keep p99 within 1 ms; these come nearest.",
        ),
        (a_report(spread=0.4), "The machine is busy: rounds of the same options differ by 40 %. Other"),
        (a_report(load=1.5), "The machine is busy: the load was 1.5 on 2 cores when this began. Other"),
    ],
)  # fmt: skip
def test_what_is_said(report: TuneReport, words: str) -> None:
    """The text states the cost of a batch, and the reasons for the advice."""
    assert words in " ".join(report.text().split())


def test_the_warning_is_beside_the_recommendation() -> None:
    """It follows the options, before the figures."""
    lines = a_report(load=1.5).text().splitlines()
    options = next(n for n, line in enumerate(lines) if line.startswith("  executor="))
    assert lines[options + 1].startswith("The machine is busy: ")


def test_no_warning_without_a_reason() -> None:
    """Small differences between trials give no warning."""
    report = a_report()
    assert report.warnings() == []
    assert "busy" not in report.text()
    assert "Called directly" not in report.text()


def test_the_figures() -> None:
    """They are JSON, and have every point and all of the advice."""
    figures = json.loads(json.dumps(a_report(WINDOW, spread=0.4).figures()))
    assert len(figures["points"]) == len(PAYING)
    assert figures["points"][0] == {
        "mode": "threads", "workers": 1, "batch_size": 256, "queue_time": 0.0, "clients": 256,
        "items_per_second": 1900.0, "p50_seconds": 256 / 1900, "p99_seconds": 256 / 1900,
    }  # fmt: skip
    assert len(figures["windows"]) == 4
    advice = figures["advice"]
    options = [
        advice[name] for name in ("executor", "max_workers", "max_batch_size", "max_queue_time")
    ]
    assert options == ["process", 2, 128, 0.01]
    assert [load["clients"] for load in advice["loads"]] == [1, 256]
    assert (figures["is_busy"], len(advice["warnings"])) == (True, 1)
    assert a_report(ONE_THREAD).figures()["advice"]["max_workers"] is None


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
    code = a_report(function=function, each=each).code()
    compile(code, "code", "exec")
    options = ['    executor="process",', "    max_workers=2,", "    max_batch_size=128,"]
    for line in [*lines, *options, "    max_queue_time=0,"]:
        assert line in code.splitlines()


def test_the_code_without_an_executor() -> None:
    """One thread is the default, and needs no option."""
    code = a_report(ONE_THREAD).code()
    assert "executor" not in code
    assert "max_workers" not in code


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


def test_lines_do_not_end_between_a_number_and_its_unit() -> None:
    """They are wrapped before the number."""
    assert wrapped("x" * 77 + " 5 %") == ["x" * 77, "5 %"]
    assert wrapped("- " + "x" * 75 + " 12 ms", "  ") == ["- " + "x" * 75, "  12 ms"]
