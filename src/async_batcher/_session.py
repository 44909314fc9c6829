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

from async_batcher._forming import AT_ONCE, Forming
from async_batcher._outcome import is_exception, own_copy, qualified_name
from async_batcher._waiter import waiters
from async_batcher.exceptions import BatcherStoppedError, BatchTimeoutError, QueueFullException

if TYPE_CHECKING:
    from contextvars import Context

    from async_batcher._outcome import Outcome
    from async_batcher.runners import Runner

logger = logging.getLogger("async_batcher")

_LONGEST_TIMER = 86_400.0  # seconds; a longer wait is taken in parts, since loops do not take any number
_STOPPED = "the batcher has been stopped; start() reopens it"
_CUT_OFF = "the batcher was stopped before the item's batch had ended"

_STALLED = (
    "every batch that may run at a time has run out of batch_timeout and cannot be ended, so nothing can be run until one "
    "returns; executor='process' ends a worker that hangs, and goes on"
)


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
        self.new_waiter = waiters(loop)
        self.pid = os.getpid()
        self.forming = forming
        self.runner = runner
        self.closing = False
        self._forced = False
        self._context = context
        self._time = loop.time
        self._timer: asyncio.Handle | None = None
        self.timer_for: float | None = None  # what the timer waits for: `wake` itself, so that `is` shows a change
        self._attending = False
        self._running: dict[int, list[asyncio.Future[Any]]] = {}
        self._lost: set[int] = set()  # of them, those whose waiters have been told that they take too long
        self._batches = 0
        self._starts = 0  # calls of `start` that have not returned
        self._drained: asyncio.Future[None] = loop.create_future()
        self._ending: asyncio.Task[None] | None = None
        self.ended: asyncio.Future[None] = loop.create_future()

    def add(self, item: Any, future: asyncio.Future[Any]) -> int:
        """Take an item.

        Returns:
            Its ticket, for `leave`.

        Raises:
            QueueFullException: The queue is full.
            BatcherStoppedError: It takes no more.
        """
        ticket = self.forming.add(self._time(), item, future)
        if ticket is None:
            raise self.refusal()
        if self.forming.wake is not self.timer_for:
            self.attend()
        return ticket

    def refusal(self) -> Exception:
        """What to raise when the queue has refused an item."""
        if self.closing:
            return BatcherStoppedError(_STOPPED)
        if self.forming.is_stalled:
            return BatchTimeoutError(_STALLED)
        msg = f"{self.forming.waiting} items wait already, as many as max_queue_size allows; try again later, or raise it"
        return QueueFullException(msg)

    def attend(self) -> None:
        """The queue's `wake` has changed: let a batch leave that is full, and set the timer."""
        self._attend(AT_ONCE, self._time())

    def submit(self, item: Any) -> Submitted:
        """Take an item; its future leaves the queue by itself when it is cancelled."""
        future = Submitted(loop=self.loop)
        future.session = self
        future.ticket = self.add(item, future)
        return future

    def leave(self, ticket: int, future: asyncio.Future[Any] | None = None) -> None:
        """The waiter of that ticket has gone: its item is not run if it still waits, and its future wants no answer."""
        if future is not None and not future.done() and not self.loop.is_closed():
            future.cancel()
        if self.forming.discard(ticket) and not self.loop.is_closed():
            self._set_timer(self._time())
            self._note_drained()

    def runs_in(self, task: asyncio.Task[Any] | None) -> bool:
        """Whether ``task`` is one of its own batches."""
        return self.runner.runs_in(task)

    def is_open(self) -> bool:
        """Whether it takes items, in this process."""
        return not self.closing and not self.loop.is_closed() and self.pid == os.getpid()

    def resize(self, *, max_batch_size: int, max_queue_time: float) -> None:
        """Change the limits of the batches that have not left yet."""
        self.forming.resize(max_batch_size=max_batch_size, max_queue_time=max_queue_time)
        if not self.loop.is_closed():
            self._attend(AT_ONCE, self._time())

    async def start(self) -> None:
        """Get the runner ready; see `Runner.start`."""
        self._starts += 1
        try:
            await self.runner.start()
        finally:
            self._starts -= 1
            self._note_drained()

    async def close(self, *, force: bool, timeout: float | None) -> None:  # noqa: ASYNC109 - it bounds one stage of several
        """Take no more, run what waits, and end.

        Raises:
            TimeoutError: It took longer than ``timeout``; what had not ended by then has failed.
        """
        self.closing = True
        expired = False
        task = asyncio.current_task()
        if self.runs_in(task):
            self.runner.spare(task)  # by force: it cannot wait for itself
        try:
            if force:
                self._abort()
            else:
                self.forming.close()
                self._attend(AT_ONCE, self._time())
                self._note_drained()
            if not self._drained.done():
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
        self.forming.close()
        if self.pid == os.getpid():
            self.runner.abandon()

    async def _end(self) -> None:
        try:
            await self.runner.close(kill=self._forced)
        finally:
            if not self.ended.done():
                self.ended.set_result(None)

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
        self.forming.close()
        error = BatcherStoppedError(_CUT_OFF)
        _, waiting = self.forming.clear()
        for futures in (waiting, *self._running.values()):
            self._settle(futures, error)
        self._set_timer(self._time())
        if not self._drained.done():
            self._drained.set_result(None)

    def _attend(self, until: float, now: float) -> None:
        """Let the batches leave that are due by ``until``, then set the timer."""
        if self._attending:
            return  # the call that is under way will see to it
        self._attending = True
        try:
            while (batch := self.forming.take(until)) is not None:
                self._launch(*batch)
        finally:
            self._attending = False
            self._set_timer(now)

    def _launch(self, items: list[Any], futures: list[asyncio.Future[Any]]) -> None:
        number = self._batches = self._batches + 1
        self._running[number] = futures
        self.runner.run(
            items, lambda outcome: self._finished(number, outcome), lambda error: self._ran_out_of_time(number, error)
        )

    def _ran_out_of_time(self, number: int, error: BatchTimeoutError) -> None:
        """A batch takes too long and runs on: its waiters need not wait for its end, its slot must."""
        futures, self._running[number] = self._running[number], []
        if not futures:
            return  # cut off by a stop
        self._lost.add(number)
        self._settle(futures, error)
        if not self._forced:
            logger.error("A batch of %d items failed: %s", len(futures), qualified_name(error))
        self.forming.lose()
        if self.forming.is_stalled:
            _, waiting = self.forming.clear()
            self._settle(waiting, BatchTimeoutError(_STALLED))
        self._set_timer(self._time())

    def _finished(self, number: int, outcome: Outcome) -> None:
        if isinstance(outcome, asyncio.CancelledError) and self._is_program_ending():
            self.closing = True  # nothing more is begun
            self._abort()
        futures = self._running.pop(number)
        was_lost = number in self._lost
        if was_lost:
            self._lost.discard(number)  # its waiters have been told
        else:
            self._settle(futures, outcome)
        self.forming.release(was_lost=was_lost)
        self._attend(now := self._time(), now)
        self._note_drained()
        if isinstance(outcome, BaseException) and not self._forced and not was_lost:
            logger.error("A batch of %d items failed: %s", len(futures), qualified_name(outcome))

    def _is_program_ending(self) -> bool:
        """Whether every task of the loop has been cancelled, as `asyncio.run` does at its end."""
        return all(task.cancelling() for task in asyncio.all_tasks(self.loop))

    def _settle(self, futures: list[asyncio.Future[Any]], outcome: Outcome) -> None:
        if isinstance(outcome, BaseException):
            for future in futures:
                if not future.done():
                    future.set_exception(own_copy(outcome))
                    if self._forced:
                        future.exception()  # a future that nobody awaits any more is no news when all are cut off
            return
        plain = None  # a type of answers that are not raised: most are of one
        for future, answer in zip(futures, outcome, strict=True):
            if future.done():
                continue
            if type(answer) is not plain:
                if is_exception(answer):
                    future.set_exception(own_copy(answer))
                    continue
                plain = type(answer)
            future.set_result(answer)

    def _note_drained(self) -> None:
        if not self.closing or self._drained.done():
            return
        if not self._running and not self._starts and not self.forming.waiting:
            self._drained.set_result(None)

    def _set_timer(self, now: float) -> None:
        wake = self.forming.wake
        if wake == self.timer_for:
            self.timer_for = wake
            return
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self.timer_for = wake
        if wake is None:
            return
        step = self._on_timer if wake <= now else self._wait
        self._timer = self.loop.call_soon(step, wake, context=self._context)

    def _wait(self, wake: float) -> None:
        # In the next turn: a batch that fills in the turn in which it began needs no timer, and one costs more than this call.
        now = self._time()
        if wake <= now:
            self._on_timer(wake)
        else:
            when = min(wake, now + _LONGEST_TIMER)
            self._timer = self.loop.call_at(when, self._on_timer, when, context=self._context)

    def _on_timer(self, when: float) -> None:
        self._timer = self.timer_for = None
        now = max(self._time(), when)  # a timer that fires a little early counts as due
        self._attend(now, now)


class Submitted(asyncio.Future[Any]):
    """What `Session.submit` returns: a future that leaves the queue when it is cancelled."""

    __slots__ = ("session", "ticket")
    session: Session
    ticket: int

    def cancel(self, msg: Any | None = None) -> bool:
        """Cancel it; an item that still waits is never run."""
        cancelled = super().cancel(msg)
        if cancelled:
            self.session.leave(self.ticket)
        return cancelled
