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


_HEEDED = (signal.SIGINT, signal.SIGTERM)


def ignored_signals() -> frozenset[int]:
    """The signals that whoever started this program has it ignore; to be asked before other code may change that."""
    return frozenset(number for number in _HEEDED if signal.getsignal(number) == signal.SIG_IGN)


class Interrupts:
    """Cancels the task that made it when a signal comes; enter it.

    Outside the main thread, where none arrives, it does nothing.

    Args:
        ignored: Signals that stay ignored; see `ignored_signals`.

    Attributes:
        number: Of the signal that has come; None: none has.
    """

    def __init__(self, ignored: frozenset[int]) -> None:
        self._ignored = ignored
        self.number: int | None = None
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.current_task()
        self._before: dict[int, Any] = {}
        self._raises = False

    def __enter__(self) -> Interrupts:
        """Listen."""
        with contextlib.suppress(ValueError):  # not the main thread
            for number in _HEEDED:
                if number not in self._ignored:
                    self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        """Listen no more."""
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: C code's

    @contextlib.contextmanager
    def raised(self) -> Iterator[None]:
        """Inside it a signal raises KeyboardInterrupt: for what may block the loop's thread.

        Raises:
            KeyboardInterrupt: One has come, now or before: what was to be cancelled may have been on its way here.
        """
        try:
            self._raises = True
            if self.number is not None:
                raise KeyboardInterrupt
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
