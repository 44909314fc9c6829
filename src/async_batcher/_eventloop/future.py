"""What a call waits on: a future, or, on asyncio's own loop, something that costs less to wake.

::

    a batcher's Delivery --set_result--> Waker --one call_soon for all--> wake --> the task of each waiter, in its own context
    a pool's result --resolve_and_resume-----------------------------------------> the task of its one caller, at once

asyncio's loop makes a handle, in Python, for every future that is settled: in a batch of 64 a fifth of what an item costs. Here
all of a batch take one. Where the loop does that in C (uvloop), a future is cheaper than what can be written in Python; and
asyncio's debug mode is to time each task's step by itself.

Rules:

- A `FastFuture` has what a task asks of the future that it waits for, and a session or a pool of the futures that it settles.
  Nobody else sees one.
- Tasks are woken in order, and never inside the call that settles or cancels; but for `resolve_and_resume`, which wakes one at
  once.
- Nothing that a task raised leads back to its waiter for longer than it is being woken: what has gone wrong is gone without the
  garbage collector.
- One that lets KeyboardInterrupt or SystemExit through, or that runs the loop inside itself, keeps no other from being woken.
"""

from __future__ import annotations

import asyncio
from asyncio import get_running_loop
from contextvars import copy_context
from functools import partial
from types import NoneType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator
    from contextvars import Context
    from typing import TypeAlias

    Callback: TypeAlias = Callable[["FastFuture"], object]


def future_factory(loop: asyncio.AbstractEventLoop) -> Callable[[], asyncio.Future[Any]]:
    """What makes waiters for ``loop``, of the kind that costs least there."""
    is_in_python = isinstance(loop, asyncio.BaseEventLoop) and type(loop).call_soon is asyncio.BaseEventLoop.call_soon
    if is_in_python and not loop.get_debug():
        return partial(FastFuture, Waker(loop))  # type: ignore[return-value]  # as far as a session and a task ask, it is a future
    return partial(asyncio.Future, loop=loop)


def resolve(waiter: asyncio.Future[Any] | FastFuture, result: Any) -> None:
    """Settle a waiter, unless it has been."""
    if not waiter.done():
        try:  # noqa: SIM105 - the other way would cost as much as the rest
            waiter.set_result(result)
        except asyncio.InvalidStateError:  # a signal's handler has cancelled it since it was asked
            pass


def resolve_and_resume(waiter: asyncio.Future[Any] | FastFuture, result: Any) -> None:
    """The same, and have its task go on before this returns, if that can be.

    That saves another turn of the loop, a tenth of what a short call costs. It cannot be while a task runs, since tasks do not
    run inside one another; so this is for callbacks of the loop, when all else that they have to do is done.
    """
    if type(waiter) is FastFuture and waiter.callback is not None and asyncio.current_task(waiter.get_loop()) is None:
        waiter.resolve_and_resume(result)
    else:
        resolve(waiter, result)


class Waker:
    """Wakes all waiters that were settled since it was last heard, with one call of the loop.

    Attributes:
        loop: The loop.
        pending: The waiters to wake; while there are any, the loop has `wake` to call.
    """

    __slots__ = ("loop", "pending")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.pending: list[FastFuture] = []

    def wake(self) -> None:
        """Wake them."""
        rung, self.pending = self.pending, []
        self._wake(iter(rung))

    def _wake(self, rest: Iterator[FastFuture]) -> None:
        # A callback that raises ends this call, and one that runs the loop inside itself holds it up: then another sees to the
        # rest. For all else that may be raised, it is the loop's business, as it is with a handle for each.
        another = self.loop.call_soon(self._wake, rest)
        callback: Any = None
        for waiter in rest:
            callback, waiter.callback = waiter.callback, None
            waiter.context.run(callback, waiter)
        another.cancel()
        del callback  # see `FastFuture.resolve_and_resume`


