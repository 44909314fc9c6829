"""One life of a batcher on one event loop, from its first call to its stop: the loop's side of everything.

::

    add(item, future) --> Forming --take--> runner.run(batch, done) --> _finished --> _settle --> the futures
                            |  ^
                       wake |  | one timer, or none
                            v  |
                          the loop

States: open --close()--> closing (takes no more, runs what waits) --> closed. An abort settles everything at once.

Rules:

- A future is settled in one place, `_settle`, which asks ``done()`` first.
- A slot is free when the runner says that the batch has ended, whoever still waits for it.
- Batches leave only in `_attend`, which never runs inside itself: an eager task or an inline executor may end a batch
  before it has returned.
"""

from __future__ import annotations

import asyncio
import logging
import os
from typing import TYPE_CHECKING, Any

from async_batcher._forming import AT_ONCE, REFUSED, Forming
from async_batcher._outcome import own_copy, qualified_name
from async_batcher.exceptions import BatcherStoppedError, QueueFullException

if TYPE_CHECKING:
    from contextvars import Context

    from async_batcher._forming import Entry
    from async_batcher._outcome import Outcome
    from async_batcher.runners import Runner

logger = logging.getLogger("async_batcher")

_LONGEST_TIMER = 86_400.0  # seconds; a longer wait is taken in parts, since loops do not take any number


class Submitted(asyncio.Future[Any]):
    """What `submit` returns: a future that leaves the queue when it is cancelled."""

    __slots__ = ("session", "ticket")
    session: Session
    ticket: int

    def cancel(self, msg: Any | None = None) -> bool:
        """Cancel it; an item that still waits is never run."""
        cancelled = super().cancel(msg)
        if cancelled:
            self.session.leave(self.ticket)
        return cancelled


