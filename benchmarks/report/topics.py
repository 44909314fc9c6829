"""What BENCHMARK.md shows of each file of results: a plot, and a table of a few rows (pure).

benchmarks/results/README.md has everything that was measured.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from benchmarks.libraries import names
from benchmarks.report import text

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from benchmarks.report.results import Record

LOOP = "asyncio"  # BENCHMARK.md shows this loop only
NOT_OTHERS = {*names.BASELINES, *names.VARIANTS, names.OURS}


@dataclass(frozen=True)
class Row:
    """A figure that BENCHMARK.md shows.

    Attributes:
        label: Its name in the table and the plot.
        scenario: A key of `METRICS`.
        where: The values of the load that select the benchmark.
        measure: The measure whose ratio is shown. None means the one that is compared.
        shown: The measure that is shown. None means the one whose ratio is shown.
        against: The library that it is compared with. None means the best other one.
        summary: Its name in the summary, which leaves it out if the name is empty.
    """

    label: str
    scenario: str
    where: Mapping[str, Any] = field(default_factory=dict)
    measure: str | None = None
    shown: str | None = None
    against: str | None = None
    summary: str = ""

    def find(self, records: Sequence[Record]) -> Record | None:
        """Return the benchmark, or None if it was not measured."""
        for record in records:
            has_load = all(record.load.get(key) == value for key, value in self.where.items())
            if record.scenario == self.scenario and record.loop in (LOOP, "none") and has_load:
                return record
        return None

    def figure(self, record: Record, name: str) -> str:
        """Write what a library measured, or a dash."""
        measure = self.shown or self.measure or record.measure
        spread = record.spread(name, measure)
        return "-" if spread is None else text.figure(measure, spread["median"])

    def other(self, record: Record) -> str | None:
        """Return the library that this project is compared with, or None without any."""
        measure = self.measure or record.measure
        if self.against is not None:
            return self.against if record.spread(self.against, measure) else None
        known = [name for name in others(record) if record.spread(name, measure)]
        return min(known, key=lambda name: record.median(name, measure), default=None)

    def ratio(self, record: Record) -> dict[str, float] | None:
        """Return the spread of the ratio to that library, or None without any."""
        other = self.other(record)
        return None if other is None else record.ratio(other, self.measure)


@dataclass(frozen=True)
class Topic:
    """The plot and the table of a file of results.

    Attributes:
        title: The title of the plot.
        head: The head of the first column.
        rows: The rows, at most `MAX_ROWS`.
        libraries: The libraries that have a column. Without any, each row names the library that
            it is compared with.
    """

    title: str
    head: str
    rows: tuple[Row, ...]
    libraries: tuple[str, ...] = ()


MAX_ROWS, MAX_COLUMNS = 8, 6


def others(record: Record) -> list[str]:
    """Return the libraries that a program could use instead of this project."""
    return [name for name in record.measured() if name not in NOT_OTHERS]


def _work(job: str, words: str) -> Iterator[Row]:
    for item_us, label in ((1, "1 us"), (10, "10 us"), (100, "100 us"), (1_000, "1 ms")):
        summary = f"work of 1 ms per item, {words}" if item_us == 1_000 else ""
        load = {"job": job, "item_us": item_us}
        yield Row(f"{label}, {words}", "crossing", load, summary=summary)


def _clients(count: int, label: str, *, summary: str = "") -> Row:
    return Row(label, "clients", {"clients": count}, summary=summary)


def _trip(payload: str, *, summary: str = "") -> Row:
    return Row(payload, "round_trip", {"payload": payload}, summary=summary)


def _busy(workers: int, batch_ms: float, *, summary: str = "") -> Row:
    label = f"{batch_ms:g} ms, {workers} worker{'s' if workers > 1 else ''}"
    load = {"workers": workers, "batch_ms": batch_ms, "in_flight": workers}
    return Row(label, "cores_busy", load, shown="busy", summary=summary)


def _latency(of_capacity: float) -> Iterator[Row]:
    for measure, label in (("p50_seconds", "p50"), ("p99_seconds", "p99")):
        load = {"job": "python", "of_capacity": of_capacity}
        case = f"{label} at {of_capacity:.0%} of capacity"
        summary = f"latency, {case}" if label == "p99" and of_capacity < 0.9 else ""
        yield Row(case, "latency", load, measure, summary=summary)


def _job(job: str, words: str) -> Iterator[Row]:
    load = {"job": job}
    yield Row(f"{words}: time per item", "job", load, summary=f"{words}, time per item")
    yield Row(f"{words}: p99 of a request", "job", load, "p99_seconds")
    yield Row(f"{words}: delay of the loop, p99", "job", load, "late_seconds")


def _pool_busy(batch_ms: float, *, scenario: str = "cores_busy", words: str = "busy cores") -> Row:
    limit = names.IMPORTABLE if scenario == "script_busy" else names.BARE_LOOP_AHEAD
    load = {"workers": 2, "batch_ms": batch_ms, "in_flight": 4}
    return Row(f"{words}, {batch_ms:g} ms", scenario, load, shown="busy", against=limit)


_START = "from start of the pool to the first result"
_PROGRAM = "from start of the interpreter to the first result"

TOPICS = {
    "crossing": Topic(
        "Share of two cores spent in the work of the items",
        "work of an item",
        (*_work("python", "GIL held"), *_work("hash", "GIL released")),
        (names.OURS_IN_THREADS, names.PROCESSES_BY_HAND, names.INLINE),
    ),
    "front_end": Topic(
        "Time per item in the front end",
        "items",
        (
            _clients(1, "1 client, no window", summary="front end, 1 client"),
            _clients(64, "64 clients", summary="front end, 64 clients"),
            _clients(1_024, "1,024 clients"),
            Row("one gather", "gather"),
            Row("100,000 in one call", "many", summary="front end, 100,000 items in one call"),
        ),
        (names.OLD, names.AIODATALOADER, names.BATCHED),
    ),
    "trips": Topic(
        "Round trip of one call to a worker process",
        "payload",
        (
            _trip("64 small ints", summary="round trip of 64 small ints"),
            _trip("1,000 objects"),
            _trip("64 x 100 kB of bytes"),
            _trip("1 MB array"),
            _trip("10 MB array", summary="round trip of a 10 MB array"),
            _trip("100 MB array"),
        ),
        (names.STANDARD_POOL, "loky", "pebble"),
    ),
    "cores": Topic(
        "Share of two cores spent in batches",
        "length of a batch",
        (
            _busy(2, 0.1),
            _busy(2, 0.5),
            _busy(2, 1.0, summary="busy cores, batches of 1 ms"),
            _busy(2, 10.0),
        ),
        (names.STANDARD_POOL, "loky", "pebble"),
    ),
    "latency": Topic(
        "Waits below the capacity, and results in time above it",
        "load",
        (
            *_latency(0.1),
            *_latency(0.8),
            Row("results in time at 200% of capacity", "overload", shown="goodput"),
        ),
        (names.PROCESSES_BY_HAND, names.OURS_IN_THREADS, names.OLD),
    ),
    "failures": Topic(
        "One bad item in a batch of 64, and one killed worker",
        "a killed worker",
        (
            Row("failed calls", "killed", measure="failed_calls"),
            Row(
                "until every slot works again",
                "killed",
                summary="recovery of a worker killed under load",
            ),
            Row("longest time without a result", "killed", measure="lost_seconds"),
            Row("replacement of an idle worker", "successor"),
        ),
        (names.STANDARD_POOL, "loky", "pebble"),
    ),
    "idle": Topic(
        "Start, memory and idle CPU time",
        "figure",
        (
            Row(_START, "start"),
            Row(
                _PROGRAM,
                "start",
                measure="program_seconds",
                summary="start of the interpreter and a pool",
            ),
            Row(
                "memory of a worker", "start", measure="worker_bytes", summary="memory of a worker"
            ),
            Row("CPU time of ten idle seconds", "idle", {"place": "coroutine"}),
            Row("stop of an idle batcher", "stop", {"place": "coroutine"}),
        ),
    ),
    "jobs": Topic(
        "Real work on two cores",
        "job",
        (*_job("sources", "source files"), *_job("texts", "texts")),
        (names.PROCESSES_BY_HAND, names.OURS_IN_THREADS, names.INLINE),
    ),
    "pool": Topic(
        "Share of two cores spent in batches, two in flight per worker",
        "figure",
        (
            _pool_busy(0.1),
            _pool_busy(0.5),
            _pool_busy(1.0),
            _pool_busy(1.0, scenario="script_busy", words="busy cores, function of a script"),
            Row("CPU time of a call", "call_cpu", against=names.BARE_LOOP),
            Row(
                "round trip of 64 small ints",
                "round_trip",
                {"payload": "64 small ints", "workers": 1},
                against=names.BARE_PIPE,
            ),
            Row("mean wait, results of a generator", "early_results", against=names.LISTED),
        ),
    ),
    "tune": Topic(
        "Time per item with the options that tune recommends",
        "batch function",
        tuple(
            Row(function, "tune", {"function": function}, against=names.BEST_OF_GRID)
            for function in (
                "fixed cost",
                "cost per item",
                "without the GIL",
                "sleeping",
                "import of 2 s",
            )
        ),
    ),
}
