"""Batches from dispatch to delivery, and the reruns of failed ones.

::

    dispatch(batch) --> runner.submit --> _on_outcome --> Delivery --> futures of the callers
        ^               |                   |     |
        |               `--> _on_results: the same with results that it yields before its end
        |                                   |     |
        |                                   |     `--> tracer, recorder, log; the slot is released
        `-- dispatch_reruns <-- FailureIsolator, if it failed

Rules:

- Callers are resolved and the slot is released with any outcome, and after any internal error.
- Observers (tracer, ``on_batch``, log) come after the callers.
- A batch without callers is cancelled if it has not started; with ``cancel_abandoned``, also if it
  has.
"""

from __future__ import annotations

import asyncio
import logging
from functools import partial
from math import inf
from typing import TYPE_CHECKING, Any

from async_batcher._batching.batch import Batch
from async_batcher._batching.bulk.slices import Slice
from async_batcher._batching.failures.isolation import (
    FailedBatch,
    FailureIsolator,
    budget_exhausted_error,
    is_retryable,
)
from async_batcher._runners.base import BatchNotStartedError
from async_batcher._serialization.caller_exceptions import CallerExceptions
from async_batcher._serialization.exception_text import counted, one_line, qualified_name
from async_batcher._worker.results import PartialOutcome
from async_batcher.exceptions import BatchError, BatchTimeoutError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextvars import Context

    from async_batcher._batching.batch import Entry, ItemFuture
    from async_batcher._batching.bulk.slices import BulkFuture
    from async_batcher._batching.delivery import Delivery
    from async_batcher._batching.scheduler import Scheduler
    from async_batcher._runners.base import Runner
    from async_batcher._worker.results import Outcome
    from async_batcher.integrations.opentelemetry import BatchTracer

logger = logging.getLogger("async_batcher")


