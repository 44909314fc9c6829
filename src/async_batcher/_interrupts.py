"""Ctrl-C and SIGTERM while a program lives on an event loop: the first ends it by force, later ones are ignored."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType


class Interrupts:
    """Cancels the task that made it when a signal comes; enter it.

    A signal that was ignored stays so. Outside the main thread, where none arrives, it does nothing.

    Attributes:
        number: Of the signal that has come; None: none has.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.current_task()
        self._before: dict[int, Any] = {}
        self._raises = False

    def __enter__(self) -> Interrupts:
        """Listen."""
        with contextlib.suppress(ValueError):  # not the main thread
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) != signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        """Listen no more."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def raised(self) -> Iterator[None]:
        """Inside it a signal raises KeyboardInterrupt: for what may block the loop's thread."""
        self._raises = True
        try:
            yield
        finally:
            self._raises = False

    def _on_signal(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 - as it is called
        if self.number is not None:
            return
        self.number = number
        if self._raises:
            raise KeyboardInterrupt
        if self._task is not None:
            self._loop.call_soon_threadsafe(self._task.cancel)


def start_fork_server() -> None:
    """Start what starts the workers deaf to Ctrl-C, and so them: this process ends them, and they have nothing to say.

    Not in the library, where the fork server may be the user's too. It takes a moment: not for the event loop's thread.
    """
    if sys.platform == "linux":
        from multiprocessing import forkserver, resource_tracker

        resource_tracker.ensure_running()  # first: older Pythons leave SIGINT unblocked when they start its process
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # of this thread alone
        try:
            forkserver.ensure_running()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