class Session:
    """The event-loop side of a running batcher.

    Args:
        loop: The loop that it lives on.
        forming: Its queue.
        runner: Where batches run.
        context: What its callbacks run in.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        forming: Forming[Any, asyncio.Future[Any]],
        runner: Runner,
        context: Context,
    ) -> None:
        self.loop = loop
        self.pid = os.getpid()
        self.forming = forming
        self.runner = runner
        self.closing = False
        self._forced = False
        self._context = context
        self._time = loop.time
        self._timer: asyncio.Handle | None = None
        self._timer_for: float | None = None  # what the timer waits for
        self._attending = False
        self._running: dict[int, list[Entry[Any, asyncio.Future[Any]]]] = {}
        self._batches = 0
        self._drained: asyncio.Future[None] = loop.create_future()
        self._ending: asyncio.Task[None] | None = None

    def add(self, item: Any, future: asyncio.Future[Any]) -> int:
        """Take an item.

        Returns:
            Its ticket, for `leave`.

        Raises:
            QueueFullException: The queue is full.
            BatcherStoppedError: It takes no more.
        """
        if self.closing:
            raise stopped()
        now = self._time()
        forming = self.forming
        ticket = forming.add(now, item, future)
        if ticket == REFUSED:
            msg = f"{forming.waiting} items wait already, as many as max_queue_size allows; try again later, or raise it"
            raise QueueFullException(msg)
        if forming.wake != self._timer_for:
            self._attend(AT_ONCE, now)
        return ticket

    def leave(self, ticket: int) -> None:
        """The waiter of that ticket has gone: its item is not run if it still waits."""
        if self.forming.discard(ticket):
            self._set_timer(self._time())
            self._note_drained()

    def resize(self, *, max_batch_size: int, max_queue_time: float) -> None:
        """Change the limits of the batches that have not left yet."""
        self.forming.resize(max_batch_size=max_batch_size, max_queue_time=max_queue_time)
        self._attend(AT_ONCE, self._time())

    async def close(self, *, force: bool, timeout: float | None) -> None:  # noqa: ASYNC109 - it bounds one stage of several
        """Take no more, run what waits, and end.

        Raises:
            TimeoutError: It took longer than ``timeout``; what had not ended by then has failed.
        """
        self.closing = True
        self.forming.close()
        self._attend(AT_ONCE, self._time())
        self._note_drained()
        expired = False
        try:
            if force:
                self._abort()
            elif not self._drained.done():
                done, _ = await asyncio.wait([self._drained], timeout=timeout)
                if not done:
                    expired = True
                    self._abort()
            if self._ending is None:
                self._ending = self.loop.create_task(self._end(), context=self._context.copy())
            await asyncio.shield(self._ending)
        except asyncio.CancelledError:
            await self._end_forced()
            raise
        if expired:
            msg = f"the batcher did not come to its end within {timeout} seconds; it has been stopped by force"
            raise TimeoutError(msg)

    def abandon(self) -> None:
        """The loop has closed without `close`."""
        self.closing = self._forced = True
        if self.pid == os.getpid():
            self.runner.abandon()

    async def _end(self) -> None:
        await self.runner.close(kill=self._forced)

    async def _end_forced(self) -> None:
        """See the end through although the task that waits for it is cancelled."""
        self._abort()
        if self._ending is None or self._ending.cancelled():
            self._ending = self.loop.create_task(self._end(), context=self._context.copy())
        while not self._ending.done():
            try:
                await asyncio.wait([self._ending])
            except asyncio.CancelledError:
                continue

    def _abort(self) -> None:
        self._forced = True
        error = stopped("the batcher was stopped before the item's batch had ended")
        self._settle(self.forming.clear(), error)
        for entries in self._running.values():
            self._settle(entries, error)
        self._set_timer(self._time())
        if not self._drained.done():
            self._drained.set_result(None)

    def _attend(self, until: float, now: float) -> None:
        """Let the batches leave that are due by ``until``, then set the timer."""
        if self._attending:
            return  # the call that is under way will see to it
        self._attending = True
        try:
            while (entries := self.forming.take(until)) is not None:
                self._launch(entries)
        finally:
            self._attending = False
            self._set_timer(now)

    def _launch(self, entries: list[Entry[Any, asyncio.Future[Any]]]) -> None:
        number = self._batches = self._batches + 1
        self._running[number] = entries
        self.runner.run([entry[2] for entry in entries], lambda outcome: self._finished(number, outcome))

    def _finished(self, number: int, outcome: Outcome) -> None:
        entries = self._running.pop(number)
        self._settle(entries, outcome)
        self.forming.release()
        self._attend(now := self._time(), now)
        self._note_drained()
        if isinstance(outcome, BaseException) and not self._forced:
            logger.error("A batch of %d items failed: %s", len(entries), qualified_name(outcome))

    def _settle(self, entries: list[Entry[Any, asyncio.Future[Any]]], outcome: Outcome) -> None:
        if isinstance(outcome, BaseException):
            for _, _, _, future in entries:
                if not future.done():
                    future.set_exception(own_copy(outcome))
            return
        for (_, _, _, future), answer in zip(entries, outcome, strict=True):
            if future.done():
                continue
            if isinstance(answer, BaseException):
                future.set_exception(own_copy(answer))
            else:
                future.set_result(answer)

    def _note_drained(self) -> None:
        if self.closing and not self._running and not self.forming.waiting and not self._drained.done():
            self._drained.set_result(None)

    def _set_timer(self, now: float) -> None:
        wake = self.forming.wake
        if wake == self._timer_for:
            return
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._timer_for = wake
        if wake is None:
            return
        if wake <= now:
            self._timer = self.loop.call_soon(self._on_timer, wake, context=self._context)
        else:
            when = min(wake, now + _LONGEST_TIMER)
            self._timer = self.loop.call_at(when, self._on_timer, when, context=self._context)

    def _on_timer(self, when: float) -> None:
        self._timer = self._timer_for = None
        now = max(self._time(), when)  # a timer that fires a little early counts as due
        self._attend(now, now)


def stopped(message: str = "the batcher has been stopped; start() reopens it") -> BatcherStoppedError:
    """The error for a call that came too late, or was cut off."""
    return BatcherStoppedError(message)
