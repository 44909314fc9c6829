"""What travels to a worker and back.

Each payload is made from a seed. A round uses two seeds in turn, so that a result of the call
before is recognised as wrong.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

from benchmarks.scenarios.worker_functions import Reading

if TYPE_CHECKING:
    from collections.abc import Callable

_RECORDS = 12_000  # records in one megabyte of pickle


def array(megabytes: float, seed: int) -> Any:
    """Make an array of random numbers of 8 bytes each."""
    import numpy as np

    return np.random.default_rng(seed).random(int(megabytes * 1e6) // 8)


def _bytes(count: int, seed: int) -> bytes:
    return random.Random(seed).randbytes(count)  # noqa: S311 - no secret


def _reading(number: int) -> Reading:
    place = f"room {number}, second floor, northern wing, house 12"
    return Reading(f"sensor {number % 64:02}", place, number, 20 + number / 7, 0.5 * number, "°C")


def _record(number: int) -> dict[str, Any]:
    """Make a record such as a JSON file holds."""
    position = {"latitude": number / 7, "longitude": number / 11}
    tags = [f"tag {number % 13}", f"group {number}"]
    return {
        "id": number,
        "name": f"record {number}",
        "position": position,
        "tags": tags,
        "is_new": number % 2 == 0,
    }


COPIED = "10 MB array, a new one back"  # the result is not the memory that was sent

PAYLOADS: dict[str, Callable[[int], Any]] = {
    "64 small ints": lambda seed: list(range(seed, seed + 64)),
    "64 kB of bytes": lambda seed: _bytes(64_000, seed),
    "1 MB of bytes": lambda seed: _bytes(1_000_000, seed),
    "64 x 100 kB of bytes": lambda seed: [_bytes(100_000, 64 * seed + i) for i in range(64)],
    "1 MB array": lambda seed: array(1, seed),
    "10 MB array": lambda seed: array(10, seed),
    COPIED: lambda seed: array(10, seed),
    "100 MB array": lambda seed: array(100, seed),
    "1,000 objects": lambda seed: [_reading(1000 * seed + i) for i in range(1000)],
    "1 MB of nested dicts": lambda seed: [_record(_RECORDS * seed + i) for i in range(_RECORDS)],
}


def are_equal(result: Any, expected: Any) -> bool:
    """Return whether both have the same type and value."""
    if type(result) is not type(expected):
        return False
    if isinstance(expected, list | bytes):
        return bool(result == expected)
    return bool(result.dtype == expected.dtype and (result == expected).all())