class FastFuture:
    """What the task of one call waits on.

    Args:
        bell: What wakes the task.

    Attributes:
        callback: What the task wants called when it is to go on; None while nobody waits.
        context: The context to call it in.
    """

    # The first is how a task tells a future from anything else; the task sets it to False when it has begun to wait.
    __slots__ = (
        "__weakref__", "_asyncio_future_blocking", "_has_answer", "_outcome", "_waker", "callback",
        "context",
    )  # fmt: skip

    callback: Callback | None
    context: Context

    # A method in Python that a task calls costs as much as ten lines of it, so two of the four are builtins. The loop is the
    # one that runs: `process` has just asked.
    get_loop = staticmethod(get_running_loop)
    # A task asks for the result to learn what it shall raise where the waiter is awaited. That it does by itself, in `__await__`.
    result: staticmethod[[], None] = staticmethod(NoneType)

    def __init__(self, bell: Waker) -> None:
        self._waker = bell
        self._has_answer: bool | None = None  # None: pending; False: _outcome is to be raised
        self._outcome: Any
        self.callback = None

    def __await__(self) -> Generator[FastFuture, None, Any]:
        """Wait for the answer, or what is raised in its place."""
        if self._has_answer is None:
            self._asyncio_future_blocking = True
            yield self
        if self._has_answer:
            return self._outcome
        if self._has_answer is None:
            msg = "the task went on before it was woken"  # what drives the coroutine is no task
            raise RuntimeError(msg)
        outcome = self._outcome
        if self.cancelled():
            self._outcome = asyncio.CancelledError()  # the one that is raised has a traceback, which leads to the waiter
        try:
            raise outcome
        finally:
            del outcome, self  # it holds this frame too

    def add_done_callback(self, callback: Callback, *, context: Context | None = None) -> None:
        """Have ``callback`` called, by the loop, once it is settled; from a task, before it begins to wait."""
        if context is None:
            context = copy_context()
        if self._has_answer is not None:
            self._waker.loop.call_soon(callback, self, context=context)
        elif self.callback is None:
            self.callback, self.context = callback, context
        else:  # what drives the coroutine has added one of its own
            both = partial(_call_both, (self.callback, self.context), (callback, context))
            self.callback, self.context = both, copy_context()

    def done(self) -> bool:
        """Whether it is settled."""
        return self._has_answer is not None

    def set_result(self, result: Any) -> None:
        """Settle it, unless it has been, and wake the task."""
        if self._has_answer is not None:  # by a signal's handler that cancels the task, since it was asked whether it is `done`
            return
        self._has_answer = True
        self._outcome = result
        if self.callback is not None:
            bell = self._waker
            if not bell.pending:
                bell.loop.call_soon(bell.wake)
            bell.pending.append(self)

    def resolve_and_resume(self, result: Any) -> None:
        """Settle it, unless it has been, and have the task go on; see the function of that name."""
        callback: Any = self.callback
        if self._has_answer is not None:  # no call stands between this and the next line, so no signal's handler does
            return
        self._has_answer = True
        self._outcome = result
        self.callback = None
        self.context.run(callback, self)
        del callback  # it knows the task, which keeps what it raised, whose traceback leads to the waiter, and to this frame

    def set_exception(self, exception: BaseException) -> None:
        """Settle it, unless it has been, with what is to be raised in the task."""
        if self._has_answer is None:
            self.set_result(exception)
            self._has_answer = False

    def exception(self) -> BaseException | None:
        """What is to be raised in the task. A future of which that was asked does not complain."""
        return None if self._has_answer else self._outcome

    def cancelled(self) -> bool:
        """Whether it was cancelled; nothing else settles it with CancelledError."""
        return self._has_answer is False and isinstance(self._outcome, asyncio.CancelledError)

    def cancel(self, msg: Any | None = None) -> bool:
        """Raise CancelledError in the task, unless it is settled; says whether it will."""
        if self._has_answer is not None:
            return False
        self.set_exception(asyncio.CancelledError() if msg is None else asyncio.CancelledError(msg))
        return True


def _call_both(first: tuple[Callback, Context], second: tuple[Callback, Context], waiter: FastFuture) -> None:
    (one, context), (other, other_context) = first, second
    try:
        context.run(one, waiter)
    finally:
        other_context.run(other, waiter)
