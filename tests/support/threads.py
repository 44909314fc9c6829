"""Threads that do something at the same time, on Pythons with and without a GIL."""

from __future__ import annotations

import contextlib
import sys
import threading
from typing import TYPE_CHECKING, TypeVar

from tests.support.worker_functions import DEADLINE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

R = TypeVar("R")

# Without one, the thread that made an object frees it, when it runs again.
HAS_GIL: bool = getattr(sys, "_is_gil_enabled", lambda: True)()


def run_together(function: Callable[[int], R], threads: int = 6) -> list[R]:
    """Call a function in several threads at once, with a number; return or raise what it does."""
    barrier = threading.Barrier(threads)
    results: dict[int, R] = {}
    errors: list[BaseException] = []

    def run(number: int) -> None:
        try:
            barrier.wait(DEADLINE)
            results[number] = function(number)
        except BaseException as exc:  # noqa: BLE001 - raised below
            errors.append(exc)

    with frequent_switches():
        running = [threading.Thread(target=run, args=(number,)) for number in range(threads)]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join()
    if errors:
        raise errors[0]
    return [results[number] for number in range(threads)]


@contextlib.contextmanager
def frequent_switches() -> Iterator[None]:
    """Have a Python with a GIL switch threads as often as it can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(before)
