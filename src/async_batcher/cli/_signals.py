"""Ctrl-C and SIGTERM while a command runs on an event loop: the first one cancels it."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from typing import TYPE_CHECKING, Any, TypeVar

from async_batcher import run
from async_batcher.cli._errors import CommandError

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Callable, Collection, Coroutine, Iterator
    from types import FrameType
    from typing import TypeAlias

    # Entered where a call may block, and nowhere else; see `_SignalHandler.interruptible`.
    Interruptible: TypeAlias = Callable[[], contextlib.AbstractContextManager[None]]

R = TypeVar("R")

_HANDLED = (signal.SIGINT, signal.SIGTERM)


def run_interruptible(
    main: Callable[[Interruptible], Coroutine[Any, Any, R]],
    options: Namespace,
    hint: Callable[[], str] = str,
) -> R:
    """Run a coroutine function on a new event loop, until it ends or a signal ends it.

    Args:
        main: The function.
        options: The loop, and the signals that were ignored when the process started.
        hint: Gives the end of the message after a signal.
    """

    async def supervised() -> R:
        with _SignalHandler(options.ignored_signals) as handler:
            try:
                result = await main(handler.interruptible)
            except (asyncio.CancelledError, KeyboardInterrupt):
                if handler.number is None:
                    raise
            if handler.number is None:
                return result
            msg = f"interrupted{hint()}"
            raise CommandError(msg, status=128 + handler.number)

    return run(supervised(), loop=options.loop)


class _SignalHandler:
    """Cancel the current task at the first signal, ``number``; ignore all later ones.

    Does nothing outside the main thread.
    """

    def __init__(self, ignored: Collection[int]) -> None:
        self.number: int | None = None
        self._ignored = ignored
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.current_task()
        self._before: dict[int, Any] = {}
        self._raises = False

    def __enter__(self) -> _SignalHandler:
        with contextlib.suppress(ValueError):  # not the main thread
            for number in _HANDLED:
                if number not in self._ignored:
                    self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            # A handler that was installed by C code reads as None.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """Raise KeyboardInterrupt from a signal inside this block, which may block the thread.

        A signal that was received before raises, too: the cancellation that follows it could not
        end a call that blocks.
        """
        try:
            self._raises = True
            if self.number is not None:
                raise KeyboardInterrupt
            yield
        finally:
            self._raises = False

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        if self.number is not None:
            return
        self.number = number
        if self._raises:
            raise KeyboardInterrupt
        if self._task is not None:
            self._loop.call_soon_threadsafe(self._task.cancel)
