"""The user's function without a batcher, in a worker process."""

from __future__ import annotations

import atexit
import time
from dataclasses import dataclass
from itertools import cycle, islice
from statistics import median
from typing import TYPE_CHECKING, Any

from async_batcher._batching.records.batch_cost import BatchCost
from async_batcher.cli._worker_function import call_batch, worker_setup

if TYPE_CHECKING:
    from collections.abc import Sequence

    from async_batcher.cli._import_string import ImportedFunction
_ROUNDS = 5  # over the same items; the median of five tolerates two that were disturbed


@dataclass(frozen=True)
class MeasuredFunction:
    """The batch function of a trial."""

    imported: ImportedFunction
    each: bool  # the user's function takes one item, not a batch

    def __call__(self, batch: list[Any]) -> Any:
        function = self.imported.function
        return [function(item) for item in batch] if self.each else function(batch)


def set_up(imported: ImportedFunction) -> None:
    """Set up this worker, until it exits."""
    if (setup := worker_setup(imported)) is not None:
        running = setup()
        next(running)
        atexit.register(next, running, None)


def run_alone(function: MeasuredFunction, item: Any) -> None:
    _raise_failure(call_batch(function, [item]))


def _raise_failure(results: list[Any]) -> None:
    for result in results:
        if isinstance(result, BaseException):
            raise result


def measure_alone(
    function: MeasuredFunction, items: Sequence[Any], size: int, seconds: float
) -> BatchCost:
    """Measure batches of a size that together hold all items, repeatedly if there is time."""
    source = cycle(items)
    batches = -(-len(items) // size)
    times: list[float] = []
    until = time.perf_counter() + seconds
    while not times or (len(times) < _ROUNDS * batches and time.perf_counter() < until):
        for _ in range(batches):
            batch = list(islice(source, size))
            began = time.perf_counter()
            results = call_batch(function, batch)
            times.append(time.perf_counter() - began)
            _raise_failure(results)
    rounds = [sum(times[i : i + batches]) for i in range(0, len(times), batches)]
    return BatchCost(size, max(1e-9, median(rounds) / batches))
