"""What batches consist of: the same items and batch function for every library.

A load names its workload with ``job`` and may say how much work an item is.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from benchmarks.scenarios import worker_functions
from benchmarks.scenarios.payloads import array

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@dataclass(frozen=True)
class Workload:
    """A kind of work.

    Attributes:
        run: The batch function, of a module, so that any pool can pickle it by its name.
        item: Makes the item with a number.
        result: Computes the result that an item must have.
    """

    run: Callable[[list[Any]], list[Any]]
    item: Callable[[int], Any]
    result: Callable[[Any], Any]


def find(load: dict[str, Any]) -> Workload:
    """Return the workload of a load. The default does nothing."""
    return WORKLOADS[load.get("job", "nothing")](load)


def as_coroutine(run: Callable[[list[Any]], list[Any]]) -> Callable[[list[Any]], Any]:
    """Wrap a batch function in a coroutine function."""

    async def process_batch(batch: list[Any]) -> list[Any]:
        return run(batch)

    return process_batch


def same(batch: list[Any]) -> list[Any]:
    """Return the items, so that a mix-up shows."""
    return batch


# Work of a known size. An item is a number, its steps, and bytes that only travel.

_Sized: TypeAlias = tuple[int, int, bytes]

_BLOCK = memoryview(bytes(65_536))


def count(batch: list[_Sized]) -> list[int]:
    """Run steps of Python code, which hold the GIL."""
    for _, steps, _ in batch:
        for _step in itertools.repeat(None, steps):
            pass
    return [number for number, _, _ in batch]


def digest(batch: list[_Sized]) -> list[int]:
    """Hash bytes. hashlib releases the GIL for pieces of at least 2 kB."""
    for _, size, _ in batch:
        value = hashlib.sha256()
        for _step in itertools.repeat(None, size // len(_BLOCK)):
            value.update(_BLOCK)
        value.update(_BLOCK[: size % len(_BLOCK)])
        value.digest()
    return [number for number, _, _ in batch]


def count_until_bad_item(batch: list[_Sized]) -> list[int]:
    """Run steps item by item, and raise at an item whose number is negative."""
    for number, steps, _ in batch:
        if number < 0:
            msg = f"item {number} is bad"
            raise ValueError(msg)
        for _step in itertools.repeat(None, steps):
            pass
    return [number for number, _, _ in batch]


def rest(batch: list[_Sized]) -> list[int]:
    """Sleep for some microseconds per item, to measure the queue instead of the cores."""
    time.sleep(sum(microseconds for _, microseconds, _ in batch) / 1e6)
    return [number for number, _, _ in batch]


def spin_each(batch: list[_Sized]) -> Iterator[int]:
    """Spin for some microseconds per item, and yield each result as soon as it is there."""
    for number, microseconds, _ in batch:
        worker_functions.spin(number, microseconds / 1e6)
        yield number


def spin_all(batch: list[_Sized]) -> list[int]:
    """Do what `spin_each` does, and return all results together."""
    return list(spin_each(batch))


def _number(item: _Sized) -> int:
    return item[0]


def _sized(run: Callable[[list[Any]], Any], load: dict[str, Any]) -> Workload:
    steps, payload = load["steps"], load.get("payload", 0)
    return Workload(run, lambda number: (number, steps, bytes(payload)), _number)


# Arrays of 1 MB. An item is the seconds for which its batch spins, whether it travels back, and it.

_Array: TypeAlias = tuple[float, bool, Any]


def record_times(batch: list[_Array]) -> list[tuple[float, float, Any]]:
    """Spin, and return for each array when the batch began and ended in this process."""
    began = time.monotonic()
    worker_functions.spin(0, batch[0][0])
    ended = time.monotonic()
    return [(began, ended, one if is_back else None) for _, is_back, one in batch]


def _arrays(load: dict[str, Any]) -> Workload:
    return Workload(
        record_times,
        lambda number: (0.0, load["returned"] == "arrays", array(1, number)),
        lambda item: item[2] if item[1] else None,
    )


def calibrate() -> dict[str, float]:
    """Return the steps per second of each sized workload on this machine, at its fastest."""
    sized = (("python", count, 500_000), ("hash", digest, 10_000_000))
    return {name: max(_speed(run, steps) for _ in range(20)) for name, run, steps in sized}


def _speed(run: Callable[[list[Any]], list[Any]], steps: int) -> float:
    began = time.perf_counter()
    run([(0, steps, b"")])
    return steps / (time.perf_counter() - began)


def _of_a_service(name: str, load: dict[str, Any]) -> Workload:
    from benchmarks.scenarios import service_workloads

    workload: Workload = getattr(service_workloads, name)(load)
    return workload


WORKLOADS: dict[str, Callable[[dict[str, Any]], Workload]] = {
    "nothing": lambda _: Workload(same, int, int),
    "python": functools.partial(_sized, count),
    "hash": functools.partial(_sized, digest),
    "poison": functools.partial(_sized, count_until_bad_item),
    "rest": functools.partial(_sized, rest),
    "spin_each": functools.partial(_sized, spin_each),
    "spin_all": functools.partial(_sized, spin_all),
    "arrays": _arrays,
    **{name: functools.partial(_of_a_service, name) for name in ("sources", "texts", "forest")},
}

if __name__ == "__main__":
    print(json.dumps(calibrate()))
