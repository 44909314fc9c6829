"""What batches consist of: the same items and the same function for every rival, and what each answer must be.

A load names its job and may say how much work an item is. Imports nothing that a job does not need.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True)
class Job:
    """A kind of work.

    Attributes:
        run: The batch function: one answer for each item. A function of a module, which any pool can send by its name.
        item: Makes the item of a number.
        answer: What the item's answer must be.
    """

    run: Callable[[list[Any]], list[Any]]
    item: Callable[[int], Any]
    answer: Callable[[Any], Any]


def find(load: dict[str, Any]) -> Job:
    """The job that a load names with ``job``; nothing to do where it names none."""
    return JOBS[load.get("job", "nothing")](load)


def as_coroutine(run: Callable[[list[Any]], list[Any]]) -> Callable[[list[Any]], Any]:
    """A batch function that is awaited, on the loop."""

    async def process_batch(batch: list[Any]) -> list[Any]:
        return run(batch)

    return process_batch


# Nothing.


def same(batch: list[Any]) -> list[Any]:
    """Does nothing, and answers with the items, so that a mix-up shows."""
    return batch


# Work of a known size: an item is a number, how many steps are to be done for it, and bytes that only travel.

_Sized: TypeAlias = tuple[int, int, bytes]

_BLOCK = memoryview(bytes(65_536))


def count(batch: list[_Sized]) -> list[int]:
    """Python's own steps, under the GIL."""
    for _, steps, _ in batch:
        for _step in itertools.repeat(None, steps):
            pass
    return [number for number, _, _ in batch]


def digest(batch: list[_Sized]) -> list[int]:
    """A hash of so many bytes, which hashlib computes without the GIL, but for pieces of less than 2 kB."""
    for _, size, _ in batch:
        value = hashlib.sha256()
        for _step in itertools.repeat(None, size // len(_BLOCK)):
            value.update(_BLOCK)
        value.update(_BLOCK[: size % len(_BLOCK)])
        value.digest()
    return [number for number, _, _ in batch]


def count_until_poison(batch: list[_Sized]) -> list[int]:
    """As `count`, item by item, until one is poison: a number below zero."""
    for number, steps, _ in batch:
        if number < 0:
            msg = f"item {number} is poison"
            raise ValueError(msg)
        for _step in itertools.repeat(None, steps):
            pass
    return [number for number, _, _ in batch]


def rest(batch: list[_Sized]) -> list[int]:
    """Sleep for so many microseconds an item: what is measured is the queue, not the cores."""
    time.sleep(sum(microseconds for _, microseconds, _ in batch) / 1e6)
    return [number for number, _, _ in batch]


def _number(item: _Sized) -> int:
    return item[0]


def _sized(run: Callable[[list[Any]], list[Any]], load: dict[str, Any]) -> Job:
    steps, payload = load["steps"], load.get("payload", 0)
    return Job(run, lambda number: (number, steps, bytes(payload)), _number)


def calibrate() -> dict[str, float]:
    """How many steps of each job of a known size this machine does in a second, at its fastest."""
    sized = (("python", count, 500_000), ("hash", digest, 10_000_000))
    return {name: max(_speed(run, steps) for _ in range(20)) for name, run, steps in sized}


def _speed(run: Callable[[list[Any]], list[Any]], steps: int) -> float:
    began = time.perf_counter()
    run([(0, steps, b"")])
    return steps / (time.perf_counter() - began)


# Work that services do have: see `_real_jobs`, which needs more than the other jobs do.


def _real(name: str, load: dict[str, Any]) -> Job:
    import _real_jobs

    job: Job = getattr(_real_jobs, name)(load)
    return job


JOBS: dict[str, Callable[[dict[str, Any]], Job]] = {
    "nothing": lambda _: Job(same, int, int),
    "python": functools.partial(_sized, count),
    "hash": functools.partial(_sized, digest),
    "poison": functools.partial(_sized, count_until_poison),
    "rest": functools.partial(_sized, rest),
    **{name: functools.partial(_real, name) for name in ("sources", "texts", "forest")},
}

if __name__ == "__main__":
    print(json.dumps(calibrate()))
