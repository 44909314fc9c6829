"""One life of a batcher on one event loop, from its first call to its stop: the loop's side of everything.

::

    the line for room
          |  as the queue empties
          v
    add(item, future) --> Forming --take--> Batches --> Settling --> the futures
                            |  ^               |           ^
                       wake |  | a timer       | a slot    | a timer
                            v  |               | is free   |
                          the loop <-----------'       Deadlines

States: open --close()--> closing (takes no more, runs what waits) --> closed. An abort settles everything at once.

Rules:

- A future is settled in one place, `Settling`. For many items at once a share of a bulk stands in its place (`bulk.py`).
- A slot is free when its batch has ended, whoever still waits for it.
- Nothing is begun for a waiter that has gone, nor after its deadline, whether a timer was late or not.
- While callers wait for room the queue is full; what is run again never needs room.
- Batches leave only in `_attend`, which never runs inside itself: an eager task or an inline executor may end a batch
  before it has returned.
"""

from __future__ import annotations

import asyncio
import math
import os
from typing import TYPE_CHECKING, Any

from async_batcher._batching.bulk import Bulk, Share
from async_batcher._batching.deadlines import Deadlines
from async_batcher._batching.delivery import Settling
from async_batcher._batching.inflight import Batches
from async_batcher._batching.queue import AT_ONCE, Forming
from async_batcher._batching.waitlist import Line, Place, SharedPlace, enter_many
from async_batcher._eventloop.future import waiters
from async_batcher.exceptions import (
    BatcherStoppedError,
    BatchTimeoutError,
    ItemTimeoutError,
    QueueFullException,
)

if TYPE_CHECKING:
    from collections.abc import Collection
    from contextvars import Context
    from typing import TypeAlias

    from async_batcher._batching.recorder import Tally
    from async_batcher._runners.base import Runner
    from async_batcher.integrations.opentelemetry import BatchTracer
    from async_batcher.stats import Stats

    Ticket: TypeAlias = int | Place | Bulk

