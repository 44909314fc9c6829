"""Signals while a program lives on an event loop."""

from __future__ import annotations

import asyncio
import signal

import pytest

from async_batcher._interrupts import Interrupts


async def test_a_signal_cancels() -> None:
    """At the next wait; a second one changes nothing."""
    with Interrupts(frozenset()) as interrupts:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(asyncio.CancelledError):
            await asyncio.sleep(0)
    assert interrupts.number == signal.SIGTERM
    task = asyncio.current_task()
    assert task is not None
    task.uncancel()


async def test_a_signal_ends_what_blocks() -> None:
    """It is raised there."""
    with Interrupts(frozenset()) as interrupts, pytest.raises(KeyboardInterrupt), interrupts.raised():
        signal.raise_signal(signal.SIGINT)
    assert interrupts.number == signal.SIGINT


async def test_a_signal_just_before_what_blocks() -> None:
    """It is not begun: the cancelling, which is on its way, could not end it, and a second signal would be ignored."""
    began = False
    with Interrupts(frozenset()) as interrupts:
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt), interrupts.raised():
            began = True
        with pytest.raises(asyncio.CancelledError):
            await asyncio.sleep(0)
    assert not began
    task = asyncio.current_task()
    assert task is not None
    task.uncancel()
