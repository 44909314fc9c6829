"""The batches of a session from when they leave the queue until they have ended, and what is run again.

::

    dispatch(items, futures) --> runner.submit(batch, done) --> _on_outcome --> Delivery --> the futures
        ^                                                          |    |
        |                                                          |    `--> tracer, recorder, log, on_batch_finished
        `-- dispatch_reruns -- FailureIsolator <-- it has failed --'

Rules:

- Whatever comes of a batch, or is raised on the way, its waiters are told and its slot is given back.
- What watches (a tracer, the user's callback, his log) is told after those who wait.
- A batch that only those waited for who have gone is ended, if it has not begun; if abandoned ones are, also if it has.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any, Protocol

from async_batcher._batching.batch import Batch
from async_batcher._batching.bulk import Slice, merge_into_slices
from async_batcher._batching.failure_kinds import budget_exhausted_error, consumes_budget, is_crash, is_retryable
from async_batcher._batching.isolation import FailedBatch, FailureIsolator
from async_batcher._runners.base import BatchNotStartedError
from async_batcher._serialization.exception_text import one_line, qualified_name
from async_batcher.exceptions import BatchError, BatchTimeoutError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextvars import Context

    from async_batcher._batching.batch import Entry, ItemFuture
    from async_batcher._batching.bulk import BulkFuture
    from async_batcher._batching.delivery import Delivery
    from async_batcher._batching.isolation import Rerun
    from async_batcher._batching.queue import BatchQueue
    from async_batcher._batching.recorder import StatsRecorder
    from async_batcher._runners.base import Runner
    from async_batcher._worker.results import Outcome
    from async_batcher.integrations.opentelemetry import BatchTracer
    from async_batcher.stats import Reason

logger = logging.getLogger("async_batcher")


class InFlightCallbacks(Protocol):
    """Whose batches they are."""

    def on_batch_finished(self, now: float, *, was_lost: bool) -> None:
        """A batch has ended, and its slot is free."""

    def on_slot_leaked(self) -> None:
        """A batch has run out of its time and runs on: its slot is lost until it ends."""

    def on_batch_cancelled(self) -> BaseException | None:
        """A batch was cancelled by somebody else; says what those get who wait for it, if that is known better here."""


class InFlightBatches:
    """The batches that run.

    Args:
        loop: The loop that they are told of on.
        queue: The queue that they leave.
        runner: Where they run.
        delivery: Tells those who wait.
        recorder: What they are counted in.
        context: What its callbacks run in.
        owner: Who is told when a slot is free, or lost.
        isolates: Whether one that fails is run again in parts.
        cancels_abandoned: Whether one whose waiters have all gone is ended.
        tracer: Makes a span of each.

    Attributes:
        runner: See above.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        queue: BatchQueue[Any, Any],
        runner: Runner,
        delivery: Delivery,
        recorder: StatsRecorder,
        context: Context,
        owner: InFlightCallbacks,
        *,
        isolates: bool,
        cancels_abandoned: bool,
        tracer: BatchTracer | None,
    ) -> None:
        self.runner = runner
        self._loop = loop
        self._time = loop.time
        self._queue = queue
        self._delivery = delivery
        self._recorder = recorder
        self._context = context
        self._callbacks = owner
        self._cancels_abandoned = cancels_abandoned
        self._tracer = tracer
        self._isolator: FailureIsolator[Entry] | None = None
        if isolates:
            self._isolator = FailureIsolator(lambda entry: entry[1].done(), spent=runner.spent)
        self._running: dict[int, Batch] = {}
        self._count = 0
        self._cancelled_callers: dict[
            asyncio.Future[Any] | BulkFuture, bool
        ] = {}  # who has left a batch that runs, and whether that is to end it

    def __bool__(self) -> bool:
        """Whether one runs."""
        return bool(self._running)

    @property
    def has_reruns(self) -> bool:
        """Whether something waits to be run again."""
        return self._isolator is not None and bool(self._isolator.waiting)

    @property
    def items(self) -> int:
        """Items that run, or wait to be run again, and that somebody waits for."""
        again = 0 if self._isolator is None else self._isolator.entries
        return sum(run.pending_items for run in self._running.values()) + again

    def dispatch(self, items: list[Any], futures: list[ItemFuture], rerun: Rerun[Entry] | None = None) -> None:
        """Run a batch, which has a slot."""
        queue = self._queue
        if rerun is None and queue.has_many:
            futures = merge_into_slices(futures)
        number = self._count = self._count + 1
        now = self._time()
        reason: Reason = queue.reason if rerun is None else "isolation"
        arrivals = queue.arrivals if rerun is None else []
        self._recorder.batch_started(reason, len(items), arrivals, now)
        kept = None if self._isolator is None else items.copy()  # the user's code may use up its list
        queue_time = now - arrivals[0] if arrivals else 0.0
        run = Batch(futures, len(items), kept, rerun, reason, queue_time, now)
        run.has_slices = (rerun is not None or queue.has_many) and any(type(future) is Slice for future in futures)
        self._running[number] = run
        if self._tracer is not None:
            run.span = self._tracer.start_span(reason, run.size, run.callers())
        try:
            run.cancel = self.runner.submit(
                items,
                lambda outcome: self._on_outcome(number, outcome),
                lambda error: self._on_uncancellable_timeout(number, error),
                run.has_callers,
            )
        except BaseException as exc:  # Ctrl-C, or no memory: its callers are not to wait for a batch that never left
            self._on_outcome(number, exc)
            if not isinstance(exc, Exception):
                raise

    def dispatch_reruns(self, until: float) -> None:
        """Give what is to be run again the slots that are free, but for the turns of fresh batches that are due by ``until``."""
        recovery, queue = self._isolator, self._queue
        while recovery is not None and recovery.waiting and queue.has_slot:
            wake = queue.next_wakeup
            rerun = recovery.next_rerun(is_fresh_due=wake is not None and wake <= until)
            if rerun is None:
                return
            queue.acquire_slot()
            self.dispatch([item for item, _ in rerun.entries], [future for _, future in rerun.entries], rerun)

    def cancel_reruns(self) -> Sequence[ItemFuture]:
        """Nothing is run again; those who wait for it are no longer theirs."""
        return [] if self._isolator is None else [future for _, future in self._isolator.clear()]

    def fail_all(self, error: BaseException) -> None:
        """Nobody waits for the end of a batch any more."""
        for run in self._running.values():
            self._delivery.deliver_and_count(run.futures, error)

    def on_caller_cancelled(self, waiter: asyncio.Future[Any] | BulkFuture, *, ends: bool | None = None) -> None:
        """Somebody who waited for items of batches that run has gone: where he was the last, they need not be run.

        Args:
            waiter: He.
            ends: Whether such a batch is ended if it has begun; None: if abandoned ones are.
        """
        if not self._cancelled_callers:  # one look for all that go in a turn, or it takes them long who are many
            self._loop.call_soon(self._cancel_abandoned, context=self._context)
        self._cancelled_callers[waiter] = self._cancels_abandoned if ends is None else ends

    def _cancel_abandoned(self) -> None:
        """End the batches that nobody but those who have gone waited for."""
        gone, self._cancelled_callers = self._cancelled_callers, {}
        for run in list(self._running.values()):
            if run.cancel is None or run.cancelling or run.has_callers():
                continue
            asked = [gone[waiter] for waiter in run.callers() if waiter in gone]
            if asked:
                run.cancelling = True
                run.cancel(any(asked))
                run.cancelling = any(asked)  # else it had not begun and has ended, or goes on

    def _on_uncancellable_timeout(self, number: int, error: BatchTimeoutError) -> None:
        """A batch takes too long and runs on: its waiters need not wait for its end, its slot must."""
        run = self._running[number]
        if self._delivery.stopping:
            return  # they have been told
        futures, run.futures = run.futures, []
        run.slot_leaked = True
        if run.rerun is not None and self._isolator is not None:  # now: its end may never come
            self._isolator.finished(run.rerun)
            run.rerun = None
        self._delivery.deliver_and_count(futures, error, size=run.size)
        self._callbacks.on_slot_leaked()
        logger.error("A batch of %d items failed: %s", run.size, qualified_name(error))

    def _on_outcome(self, number: int, outcome: Outcome) -> None:
        run = self._running.pop(number, None)
        if run is None:  # its trip has failed, and has come to an end all the same
            return
        now = self._time()
        try:
            if isinstance(outcome, asyncio.CancelledError) and not run.cancelling:
                outcome = self._callbacks.on_batch_cancelled() or outcome
            if self._isolator is not None and run.rerun is not None:
                self._isolator.finished(run.rerun)
            failed = 0 if run.slot_leaked else self._deliver_safely(run, outcome, now)
            self._record(run, outcome, failed, now)
        finally:  # Ctrl-C, or what the user's callback or a filter of his log lets through
            self._callbacks.on_batch_finished(now, was_lost=run.slot_leaked)

    def _deliver_safely(self, run: Batch, outcome: Outcome, now: float) -> int:
        """See `_deliver`; whatever goes wrong there, nobody is left to wait."""
        try:
            return self._deliver(run, outcome, now)
        except BaseException as exc:
            msg = f"what process_batch returned or raised cannot be handed out: {one_line(exc)}"
            failed = self._delivery.deliver_and_count(
                run.futures, BatchError(msg, original_type=qualified_name(exc)), size=run.size
            )
            if not isinstance(exc, Exception):
                raise
            logger.exception("What came of a batch of %d items cannot be handed out", run.size)
            return failed

    def _record(self, run: Batch, outcome: Outcome, failed: int, now: float) -> None:
        """Those who wait have been told; now tell those who watch."""
        error = outcome if isinstance(outcome, BaseException) else None
        if self._tracer is not None:
            self._tracer.end_span(run.span, error)
        self._recorder.batch_finished(run.reason, run.size, run.queue_time, now - run.started_at, failed, error)
        if self._delivery.stopping:
            return
        if run.rerun is None:
            if error is not None and not run.cancelling and not run.slot_leaked and not isinstance(error, BatchNotStartedError):
                logger.error("A batch of %d items failed: %s", run.size, qualified_name(error))
        elif not run.rerun.case.pending:
            case = run.rerun.case
            logger.error("Of a batch of %d items that failed, %d failed alone, in %d reruns", case.size, case.guilty, case.reruns)

    def _deliver(self, run: Batch, outcome: Outcome, now: float) -> int:
        """Tell those who wait for a batch what came of it, or have it run again in parts.

        Returns:
            How many of them got an error.
        """
        if not isinstance(outcome, BaseException):
            return self._delivery.deliver_and_count(run.futures, outcome, size=run.size, has_shares=run.has_slices)
        if (
            self._isolator is None
            or run.items is None
            or self._delivery.stopping
            or not is_retryable(outcome, on_loop=self.runner.runs_on_loop)
        ):
            return self._delivery.deliver_and_count(run.futures, outcome, size=run.size)
        entries = run.entries()
        return self._isolate(self._isolator, run, entries, outcome, now) if entries else 0

    def _isolate(
        self, recovery: FailureIsolator[Entry], run: Batch, entries: list[Entry], error: BaseException, now: float
    ) -> int:
        """Handle the failure of a batch, or of a part of one that was run again.

        Returns:
            How many got an error.
        """
        case = FailedBatch(len(entries)) if run.rerun is None else run.rerun.case
        why = recovery.split(entries, case, now, has_died=is_crash(error), is_costly=consumes_budget(error))
        if why is None:
            return 0
        if not why:  # one caller is left, whose item has its place among all of the batch
            return self._delivery.deliver_and_count(run.futures, error, size=run.size)
        futures = [future for _, future in entries]
        futures += [future for _, future in recovery.abandon(case)]
        return self._delivery.deliver_and_count(futures, budget_exhausted_error(error, why))
