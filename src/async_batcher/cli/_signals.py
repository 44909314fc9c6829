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
    from typing import TypeAlias

    # Entered where a call may block, and nowhere else; see `run_interruptible`.
    Interruptible: TypeAlias = Callable[[], contextlib.AbstractContextManager[None]]

R = TypeVar("R")

_HANDLED = (signal.SIGINT, signal.SIGTERM)


def run_interruptible(
    main: Callable[[Interruptible], Coroutine[Any, Any, R]],
    options: Namespace,
    hint: Callable[[], str] = str,
) -> R:
    """Run a coroutine function on a new event loop, until it ends or a signal ends it.

    The first signal cancels it, and all later ones are ignored.

    Args:
        main: The function. Signals raise KeyboardInterrupt in blocks of its argument, in which
            calls may block.
        options: The loop, and the signals that were ignored when the process started.
        hint: Gives the end of the message after a signal.
    """
    received: int | None = None
    is_blocking = False

    @contextlib.contextmanager
    def interruptible() -> Iterator[None]:
        nonlocal is_blocking
        try:
            is_blocking = True
            if received is not None:  # the cancellation on its way could not end a call that blocks
                raise KeyboardInterrupt
            yield
        finally:
            is_blocking = False

    async def supervised() -> R:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()

        def on_signal(number: int, _: object) -> None:
            nonlocal received
            if received is not None:
                return
            received = number
            if is_blocking:
                raise KeyboardInterrupt
            if task is not None:
                loop.call_soon_threadsafe(task.cancel)

        with _handled(on_signal, options.ignored_signals):
            try:
                result = await main(interruptible)
            except (asyncio.CancelledError, KeyboardInterrupt):
                if received is None:
                    raise
            if received is None:
                return result
            msg = f"interrupted{hint()}"
            raise CommandError(msg, status=128 + received)

    return run(supervised(), loop=options.loop)


@contextlib.contextmanager
def _handled(handler: Callable[[int, object], None], ignored: Collection[int]) -> Iterator[None]:
    before: dict[int, Any] = {}
    try:
        with contextlib.suppress(ValueError):  # not the main thread
            for number in _HANDLED:
                if number not in ignored:
                    before[number] = signal.signal(number, handler)
        yield
    finally:
        for handled, old in before.items():
            # A handler that was installed by C code reads as None.
            signal.signal(handled, signal.SIG_DFL if old is None else old)
