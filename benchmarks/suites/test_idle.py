"""What an idle batcher costs, how soon it stops, how soon a pool starts, and the import."""

from __future__ import annotations

import functools
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest

from benchmarks.harness.child_process import LibraryProcess
from benchmarks.harness.import_time import measure_import
from benchmarks.harness.sizes import loads
from benchmarks.harness.venvs import python_for
from benchmarks.libraries.names import (
    BATCHED,
    BY_HAND,
    IMPORT_ASYNCIO,
    NEAREST_POOLS,
    OLD,
    OTHER_POOLS,
    OUR_POOL,
    OURS,
    RAY_SERVE,
)

if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks.harness.child_process import LibraryProcesses
    from benchmarks.harness.interleave import InterleavedRun, Round

MODULE = "async_batcher.batcher"
# A program that only imports the batcher needs none of these.
NOT_IMPORTED = {"uvloop", "cloudpickle", "multiprocessing", "numpy"}
LIMITS = {"max_batch_size": 64, "max_queue_time": 0.01, "workers": 2}
# Seconds until a batcher counts as idle. The second worker process is still starting when the
# first one has returned a result.
SETTLE = {"process": 0.5}


@pytest.mark.parametrize("loop", loads(quick=["asyncio"], full=["uvloop"]), indirect=True)
@pytest.mark.parametrize(
    "place", loads(quick=["coroutine", "process"], usual=["loop threads", "thread"])
)
def test_stop(interleaved: InterleavedRun, prepare: Any, loop: str, place: str) -> None:
    """`stop` of an idle batcher that has run one batch; a pool's workers have exited by then."""
    load = {**LIMITS, "place": place, "settle": SETTLE.get(place, 0.1)}
    names = interleaved.names((OLD, BATCHED, RAY_SERVE, OURS))
    libraries = {name: prepare(name, "stop", load) for name in names}
    interleaved.run(libraries, measure="seconds", scenario="stop", loop=loop, load=load)


@pytest.mark.parametrize("loop", loads(quick=["asyncio"], full=["uvloop"]), indirect=True)
@pytest.mark.parametrize("place", loads(quick=["coroutine", "process"], full=["thread"]))
def test_idle(interleaved: InterleavedRun, prepare: Any, loop: str, place: str) -> None:
    """Wake-ups and CPU time of a program with an idle batcher, and of one without."""
    seconds = interleaved.pick(0.3, 10.0)
    load = {**LIMITS, "place": place, "settle": SETTLE.get(place, 0.1), "seconds": seconds}
    names = interleaved.names((BY_HAND, OURS, OLD, BATCHED, RAY_SERVE))
    interleaved.run(
        {name: prepare(name, "idle", load) for name in names},
        measure="cpu_seconds",
        together=True,
        scenario="idle",
        loop=loop,
        load=load,
    )


def _start(library: str, load: dict[str, Any]) -> dict[str, float]:
    """Measure the start in a process that has not had a pool before.

    Returns:
        The scenario's measures, and ``program_seconds``: from before the interpreter starts until
        the first result.
    """
    began = time.perf_counter()
    process = LibraryProcess(library, "asyncio")
    try:
        running = time.perf_counter() - began
        measures = process.run_round("start", load)
    finally:
        process.close()
    return {**measures, "program_seconds": running + measures["first_seconds"]}


def test_start(interleaved: InterleavedRun, processes: LibraryProcesses) -> None:
    """From no pool to its first result, and the memory of a worker, each in a new process."""
    load = {"workers": LIMITS["workers"]}

    def prepare(library: str) -> tuple[dict[str, str], Round]:
        facts = processes.get(library, "asyncio").facts
        return facts, functools.partial(_start, library, load)

    names = interleaved.names(NEAREST_POOLS, OTHER_POOLS)
    libraries = {name: functools.partial(prepare, name) for name in names}
    libraries[OURS] = functools.partial(prepare, OUR_POOL)
    interleaved.run(
        libraries,
        measure="first_seconds",
        rounds=interleaved.pick(1, 5, 21),
        scenario="start",
        loop="asyncio",
        load=load,
    )


def test_import(interleaved: InterleavedRun) -> None:
    """The import statement and the whole process; no module of `NOT_IMPORTED` is loaded."""
    _, version, modules = measure_import(sys.executable, MODULE)
    assert not modules & NOT_IMPORTED

    def prepare(python: Path | str, module: str, version: str) -> tuple[dict[str, str], Round]:
        return {"version": version}, lambda: measure_import(python, module)[0]

    def prepare_old() -> tuple[dict[str, str], Round]:
        python = python_for(OLD, "asyncio")
        _, old_version, _ = measure_import(python, MODULE)
        assert old_version in OLD
        return prepare(python, MODULE, old_version)

    libraries: dict[str, Any] = {
        IMPORT_ASYNCIO: functools.partial(prepare, sys.executable, "asyncio", "-"),
        OLD: prepare_old,
        OURS: functools.partial(prepare, sys.executable, MODULE, version),
    }
    interleaved.run(
        libraries,
        measure="seconds",
        rounds=interleaved.pick(3, 21, 41),
        scenario="import",
        loop="none",
        load={"module": MODULE},
    )
