"""The table on the first screen of the README, from records of two scenarios."""

from __future__ import annotations

from typing import Any

import pytest
from benchmarks.harness.sampling import spread
from benchmarks.libraries.names import OURS, OURS_IN_THREADS, PROCESSES_BY_HAND, STANDARD_POOL
from benchmarks.report.first_screen import first_screen
from benchmarks.report.render import load, render
from benchmarks.report.results import Record, read

JOB = {"job": "texts", "items": 100, "clients": 20, "workers": 2, "max_batch_size": 16}


def _record(
    scenario: str, measure: str, medians: dict[str, float], loop: str = "asyncio", **load: Any
) -> Record:
    libraries = {
        name: {"data": {measure: [value]}, "spread": {measure: spread([value])}}
        for name, value in medians.items()
    }
    return Record(
        {
            "question": scenario, "loop": loop, "measure": measure, "mode": "usual",
            "rivals": libraries, "load": load,
        }
    )  # fmt: skip


def _job(loop: str = "asyncio", **changes: Any) -> Record:
    medians = {OURS: 0.01, OURS_IN_THREADS: 0.02, PROCESSES_BY_HAND: 0.03}
    return _record("job", "seconds_per_item", medians, loop, **{**JOB, **changes})


def _killed() -> Record:
    return _record("killed", "failed_calls", {OURS: 1.0, STANDARD_POOL: 8.0}, clients=8)


def test_each_row_has_its_own_figures() -> None:
    """Seconds for all items, and the calls that a killed worker fails."""
    records = [_job("uvloop", items=7), _job(job="sources"), _job(), _killed()]
    table = first_screen(records)
    assert table is not None
    about, _, rows = table.partition("\n\n")
    assert rows.splitlines() == [
        "|  | 100 requests | lost when a worker crashes | a call that hangs |",
        "| --- | --- | --- | --- |",
        "| threads | 2.00 s | the whole program | runs on |",
        "| `ProcessPoolExecutor` | 3.00 s | 8 of 8 calls | runs on |",
        '| `executor="process"` | 1.00 s | 1 of 8 calls | is ended |',
    ]
    assert "20 clients on 2 cores" in about
    assert "up to 16 requests" in about


@pytest.mark.parametrize("records", [[_job()], [_killed()], [_job(job="sources"), _killed()]])
def test_no_table_without_all_figures(records: list[Record]) -> None:
    """A page can be rendered before all of it is measured."""
    assert first_screen(records) is None


def test_the_page_has_the_table_of_the_saved_results() -> None:
    """The block's name is known to the pages."""
    page = "<!-- begin all.first_screen -->\n<!-- end all.first_screen -->\n"
    table = first_screen(read(load().values()))
    assert table is not None
    assert table in render(page, load())
