"""What a caller awaits: a future, or on asyncio's own loop `FastFuture`, which costs less to wake.

::

    set_result --> Waker --one call_soon for all--> wake --> each task, in its context
                     `----is_held ... release-----> wake, at once

asyncio's loop makes a handle, in Python, for every resolved future: a fifth of an item's cost in a
batch of 64. Here one serves all. uvloop does that in C, where a plain future is cheaper.

Rules:

- Only tasks, the front end and the pool see a `FastFuture`; it has what they ask of a future.
- Tasks are woken in order; only `Waker.release` wakes inside the call that resolves.
- No reference cycle joins a future and its task's exception: failures are freed at once.
- A task that raises KeyboardInterrupt, or runs the loop inside itself, does not stop the others
  from being woken.
"""

from __future__ import annotations

import asyncio
import weakref
from asyncio import current_task, get_running_loop
from contextvars import copy_context
from functools import partial
from types import NoneType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator
    from contextvars import Context
    from typing import TypeAlias

    Callback: TypeAlias = Callable[["FastFuture"], object]


def waker_of(loop: asyncio.AbstractEventLoop) -> Waker | None:
    """Return what wakes the tasks on a loop; None: the loop does that at less cost."""
    is_in_python = (
        isinstance(loop, asyncio.BaseEventLoop)
        and type(loop).call_soon is asyncio.BaseEventLoop.call_soon
    )
    if not is_in_python or loop.get_debug():
        return None
    return _wakers.setdefault(loop, Waker(loop))


def future_factory(loop: asyncio.AbstractEventLoop) -> Callable[[], asyncio.Future[Any]]:
    """Return what makes futures for ``loop``, of the kind that costs least there."""
    waker = waker_of(loop)
    if waker is not None:
        return partial(FastFuture, waker)  # type: ignore[return-value]  # as good as one
    return partial(asyncio.Future, loop=loop)


def resolve(future: asyncio.Future[Any] | FastFuture, result: Any) -> None:
    """Set the result unless the future is done."""
    if not future.done():
        try:  # noqa: SIM105 - contextlib.suppress would double the cost
            future.set_result(result)
        except asyncio.InvalidStateError:  # a signal handler cancelled it after `done()`
            pass


class Waker:
    """Wakes the tasks of futures that were resolved; one for each loop.

    Attributes:
        pending: The futures.
        is_held: Set at the beginning of a callback of the loop that calls `release` last: the loop
            need not wake the tasks of what is resolved meanwhile.
    """

    __slots__ = ("_loop", "is_held", "pending")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = weakref.ref(loop)  # which keeps this one
        self.pending: list[FastFuture] = []
        self.is_held = False

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        loop = self._loop()
        assert loop is not None  # noqa: S101 - it runs
        return loop

    def release(self) -> None:
        """Wake the tasks of what was resolved since ``is_held`` was set.

        At once, which saves a turn of the loop: a tenth of the cost of a short call. But tasks do
        not run inside one another.
        """
        self.is_held = False
        pending = self.pending
        if not pending:
            return
        if current_task(self._loop()) is not None:
            self.loop.call_soon(self.wake)
        elif len(pending) > 1:
            self.wake()
        else:  # as `wake` does, but no other task waits for it
            (future,) = pending
            pending.clear()
            callback: Any = future.callback
            future.callback = None
            future.context.run(callback, future)
            # It refers to the task, which keeps what it raised, whose traceback leads here.
            del callback

    def wake(self, rest: Iterator[FastFuture] | None = None) -> None:
        if rest is None:
            if not self.pending:  # `release` has woken them
                return
            rest, self.pending = iter(self.pending), []
        # A callback may raise, which ends this call, or run the loop inside itself, which delays
        # it: then another call wakes the rest. The loop handles what is raised, as with handles.
        another = self.loop.call_soon(self.wake, rest)
        callback: Any = None
        for future in rest:
            callback, future.callback = future.callback, None
            future.context.run(callback, future)
        another.cancel()
        del callback  # see `release`


_wakers: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Waker] = weakref.WeakKeyDictionary()


class FastFuture:
    """A future for the task of one caller, which sets ``callback`` when it starts to wait."""

    # A task recognizes a future by the second name, and sets it to False when it starts to wait.
    __slots__ = (
        "__weakref__", "_asyncio_future_blocking", "_has_result", "_outcome", "_waker", "callback",
        "context",
    )  # fmt: skip

    callback: Callback | None
    context: Context

    # A Python method that the task calls costs as much as ten lines of it, so two are builtins. The
    # loop is the running one: `process` just asked for it.
    get_loop = staticmethod(get_running_loop)
    # A task asks for the result to learn what to raise. `__await__` raises it.
    result: staticmethod[[], None] = staticmethod(NoneType)

    def __init__(self, waker: Waker) -> None:
        self._waker = waker
        self._has_result: bool | None = None  # None: pending. False: _outcome is to be raised
        self._outcome: Any
        self.callback = None

    def __await__(self) -> Generator[FastFuture, None, Any]:
        if self._has_result is None:
            self._asyncio_future_blocking = True
            yield self
        if self._has_result:
            return self._outcome
        if self._has_result is None:
            msg = "the task went on before it was woken"  # the coroutine is not driven by a task
            raise RuntimeError(msg)
        outcome = self._outcome
        if self.cancelled():
            # The traceback of the one that is raised leads to this future.
            self._outcome = asyncio.CancelledError()
        __tracebackhide__ = True  # of IPython and pytest, which show arguments, too
        try:
            raise outcome
        finally:
            del outcome, self  # the traceback holds this frame

    def add_done_callback(self, callback: Callback, *, context: Context | None = None) -> None:
        """Have the loop call ``callback`` when this is done; a task does so before it waits."""
        if context is None:
            context = copy_context()
        if self._has_result is not None:
            self._waker.loop.call_soon(callback, self, context=context)
        elif self.callback is None:
            self.callback, self.context = callback, context
        else:  # what drives the coroutine has added one too
            both = partial(_call_both, (self.callback, self.context), (callback, context))
            self.callback, self.context = both, copy_context()

    def done(self) -> bool:
        return self._has_result is not None

    def set_result(self, result: Any) -> None:
        """Set the result and wake the task, unless this is done."""
        if self._has_result is not None:  # a signal handler cancelled the task after `done()`
            return
        self._has_result = True
        self._outcome = result
        if self.callback is not None:
            waker = self._waker
            if not waker.pending and not waker.is_held:
                waker.loop.call_soon(waker.wake)
            waker.pending.append(self)

    def set_exception(self, exception: BaseException) -> None:
        """Set what is raised in the task, unless this is done."""
        if self._has_result is None:
            self.set_result(exception)
            self._has_result = False

    def exception(self) -> BaseException | None:
        return None if self._has_result else self._outcome

    def cancelled(self) -> bool:
        return self._has_result is False and isinstance(self._outcome, asyncio.CancelledError)

    def cancel(self, msg: Any | None = None) -> bool:
        """Raise CancelledError in the task unless this is done; tell whether it will be raised."""
        if self._has_result is not None:
            return False
        self.set_exception(asyncio.CancelledError() if msg is None else asyncio.CancelledError(msg))
        return True


def _call_both(
    first: tuple[Callback, Context], second: tuple[Callback, Context], future: FastFuture
) -> None:
    (callback, context), (other, other_context) = first, second
    try:
        context.run(callback, future)
    finally:
        other_context.run(other, future)
