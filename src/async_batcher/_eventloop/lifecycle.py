"""The lifecycle of what lives on one event loop: a batcher's scheduler, a pool's dispatcher.

::

    new --first use, start--> running --stop--> stopped --start--> running ...
                                 |
                                 `--its loop was closed--> the next use starts again, on its loop

    Session.close():  drain --> end
                        `--- force, timeout, cancellation --> fail_all --> end

A `Lifecycle` has one session at a time, which its owner makes.

Rules:

- While the loop of a session is open, no other loop may use the owner, nor may a forked child.
  Other threads use ``asyncio.run_coroutine_threadsafe``, and ask for statistics. So a session is
  used by one thread, and needs no locks; two threads cannot make one at the same time.
- A stop returns when the session has ended, even if the task that calls it is cancelled.
- All stops of a session share one end. If one of them is forced, all are.
- A start may reopen while a stop drains the session before; that one ends beside the new one.
- At the interpreter's exit nothing is closed here: the system ends the worker processes.
"""

from __future__ import annotations

import asyncio
import os
import threading
import weakref
from abc import ABC, abstractmethod
from asyncio import get_running_loop
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from async_batcher.exceptions import BatcherStoppedError

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from contextvars import Context


class Session(ABC):
    """What lives on one event loop.

    Attributes:
        noun: What its owner is called in errors.
        loop: The event loop that ran when it was made.
        closing: Whether it refuses work.
        forced: Whether all its work was failed.
    """

    noun: str

    def __init__(self, loop: asyncio.AbstractEventLoop, context: Context) -> None:
        self.loop = loop
        self.closing: bool = False
        self.forced: bool = False
        self._context = context
        self._pid = os.getpid()
        self._ending: asyncio.Task[None] | None = None

    @property
    def is_inherited(self) -> bool:
        """Whether it belongs to the parent process, which has forked since."""
        return self._pid != os.getpid()

    async def close(self, *, force: bool, timeout: float | None) -> None:  # noqa: ASYNC109 - it bounds one stage of several
        """Refuse new work, drain, and end.

        Raises:
            TimeoutError: The drain took longer than ``timeout``, and was forced.
        """
        self.closing = True
        timed_out = False
        try:
            if not force:
                try:
                    async with asyncio.timeout(timeout):
                        await self.drain()
                except TimeoutError:
                    timed_out = True
            if force or timed_out:
                self.force()
            await asyncio.shield(self._begin_end())
        except asyncio.CancelledError:
            self.force()
            for _ in range(2):  # the loop may cancel the end after this task
                ending = self._begin_end()
                while not ending.done():
                    try:
                        await asyncio.wait([ending])
                    except asyncio.CancelledError:
                        continue
            raise
        if timed_out:
            msg = f"the {self.noun} did not stop within {timeout} seconds; it was stopped by force"
            raise TimeoutError(msg)

    def force(self) -> None:
        """Fail all work now, instead of draining."""
        if not self.forced:
            self.forced = True
            self.fail_all()

    def _begin_end(self) -> asyncio.Task[None]:
        """Return the task that ends the session; a new one if the loop cancelled it."""
        if self._ending is None or self._ending.cancelled():
            self._ending = self.loop.create_task(self.end(), context=self._context.copy())
        return self._ending

    @abstractmethod
    async def drain(self) -> None:
        """Wait until what was accepted has finished; may be called several times, and cancelled."""

    @abstractmethod
    def fail_all(self) -> None:
        """Fail all work, which ends every `drain`."""

    @abstractmethod
    def end(self) -> Coroutine[Any, Any, None]:
        """Release what the session made; at once if it is ``forced``."""

    @abstractmethod
    def close_without_loop(self) -> None:
        """End what can be ended after the loop has closed."""


SessionT = TypeVar("SessionT", bound=Session)


