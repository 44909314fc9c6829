"""Signals while a command runs on an event loop."""

from __future__ import annotations

import asyncio
import signal
from argparse import Namespace
from typing import TYPE_CHECKING

import pytest

from async_batcher.cli._errors import CommandError
from async_batcher.cli._signals import run_interruptible

if TYPE_CHECKING:
    from async_batcher.cli._signals import Interruptible

OPTIONS = Namespace(loop="auto", ignored_signals=[])


def test_a_signal_cancels() -> None:
    """The first signal cancels the task at its next await; a second one is ignored."""

    async def main(_: Interruptible) -> None:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        await asyncio.sleep(0)
        pytest.fail("it goes on")

    with pytest.raises(CommandError, match=r"^interrupted; a hint$") as caught:
        run_interruptible(main, OPTIONS, hint=lambda: "; a hint")
    assert caught.value.status == 128 + signal.SIGTERM


def test_a_signal_ends_what_blocks() -> None:
    """A signal raises KeyboardInterrupt inside an interruptible block."""

    async def main(interruptible: Interruptible) -> None:
        with interruptible():
            signal.raise_signal(signal.SIGINT)
            pytest.fail("it goes on")

    with pytest.raises(CommandError) as caught:
        run_interruptible(main, OPTIONS)
    assert caught.value.status == 130


def test_a_signal_just_before_what_blocks() -> None:
    """An interruptible block does not begin after a signal, as the cancellation could not end it."""

    async def main(interruptible: Interruptible) -> None:
        signal.raise_signal(signal.SIGINT)
        with interruptible():
            pytest.fail("it is begun")

    with pytest.raises(CommandError, match="interrupted"):
        run_interruptible(main, OPTIONS)


def test_a_signal_just_before_the_end() -> None:
    """A signal counts even if there is nothing left to cancel."""

    async def main(_: Interruptible) -> None:
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(CommandError, match="interrupted"):
        run_interruptible(main, OPTIONS)


def test_a_signal_that_is_ignored() -> None:
    """An ignored signal stays ignored, and all handlers are restored."""
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)

    options = Namespace(loop="auto", ignored_signals=[signal.SIGTERM])

    async def main(_: Interruptible) -> str:
        signal.raise_signal(signal.SIGTERM)
        return "done"

    try:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        assert run_interruptible(main, options) == "done"
    finally:
        signal.signal(signal.SIGTERM, before[1])
    assert signal.getsignal(signal.SIGINT) == before[0]
