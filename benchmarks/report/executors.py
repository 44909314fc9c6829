"""The table of ``benchmarks/test_executors.py``, from its file of pytest-benchmark (pure)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.report import text
from benchmarks.report.topics import LOOP

if TYPE_CHECKING:
    from benchmarks.report.results import Results

LABELS = {
    "ThreadPoolExecutor": "`ThreadPoolExecutor`",
    "thread": '`executor="thread"`',
    "ProcessPoolExecutor": "`ProcessPoolExecutor`",
    "process": '`executor="process"` (a `WorkerPool`)',
}
COLUMNS = (  # kind of work and microseconds per item
    ("GIL held", 10),
    ("GIL held", 200),
    ("GIL held", 5_000),
    ("GIL released", 200),
    ("GIL released", 5_000),
)


def executor_table(results: Results) -> str:
    """Write a row for each executor, with the time per item of each load on asyncio."""
    medians = {}
    for one in results["benchmarks"]:
        params = one["params"]
        if params["loop"] == LOOP:
            case = (params["name"], params["kind"], params["item_us"])
            medians[case] = one["stats"]["median"] / one["extra_info"]["items"]
    columns = [it for it in COLUMNS if any(case[1:] == it for case in medians)]
    head = ["executor", *(f"{item_us:,} us, {kind}" for kind, item_us in columns)]
    rows = []
    for name, label in LABELS.items():
        found = [medians.get((name, *column)) for column in columns]
        cells = ["-" if one is None else text.seconds(one) for one in found]
        rows.append([label, *cells])
    return text.markdown_table(head, rows)