class InFlightBatches:
    """The running batches of one batcher.

    Args:
        scheduler: Released slots are reported to it.
        runner: Where batches run.
        delivery: Resolves the callers.
        context: What callbacks on the loop run in.
        isolates_failures: Whether failed batches are split.
        cancels_abandoned: Whether a running batch without callers is cancelled.
        tracer: Makes a span for each batch.

    Attributes:
        isolator: Of failures, if the batcher isolates them; true while a rerun waits.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        delivery: Delivery,
        context: Context,
        *,
        isolates_failures: bool,
        cancels_abandoned: bool,
        tracer: BatchTracer | None,
    ) -> None:
        self.runner = runner
        self._scheduler = scheduler
        self._queue = scheduler.queue
        self._recorder = scheduler.recorder
        self._time = scheduler.loop.time
        self._delivery = delivery
        self._context = context
        self._cancels_abandoned = cancels_abandoned
        self.tracer = tracer
        self.isolator: FailureIsolator[Entry] | None = None
        if isolates_failures:
            self.isolator = FailureIsolator(
                lambda entry: entry[1].done(), crash_times=runner.crash_times
            )
        # By number, so that a callback of the runner holds no batch: a batch leads to exceptions,
        # and they to the callback.
        self._running: dict[int, Batch[Any, Any]] = {}
        self._count = 0
        # Callers of running batches that were cancelled, timed out or failed, and whether a batch
        # without others is cancelled if it has started.
        self._gone_callers: dict[asyncio.Future[Any] | BulkFuture, bool] = {}

    def __bool__(self) -> bool:
        return bool(self._running)

    @property
    def pending_items(self) -> int:
        """Items with a caller that have been dispatched, or wait to run again."""
        reruns = 0 if self.isolator is None else self.isolator.pending_items
        batches = list(self._running.values())  # other threads may ask, too
        return sum(batch.pending_items for batch in batches) + reruns

    @property
    def waiting_items(self) -> int:
        """Those of them whose batch waits for a worker, or at one."""
        return sum(
            batch.pending_items
            for batch in list(self._running.values())
            if batch.handle is not None and batch.handle.is_waiting
        )

    def dispatch(self, batch: Batch[Any, Any]) -> None:
        """Run a batch, which has a slot."""
        number = self._count = self._count + 1
        batch.started_at = self._time()
        if batch.has_slices:
            batch.merge_slices()
        if self.isolator is not None:
            batch.kept_items = batch.items.copy()
        self._recorder.batch_started(batch)
        self._running[number] = batch
        if self.tracer is not None:
            batch.span = self.tracer.start_span(batch.reason, batch.size, batch.callers())
        try:
            batch.handle = self.runner.submit(
                batch.items,
                partial(self._on_outcome, number),
                partial(self._on_timeout, number),
                batch.has_callers,
                partial(self._on_results, number),
            )
        except BaseException as exc:  # Ctrl-C, or no memory
            self._on_outcome(number, exc)
            if not isinstance(exc, Exception):
                raise

    def dispatch_reruns(self, until: float) -> None:
        """Run failed batches again in free slots, in turn with batches due by ``until``."""
        isolator, queue = self.isolator, self._queue
        while isolator and queue.may_dispatch_full:
            rerun = isolator.next_rerun(new_batch_is_due=queue.next_wakeup <= until)
            if rerun is None:
                return
            queue.acquire_slot()
            items = [item for item, _ in rerun.entries]
            futures = [future for _, future in rerun.entries]
            batch: Batch[Any, Any] = Batch(items, futures, [], "isolation", rerun)
            batch.has_slices = any(type(future) is Slice for future in futures)
            self.dispatch(batch)

    def cancel_reruns(self) -> Sequence[ItemFuture]:
        """Forget all reruns that wait, and return their futures."""
        return [] if self.isolator is None else [future for _, future in self.isolator.clear()]

    def fail_all(self, error: BaseException) -> None:
        """Fail the callers of all running batches."""
        for batch in self._running.values():
            self._delivery.fail(batch.futures, error)

    def on_caller_gone(
        self, future: asyncio.Future[Any] | BulkFuture, *, cancels_started: bool | None = None
    ) -> None:
        """Record a caller that was cancelled, timed out or failed.

        Batches left without callers are cancelled in the next loop iteration.

        Args:
            future: The caller's.
            cancels_started: Whether such a batch is cancelled if it has started. None: with
                ``cancel_abandoned``.
        """
        # One look at the batches for all callers of a loop iteration.
        if not self._gone_callers:
            self._scheduler.loop.call_soon(self._cancel_abandoned, context=self._context)
        if cancels_started is None:
            cancels_started = self._cancels_abandoned
        self._gone_callers[future] = cancels_started

    def _cancel_abandoned(self) -> None:
        gone, self._gone_callers = self._gone_callers, {}
        for batch in list(self._running.values()):
            if batch.handle is None or batch.cancelling or batch.has_callers():
                continue
            asked = [gone[future] for future in batch.callers() if future in gone]
            if asked:
                batch.cancelling = True
                batch.handle.cancel(force=any(asked))
                # With False only an unstarted batch was cancelled; a started one goes on.
                batch.cancelling = any(asked)

    def _on_timeout(self, number: int, error: BatchTimeoutError) -> None:
        """Fail the callers of a batch that timed out and runs on; it keeps its slot."""
        batch = self._running[number]
        if self._delivery.stopping:
            return  # the callers have been failed
        futures, batch.futures = batch.futures, []
        batch.slot_leaked = True
        if batch.rerun is not None and self.isolator is not None:  # now: it may never return
            self.isolator.finished(batch.rerun)
            batch.rerun = None
        self._delivery.fail(futures, error, batch_size=batch.size)
        self._scheduler.on_slot_leaked()
        self._log_failure(batch, error)

    def _on_results(self, number: int, results: list[Any]) -> None:
        """Deliver results of the next items of a batch that runs on."""
        batch = self._running.get(number)
        if batch is None or batch.slot_leaked:  # the callers have been failed
            return
        early = batch.early
        if early is None:
            exceptions = CallerExceptions(size=batch.size, function=self._delivery.name)
            early = batch.begin_early(exceptions)
        futures = batch.futures[early.size : early.size + len(results)]
        early.failed += self._deliver(batch, futures, results)
        batch.drop_delivered(early, len(results))
        if early.size < batch.size and not batch.has_callers():
            self.on_caller_gone(batch.callers()[-1])

    def _on_outcome(self, number: int, outcome: Outcome) -> None:
        batch = self._running.pop(number, None)
        if batch is None:  # its submission failed, and it finished all the same
            return
        now = self._time()
        has_run = True
        if batch.handle is not None and (began_at := batch.handle.began_at):
            has_run = began_at < inf  # else it was taken back before
            batch.started_at = min(began_at, now)
        try:
            if isinstance(outcome, asyncio.CancelledError) and not batch.cancelling:
                outcome = self._scheduler.abort_if_loop_is_ending() or outcome
            if self.isolator is not None and batch.rerun is not None:
                self.isolator.finished(batch.rerun)
            error = outcome if isinstance(outcome, BaseException) else None
            if self.isolator is not None and isinstance(outcome, PartialOutcome):
                error = outcome.error
            early, futures, failed = batch.early, batch.futures, 0
            if early is not None:
                futures, failed = futures[early.size :], early.failed
            if not batch.slot_leaked:
                failed += self._deliver(batch, futures, outcome)
            if self.tracer is not None:
                self.tracer.end_span(batch.span, error)
            self._recorder.batch_finished(batch, failed, error, now, has_run=has_run)
            if error is not None or batch.rerun is not None:
                self._log_end(batch, error)
        finally:  # also after Ctrl-C, or what on_batch or a log filter raises
            self._scheduler.on_batch_finished(now, leaked=batch.slot_leaked)

    def _deliver(
        self, batch: Batch[Any, Any], futures: Sequence[ItemFuture], outcome: Outcome
    ) -> int:
        """Deliver, or split a failed batch; return how many items failed for their callers.

        If that raises, the callers of the batch that have no result yet fail.
        """
        try:
            if isinstance(outcome, BaseException):
                return self._split_or_fail(batch, outcome)
            if (
                self.isolator is not None
                and isinstance(outcome, PartialOutcome)
                and len(batch.entries()) > 1
            ):
                return self._split_or_fail(batch, outcome.error)
            return self._delivery.deliver(
                futures, outcome, has_slices=batch.has_slices, early=batch.early
            )
        except BaseException as exc:
            msg = f"the outcome of process_batch cannot be delivered: {one_line(exc)}"
            error = BatchError(msg, original_type=qualified_name(exc))
            failed = self._delivery.fail(batch.futures, error, batch_size=batch.size)
            if not isinstance(exc, Exception):
                raise
            logger.exception(
                "%s: the outcome of a batch of %s cannot be delivered",
                self._delivery.name,
                counted(batch.size, "item"),
            )
            return failed

    def _split_or_fail(self, batch: Batch[Any, Any], error: BaseException) -> int:
        """Run a failed batch again in halves, or fail its callers; return how many failed."""
        fail = self._delivery.fail
        isolator = self.isolator
        if (
            isolator is None
            or self._delivery.stopping
            or not is_retryable(error, on_loop=self.runner.runs_on_loop)
        ):
            return fail(batch.futures, error, batch_size=batch.size)
        entries = batch.entries()
        if not entries:
            return 0
        rerun = batch.rerun
        failed_batch = FailedBatch(len(entries)) if rerun is None else rerun.failed_batch
        why = isolator.split(entries, failed_batch, self._time(), error)
        if why is None:
            return 0
        if not why:  # one item; it has its place among all of the batch
            return fail(batch.futures, error, batch_size=batch.size)
        entries += isolator.abandon(failed_batch)
        futures = [future for _, future in entries]
        return fail(futures, budget_exhausted_error(error, why))

    def _log_end(self, batch: Batch[Any, Any], error: BaseException | None) -> None:
        """Log a batch that failed, or the last rerun of one."""
        if self._delivery.stopping:
            return
        if batch.rerun is None:
            if error is not None and not (batch.cancelling or batch.slot_leaked):
                self._log_failure(batch, error)
        elif not batch.rerun.failed_batch.pending:
            of_batch = batch.rerun.failed_batch
            logger.error(
                "%s: of a failed batch of %s, %d failed alone, in %s",
                self._delivery.name,
                counted(of_batch.size, "item"),
                of_batch.failed_items,
                counted(of_batch.reruns, "rerun"),
            )

    def _log_failure(self, batch: Batch[Any, Any], error: BaseException) -> None:
        if not isinstance(error, BatchNotStartedError):
            when = "" if batch.early is None else f" after {batch.early.size} of its results"
            logger.error(
                "%s: a batch of %s failed%s: %s",
                self._delivery.name,
                counted(batch.size, "item"),
                when,
                one_line(error),
            )
