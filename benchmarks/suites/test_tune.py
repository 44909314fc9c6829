"""What `tune` recommends, beside the best of an exhaustive grid. A quick run has no time for it.

The grid is measured once. Its five best and the recommendation are then measured again, in turn:
the best of one measurement of many is partly luck.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from statistics import median
from typing import TYPE_CHECKING, Any

import pytest

from benchmarks.harness.machine import ROOT, usable_cores
from benchmarks.harness.sizes import loads
from benchmarks.libraries.names import AGAIN, BEST_OF_GRID, OURS
from benchmarks.scenarios.tuned import ClientsInThread, Options

if TYPE_CHECKING:
    from pathlib import Path

    from pytest_benchmark.fixture import BenchmarkFixture

    from benchmarks.harness.interleave import InterleavedRun, Prepare

FUNCTIONS = {
    "fixed cost": "benchmarks.scenarios.tuned:fixed_cost",
    "cost per item": "benchmarks.scenarios.tuned:cost_per_item",
    "without the GIL": "benchmarks.scenarios.tuned:without_gil",
    "sleeping": "benchmarks.scenarios.tuned:sleeping",
    "import of 2 s": "benchmarks.scenarios.slow_import:imported_slowly",
}
PLACES = [f"{place} of the grid" for place in ("first", "second", "third", "fourth", "fifth")]
CLIENTS = 256
TUNE_SECONDS = 60
ITEMS = 1000
WINDOWS = (0.0, 0.001, 0.01)
BATCH_SIZES = [1 << n for n in range(9)]  # up to all clients in one batch
GRID_SECONDS = 0.3  # of each point of the grid
ROUND_SECONDS = 1.0
ROUNDS = 9


@pytest.mark.parametrize("loop", loads(quick=[], usual=["asyncio"]), indirect=True)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_tune(
    interleaved: InterleavedRun,
    benchmark: BenchmarkFixture,
    tmp_path: Path,
    loop: str,
    function: str,
) -> None:
    """The recommendation against what is best of the grid when that is measured again."""
    advice, seconds = _recommendation(tmp_path, FUNCTIONS[function], loop)
    module, _, name = FUNCTIONS[function].partition(":")
    imported = getattr(importlib.import_module(module), name)
    with ClientsInThread(imported, loop) as clients:
        grid = {
            options: clients.seconds_per_item(options, CLIENTS, GRID_SECONDS)
            for options in _grid(usable_cores())
        }
        best = sorted(grid, key=lambda options: grid[options])[: len(PLACES)]

        def prepare(options: Options) -> Prepare:
            facts = {"options": str(options._asdict())}

            def run_round() -> dict[str, float]:
                found = clients.seconds_per_item(options, CLIENTS, ROUND_SECONDS)
                return {"seconds_per_item": found, "tune_seconds": seconds}

            return lambda: (facts, run_round)

        interleaved.run(
            {
                **{place: prepare(options) for place, options in zip(PLACES, best, strict=True)},
                AGAIN: prepare(advice),
                OURS: prepare(advice),
            },
            measure="seconds_per_item",
            rounds=ROUNDS,
            scenario="tune",
            loop=loop,
            load={"function": function, "clients": CLIENTS, "tune_seconds": TUNE_SECONDS},
        )
    benchmark.extra_info["grid"] = _keep_best(benchmark.extra_info["rivals"])


def _recommendation(folder: Path, function: str, loop: str) -> tuple[Options, float]:
    """Run the command; return what it recommends, and the seconds that it says it took."""
    items = folder / "items.txt"
    items.write_text("".join(f"item {number}\n" for number in range(ITEMS)))
    command = [
        sys.executable, "-m", "async_batcher", "tune", function, str(items), "--format", "lines",
        "--time", str(TUNE_SECONDS), "--loop", loop, "--json",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, check=True)  # noqa: S603 - ours
    figures: dict[str, Any] = json.loads(done.stdout)
    advice = figures["advice"]
    options = Options(
        advice["executor"],
        advice["max_workers"] or 1,
        advice["max_batch_size"],
        advice["max_queue_time"],
    )
    return options, figures["seconds"]


def _grid(cores: int) -> list[Options]:
    counts = sorted({*(1 << n for n in range(cores.bit_length()) if 1 << n <= cores), cores})
    return [
        Options(executor, workers, size, window)
        for executor in ("thread", "process")
        for workers in counts
        for size in sorted({*BATCH_SIZES, -(-CLIENTS // workers)})
        for window in WINDOWS
    ]


def _keep_best(measured: dict[str, Any]) -> dict[str, Any]:
    """Leave one of the grid, the one with the best median; return what all have measured."""
    grid = {place: measured.pop(place) for place in PLACES}
    best = min(grid, key=lambda place: median(grid[place]["data"]["seconds_per_item"]))
    measured[BEST_OF_GRID] = grid[best]
    return grid
