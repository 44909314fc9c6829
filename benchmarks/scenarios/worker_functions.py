"""The functions that run in workers, the same for every library.

The module imports nothing heavy, because the start of a worker is measured too.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")


class Reading(NamedTuple):
    """A small object such as programs send by the thousand; about 100 bytes of pickle."""

    sensor: str
    place: str
    number: int
    value: float
    weight: float
    unit: str


def same(value: T) -> T:
    """Return the argument."""
    return value


def copied(value: Any) -> Any:
    """Return a copy, as a function does that does not work in place."""
    return value.copy()


def spin(number: int, seconds: float) -> tuple[int, float]:
    """Be busy for ``seconds`` of wall-clock time.

    Returns:
        The number, which identifies the result, and the processor time that the call got.
    """
    began, end = time.thread_time(), time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass
    return number, time.thread_time() - began


def burn(number: int, seconds: float) -> tuple[int, float]:
    """Be busy for ``seconds`` of processor time, for workers that wait for each other."""
    began = time.thread_time()
    while (spent := time.thread_time() - began) < seconds:
        pass
    return number, spent


def spin_and_name(number: int, seconds: float) -> tuple[int, int]:
    """Spin, and return the number and the process id."""
    return spin(number, seconds)[0], os.getpid()


def hold(seconds: float) -> int:
    """Keep a worker from taking another call.

    Returns:
        The system's id of the thread, because not every worker is a process.
    """
    time.sleep(seconds)
    return threading.get_native_id()


def crash() -> None:
    """Kill this process as the system does when it runs out of memory."""
    os.kill(os.getpid(), signal.SIGKILL)


def spin_and_crash(seconds: float, note: str) -> None:
    """Spin, then crash.

    Args:
        seconds: How long to spin.
        note: A file that gets the process id and the time of `time.perf_counter`, which all
            processes read from one clock.
    """
    spin(0, seconds)
    with open(note, "w", encoding="ascii") as file:  # noqa: PTH123 - pathlib is slow to import
        file.write(f"{os.getpid()} {time.perf_counter()}")
    crash()


async def as_coroutine(function: Callable[..., T], *args: Any) -> T:
    """Call a function, for a pool that runs coroutines only."""
    return function(*args)
