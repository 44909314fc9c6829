"""The batches of a session from when they leave the queue until they have ended, and what is run again.

::

    launch(items, futures) --> runner.run(batch, done) --> _finished --> Settling --> the futures
        ^                                                      |    `--> tracer, tally, log     `--> Owner.on_ended
        `-- run_again -- Recovery <--- it has failed, in halves'

Rules:

- Whatever comes of a batch, or is raised on the way, its waiters are told and its slot is given back.
- What watches (a tracer, the user's callback, his log) is told after those who wait.
- A batch that only those waited for who have gone is ended, if it has not begun; if abandoned ones are, also if it has.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any, Protocol

from async_batcher._batching.batch import Run
from async_batcher._batching.bulk import Share, cut_shares
from async_batcher._batching.failure_kinds import given_up, has_died, is_costly, is_items_fault
from async_batcher._batching.isolation import Case, Recovery
from async_batcher._runners.base import NotBegunError
from async_batcher._serialization.exception_text import describe, qualified_name
from async_batcher.exceptions import BatchError, BatchTimeoutError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextvars import Context

    from async_batcher._batching.batch import Entry, InBatch
    from async_batcher._batching.bulk import Bulk
    from async_batcher._batching.delivery import Settling
    from async_batcher._batching.isolation import Rerun
    from async_batcher._batching.queue import Forming
    from async_batcher._batching.recorder import Tally
    from async_batcher._runners.base import Runner
    from async_batcher._worker.results import Outcome
    from async_batcher.integrations.opentelemetry import BatchTracer
    from async_batcher.stats import Reason

logger = logging.getLogger("async_batcher")


class Owner(Protocol):
    """Whose batches they are."""

    def on_ended(self, now: float, *, was_lost: bool) -> None:
        """A batch has ended, and its slot is free."""

    def on_lost(self) -> None:
        """A batch has run out of its time and runs on: its slot is lost until it ends."""

    def on_cancelled(self) -> BaseException | None:
        """A batch was cancelled by somebody else; says what those get who wait for it, if that is known better here."""


class Batches:
    """The batches that run.

    Args:
        loop: The loop that they are told of on.
        forming: The queue that they leave.
        runner: Where they run.
        settling: Tells those who wait.
        tally: What they are counted in.
        context: What its callbacks run in.
        owner: Who is told when a slot is free, or lost.
        isolates: Whether one that fails is run again in parts.
        ends_abandoned: Whether one whose waiters have all gone is ended.
        tracer: Makes a span of each.

    Attributes:
        runner: See above.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        forming: Forming[Any, Any],
        runner: Runner,
        settling: Settling,
        tally: Tally,
        context: Context,
        owner: Owner,
        *,
        isolates: bool,
        ends_abandoned: bool,
        tracer: BatchTracer | None,
    ) -> None:
        self.runner = runner
        self._loop = loop
        self._time = loop.time
        self._forming = forming
        self._settling = settling
        self._tally = tally
        self._context = context
        self._owner = owner
        self._ends_abandoned = ends_abandoned
        self._tracer = tracer
        self._recovery: Recovery[Entry] | None = None
        if isolates:
            self._recovery = Recovery(lambda entry: entry[1].done(), spent=runner.spent)
        self._running: dict[int, Run] = {}
        self._count = 0
        self._gone: dict[asyncio.Future[Any] | Bulk, bool] = {}  # who has left a batch that runs, and whether that is to end it

    def __bool__(self) -> bool:
        """Whether one runs."""
        return bool(self._running)

    @property
    def has_reruns(self) -> bool:
        """Whether something waits to be run again."""
        return self._recovery is not None and bool(self._recovery.waiting)

    @property
    def items(self) -> int:
        """Items that run, or wait to be run again, and that somebody waits for."""
        again = 0 if self._recovery is None else self._recovery.entries
        return sum(run.waited_for for run in self._running.values()) + again

    def launch(self, items: list[Any], futures: list[InBatch], rerun: Rerun[Entry] | None = None) -> None:
        """Run a batch, which has a slot."""
        forming = self._forming
        if rerun is None and forming.has_many:
            futures = cut_shares(futures)
        number = self._count = self._count + 1
        now = self._time()
        reason: Reason = forming.reason if rerun is None else "isolation"
        arrivals = forming.arrivals if rerun is None else []
        self._tally.left(reason, len(items), arrivals, now)
        kept = None if self._recovery is None else items.copy()  # the user's code may use up its list
        queue_time = now - arrivals[0] if arrivals else 0.0
        run = Run(futures, len(items), kept, rerun, reason, queue_time, now)
        run.has_shares = (rerun is not None or forming.has_many) and any(type(future) is Share for future in futures)
        self._running[number] = run
        if self._tracer is not None:
            run.span = self._tracer.begin(reason, run.size, run.waiters())
        try:
            run.end = self.runner.run(
                items,
                lambda outcome: self._finished(number, outcome),
                lambda error: self._ran_out_of_time(number, error),
                run.is_wanted,
            )
        except BaseException as exc:  # Ctrl-C, or no memory: its callers are not to wait for a batch that never left
            self._finished(number, exc)
            if not isinstance(exc, Exception):
                raise

    def run_again(self, until: float) -> None:
        """Give what is to be run again the slots that are free, but for the turns of fresh batches that are due by ``until``."""
        recovery, forming = self._recovery, self._forming
        while recovery is not None and recovery.waiting and forming.has_slot:
            wake = forming.wake
            rerun = recovery.take(is_fresh_due=wake is not None and wake <= until)
            if rerun is None:
                return
            forming.reserve()
            self.launch([item for item, _ in rerun.entries], [future for _, future in rerun.entries], rerun)

    def give_up_reruns(self) -> Sequence[InBatch]:
        """Nothing is run again; those who wait for it are no longer theirs."""
        return [] if self._recovery is None else [future for _, future in self._recovery.clear()]

    def fail_all(self, error: BaseException) -> None:
        """Nobody waits for the end of a batch any more."""
        for run in self._running.values():
            self._settling.fail(run.futures, error)

    def note_gone(self, waiter: asyncio.Future[Any] | Bulk, *, ends: bool | None = None) -> None:
        """Somebody who waited for items of batches that run has gone: where he was the last, they need not be run.

        Args:
            waiter: He.
            ends: Whether such a batch is ended if it has begun; None: if abandoned ones are.
        """
        if not self._gone:  # one look for all that go in a turn, or it takes them long who are many
            self._loop.call_soon(self._end_unwanted, context=self._context)
        self._gone[waiter] = self._ends_abandoned if ends is None else ends

    def _end_unwanted(self) -> None:
        """End the batches that nobody but those who have gone waited for."""
        gone, self._gone = self._gone, {}
        for run in list(self._running.values()):
            if run.end is None or run.is_ending or run.is_wanted():
                continue
            asked = [gone[waiter] for waiter in run.waiters() if waiter in gone]
            if asked:
                run.is_ending = True
                run.end(any(asked))
                run.is_ending = any(asked)  # else it had not begun and has ended, or goes on

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
        self._settling.fail(futures, error, size=run.size)
        self._owner.on_lost()
        logger.error("A batch of %d items failed: %s", run.size, qualified_name(error))

    def _finished(self, number: int, outcome: Outcome) -> None:
        run = self._running.pop(number, None)
        if run is None:  # its trip has failed, and has come to an end all the same
            return
        now = self._time()
        try:
            if isinstance(outcome, asyncio.CancelledError) and not run.is_ending:
                outcome = self._owner.on_cancelled() or outcome
            if self._recovery is not None and run.rerun is not None:
                self._recovery.ended(run.rerun)
            failed = 0 if run.is_lost else self._hand_out(run, outcome, now)
            self._report(run, outcome, failed, now)
        finally:  # Ctrl-C, or what the user's callback or a filter of his log lets through
            self._owner.on_ended(now, was_lost=run.is_lost)

    def _hand_out(self, run: Run, outcome: Outcome, now: float) -> int:
        """See `_answer`; whatever goes wrong there, nobody is left to wait."""
        try:
            return self._answer(run, outcome, now)
        except BaseException as exc:
            msg = f"what process_batch returned or raised cannot be handed out: {describe(exc)}"
            failed = self._settling.fail(run.futures, BatchError(msg, original_type=qualified_name(exc)), size=run.size)
            if not isinstance(exc, Exception):
                raise
            logger.exception("What came of a batch of %d items cannot be handed out", run.size)
            return failed

    def _report(self, run: Run, outcome: Outcome, failed: int, now: float) -> None:
        """Those who wait have been told; now tell those who watch."""
        error = outcome if isinstance(outcome, BaseException) else None
        if self._tracer is not None:
            self._tracer.end(run.span, error)
        self._tally.ended(run.reason, run.size, run.queue_time, now - run.began, failed, error)
        if self._settling.is_forced:
            return
        if run.rerun is None:
            if error is not None and not run.is_ending and not run.is_lost and not isinstance(error, NotBegunError):
                logger.error("A batch of %d items failed: %s", run.size, qualified_name(error))
        elif not run.rerun.case.pending:
            case = run.rerun.case
            logger.error("Of a batch of %d items that failed, %d failed alone, in %d reruns", case.size, case.guilty, case.reruns)

    def _answer(self, run: Run, outcome: Outcome, now: float) -> int:
        """Tell those who wait for a batch what came of it, or have it run again in parts.

        Returns:
            How many of them got an error.
        """
        if not isinstance(outcome, BaseException):
            return self._settling.fail(run.futures, outcome, size=run.size, has_shares=run.has_shares)
        if (
            self._recovery is None
            or run.items is None
            or self._settling.is_forced
            or not is_items_fault(outcome, on_loop=self.runner.is_on_loop)
        ):
            return self._settling.fail(run.futures, outcome, size=run.size)
        entries = run.entries()
        return self._recover(self._recovery, run, entries, outcome, now) if entries else 0

    def _recover(self, recovery: Recovery[Entry], run: Run, entries: list[Entry], error: BaseException, now: float) -> int:
        """Handle the failure of a batch, or of a part of one that was run again.

        Returns:
            How many got an error.
        """
        case = Case(len(entries)) if run.rerun is None else run.rerun.case
        why = recovery.failed(entries, case, now, has_died=has_died(error), is_costly=is_costly(error))
        if why is None:
            return 0
        if not why:  # one caller is left, whose item has its place among all of the batch
            return self._settling.fail(run.futures, error, size=run.size)
        futures = [future for _, future in entries]
        futures += [future for _, future in recovery.give_up(case)]
        return self._settling.fail(futures, given_up(error, why))
