"""One life of a batcher on one event loop, from its first call to its stop: the loop's side of everything.

::

    the line for room
          |  as the queue empties
          v
    add(item, future) --> Forming --take--> runner.run(batch, done) --> _finished --> Settling --> the futures
                            |  ^                  ^                         |             ^
                       wake |  | a timer          `------- Recovery <-------'             | a timer
                            v  |                    a batch that has failed, in halves    |
                          the loop                                                    Deadlines

States: open --close()--> closing (takes no more, runs what waits) --> closed. An abort settles everything at once.

Rules:

- A future is settled in one place, `Settling`. For many items at once a share of a bulk stands in its place (`_many.py`).
- A slot is free when the runner says that the batch has ended, whoever still waits for it.
- Nothing is begun for a waiter that has gone, nor after its deadline, whether a timer was late or not.
- While callers wait for room the queue is full; what is run again never needs room.
- Batches leave only in `_attend`, which never runs inside itself: an eager task or an inline executor may end a batch
  before it has returned.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
from typing import TYPE_CHECKING, Any

from async_batcher._blame import given_up, has_died, is_costly, is_items_fault
from async_batcher._deadlines import Deadlines
from async_batcher._forming import AT_ONCE, Forming
from async_batcher._line import Line, Place, SharedPlace, enter_many
from async_batcher._many import Bulk, Share, cut_shares
from async_batcher._outcome import describe, qualified_name
from async_batcher._recovery import Case, Recovery
from async_batcher._run import Run
from async_batcher._settling import Settling
from async_batcher._waiter import waiters
from async_batcher.exceptions import (
    BatchError,
    BatcherStoppedError,
    BatchTimeoutError,
    ItemTimeoutError,
    QueueFullException,
)

if TYPE_CHECKING:
    from collections.abc import Collection
    from contextvars import Context
    from typing import TypeAlias

    from async_batcher._outcome import Outcome
    from async_batcher._recovery import Rerun
    from async_batcher._run import Entry, InBatch
    from async_batcher._tally import Tally
    from async_batcher.opentelemetry import BatchTracer
    from async_batcher.runners import Runner
    from async_batcher.stats import Reason, Stats

    Ticket: TypeAlias = int | Place | Bulk

logger = logging.getLogger("async_batcher")

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

    Attributes:
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
    ) -> None:
        self.loop = loop
        self.new_waiter = waiters(loop)
        self.pid = os.getpid()
        self.forming = forming
        self.runner = runner
        self.closing = False
        self.tally = tally
        self._settling = Settling(tally, self._drop)
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
        self._recovery: Recovery[Entry] | None = None
        if isolates:
            self._recovery = Recovery(lambda entry: entry[1].done(), spent=runner.spent)
        self._ends_abandoned = ends_abandoned
        self._running: dict[int, Run] = {}
        self._batches = 0
        self._starts = 0  # calls of `start` that have not returned
        self._drained: asyncio.Future[None] = loop.create_future()
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
        if future.cancelled():  # else its answer has come just before
            self.tally.cancelled += 1
        if self._take_out(ticket):
            self._note_room()
        else:
            self._note_gone(future)
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
            self._note_gone(bulk)
        self._note_drained()

    def runs_in(self, task: asyncio.Task[Any] | None) -> bool:
        """Whether ``task`` is one of its own batches."""
        return self.runner.runs_in(task)

    def stats(self) -> Stats:
        """What it does, and has done."""
        running = sum(run.waited_for for run in self._running.values())
        if self._recovery is not None:
            running += self._recovery.entries
        return self.tally.stats(
            queued=self.forming.waiting, waiting_for_room=len(self._line), running=running, workers=self.runner.workers()
        )

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
            self.runner.abandon()

    async def _end(self) -> None:
        try:
            await self.runner.close(kill=self._settling.is_forced)
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
        self.forming.close()
        error = BatcherStoppedError(_CUT_OFF)
        self._clear_queues(error)
        for run in list(self._running.values()):  # one that has not begun may end here, when nobody waits for it any more
            self._settling.fail(run.futures, error)
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
            if self._recovery is not None:
                self._run_again(self._recovery, until)
            while True:
                if self._line:
                    self._line.let_in(now)
                batch = self.forming.take(until)
                if batch is None:
                    break
                self._launch(*batch)
                if self._recovery is not None:
                    self._run_again(self._recovery, until)
        finally:
            self._attending = False
            self._set_timer(now)

    def _run_again(self, recovery: Recovery[Entry], until: float) -> None:
        """Give what is to be run again the slots that are free, but for the turns of fresh batches."""
        while recovery.waiting and self.forming.has_slot:
            wake = self.forming.wake
            rerun = recovery.take(is_fresh_due=wake is not None and wake <= until)
            if rerun is None:
                return
            self.forming.reserve()
            self._launch([item for item, _ in rerun.entries], [future for _, future in rerun.entries], rerun)

    def _clear_queues(self, error: BaseException) -> None:
        """Nothing that waits is run any more."""
        _, waiters = self.forming.clear()
        waiting = list(dict.fromkeys(waiters))  # a share is there once for each of its items
        if self._recovery is not None:
            waiting.extend(future for _, future in self._recovery.clear())
        self._settling.fail(waiting, error)
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

    def _launch(self, items: list[Any], futures: list[InBatch], rerun: Rerun[Entry] | None = None) -> None:
        if rerun is None and self.forming.has_many:
            futures = cut_shares(futures)
        number = self._batches = self._batches + 1
        now = self._time()
        reason: Reason = self.forming.reason if rerun is None else "isolation"
        arrivals = self.forming.arrivals if rerun is None else []
        self.tally.left(reason, len(items), arrivals, now)
        kept = None if self._recovery is None else items.copy()  # the user's code may use up its list
        queue_time = now - arrivals[0] if arrivals else 0.0
        run = Run(futures, len(items), kept, rerun, reason, queue_time, now)
        run.has_shares = (rerun is not None or self.forming.has_many) and any(type(future) is Share for future in futures)
        self._running[number] = run
        if self._tracer is not None:
            run.span = self._tracer.begin(reason, run.size, [f.bulk if type(f) is Share else f for f in futures])
        run.end = self.runner.run(
            items, lambda outcome: self._finished(number, outcome), lambda error: self._ran_out_of_time(number, error)
        )

    def _ran_out_of_time(self, number: int, error: BatchTimeoutError) -> None:
        """A batch takes too long and runs on: its waiters need not wait for its end, its slot must."""
        run = self._running[number]
        if self._settling.is_forced:
            return  # they have been told
        futures, run.futures = run.futures, []
        run.is_lost = True
        if run.rerun is not None and self._recovery is not None:  # now: its end may never come
            self._recovery.ended(run.rerun)
            run.rerun = None
        self._settling.fail(futures, error)
        logger.error("A batch of %d items failed: %s", run.size, qualified_name(error))
        self.forming.lose()
        if self.forming.is_stalled:
            stalled = BatchTimeoutError(_STALLED)
            self._clear_queues(stalled)
        self._attend(AT_ONCE, self._time())

    def _finished(self, number: int, outcome: Outcome) -> None:
        run = self._running.pop(number)
        if isinstance(outcome, asyncio.CancelledError) and not run.is_ending and self._is_program_ending():
            self.closing = True  # nothing more is begun
            self._settling.fail(run.futures, BatcherStoppedError(_CUT_OFF))
            self._abort()
        now = self._time()
        if self._recovery is not None and run.rerun is not None:
            self._recovery.ended(run.rerun)
        try:
            failed = 0 if run.is_lost else self._answer(run, outcome, now)
        except Exception as exc:
            logger.exception("What came of a batch of %d items cannot be handed out", run.size)
            msg = f"what process_batch returned or raised cannot be handed out: {describe(exc)}"
            failed = self._settling.fail(run.futures, BatchError(msg, original_type=qualified_name(exc)))
        if run.rerun is not None and not run.rerun.case.pending and not self._settling.is_forced:
            case = run.rerun.case
            logger.error("Of a batch of %d items that failed, %d failed alone, in %d reruns", case.size, case.guilty, case.reruns)
        try:
            error = outcome if isinstance(outcome, BaseException) else None
            if self._tracer is not None:
                self._tracer.end(run.span, error)
            self.tally.ended(run.reason, run.size, run.queue_time, now - run.began, failed, error)
        finally:  # the user's callback may let through what ends a program
            self.forming.release(now, was_lost=run.is_lost)
            self._attend(now, now)
            if self._expiry is not None and not self._running and not self.forming.waiting:
                self._expire(now)  # nobody waits: no timer is to wake an idle program
            self._note_drained()

    def _answer(self, run: Run, outcome: Outcome, now: float) -> int:
        """Tell those who wait for a batch what came of it, or have it run again in parts.

        Returns:
            How many of them got an error.
        """
        if not isinstance(outcome, BaseException):
            return self._settling.fail(run.futures, outcome, has_shares=run.has_shares)
        if not self._settling.is_forced and not run.is_ending and run.rerun is None:
            logger.error("A batch of %d items failed: %s", run.size, qualified_name(outcome))
        if (
            self._recovery is None
            or run.items is None
            or self._settling.is_forced
            or not is_items_fault(outcome, on_loop=self.runner.is_on_loop)
        ):
            return self._settling.fail(run.futures, outcome)
        entries = run.entries()
        return self._recover(self._recovery, entries, run.rerun, outcome, now) if entries else 0

    def _recover(
        self, recovery: Recovery[Entry], entries: list[Entry], rerun: Rerun[Entry] | None, error: BaseException, now: float
    ) -> int:
        """A batch has failed, or a part of one that was run again.

        Returns:
            How many got an error.
        """
        case = Case(len(entries)) if rerun is None else rerun.case
        why = recovery.failed(entries, case, now, has_died=has_died(error), is_costly=is_costly(error))
        if why is None:
            return 0
        futures = [future for _, future in entries]
        if not why:
            return self._settling.fail(futures, error)
        futures += [future for _, future in recovery.give_up(case)]
        return self._settling.fail(futures, given_up(error, why))

    def _note_gone(self, waiter: asyncio.Future[Any] | Bulk, *, ends: bool | None = None) -> None:
        """Somebody who waited for items of batches that run has gone: where he was the last, they need not be run.

        Args:
            waiter: He.
            ends: Whether such a batch is ended if it has begun; None: if abandoned ones are.
        """
        force = self._ends_abandoned if ends is None else ends
        for run in [run for run in self._running.values() if run.end is not None and run.is_of(waiter)]:
            if run.end is not None and not run.is_ending and not run.waited_for:
                run.is_ending = True
                run.end(force)
                run.is_ending = force  # else it had not begun and has ended, or goes on

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
            self._note_gone(future)
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

    def _is_program_ending(self) -> bool:
        """Whether every task of the loop has been cancelled, as `asyncio.run` does at its end."""
        return all(task.cancelling() for task in asyncio.all_tasks(self.loop))

    def _drop(self, bulk: Bulk) -> None:
        """A bulk is over, for its first failure was that of all: what has not begun of it need not."""
        self._take_out(bulk)
        self._note_gone(bulk, ends=False)

    def _note_drained(self) -> None:
        if not self.closing or self._drained.done():
            return
        if self._running or self._starts or self.forming.waiting:
            return
        if self._recovery is None or not self._recovery.waiting:
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
