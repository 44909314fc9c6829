"""What each question is called on the page, what tells its benchmarks apart, and what goals it is held against (pure).

A question is the ``question`` of a benchmark's ``extra_info``; its measures are what the rival's side answered.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from benchmarks.children import STANDARD_POOL

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True)
class Part:
    """Something in the load that tells the benchmarks of one question apart.

    Attributes:
        key: Its key in the load.
        head: What its column is called.
        text: How its value is written in the column.
        words: How it is written in a sentence; as in the column if empty.
        names: What some of its values are called.
    """

    key: str
    head: str
    text: str = "{}"
    words: str = ""
    names: Mapping[Any, str] = field(default_factory=dict)

    def cell(self, load: Mapping[str, Any]) -> str:
        """The value, as in a column."""
        value = load[self.key]
        return self.text.format(self.names.get(value, value))

    def said(self, load: Mapping[str, Any]) -> str:
        """The value, as in a sentence."""
        value = load[self.key]
        return (self.words or self.text).format(self.names.get(value, value))


@dataclass(frozen=True)
class Question:
    """How the page speaks of a question.

    Attributes:
        title: Its name.
        measure: What the figure is that is compared.
        parts: What tells its benchmarks apart, but for the loop.
        is_race: Whether a rival that does better is a loss of ours.
        better: What is said of such a rival.
    """

    title: str
    measure: str
    parts: tuple[Part, ...] = ()
    is_race: bool = True
    better: str = "is faster"


@dataclass(frozen=True)
class Goal:
    """A bound that a question's figure is held against; it is reported, and nothing fails on it.

    Attributes:
        question: Of which question.
        rival: Against whom, as a ratio of ours to its; None: the bound is on our own figure.
        bound: At most this.
        measure: Which measure, where it is not the question's own.
        at_least: The bound is a least.
        where: Only for loads that have these values.
        figure: What the figure is called, where the title does not say so.
    """

    question: str
    rival: str | None
    bound: float
    measure: str | None = None
    at_least: bool = False
    where: Mapping[str, Any] = field(default_factory=dict)
    figure: str = ""


JOBS = {"python": "work under the GIL", "hash": "work without the GIL"}

_PLACE = Part("place", "place")
_JOB = Part("job", "job", names={"sources": "source files", "forest": "a random forest"})
_PAYLOAD = Part("payload", "payload")
_BATCH = Part("batch_ms", "batch", "{:g} ms", "batches of {:g} ms")
_WORKERS = Part("workers", "workers", "{}", "{} workers")
_IN_FLIGHT = Part("in_flight", "in flight", "{}", "{} in flight")
_WORK = Part("job", "work", names=JOBS)
_ITEM = Part("item_us", "an item", "{:,} us", "{:,} us an item")
_CLIENTS = Part("clients", "clients", "{:,}", "clients: {:,}")
_OF_CAPACITY = Part("of_capacity", "load", "{:.0%}", "{:.0%} of capacity")

_ITEM_TIME = "time per item"

QUESTIONS = {
    "crossing": Question("processes or threads", _ITEM_TIME, (_WORK, _ITEM)),
    "clients": Question("clients one by one", _ITEM_TIME, (_CLIENTS,)),
    "gather": Question("one gather", _ITEM_TIME),
    "many": Question("100,000 items in one call", _ITEM_TIME),
    "lone_item": Question("a lone item", "waits"),
    "stream": Question("a stream of items", _ITEM_TIME, is_race=False),
    "round_trip": Question("round trip", "time", (_PAYLOAD,)),
    "hold_up": Question("the loop's longest hold-up", "longest hold-up", better="holds it up for less"),
    "cores_busy": Question("the cores", "time per batch", (_WORKERS, _BATCH, _IN_FLIGHT), better="keeps them busier"),
    "latency": Question("latency under load", "p99", (_WORK, _OF_CAPACITY), better="answers sooner"),
    "overload": Question("twice the load that can be borne", "time per answer in time"),
    "poison": Question("a bad item in a batch of 64", "until all know", (_PLACE,)),
    "killed": Question("a worker killed under load", "until all slots answer again", better="is back sooner"),
    "successor": Question("a killed worker's successor", "until whole again"),
    "kills": Question("workers killed", "median until whole again", is_race=False),
    "start": Question("the start of a pool", "to the first result"),
    "stop": Question("stop of an idle batcher", "time", (_PLACE,)),
    "idle": Question("an idle batcher", "CPU time", (_PLACE,), better="uses less"),
    "import": Question("the import", "time"),
    "job": Question("a real job", _ITEM_TIME, (_JOB,)),
}

_MANY_CLIENTS = {"clients": 64}
_TWO = {"workers": 2, "in_flight": 2}  # as many batches as workers

GOALS = (
    Goal("clients", "async-batcher 0.2.2", 0.30, where=_MANY_CLIENTS),
    Goal("clients", "aiodataloader", 1.0, where=_MANY_CLIENTS),
    Goal("gather", "async-batcher 0.2.2", 0.40),
    Goal("lone_item", None, 0.0005, measure="excess_seconds", figure="longer than a bare timer"),
    Goal("stop", None, 0.010),
    Goal("import", "import asyncio", 1.25),
    Goal("round_trip", STANDARD_POOL, 0.30, where={"payload": "64 small ints"}),
    Goal("round_trip", STANDARD_POOL, 0.15, where={"payload": "1 MB array"}),
    Goal("round_trip", STANDARD_POOL, 0.08, where={"payload": "10 MB array"}),
    Goal("round_trip", STANDARD_POOL, 0.45, where={"payload": "64 x 100 kB of bytes"}),
    Goal("cores_busy", None, 0.85, measure="busy", at_least=True, where={"batch_ms": 1.0, **_TWO}, figure="kept busy"),
    Goal("cores_busy", None, 0.75, measure="busy", at_least=True, where={"batch_ms": 0.5, **_TWO}, figure="kept busy"),
    *(
        Goal("cores_busy", STANDARD_POOL, 1.5, measure="busy", at_least=True, where={"batch_ms": ms, **_TWO}, figure="kept busy")
        for ms in (1.0, 0.5)
    ),
    Goal("many", "async-batcher 0.2.2", 0.05),
    Goal("stream", None, 1.0, measure="memory_growth", figure="memory grown from the first twentieth to the last, MB"),
    Goal("overload", None, 0.9, measure="goodput", at_least=True, figure="answers in time, of capacity"),
    Goal("overload", None, 5.0, measure="memory_growth", figure="memory grown from the first second to the last, MB"),
    Goal("hold_up", None, 0.020),
    Goal("hold_up", STANDARD_POOL, 1 / 3),
    Goal("successor", None, 0.150),
    *(
        Goal("kills", None, 0.0, measure=f"more_{what}", figure=f"{what} left behind")
        for what in ("descriptors", "threads", "processes")
    ),
)
