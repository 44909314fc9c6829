"""What runs in the workers, the same for every rival. Imports nothing heavy: the start of a worker is measured too."""

from __future__ import annotations

import os
import signal
import time
from typing import TypeVar

T = TypeVar("T")


def same(value: T) -> T:
    """What it was given: the trip alone."""
    return value


def spin(number: int, seconds: float) -> tuple[int, float]:
    """Be busy for that long by the clock on the wall.

    Returns:
        The number, by which an answer is known, and the processor's seconds that it was given meanwhile.
    """
    began, end = time.thread_time(), time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass
    return number, time.thread_time() - began


def hold(seconds: float) -> int:
    """Keep a worker from taking another call.

    Returns:
        Its process id.
    """
    time.sleep(seconds)
    return os.getpid()


def die() -> None:
    """End this process as the system does when memory runs out."""
    os.kill(os.getpid(), signal.SIGKILL)
