"""An event loop whose callbacks may raise, for code that must go on then."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVarTuple

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

Ts = TypeVarTuple("Ts")


class GuardedLoop:
    """The loop as the parts of a pool use it: what a callback of theirs raises is not lost.

    Args:
        loop: The event loop.
        on_error: Called with what a callback raised, on the loop's thread.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, on_error: Callable[[Exception], None]
    ) -> None:
        self._loop = loop
        self._on_error = on_error
        self.is_closed = loop.is_closed
        self.create_future = loop.create_future
        self.remove_reader = loop.remove_reader
        self.remove_writer = loop.remove_writer

    def guard(self, callback: Callable[[*Ts], object]) -> Callable[[*Ts], None]:
        """Return a callback that passes what ``callback`` raises to ``on_error``."""

        def guarded(*args: *Ts) -> None:
            try:
                callback(*args)
            except Exception as exc:  # noqa: BLE001 - the owner decides
                self._on_error(exc)

        return guarded

    def call_soon(self, callback: Callable[[*Ts], object], *args: *Ts) -> asyncio.Handle:
        return self._loop.call_soon(self.guard(callback), *args)

    def call_soon_threadsafe(self, callback: Callable[[*Ts], object], *args: *Ts) -> asyncio.Handle:
        return self._loop.call_soon_threadsafe(self.guard(callback), *args)

    def call_later(
        self, delay: float, callback: Callable[[*Ts], object], *args: *Ts
    ) -> asyncio.TimerHandle:
        return self._loop.call_later(delay, self.guard(callback), *args)

    def add_reader(self, fd: int, callback: Callable[[*Ts], object], *args: *Ts) -> None:
        self._loop.add_reader(fd, self.guard(callback), *args)

    def add_writer(self, fd: int, callback: Callable[[*Ts], object], *args: *Ts) -> None:
        self._loop.add_writer(fd, self.guard(callback), *args)

    def call_soon_unguarded(self, callback: Callable[[*Ts], object], *args: *Ts) -> asyncio.Handle:
        """Call what may raise on purpose: the loop handles it."""
        return self._loop.call_soon(callback, *args)

    def add_reader_unguarded(self, fd: int, callback: Callable[[], Any]) -> None:
        """Watch a descriptor with a callback that catches what it raises itself."""
        self._loop.add_reader(fd, callback)