_LONGEST_TIMER = 86_400.0  # seconds; a longer wait is taken in parts, since loops do not take any number
_EARLY = 0.01  # seconds that a timer may fire early: loops count in milliseconds at the coarsest
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
        tally: What it counts in.
        item_timeout: Seconds within which an item must have its result; None: no limit.
        may_wait_for_room: Whether a call that finds the queue full waits.
        isolates: Whether a batch that fails is run again in parts.
        ends_abandoned: Whether a batch whose waiters have all gone is ended.
        tracer: Makes a span of each batch.
        function: The name of the batch function.

    Attributes:
        batches: Those that run.
        watches: Whether `watch` is to be told of every waiter.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        forming: Forming[Any, Any],
        runner: Runner,
        context: Context,
        tally: Tally,
        *,
        item_timeout: float | None = None,
        may_wait_for_room: bool = False,
        isolates: bool = False,
        ends_abandoned: bool = False,
        tracer: BatchTracer | None = None,
        function: str = "process_batch",
    ) -> None:
        self.loop = loop
        self.new_waiter = waiters(loop)
        self.pid = os.getpid()
        self.forming = forming
        self.closing = False
        self.tally = tally
        self._settling = Settling(tally, self._drop, function)
        self.batches = Batches(
            loop,
            forming,
            runner,
            self._settling,
            tally,
            context,
            self,
            isolates=isolates,
            ends_abandoned=ends_abandoned,
            tracer=tracer,
        )
        self._context = context
        self._time = loop.time
        self._timer: asyncio.Handle | None = None
        self.timer_for: float | None = None  # what the timer waits for: `wake` itself, so that `is` shows a change
        self._attending = False
        self._tracer = tracer
        self.watches = item_timeout is not None or tracer is not None
        self._item_timeout = item_timeout
        self._deadlines: Deadlines[tuple[asyncio.Future[Any] | Bulk, Ticket, float]] = Deadlines(lambda limit: limit[0].done())
        self._expiry: asyncio.TimerHandle | None = None
        self._expiry_for = math.inf  # what that timer waits for
        self._may_wait_for_room = may_wait_for_room
        self._line = Line(forming)
        self._starts = 0  # calls of `start` that have not returned
        self._drained: asyncio.Future[None] = loop.create_future()
        self._leaving: asyncio.Task[None] | None = None  # the tear-downs
        self._torn_down: asyncio.Future[None] = loop.create_future()
        self._ending: asyncio.Task[None] | None = None
        self.ended: asyncio.Future[None] = loop.create_future()

    def add(self, item: Any, future: asyncio.Future[Any], timeout: float | None = None) -> int:
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
        if timeout is not None or self.watches:
            self.watch(future, ticket, timeout)
        if self.forming.wake is not self.timer_for:
            self.attend()
        return ticket

    def wait_for_room(self, item: Any, future: asyncio.Future[Any]) -> Place:
        """Have an item that the queue has refused wait until there is room.

        Raises:
            QueueFullException: It is not to wait.
            BatchTimeoutError: Every slot is lost.
            BatcherStoppedError: The batcher takes no more.
        """
        if not self._may_wait_for_room or self.closing or self.forming.is_stalled:
            raise self.refusal()
        place = Place(item, future)
        self._line.join(place)
        return place

    def add_many(self, items: list[Any], bulk: Bulk, timeout: float | None = None, *, may_wait: bool | None = None) -> None:
        """Take all items of a bulk, or none, or have them wait until there is room.

        Args:
            items: They, one at least.
            bulk: Who waits for them.
            timeout: As for `watch`.
            may_wait: Whether they may wait; None: as single items do.

        Raises:
            QueueFullException: There is no room for all of them, and they are not to wait.
            BatchTimeoutError: Every slot is lost.
            BatcherStoppedError: The batcher takes no more.
        """
        now = self._time()
        share = Share(bulk, 0, len(items))
        if not enter_many(self.forming, now, items, share):
            waits = self._may_wait_for_room if may_wait is None else may_wait
            if not waits or self.closing or self.forming.is_stalled:
                raise self.refusal(len(items))
            bulk.place = SharedPlace(items, share)
            self._line.join(bulk.place)
            self._line.let_in(now)
        if timeout is not None or self.watches:
            self.watch(bulk, bulk, timeout)
        if self.forming.wake is not self.timer_for:
            self.attend()

    def flush(self) -> None:
        """What waits now, in the queue or for room, need not wait for more."""
        self.forming.flush()
        self._line.flush()
        if self.forming.wake is not self.timer_for:
            self.attend()

    def watch(self, future: asyncio.Future[Any] | Bulk, ticket: Ticket, timeout: float | None) -> None:
        """Give the waiter of that ticket so many seconds (None: as many as all have), and note the span that he is in."""
        if self._tracer is not None:
            self._tracer.called(future)
        seconds = self._item_timeout if timeout is None else timeout
        if seconds is not None:
            self._deadlines.add(self._time() + seconds, (future, ticket, seconds))
            self._set_expiry()

    def refusal(self, size: int = 1) -> Exception:
        """What to raise when the queue has refused an item, or so many at once."""
        if self.closing:
            return BatcherStoppedError(_STOPPED)
        if self.forming.is_stalled:
            return BatchTimeoutError(_STALLED)
        self.tally.refused += size
        waiting = self.forming.waiting
        if size == 1:
            msg = f"{waiting} items wait already, as many as max_queue_size allows; try again later, or raise it"
        else:
            msg = (
                f"{waiting} items wait already, and {size} more are more than max_queue_size allows; try again later, raise it, "
                "call with fewer items, or let calls wait for room: when_full='wait'"
            )
        return QueueFullException(msg)

    def attend(self) -> None:
        """The queue's `wake` has changed: let a batch leave that is full, and set the timer."""
        self._attend(AT_ONCE, self._time())

    def submit(self, item: Any, timeout: float | None = None) -> Submitted:
        """Take an item; its future leaves the queue by itself when it is cancelled."""
        future = Submitted(loop=self.loop)
        future.session = self
        future.ticket = self.add(item, future, timeout)
        return future

    def leave(self, ticket: Ticket, future: asyncio.Future[Any]) -> None:
        """The waiter of that ticket has gone: its item is not run if it still waits, and its future wants no answer."""
        if self.loop.is_closed():
            return
        if not future.done():
            future.cancel()
        if not future.cancelled():  # its answer has come just before, or its time was over
            return
        self.tally.cancelled += 1
        if self._take_out(ticket):
            self._note_room()
        else:
            self.batches.note_gone(future)
        self._note_drained()

    def leave_many(self, bulks: Collection[Bulk]) -> None:
        """Who waited for these has gone; see `leave`."""
        if self.loop.is_closed():
            return
        self.tally.cancelled += sum(bulk.abandon() for bulk in bulks)
        were_waiting = [self._take_out(bulk) for bulk in bulks]  # all, before a batch of one ends and makes room for another
        if any(were_waiting):
            self._note_room()
        for bulk in bulks:
            self.batches.note_gone(bulk)
        self._note_drained()

    def runs_in(self, task: asyncio.Task[Any] | None) -> bool:
        """Whether ``task`` is one of its own batches."""
        return self.batches.runner.runs_in(task)

    def stats(self) -> Stats:
        """What it does, and has done."""
        return self.tally.stats(
            queued=self.forming.waiting,
            waiting_for_room=len(self._line),
            running=self.batches.items,
            workers=self.batches.runner.workers(),
        )

    def hold(self) -> None:
        """Dispatch nothing before `use`: where batches run is not known yet."""
        self.forming.widen(concurrency=1, workers=1)
        self.forming.reserve()

    def use(self, runner: Runner, *, concurrency: int, workers: int) -> None:
        """Dispatch what was held to a runner."""
        self.batches.runner = runner
        self.forming.widen(concurrency=concurrency, workers=workers)
        now = self._time()
        self.forming.release(now)
        self._attend(now, now)
        self._note_drained()

    def refuse(self, error: BaseException) -> None:
        """Fail everything, since nothing that was held can run; take no more."""
        self.closing = True
        self.forming.close()
        self._clear_queues(error)
        now = self._time()
        self._set_timer(now)
        self._expire(now)
        if not self._drained.done():
            self._drained.set_result(None)
        if not self.ended.done():
            self.ended.set_result(None)

    def is_open(self) -> bool:
        """Whether it takes items, in this process."""
        return not self.closing and not self.loop.is_closed() and self.pid == os.getpid()

    def resize(self, *, max_batch_size: int, max_queue_time: float) -> None:
        """Change the limits of the batches that have not left yet."""
        self.forming.resize(max_batch_size=max_batch_size, max_queue_time=max_queue_time)
        if not self.loop.is_closed():
            self._attend(AT_ONCE, self._time())

    # What its batches tell.

    def on_ended(self, now: float, *, was_lost: bool) -> None:
        """A batch has ended, and its slot is free."""
        self.forming.release(now, was_lost=was_lost)
        self._attend(now, now)
        if self._expiry is not None and not self.batches and not self.forming.waiting:
            self._expire(now)  # nobody waits: no timer is to wake an idle program
        self._note_drained()

    def on_lost(self) -> None:
        """A batch has run out of its time and runs on: its slot is lost until it ends."""
        self.forming.lose()
        if self.forming.is_stalled:
            self._clear_queues(BatchTimeoutError(_STALLED))
        self._attend(AT_ONCE, self._time())

    def on_cancelled(self) -> BaseException | None:
        """A batch was cancelled by somebody else: if every task of the loop was, the program ends, and nothing more is begun."""
        if not all(task.cancelling() for task in asyncio.all_tasks(self.loop)):  # as `asyncio.run` does at its end
            return None
        self.closing = True
        self._abort()
        return BatcherStoppedError(_CUT_OFF)

    # Its life.

    async def start(self) -> None:
        """Get the runner ready; see `Runner.start`."""
        self._starts += 1
        try:
            await self.batches.runner.start()
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
        until = self._time() + (timeout or 0.0)
        task = asyncio.current_task()
        if self.runs_in(task):
            self.batches.runner.spare(task)  # by force: it cannot wait for itself
        try:
            if force:
                self._abort()
            else:
                self._clear_line(BatcherStoppedError(_STOPPED))
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
            if not expired and timeout is not None and self.batches.runner.tears_down:
                await asyncio.wait([self._torn_down], timeout=max(0.0, until - self._time()))
                if not self._torn_down.done():
                    expired = True
                    self._abort()
            await asyncio.shield(self._ending)
        except asyncio.CancelledError:
            await self._end_forced()
            raise
        if expired:
            msg = f"the batcher did not come to its end within {timeout} seconds; it has been stopped by force"
            raise TimeoutError(msg)

    def abandon(self) -> None:
        """The loop has closed without `close`."""
        self.closing = self._settling.is_forced = True
        self.forming.close()
        if self.pid == os.getpid():
            self.batches.runner.abandon()

    async def _end(self) -> None:
        try:
            if not self._settling.is_forced and self.batches.runner.tears_down:
                self._leaving = self.loop.create_task(self.batches.runner.leave(), context=self._context.copy())
                await asyncio.wait([self._leaving])
            if not self._torn_down.done():
                self._torn_down.set_result(None)
            await self.batches.runner.close(kill=self._settling.is_forced)
        finally:
            if self._expiry is not None:
                self._expiry.cancel()
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
        self._settling.is_forced = True
        if self._leaving is not None:
            self._leaving.cancel()  # a tear-down that takes too long is not waited for
        self.forming.close()
        error = BatcherStoppedError(_CUT_OFF)
        self._clear_queues(error)
        self.batches.fail_all(error)
        self._set_timer(self._time())
        if not self._drained.done():
            self._drained.set_result(None)

    def _attend(self, until: float, now: float) -> None:
        """Let the batches leave that are due by ``until``, then set the timer."""
        if self._attending:
            return  # the call that is under way will see to it
        self._attending = True
        try:
            if self._deadlines.next <= now:
                self._expire(now)
            batches = self.batches
            if batches.has_reruns:
                batches.run_again(until)
            while True:
                if self._line:
                    self._line.let_in(now)
                batch = self.forming.take(until)
                if batch is None:
                    break
                batches.launch(*batch)
                if batches.has_reruns:
                    batches.run_again(until)
        finally:
            self._attending = False
            self._set_timer(now)

    def _clear_queues(self, error: BaseException) -> None:
        """Nothing that waits is run any more."""
        _, waiters = self.forming.clear()
        waiting = list(dict.fromkeys(waiters))  # a share is there once for each of its items
        self._settling.fail([*waiting, *self.batches.give_up_reruns()], error)
        self._clear_line(error)

    def _clear_line(self, error: BaseException) -> None:
        """Nobody gets room any more."""
        self._settling.fail(self._line.clear(), error)

    def _take_out(self, ticket: Ticket) -> bool:
        """Take an item, or what is left of a bulk, out of the line, or of the queue; says whether it was in either."""
        if isinstance(ticket, Bulk):
            shares, ticket.queued = ticket.queued, set()
            place, ticket.place = ticket.place, None
            for share in shares:
                self.forming.discard_many(share.ticket, share.size)
            was_in_line = place is not None and self._line.leave(place)
            return was_in_line or bool(shares)
        if not isinstance(ticket, Place):
            return self.forming.discard(ticket)
        if ticket.ticket is not None:
            return self.forming.discard(ticket.ticket)
        return self._line.leave(ticket)

    def _note_room(self) -> None:
        """Something has left the queue without being run."""
        now = self._time()
        if self._line:
            self._attend(AT_ONCE, now)
        else:
            self._set_timer(now)

    def _expire(self, now: float) -> None:
        """The time of some is over."""
        gone: list[asyncio.Future[Any] | Bulk] = []
        for future, ticket, seconds in self._deadlines.expire(now):
            was_waiting = self._take_out(ticket)
            if isinstance(future, Bulk):
                what, where = f"{future.left} of {len(future.answers)} items", "those that were still queued are never run"
            else:
                what = "the item"
                where = "it was still queued, and is never run" if was_waiting else "its batch was still running"
            self.tally.expired += self._settling.settle(
                [future], ItemTimeoutError(f"{what} had no result within {seconds} seconds: {where}")
            )
            if isinstance(future, Bulk) or not was_waiting:
                gone.append(future)
        for future in gone:
            self.batches.note_gone(future)
        self._set_expiry()

    def _set_expiry(self) -> None:
        when = self._deadlines.next
        if self._expiry is not None:
            if self._expiry_for <= when != math.inf:
                return
            self._expiry.cancel()
            self._expiry = None
        if when != math.inf:
            self._expiry_for = when
            self._expiry = self.loop.call_at(
                min(when, self._time() + _LONGEST_TIMER), self._on_expiry, when, context=self._context
            )

    def _on_expiry(self, when: float) -> None:
        self._expiry = None
        now = self._time()
        if now < when <= now + _EARLY:
            now = when  # a timer that fires a little early counts as due
        self._attend(AT_ONCE, now)
        self._set_expiry()
        self._note_drained()

    def _drop(self, bulk: Bulk) -> None:
        """A bulk is over, for its first failure was that of all: what has not begun of it need not."""
        self._take_out(bulk)
        self.batches.note_gone(bulk, ends=False)

    def _note_drained(self) -> None:
        if not self.closing or self._drained.done():
            return
        if not (self.batches or self.batches.has_reruns or self._starts or self.forming.waiting):
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
            self.session.leave(self.ticket, self)
        return cancelled
