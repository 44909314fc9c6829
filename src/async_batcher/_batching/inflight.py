"""Batches from dispatch to delivery, and the reruns of failed ones.

::

    dispatch(batch) --> runner.submit --> _on_outcome --> Delivery --> futures of the callers
        ^               |                   |     |
        |               `--> _on_results: the same with results that it yields before its end
        |                                   |     |
        |                                   |     `--> recorder, log; the slot is released
        `-- dispatch_reruns <-- Recovery, if it failed --> the queue

Rules:

- Callers are resolved and the slot is released with any outcome, and after any internal error.
- Observers (``on_batch``, log) come after the callers, except for the start of a batch.
- A batch without callers is cancelled if it has not started; with ``cancel_abandoned``, also if it
  has. A `Later` that it raises pauses the batcher all the same.
"""

from __future__ import annotations

import asyncio
import logging
from functools import partial
from math import inf
from typing import TYPE_CHECKING, Any

from async_batcher._batching.failures.recovery import Recovery
from async_batcher._batching.queue.base import ALREADY_DUE
from async_batcher._batching.queue.lane_queue import LaneQueue
from async_batcher._serialization.caller_exceptions import CallerExceptions
from async_batcher._serialization.exception_text import counted, one_line, qualified_name
from async_batcher._worker.results import BatchNotStartedError, BatchRecalledError, PartialOutcome
from async_batcher.exceptions import BatchError, BatchTimeoutError
from async_batcher.failures import Later

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextvars import Context

    from async_batcher._batching.batch import Batch, CallerFuture, ItemFuture
    from async_batcher._batching.delivery import Delivery
    from async_batcher._batching.scheduler import Scheduler
    from async_batcher._runners.base import Runner
    from async_batcher._worker.results import Outcome
    from async_batcher.failures import FailurePolicy

logger = logging.getLogger("async_batcher")


