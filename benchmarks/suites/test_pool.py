"""The worker pool against its limits: busy cores, CPU time of the program, trips, early results.

Each figure of this project is measured twice, in two processes, so that noise shows. The limits are
bare loops and pipes, which do nothing but send pickles.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from benchmarks.harness.machine import usable_cores
from benchmarks.harness.sizes import loads
from benchmarks.libraries.names import (
    AGAIN,
    BARE_LOOP,
    BARE_LOOP_AHEAD,
    BARE_PIPE,
    IMPORTABLE,
    LISTED,
    OUR_POOL,
    OUR_POOL_AGAIN,
    OURS,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.harness.interleave import InterleavedRun, Prepare

    Run = Callable[..., None]

MEASURES = {  # what is compared in each scenario
    "cores_busy": "seconds_per_batch",
    "script_busy": "seconds_per_batch",
    "call_cpu": "cpu_seconds_per_call",
    "batch_of_one": "cpu_seconds_per_item",
    "round_trip": "seconds",
    "batch_gap": "gap_seconds",
    "early_results": "mean_seconds",
}
WORKERS = 2
MANY_WORKERS, MANY_CORES = 14, 16  # two cores are left for the event loop and the system
LENGTHS_MS = loads(quick=[1.0], usual=[0.5, 0.1])
ROUND_SECONDS = 0.5  # of pure batch time; a round stops after twice as long
CALLS = 3_000  # each of some tens of microseconds


@pytest.fixture
def run(interleaved: InterleavedRun, prepare: Any, loop: str) -> Run:
    """``run(scenario, load, others)`` runs this project, the same again, and others."""

    def run_all(scenario: str, load: dict[str, Any], others: dict[str, Prepare]) -> None:
        adapters = (OURS, AGAIN) if "place" in load else (OUR_POOL, OUR_POOL_AGAIN)
        ours, again = (prepare(adapter, scenario, load) for adapter in adapters)
        interleaved.run(
            {**others, AGAIN: again, OURS: ours},
            measure=MEASURES[scenario],
            scenario=scenario,
            loop=loop,
            load=load,
        )

    return run_all


@pytest.mark.parametrize("batch_ms", LENGTHS_MS)
@pytest.mark.parametrize("workers", loads(quick=[WORKERS], usual=[MANY_WORKERS]))
def test_two_in_flight(
    interleaved: InterleavedRun, prepare: Any, run: Run, workers: int, batch_ms: float
) -> None:
    """Two callers per worker, beside a bare loop that keeps two calls at each worker."""
    if workers == MANY_WORKERS and usable_cores() < MANY_CORES:
        pytest.skip(f"{workers} workers need {MANY_CORES} cores, and {usable_cores()} are usable")
    load = _busy(interleaved, workers, batch_ms, 2)
    run("cores_busy", load, {BARE_LOOP_AHEAD: _bare_loop_ahead(prepare, load)})


@pytest.mark.parametrize("batch_ms", LENGTHS_MS)
def test_one_in_flight(
    interleaved: InterleavedRun, prepare: Any, run: Run, batch_ms: float
) -> None:
    """One caller per worker, so no call can be sent ahead."""
    load = _busy(interleaved, WORKERS, batch_ms, 1)
    run("cores_busy", load, {BARE_LOOP: prepare(BARE_LOOP, "cores_busy", load)})


@pytest.mark.parametrize("batch_ms", LENGTHS_MS)
def test_function_of_a_script(
    interleaved: InterleavedRun, prepare: Any, run: Run, batch_ms: float
) -> None:
    """Two callers per worker with a function that travels by value, and with an importable one."""
    load = _busy(interleaved, WORKERS, batch_ms, 2)
    importable = prepare(OUR_POOL, "cores_busy", load)
    others = {BARE_LOOP_AHEAD: _bare_loop_ahead(prepare, load), IMPORTABLE: importable}
    run("script_busy", load, others)


def _busy(
    interleaved: InterleavedRun, workers: int, batch_ms: float, per_worker: int
) -> dict[str, Any]:
    seconds = interleaved.pick(0.1, 1.0) * ROUND_SECONDS
    return {
        "batch_ms": batch_ms,
        "in_flight": per_worker * workers,
        "workers": workers,
        "batches": round(seconds * 1e3 / batch_ms) * workers,
        "seconds": 2 * seconds,
        "warm_up": workers * interleaved.pick(5, 100),
    }


def _bare_loop_ahead(prepare: Any, load: dict[str, Any]) -> Any:
    return prepare(BARE_LOOP, "cores_busy", {**load, "per_worker": 2})


def test_call_cpu(interleaved: InterleavedRun, prepare: Any, run: Run) -> None:
    """`pool.run` of next to nothing, one call at a time: the CPU time of the program."""
    calls = CALLS // interleaved.pick(20, 1)
    load = {"workers": WORKERS, "calls": calls, "warm_up": calls // 5}
    run("call_cpu", load, {BARE_LOOP: prepare(BARE_LOOP, "call_cpu", load)})


def test_batch_of_one(interleaved: InterleavedRun, run: Run) -> None:
    """Batches of one item, one at a time: the CPU time of the program."""
    load = {
        **_batcher(WORKERS, 1),
        "max_queue_time": 0.0,
        "clients": 1,
        "items": CALLS // interleaved.pick(20, 1),
        "settle": interleaved.pick(0.1, 0.3),
    }
    run("batch_of_one", load, {})


def test_round_trip(interleaved: InterleavedRun, prepare: Any, run: Run) -> None:
    """64 ints there and back; both ends of the bare pipe block until they have received them."""
    trips = CALLS // interleaved.pick(20, 1)
    load = {"payload": "64 small ints", "workers": 1, "trips": trips, "warm_up": trips // 5}
    run("round_trip", load, {BARE_PIPE: prepare(BARE_PIPE, "round_trip", load)})


@pytest.mark.parametrize("returned", ["times", "arrays"])
def test_batch_gap(interleaved: InterleavedRun, run: Run, returned: str) -> None:
    """Full batches of arrays with a backlog: how long the worker waits between two of them."""
    load = {
        **_batcher(1, 8),
        "job": "arrays",
        "returned": returned,
        "spin_ms": 20.0,  # longer than the trip, so that the work can hide it
        "warm_up": 3,
        "trips": interleaved.pick(3, 20),
        "batches": interleaved.pick(4, 20),
    }
    run("batch_gap", load, {})


def test_early_results(interleaved: InterleavedRun, prepare: Any, run: Run) -> None:
    """A generator over 64 items of 2 ms, and the same function with its results in a list."""
    load = {
        **_batcher(1, interleaved.pick(8, 64)),
        "job": "spin_each",
        "steps": 2_000,
        "batches": interleaved.pick(1, 5),
    }
    listed = prepare(OURS, "early_results", {**load, "job": "spin_all"})
    run("early_results", load, {LISTED: listed})


def _batcher(workers: int, batch_size: int) -> dict[str, Any]:
    options = {"max_batch_size": batch_size, "max_queue_time": 0.01}
    return {"place": "process", "workers": workers, **options}
