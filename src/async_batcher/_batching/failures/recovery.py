"""What becomes of items that have failed: another try, parts of their batch, or their error.

::

    a batch fails  --on_failure--> for each item: FailurePolicies.decide
    a result is an --taking_back-.     |-- seconds: `LaneItems` has it until then
    exception                     `--> |-- "isolate": FailureIsolator --next_rerun--> Batch
                                       `-- None: its caller gets the error

Rules:

- Nothing comes back for a caller that is gone, or after a forced stop.
- What comes back is in the queue before the slot of its batch is released.
- With the first item that comes back, the batcher gets a `LaneQueue` for its `BatchQueue`.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from async_batcher._batching.batch import Batch
from async_batcher._batching.bulk.slices import Slice
from async_batcher._batching.failures.isolation import (
    FailedBatch,
    FailureIsolator,
    budget_exhausted_error,
    is_retryable,
)
from async_batcher._batching.failures.policies import FailurePolicies, spent_error
from async_batcher._batching.queue.lane import Entry
from async_batcher._worker.results import BatchRecalledError
from async_batcher.failures import Later

if TYPE_CHECKING:
    from collections.abc import Sequence

    from async_batcher._batching.batch import ItemFuture
    from async_batcher._batching.delivery import Delivery, TakeBack
    from async_batcher._batching.scheduler import Scheduler
    from async_batcher._runners.base import Runner
    from async_batcher._worker.results import PartialOutcome
    from async_batcher.failures import FailurePolicy


class Recovery:
    """Decides about failed items of one batcher, and carries it out.

    Args:
        scheduler: Its queue takes what comes back.
        delivery: Fails the others.
        runner: Where batches run.
        policies: Those of ``on_failure``.

    Attributes:
        isolator: Of failures, if there are policies; true while a rerun waits.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        delivery: Delivery,
        runner: Runner,
        policies: Sequence[FailurePolicy],
    ) -> None:
        self._scheduler = scheduler
        self._delivery = delivery
        self._runner = runner
        self.policies = FailurePolicies(policies, delivery.name)
        self.isolator: FailureIsolator[Entry] | None = None
        if policies:
            self.isolator = FailureIsolator(
                Entry.is_done,
                crash_times=runner.crash_times,
                in_order=scheduler.queue.keeps_order,
                on_waiting=self._on_waiting,
            )

    @property
    def pending_items(self) -> int:
        """Items with a caller that wait to run again in a part of their batch."""
        return 0 if self.isolator is None else self.isolator.pending_items

    def count_tries(self, batch: Batch[Any, Any], sign: int = 1) -> None:
        """Count the items of a batch that are tried for the first time; -1: take that back."""
        self.policies.count_tries(self._scheduler.loop.time(), sign * batch.first_tries)

    def decides_about(self, error: BaseException) -> bool:
        """Tell whether items with that error may run again."""
        return bool(self.policies) or isinstance(error, Later)

    def on_failure(self, batch: Batch[Any, Any], error: BaseException) -> int:
        """Deal with a batch that failed; return how many items failed for their callers."""
        if isinstance(error, BatchRecalledError) and not self._delivery.stopping:
            self._requeue(batch)
            return 0
        if self._is_final(error):
            return self._delivery.fail(batch.futures, error, batch_size=batch.size)
        first = 0 if batch.early is None else batch.early.size
        return self._decide(batch, range(first, batch.size), error)

    def on_partial_failure(self, batch: Batch[Any, Any], outcome: PartialOutcome) -> int:
        """Do the same for a batch of which some items have a result of their own."""
        error = outcome.error
        ran = [place for place, result in enumerate(outcome) if result is error]
        batch.entries()  # before there are results
        failed = self._delivery.deliver(
            batch.futures, outcome, has_slices=True, batch=batch, leaving=error
        )
        if self._is_final(error):
            return failed + self._fail(batch, ran, error)
        return failed + self._decide(batch, ran, error)

    def pause(self, later: Later, *, attempt: int, delay: float | None = None) -> None:
        """Let nothing start before the time of a `Later` that a batch raised.

        Args:
            later: The exception.
            attempt: How often an item of the batch has been tried at most.
            delay: Seconds until the first item comes back; None: none does.
        """
        if self._delivery.stopping:
            return
        now = self._scheduler.loop.time()
        if later.after is not None:
            delay = later.after
        elif delay is None:  # all callers may be gone
            verdict = self.policies.decide(later, attempt, now)
            delay = verdict if isinstance(verdict, float) else 0.0
        self._scheduler.use_lanes().pause(now + delay)
        self._scheduler.inflight.recall()

    def taking_back(self, batch: Batch[Any, Any]) -> TakeBack:
        """Return what puts back items for which exceptions were returned; see `Delivery`."""
        # One time for all of them, so that they come back together.
        return partial(self._take_back, batch, self._scheduler.loop.time())

    def next_rerun(self, until: float) -> Batch[Any, Any] | None:
        """Take a slot for the next part of a failed batch, in turn with batches due by ``until``.

        Returns:
            The part, as a batch; None if no slot is free, or it is a new batch's turn.
        """
        isolator, queue = self.isolator, self._scheduler.queue
        if not isolator or not queue.may_dispatch_full:
            return None
        rerun = isolator.next_rerun(
            new_batch_is_due=queue.next_wakeup <= until, may_run=queue.may_rerun
        )
        if rerun is None:
            return None
        queue.acquire_slot(rerun.entries)
        return Batch.of_entries(rerun.entries, "isolation", rerun)

    def finish_rerun(self, batch: Batch[Any, Any]) -> None:
        """Count a part of a failed batch that has ended."""
        if self.isolator is not None and batch.rerun is not None:
            self.isolator.finished(batch.rerun)

    def futures(self) -> list[ItemFuture]:
        """Return the futures of items that wait to run again in a part of their batch."""
        return [] if self.isolator is None else [entry.future for entry in self.isolator.entries()]

    def clear(self) -> list[ItemFuture]:
        """Forget all parts that wait, and return the futures of their items."""
        return [] if self.isolator is None else [entry.future for entry in self.isolator.clear()]

    def _is_final(self, error: BaseException) -> bool:
        """Tell whether nothing can be done about an error."""
        return self._delivery.stopping or not self.decides_about(error)

    def _take_back(
        self, batch: Batch[Any, Any], now: float, place: int, error: BaseException
    ) -> BaseException | None:
        if self._is_final(error):
            return error
        entry = batch.entries()[place]
        verdict = self.policies.decide(error, entry.attempt, now)
        if verdict is None or verdict == "isolate":  # it stands alone
            return spent_error(error, entry.attempt) if isinstance(error, Later) else error
        self._retry(batch, [entry], now + verdict)
        return None

    def _decide(self, batch: Batch[Any, Any], places: Sequence[int], error: BaseException) -> int:
        """Decide about the items at these places, which ``error`` was raised for."""
        entries, now = batch.entries(), self._scheduler.loop.time()
        back: dict[float, list[Entry]] = {}
        parts: list[Entry] = []
        failing: list[int] = []
        for place in places:
            entry = entries[place]
            if entry.is_done():
                continue
            verdict = self.policies.decide(error, entry.attempt, now)
            if verdict is None:
                failing.append(place)
            elif verdict == "isolate":
                parts.append(entry)
            else:
                back.setdefault(verdict, []).append(entry)
        for delay, returning in back.items():
            self._retry(batch, returning, now + delay)
        if isinstance(error, Later):
            self.pause(error, attempt=batch.attempt, delay=min(back, default=None))
        failed = 0
        if parts:
            failed = self._split(batch, parts, error, now)
        if failing:
            failed += self._fail(batch, failing, error)
        return failed

    def _split(
        self, batch: Batch[Any, Any], entries: list[Entry], error: BaseException, now: float
    ) -> int:
        """Run items again in halves, or fail them; return how many failed."""
        isolator, rerun = self.isolator, batch.rerun
        if isolator is None or not is_retryable(error, on_loop=self._runner.runs_on_loop):
            return self._fail(batch, _places(batch, entries), error)
        failed_batch = FailedBatch(len(entries)) if rerun is None else rerun.failed_batch
        why = isolator.split(entries, failed_batch, now, error)
        if why is None:
            for entry in entries:
                entry.has_run = True  # its part may be put back into the queue before it runs
            return 0
        if not why:  # one item
            return self._fail(batch, _places(batch, entries), error)
        entries = entries + isolator.abandon(failed_batch)
        futures = [entry.future for entry in entries]
        return self._delivery.fail(futures, budget_exhausted_error(error, why))

    def _fail(self, batch: Batch[Any, Any], places: Sequence[int], error: BaseException) -> int:
        entries = batch.entries()
        if isinstance(error, Later):
            error = spent_error(error, batch.attempt)
        futures = [entries[place].future for place in places]
        return self._delivery.fail(futures, error, batch_size=batch.size, places=places)

    def _retry(self, batch: Batch[Any, Any], entries: list[Entry], at: float) -> None:
        batch.retried += len(entries)
        self._scheduler.recorder.retried += len(entries)
        for entry in entries:
            self._scheduler.item_timeouts.note_attempt(entry.future, entry.attempt)
        self._enqueue(batch, [entry.next_attempt() for entry in entries], at)

    def _requeue(self, batch: Batch[Any, Any]) -> None:
        """Put the items of a batch back that was taken back before it started."""
        if self.policies.have_budget:
            self.count_tries(batch, -1)
        now = self._scheduler.loop.time()
        self._enqueue(batch, [entry for entry in batch.entries() if not entry.is_done()], now)

    def _enqueue(self, batch: Batch[Any, Any], entries: list[Entry], at: float) -> None:
        """Put items of a batch back into the queue, in their place, when it is time."""
        queue = self._scheduler.use_lanes()
        queue.requeue(_in_queue(entries), at)
        if queue.keeps_order and self.isolator and batch.rerun is not None:
            # The other parts of the failed batch come after them.
            others = self.isolator.abandon(batch.rerun.failed_batch)
            queue.requeue(_in_queue(others), self._scheduler.loop.time())

    def _on_waiting(self, entries: list[Entry], change: int) -> None:
        self._scheduler.queue.count_rerun(entries, change)


def _in_queue(entries: list[Entry]) -> list[Entry]:
    """Let bulk calls know that items are queued again."""
    for entry in entries:
        future = entry.future
        if type(future) is Slice:
            future.ticket = entry.ticket
            future.bulk.queued.add(future)
    return entries


def _places(batch: Batch[Any, Any], entries: list[Entry]) -> list[int]:
    indices = {id(entry): place for place, entry in enumerate(batch.entries())}
    return [indices[id(entry)] for entry in entries]