class Lifecycle(Generic[SessionT]):
    """One session after another.

    Args:
        noun: What the owner is called in errors.
        close_orphan: Called on the loop with a running session whose owner was garbage-collected.
            Only for sessions that do not refer to their owner.

    Attributes:
        session: The session; None before the first use and after a stop.
        is_stopped: Whether a stop forbids a new session; a start sets it to False.
    """

    __slots__ = (
        "__weakref__", "_close_orphan", "_finalizer", "_making", "_noun", "is_stopped", "session",
    )  # fmt: skip

    def __init__(self, noun: str, close_orphan: Callable[[SessionT], None] | None = None) -> None:
        self.session: SessionT | None = None
        self.is_stopped = False
        self._noun = noun
        self._close_orphan = close_orphan
        self._finalizer: weakref.finalize[..., Any] | None = None
        self._making = threading.Lock()  # acquired while a session is made; no thread waits for it

    @property
    def is_running(self) -> bool:
        """Whether the session accepts work, in this process."""
        session = self.session
        if session is None or session.closing or session.is_inherited:
            return False
        return not session.loop.is_closed()

    @property
    def state(self) -> str:
        """The state, for a ``repr``."""
        if self.session is None:
            return "stopped" if self.is_stopped else "not started"
        return "running" if self.is_running else "stopping"

    def get(self, make: Callable[[], SessionT]) -> SessionT:
        """Return the session on the running loop, and make it if there is none.

        Raises:
            BatcherStoppedError: The owner has been stopped.
            RuntimeError: The session is on another loop, or in the parent process.
        """
        session = self.session
        if session is not None and not session.closing and session.loop is get_running_loop():
            return session
        if not self._making.acquire(blocking=False):
            raise self._other_loop_error()  # of another thread, which is about to have a session
        try:
            self.discard_closed_loop()
            if self.is_stopped:
                msg = f"the {self._noun} has been stopped; start() reopens it"
                raise BatcherStoppedError(msg)
            draining = self.current()
            session = make()
            if draining is not None:
                self.release(draining)
            self.session = session
            if self._close_orphan is not None:
                self._finalizer = weakref.finalize(self, _on_orphaned, session, self._close_orphan)
                self._finalizer.atexit = False
            return session
        finally:
            self._making.release()

    def current(self) -> SessionT | None:
        """Return the session if there is one; raise RuntimeError if it is not to be used here."""
        self.discard_closed_loop()
        session, noun = self.session, self._noun
        if session is None or session.loop is get_running_loop():
            return session
        if session.is_inherited:
            msg = (
                f"this {noun} was started in the parent process, before os.fork(); make a new "
                f"{noun} in the child"
            )
            raise RuntimeError(msg)
        raise self._other_loop_error()

    def _other_loop_error(self) -> RuntimeError:
        noun = self._noun
        msg = (
            f"this {noun} runs on another event loop, which is still open; use one {noun} for "
            f"each loop, or stop the {noun} there first"
        )
        return RuntimeError(msg)

    async def stop(self, *, force: bool, timeout: float | None) -> None:  # noqa: ASYNC109 - see `Session.close`
        """End the session, and allow no other one; see `Session.close`."""
        session = self.current()
        self.is_stopped = True
        if session is not None:
            try:
                await session.close(force=force, timeout=timeout)
            finally:
                self.release(session)

    def discard_closed_loop(self) -> None:
        """Drop the session if its loop has closed."""
        session = self.session
        if session is not None and session.loop.is_closed():
            if not session.is_inherited:
                session.close_without_loop()
            self.release(session)

    def release(self, session: SessionT) -> None:
        """Forget a session that ends, unless another one has taken its place."""
        if self.session is session:
            self.session = None
            if self._finalizer is not None:
                self._finalizer.detach()


# Called in any thread; without a GIL perhaps late, since the thread that made an object frees it.
def _on_orphaned(session: SessionT, close: Callable[[SessionT], None]) -> None:
    if session.closing or session.is_inherited:
        return
    try:
        session.loop.call_soon_threadsafe(close, session)
    except RuntimeError:  # the loop has closed
        session.close_without_loop()
