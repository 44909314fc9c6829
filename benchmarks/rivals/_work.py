"""What runs in the workers, the same for every rival. Imports nothing heavy: the start of a worker is measured too."""

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
    """What it was given: the trip alone."""
    return value


def anew(value: Any) -> Any:
    """A copy, as a function returns that does not work in place."""
    return value.copy()


def spin(number: int, seconds: float) -> tuple[int, float]:
    """Be busy for that long by the clock on the wall.

    Returns:
        The number, by which an answer is known, and the processor's seconds that it was given meanwhile.
    """
    began, end = time.thread_time(), time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass
    return number, time.thread_time() - began


def burn(number: int, seconds: float) -> tuple[int, float]:
    """As `spin`, but by the processor's clock: for workers that wait for each other while the clock on the wall goes on."""
    began = time.thread_time()
    while (spent := time.thread_time() - began) < seconds:
        pass
    return number, spent


def serve(number: int, seconds: float) -> tuple[int, int]:
    """As `spin`, to learn who does the work.

    Returns:
        The number and the process id.
    """
    return spin(number, seconds)[0], os.getpid()


def hold(seconds: float) -> int:
    """Keep a worker from taking another call.

    Returns:
        Which worker it is: the system's id of its thread, since not every worker is a process.
    """
    time.sleep(seconds)
    return threading.get_native_id()


def die() -> None:
    """End this process as the system does when memory runs out."""
    os.kill(os.getpid(), signal.SIGKILL)


def die_at_work(seconds: float, note: str) -> None:
    """As `die`, when it has been busy for that long.

    Args:
        seconds: How long.
        note: A file that is to hold the process id and the time of `time.perf_counter`, which all processes read off one clock.
    """
    spin(0, seconds)
    with open(note, "w", encoding="ascii") as file:  # noqa: PTH123 - pathlib is much to import
        file.write(f"{os.getpid()} {time.perf_counter()}")
    die()


async def as_coroutine(function: Callable[..., T], *args: Any) -> T:
    """For a pool that runs nothing else."""
    return function(*args)
