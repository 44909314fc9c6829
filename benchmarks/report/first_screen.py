"""The table on the first screen of the README: threads, the standard pool, this project (pure)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.libraries.names import OURS, OURS_IN_THREADS, PROCESSES_BY_HAND, STANDARD_POOL
from benchmarks.report.text import markdown_table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.report.results import Record

LOOP = "asyncio"
JOB = "texts"

# ``tests/runners/test_other_pools.py`` checks what a crash of a thread and a hang do.
HEAD = ("", "{items} requests", "lost when a worker crashes", "a call that hangs")
THREADS = ("threads", "the whole program", "runs on")
PROCESSES = ("`ProcessPoolExecutor`", "{failed} of {clients} calls", "runs on")
WORKERS = ('`executor="process"`', "{failed} of {clients} calls", "is ended")


def first_screen(records: Sequence[Record]) -> str | None:
    """Write the table and what it shows, or return None if the results lack something."""
    job = _find(records, "job", (OURS, OURS_IN_THREADS, PROCESSES_BY_HAND), job=JOB)
    killed = _find(records, "killed", (OURS, STANDARD_POOL))
    if job is None or killed is None:
        return None

    def row(
        words: tuple[str, str, str], measured: str, crashed: str | None = None
    ) -> tuple[str, ...]:
        name, crash, hang = words
        if crashed is not None:
            failed = round(killed.median(crashed, "failed_calls"))
            crash = crash.format(failed=failed, clients=killed.load["clients"])
        return (name, f"{job.median(measured) * job.load['items']:.2f} s", crash, hang)

    head = [cell.format(items=job.load["items"]) for cell in HEAD]
    rows = [
        row(THREADS, OURS_IN_THREADS),
        row(PROCESSES, PROCESSES_BY_HAND, STANDARD_POOL),
        row(WORKERS, OURS, OURS),
    ]
    about = (
        f"A text classifier of scikit-learn serves {job.load['clients']} clients on "
        f'{job.load["workers"]} cores. Threads and `executor="process"` run batches '
        f"of up to {job.load['max_batch_size']} requests; `ProcessPoolExecutor` runs one request "
        f"per call. In another run, a worker is killed while {killed.load['clients']} clients call:"
    )
    return f"{about}\n\n{markdown_table(head, rows)}"


def _find(
    records: Sequence[Record], scenario: str, names: Sequence[str], **load: str
) -> Record | None:
    """Return the record of a scenario in which all libraries were measured."""
    for record in records:
        if (
            record.scenario == scenario
            and record.loop == LOOP
            and load.items() <= record.load.items()
            and set(names) <= set(record.measured())
        ):
            return record
    return None
