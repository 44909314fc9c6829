"""`LimitTimer`, on a virtual clock; ``pool/test_halts.py`` halts a program."""

from __future__ import annotations

import asyncio

import pytest

from async_batcher._eventloop.halts import LimitTimer
from tests.support.virtual_clock import now, virtual_loop

pytestmark = pytest.mark.virtual_clock


def _note_time(times: list[float]) -> None:
    times.append(now())


async def test_a_timer_without_a_halt() -> None:
    """It fires once, at its time."""
    for seconds in (0.0, 0.02, 0.3, 10.0):
        fired: list[float] = []
        start = now()
        LimitTimer(virtual_loop(), seconds, _note_time, fired)
        await asyncio.sleep(seconds + 20.0)
        assert fired == [pytest.approx(start + seconds)]
    assert virtual_loop().timers() == 0


async def test_halts_do_not_count() -> None:
    """Neither one that ends after the limit nor one before; a part of the time before is lost."""
    for halt in (100.0, 3.0):
        fired: list[str] = []
        LimitTimer(virtual_loop(), 8.0, fired.append, "fired")
        await asyncio.sleep(2.1)
        virtual_loop().advance(halt)
        await asyncio.sleep(5.0)
        assert fired == []
        await asyncio.sleep(1.0)
        assert fired == ["fired"]


async def test_a_loop_that_is_always_late() -> None:
    """The timer fires all the same."""
    fired: list[str] = []
    LimitTimer(virtual_loop(), 1.0, fired.append, "fired")
    for _ in range(30):
        await asyncio.sleep(0.001)
        virtual_loop().advance(0.5)
    assert fired == ["fired"]


async def test_a_cancelled_timer() -> None:
    """It does not fire, and leaves nothing in the loop."""
    fired: list[str] = []
    timer = LimitTimer(virtual_loop(), 8.0, fired.append, "fired")
    await asyncio.sleep(5.0)
    timer.cancel()
    assert virtual_loop().timers() == 0
    await asyncio.sleep(5.0)
    assert fired == []
