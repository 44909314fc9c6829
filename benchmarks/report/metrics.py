"""Every scenario as the pages present it: its words, its table and its goals (pure)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from benchmarks.libraries import names

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True)
class Part:
    """A value of the load that tells the benchmarks of one scenario apart.

    Attributes:
        key: Its key in the load.
        head: The head of its column.
        text: The format of its cell.
        words: Its format in a sentence. Empty uses ``text``.
        names: Other names for some values.
    """

    key: str
    head: str
    text: str = "{}"
    words: str = ""
    names: Mapping[Any, str] = field(default_factory=dict)

    def cell(self, load: Mapping[str, Any]) -> str:
        """Write the value for a table."""
        return self.text.format(self.names.get(load[self.key], load[self.key]))

    def phrase(self, load: Mapping[str, Any]) -> str:
        """Write the value for a sentence."""
        return (self.words or self.text).format(self.names.get(load[self.key], load[self.key]))


@dataclass(frozen=True)
class Goal:
    """A bound for a figure. A missed goal is reported and fails nothing.

    Attributes:
        scenario: A key of `METRICS`.
        bound: The largest value that meets the goal; the smallest, if ``at_least``.
        against: The library whose ratio is bounded. None bounds this project's own figure.
        measure: The measure. None means the one that is compared.
        where: The values of the load for which the goal holds.
        figure: The name of the figure, unless the title names it.
    """

    scenario: str
    bound: float
    against: str | None = None
    measure: str | None = None
    at_least: bool = False
    where: Mapping[str, Any] = field(default_factory=dict)
    figure: str = ""


@dataclass(frozen=True)
class Metric:
    """How the pages present a scenario.

    Attributes:
        title: The name of the scenario.
        measure: The name of the compared measure.
        parts: What tells its benchmarks apart, besides the loop.
        columns: Other measures by head. With them the table has a row for each library and load.
        against: Without columns the table has a row for each load, a column for each library, and
            the ratios to these libraries.
        shown: The measure in that table. None means the one that is compared.
        better: What the pages say of a library with a better figure. Empty if that is no loss.
    """

    title: str
    measure: str
    parts: tuple[Part, ...] = ()
    columns: Mapping[str, str] = field(default_factory=dict)
    against: tuple[str, ...] = ()
    shown: str | None = None
    better: str = "is faster"


MISSING = {"p999_seconds": "too few", "turns": "not counted"}  # cells of measures without a value
WORK_NAMES = {"python": "work that holds the GIL", "hash": "work that releases the GIL"}

_PLACE = Part("place", "place")
_FUNCTION = Part("function", "function")
_JOB = Part("job", "job", names={"sources": "source files", "forest": "a random forest"})
_PAYLOAD = Part("payload", "payload")
_BATCH = Part("batch_ms", "batch", "{:g} ms", "batches of {:g} ms")
_WORKERS = Part("workers", "workers", "{}", "{} workers")
_IN_FLIGHT = Part("in_flight", "in flight", "{}", "{} in flight")
_WORK = Part("job", "work", names=WORK_NAMES)
_ITEM = Part("item_us", "per item", "{:,} us", "{:,} us per item")
_CLIENTS = Part("clients", "clients", "{:,}", "clients: {:,}")
_RETURNED = Part("returned", "returns", words="returning {}")
_LOAD = Part("of_capacity", "load", "{:.0%}", "{:.0%} of capacity")

_ITEM_TIME = "time per item"
_BATCHERS = (names.OLD, names.AIODATALOADER)
_STANDARD = (names.STANDARD_POOL,)
_64 = {"clients": 64}
_GROWN = "memory grown from the first {} to the last, MB"
_GROWN_STREAM, _GROWN_OVERLOAD = _GROWN.format("twentieth"), _GROWN.format("second")
_IN_TIME = "results in time, of capacity"
_OF_TRIP, _FIRST = "of the trip of one", "first caller"
_LEFT = {f"{what} left": f"more_{what}" for what in ("descriptors", "threads", "processes")}

METRICS = {
    "crossing": Metric(
        "processes or threads",
        _ITEM_TIME,
        (_WORK, _ITEM),
        against=(names.OURS_IN_THREADS, names.OLD),
    ),
    "clients": Metric("clients one by one", _ITEM_TIME, (_CLIENTS,), against=_BATCHERS),
    "gather": Metric("one gather", _ITEM_TIME, against=_BATCHERS),
    "many": Metric("100,000 items in one call", _ITEM_TIME, against=_BATCHERS),
    "lone_item": Metric(
        "a single request",
        "wait",
        columns={"a bare timer": "timer_seconds", "difference": "excess_seconds"},
    ),
    "stream": Metric(
        "a stream of items",
        _ITEM_TIME,
        columns={"largest memory, MB": "memory_most", _GROWN_STREAM: "memory_growth"},
        better="",
    ),
    "round_trip": Metric(
        "round trip", "time", (_PAYLOAD,), against=(names.STANDARD_POOL, names.BARE_PIPE)
    ),
    "hold_up": Metric(
        "event loop blocked by an array",
        "longest block",
        columns={
            "of the first trip": "first_hold_up_seconds",
            "of an idle loop": "idle_seconds",
            "time of the trip": "trip_seconds",
        },
        better="blocks it for less",
    ),
    "cores_busy": Metric(
        "busy cores",
        "time per batch",
        (_WORKERS, _BATCH, _IN_FLIGHT),
        against=(names.STANDARD_POOL, names.BARE_LOOP, names.BARE_LOOP_AHEAD),
        shown="busy",
        better="keeps them busier",
    ),
    "script_busy": Metric(
        "busy cores, function of a script",
        "time per batch",
        (_WORKERS, _BATCH, _IN_FLIGHT),
        against=(names.IMPORTABLE,),
        shown="busy",
        better="keeps them busier",
    ),
    "call_cpu": Metric(
        "CPU time of the program for a call",
        "CPU time",
        against=(names.BARE_LOOP,),
        better="uses less",
    ),
    "batch_of_one": Metric(
        "CPU time of the program for a batch of one",
        "CPU time",
        columns={_ITEM_TIME: "seconds_per_item"},
        better="uses less",
    ),
    "batch_gap": Metric(
        "gap between two batches of arrays",
        "gap",
        (_RETURNED,),
        columns={"trip of one": "trip_seconds", _OF_TRIP: "gap_share"},
        better="is shorter",
    ),
    "early_results": Metric(
        "results of a generator",
        "mean wait",
        columns={_FIRST: "first_seconds", "last caller": "last_seconds"},
    ),
    "latency": Metric(
        "latency under load",
        "p99",
        (_WORK, _LOAD),
        columns={
            "p50": "p50_seconds",
            "p95": "p95_seconds",
            "p99.9": "p999_seconds",
            "still pending": "unanswered",
        },
        better="returns sooner",
    ),
    "overload": Metric(
        "twice the capacity",
        "time per result in time",
        columns={
            _IN_TIME: "goodput",
            "late": "late",
            "refused, expired or cancelled": "unanswered",
            _GROWN_OVERLOAD: "memory_growth",
        },
    ),
    "poison": Metric(
        "a bad item in a batch of 64",
        "until every caller is notified",
        (_PLACE,),
        columns={
            "batch without a bad item": "healthy_seconds",
            "other callers with an error": "hurt",
            "callers never notified": "never_told",
        },
    ),
    "killed": Metric(
        "a worker killed under load",
        "until every slot works again",
        columns={"failed calls": "failed_calls", "longest time without a result": "lost_seconds"},
        better="recovers sooner",
    ),
    "successor": Metric(
        "replacement of a killed worker", "until complete again", against=_STANDARD
    ),
    "kills": Metric(
        "many killed workers",
        "median until complete again",
        columns={"longest": "worst_seconds", **_LEFT},
        better="",
    ),
    "start": Metric(
        "start of a pool",
        "to the first result",
        columns={
            "to a result of every worker": "all_seconds",
            "from the start of the interpreter": "program_seconds",
            "memory of a worker": "worker_bytes",
        },
    ),
    "idle": Metric(
        "an idle batcher",
        "CPU time",
        (_PLACE,),
        columns={"loop iterations": "turns", "wake-ups": "wakes"},
        better="uses less",
    ),
    "stop": Metric("stop of an idle batcher", "time", (_PLACE,), against=(names.OLD,)),
    "import": Metric("the import", "time", against=(names.IMPORT_ASYNCIO, names.OLD)),
    "tune": Metric(
        "the recommendation of `tune`",
        _ITEM_TIME,
        (_FUNCTION,),
        against=(names.BEST_OF_GRID,),
        better="",  # the goal is a bound for the ratio
    ),
    "job": Metric(
        "real work",
        _ITEM_TIME,
        (_JOB,),
        columns={
            "p50": "p50_seconds",
            "p99": "p99_seconds",
            "workers busy": "busy",
            "delay of the loop, p99": "late_seconds",
        },
    ),
}


def _busy(
    bound: float,
    batch_ms: float,
    against: str | None = None,
    *,
    workers: int = 2,
    per_worker: int = 1,
) -> Goal:
    """Return a least share of busy cores, with so many batches in flight per worker."""
    where = {"batch_ms": batch_ms, "workers": workers, "in_flight": per_worker * workers}
    return Goal("cores_busy", bound, against, "busy", at_least=True, where=where)


def _ahead(workers: int, bounds: Mapping[float, float]) -> list[Goal]:
    """Return the least parts of what the bare loop does with two in flight, by batch length."""
    limit = names.BARE_LOOP_AHEAD
    return [
        _busy(bound, batch_ms, limit, workers=workers, per_worker=2)
        for batch_ms, bound in bounds.items()
    ]


def _trip(bound: float, payload: str) -> Goal:
    return Goal("round_trip", bound, names.STANDARD_POOL, where={"payload": payload})


def _grown(scenario: str, bound: float, figure: str) -> Goal:
    return Goal(scenario, bound, measure="memory_growth", figure=figure)


GOALS = (
    Goal("clients", 0.30, names.OLD, where=_64),
    Goal("clients", 1.0, names.AIODATALOADER, where=_64),
    Goal("gather", 0.40, names.OLD),
    Goal("many", 0.05, names.OLD),
    Goal("lone_item", 0.0005, measure="excess_seconds", figure="longer than a bare timer"),
    _grown("stream", 1.0, _GROWN_STREAM),
    _trip(0.30, "64 small ints"),
    _trip(0.15, "1 MB array"),
    _trip(0.08, "10 MB array"),
    _trip(0.45, "64 x 100 kB of bytes"),
    Goal("hold_up", 0.020),
    Goal("hold_up", 1 / 3, names.STANDARD_POOL),
    _busy(0.85, 1.0),
    _busy(0.75, 0.5),
    _busy(1.5, 1.0, names.STANDARD_POOL),
    _busy(1.5, 0.5, names.STANDARD_POOL),
    *_ahead(2, {1.0: 0.97, 0.5: 0.97, 0.1: 0.93}),
    *_ahead(14, {1.0: 0.96, 0.5: 0.95, 0.1: 0.80}),
    Goal("script_busy", 0.98, names.IMPORTABLE, "busy", at_least=True),
    Goal("call_cpu", 15e-6),
    Goal("batch_of_one", 28e-6),
    Goal("round_trip", 1.15, names.BARE_PIPE, where={"payload": "64 small ints", "workers": 1}),
    Goal("batch_gap", 0.3, measure="gap_share", figure=_OF_TRIP),
    Goal("early_results", 0.004, measure="first_seconds", figure=_FIRST),
    Goal("early_results", 0.55, names.LISTED),
    Goal("overload", 0.9, measure="goodput", at_least=True, figure=_IN_TIME),
    _grown("overload", 5.0, _GROWN_OVERLOAD),
    Goal("successor", 0.150),
    *(Goal("kills", 0.0, measure=more, figure=left) for left, more in _LEFT.items()),
    Goal("stop", 0.010),
    Goal("import", 1.25, names.IMPORT_ASYNCIO),
    Goal("tune", 1.05, names.BEST_OF_GRID),
    Goal("tune", 60.0, measure="tune_seconds", figure="time of tune"),
)
