"""Waiting for what other processes do, which no event of the loop tells."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from tests.support.scripts import is_alive
from tests.support.worker_functions import DEADLINE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable


async def wait_until(condition: Callable[[], object], seconds: float = DEADLINE) -> None:
    """Wait until it is so."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        await asyncio.sleep(0.002)


async def wait_for_exit(pids: Iterable[int], seconds: float = DEADLINE) -> None:
    """Wait until processes have ended."""
    pids = list(pids)
    await wait_until(lambda: not any(is_alive(pid) for pid in pids), seconds)