class InFlightBatches:
    """The running batches of one batcher.

    Args:
        scheduler: Released slots are reported to it.
        runner: Where batches run.
        delivery: Resolves the callers.
        context: What callbacks on the loop run in.
        on_failure: The policies for items that fail.
        cancels_abandoned: Whether a running batch without callers is cancelled.

    Attributes:
        recovery: What becomes of items that fail.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        delivery: Delivery,
        context: Context,
        *,
        on_failure: Sequence[FailurePolicy],
        cancels_abandoned: bool,
    ) -> None:
        self.runner = runner
        self._scheduler = scheduler
        self._recorder = scheduler.recorder
        self._observers = scheduler.recorder.observers
        self._time = scheduler.loop.time
        self._delivery = delivery
        self._context = context
        self._cancels_abandoned = cancels_abandoned
        self.recovery = Recovery(scheduler, delivery, runner, on_failure)
        delivery.taking_back = self.recovery.taking_back
        # By number, so that a callback of the runner holds no batch: a batch leads to exceptions,
        # and they to the callback.
        self._running: dict[int, Batch[Any, Any]] = {}
        # Callers of running batches that were cancelled, timed out or failed, and whether a batch
        # without others is cancelled if it has started.
        self._gone_callers: dict[CallerFuture, bool] = {}

    def __bool__(self) -> bool:
        return bool(self._running)

    @property
    def pending_items(self) -> int:
        """Items with a caller that have been dispatched, or wait to run again."""
        batches = list(self._running.values())  # other threads may ask, too
        return sum(batch.pending_items for batch in batches) + self.recovery.pending_items

    def futures(self) -> list[Any]:
        """Return the futures of all items that have been dispatched, or wait to run again."""
        running = [future for batch in self._running.values() for future in batch.futures]
        return running + self.recovery.futures()

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
        batch.started_at = self._time()
        if batch.has_slices:
            batch.leave_queue()
        if self.recovery.policies.have_budget:
            self.recovery.count_tries(batch)
        self._recorder.batch_started(batch)
        number, facts, timeouts = batch.number, None, self._scheduler.item_timeouts
        self._running[number] = batch
        try:
            if self._observers is not None:
                self._observers.started(batch)
            if timeouts.next < inf or isinstance(self._scheduler.queue, LaneQueue):
                facts = batch.facts(timeouts)
            batch.handle = self.runner.submit(
                batch.items,
                partial(self._on_outcome, number),
                partial(self._on_timeout, number),
                batch.has_callers,
                partial(self._on_results, number),
                facts,
            )
        except BaseException as exc:  # Ctrl-C, or no memory
            self._on_outcome(number, exc)
            if not isinstance(exc, Exception):
                raise

    def dispatch_reruns(self, until: float) -> None:
        """Run failed batches again in free slots, in turn with batches due by ``until``."""
        while (batch := self.recovery.next_rerun(until)) is not None:
            self.dispatch(batch)

    def recall(self) -> None:
        """Take the batches back that have not started; their items return to the queue."""
        self.runner.recall()

    def fail_all(self, error: BaseException) -> None:
        """Fail the callers of all running batches."""
        for batch in self._running.values():
            self._delivery.fail(batch.futures, error)

    def on_caller_gone(self, future: CallerFuture, *, cancels_started: bool | None = None) -> None:
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
        # The newest first: none begins because an older one has been taken back.
        for batch in list(reversed(self._running.values())):
            if batch.handle is None or batch.cancelling or batch.has_callers():
                continue
            asked = [gone[future] for future in batch.callers() if future in gone]
            if asked:
                batch.cancelling = True
                pause = partial(self.recovery.pause, attempt=batch.attempt)
                batch.handle.cancel(force=any(asked), on_later=pause)
                # With False only an unstarted batch was cancelled; a started one goes on.
                batch.cancelling = any(asked)
        if self.recovery.isolator:  # which forgets the parts that wait without callers
            self._scheduler.pump(ALREADY_DUE, self._time())

    def _on_timeout(self, number: int, error: BatchTimeoutError) -> None:
        """Fail the callers of a batch that timed out and runs on; it keeps its slot."""
        batch = self._running[number]
        if self._delivery.stopping:
            return  # the callers have been failed
        futures, batch.futures = batch.futures, []
        batch.slot_leaked = True
        self.recovery.finish_rerun(batch)  # now: it may never return
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
        if self._scheduler.queue.wakeup_changed:  # some of them come back
            self._scheduler.pump(ALREADY_DUE, self._time())
        self._scheduler.check_drained()
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
            if batch.rerun is not None:
                self.recovery.finish_rerun(batch)
            error = outcome if isinstance(outcome, BaseException) else None
            if isinstance(outcome, PartialOutcome):
                error = outcome.error
            early, futures, failed = batch.early, batch.futures, 0
            if early is not None:
                futures, failed = futures[early.size :], early.failed
            if not batch.slot_leaked:
                failed += self._deliver(batch, futures, outcome)
            self._recorder.batch_finished(batch, failed, error, now, has_run=has_run)
            if error is not None or batch.rerun is not None:
                self._log_end(batch, failed, error)
        finally:  # also after Ctrl-C, or what on_batch or a log filter raises
            self._scheduler.on_batch_finished(now, batch)

    def _deliver(
        self, batch: Batch[Any, Any], futures: Sequence[ItemFuture], outcome: Outcome
    ) -> int:
        """Deliver, or recover a failed batch; return how many items failed for their callers.

        If that raises, the callers of the batch that have no result yet fail.
        """
        try:
            if isinstance(outcome, BaseException):
                return self.recovery.on_failure(batch, outcome)
            if isinstance(outcome, PartialOutcome):
                return self.recovery.on_partial_failure(batch, outcome)
            return self._delivery.deliver(
                futures, outcome, has_slices=batch.has_slices, batch=batch
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

    def _log_end(self, batch: Batch[Any, Any], failed: int, error: BaseException | None) -> None:
        """Log a batch that failed, or the last rerun of one."""
        if self._delivery.stopping:
            return
        if error is not None and batch.retried and not failed:
            logger.info(
                "%s: %s run again: %s",
                self._delivery.name,
                counted(batch.retried, "item"),
                one_line(error),
            )
        elif (
            error is not None
            and batch.rerun is None
            and not (batch.cancelling or batch.slot_leaked)
            and (failed or not isinstance(error, Later))
        ):
            self._log_failure(batch, error)
        if batch.rerun is not None and not batch.rerun.failed_batch.pending:
            of_batch = batch.rerun.failed_batch
            logger.log(
                logging.ERROR if of_batch.failed_items else logging.INFO,
                "%s: of a failed batch of %s, %d failed alone, in %s",
                self._delivery.name,
                counted(of_batch.size, "item"),
                of_batch.failed_items,
                counted(of_batch.reruns, "rerun"),
            )

    def _log_failure(self, batch: Batch[Any, Any], error: BaseException) -> None:
        if not isinstance(error, BatchNotStartedError | BatchRecalledError):
            if isinstance(error, Later) and error.__cause__ is not None:
                error = error.__cause__
            when = "" if batch.early is None else f" after {batch.early.size} of its results"
            logger.error(
                "%s: a batch of %s failed%s: %s",
                self._delivery.name,
                counted(batch.size, "item"),
                when,
                one_line(error),
            )
