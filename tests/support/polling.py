"""Waiting: for iterations of the event loop, and for what other threads and processes do."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from tests.support.scripts import is_alive
from tests.support.worker_functions import DEADLINE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable


async def turn(times: int = 3) -> None:
    """Let the event loop run some iterations."""
    for _ in range(times):
        await asyncio.sleep(0)


async def wait_until(condition: Callable[[], object]) -> None:
    """Wait until a condition is true; no event announces the change."""
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, "the condition did not become true in time"
        await asyncio.sleep(0.002)


def block_until(condition: Callable[[], object]) -> None:
    """Wait until a condition is true, without an event loop or while it is to stand still."""
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, "the condition did not become true in time"
        time.sleep(0.002)


async def wait_for_exit(pids: Iterable[int]) -> None:
    """Wait until processes have exited."""
    pids = list(pids)
    await wait_until(lambda: not any(is_alive(pid) for pid in pids))
