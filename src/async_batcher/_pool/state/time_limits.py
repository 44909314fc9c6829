"""What is due when: starts, set-ups, batches, stops and exits that take too long. Pure.

::

    a batch has run for too long --> BatchTimeoutError for its callers; another worker is started
        its worker is INTERRUPTED --> user code gets KeyboardInterrupt: its ``finally`` blocks run
            it replies --> it is stopped: exit handlers, tear-downs
        INTERRUPT_GRACE seconds after the time limit --> it is killed

    a start or set-up takes too long, or a batch does not begin --> the worker is killed at once

Rules:

- A batch without callers is interrupted in the same way, if it is to be cancelled.
- Time for which the whole program was halted, or its event loop blocked, does not count.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from async_batcher._pool import errors
from async_batcher._pool.state.commands import (
    Abandon,
    CheckWorker,
    InterruptBatch,
    ReportStartTimeout,
)
from async_batcher._pool.state.worker import (
    ABANDONED,
    CHANNEL_CLOSED,
    SETUP_TIMEOUT,
    START_TIMEOUT,
    TIMEOUT,
    StartFailure,
    WorkerState,
)

if TYPE_CHECKING:
    from async_batcher._pool.state.assignment import Assignment
    from async_batcher._pool.state.worker import Progress, Trip, Worker
    from async_batcher._pool.state.worker_events import WorkerEvents
    from async_batcher._worker.results import Outcome

INTERRUPT_GRACE = 0.5  # seconds from the interrupt to the kill, in which ``finally`` blocks run
_RECHECK_DELAY = 0.01  # seconds
MIN_BEGIN_TIMEOUT = 1.0  # seconds for an idle worker to begin what it was sent


class TimeLimits:
    """The deadlines of a pool and its workers."""

    def __init__(self, assignment: Assignment, worker_events: WorkerEvents) -> None:
        self._worker_events = worker_events
        self._assignment = assignment
        self._backlog = assignment.backlog
        self._setups = assignment.setups
        self._supervisor = assignment.supervisor

    def tick(self, now: float, halted: float = 0.0) -> None:
        """Do what is due.

        Args:
            now: When.
            halted: Seconds for which the program was halted, or its event loop blocked.
        """
        supervisor = self._supervisor
        if halted:
            self._extend(halted, now)
        if supervisor.retry_at <= now:
            supervisor.retry()
        if self._assignment.kill_at <= now:
            self._assignment.kill_at = math.inf
            for worker in list(supervisor.workers):
                supervisor.kill(worker, "", now)
        for worker in list(supervisor.workers):
            if worker.deadline <= now:
                self._on_deadline(worker, now)
        self._assignment.reconcile(now)
        self._assignment.update_wake_up()

    def interrupt(self, trip: Trip, reason: str, now: float) -> None:
        """Interrupt a batch, whose worker gets no other one."""
        worker = trip.worker
        self._supervisor.take_back(worker)
        worker.mark_interrupted(reason)
        worker.deadline = now + INTERRUPT_GRACE
        self._supervisor.changed = True
        # A generator is closed at its next `yield` if the interrupt came between two of them.
        self._assignment.commands += (Abandon(trip), InterruptBatch(trip))

    def _extend(self, seconds: float, now: float) -> None:
        """Give every worker more time."""
        for worker in self._supervisor.workers:
            worker.deadline += seconds
            trip = worker.trip
            if trip is not None:
                trip.sent_at += seconds
                trip.progressed_at += seconds
                if trip.item.timeout is not None:
                    trip.halts += ((now, seconds),)

    def _on_deadline(self, worker: Worker, now: float) -> None:
        self._assignment.log.append((now, "deadline", worker.pid, worker.state.value))
        worker.deadline = math.inf
        match worker.state:
            case WorkerState.STARTING:
                msg = "the worker was not ready within start_timeout, so it was killed"
                # Another attempt would take as long, unless workers have been ready before.
                why = "" if self._setups.start_seconds else "none was ready in time"
                worker.start_failure = StartFailure(TimeoutError(msg), why)
                self._supervisor.kill(worker, START_TIMEOUT, now)
                self._assignment.commands.append(ReportStartTimeout(worker))
            case WorkerState.STOPPING | WorkerState.INTERRUPTED:
                self._supervisor.kill(worker, "", now)
            case WorkerState.EXITING if not worker.is_killed:
                self._supervisor.kill(worker, CHANNEL_CLOSED, now)
            case _:
                self._assignment.commands.append(CheckWorker(worker))

    def checked(self, worker: Worker, trip: Trip | None, progress: Progress, now: float) -> None:
        """Decide on a worker past its deadline, now that its progress is known.

        Args:
            worker: The worker.
            trip: Its trip at that deadline.
            progress: Of that trip.
            now: When.
        """
        if worker.state is WorkerState.EXITING:  # its exit status does not come
            self._worker_events.exited(worker, progress, now)
        elif trip is not None and worker.trip is trip and worker.is_alive():
            in_setup = progress.is_setting_up
            is_over = progress.started_seq > trip.seq  # the next one has begun: its reply has come
            is_abandoned = trip.interrupt_reason == ABANDONED
            has_begun = progress.started_at is not None
            if trip.is_staging:
                pass  # its time has not begun
            elif is_over:
                self._assignment.limit(worker, _RECHECK_DELAY, now)
            elif is_abandoned and not in_setup and (has_begun or trip.setup_timeout is None):
                self.interrupt(trip, ABANDONED, now)
            elif trip.setup_timeout is not None and (
                in_setup or (not has_begun and trip.item.timeout is None)
            ):
                self._check_setup(worker, trip, trip.setup_timeout, progress, now)
            elif trip.item.timeout is not None:
                self._check_batch(worker, trip, trip.item.timeout, progress, now)
            self._assignment.reconcile(now)
        self._assignment.update_wake_up()

    def _check_setup(
        self, worker: Worker, trip: Trip, timeout: float, progress: Progress, now: float
    ) -> None:
        """Kill a worker whose set-up takes too long, unless a caller waits without a timeout."""
        item = trip.item
        remaining = trip.sent_at + timeout - now
        if remaining > 0:
            self._assignment.limit(worker, remaining, now)
            return
        if not progress.is_setting_up and not item.is_abandoned:
            # The worker is halted, or starved of the processor.
            self._assignment.limit(worker, timeout, now)
            return
        if item in self._backlog.pending and not item.is_abandoned and item.timeout is None:
            return
        self._setups.on_failed(item.key)
        limit_error = errors.setup_timeout_error(worker, self._setups.timeout(item.key))
        error: Outcome = limit_error
        if item.is_abandoned:
            self._setups.on_abandoned_timeout(item.key)
            error = errors.abandoned_error()
        worker.trip = None
        self._supervisor.kill(worker, SETUP_TIMEOUT, now)
        self._worker_events.setup_failed(worker, limit_error, now)
        self._assignment.resolve(item, error)

    def _check_batch(
        self, worker: Worker, trip: Trip, timeout: float, progress: Progress, now: float
    ) -> None:
        if progress.started_at is None:
            # A long message without shared memory may still be on its way. If it is not, the worker
            # was idle and has not started: it is halted or starved, so another one is to run this.
            if progress.bytes_sent != trip.bytes_sent:
                trip.bytes_sent, trip.progressed_at = progress.bytes_sent, now
            remaining = trip.progressed_at + max(timeout, MIN_BEGIN_TIMEOUT) - now
        else:
            # A halt before the batch began, as while its function was set up, does not count.
            halted = trip.halted_since(progress.started_at)
            remaining = progress.started_at + halted + timeout - now
        if remaining > 0:
            self._assignment.limit(worker, remaining, now)
            return
        waiting = self._supervisor.ahead.get(worker)
        if progress.started_at is None:
            # It may start until it has exited, so its exit decides who runs the batch.
            self._supervisor.kill(worker, TIMEOUT, now)
        elif waiting is not None and not waiting.is_asked_back:
            # If the worker has started that one, the reply to this one has come; so check again.
            trip.interrupt_reason = TIMEOUT  # so that nothing else is sent ahead
            self._supervisor.take_back(worker)
            self._assignment.commands.append(CheckWorker(worker))
        else:
            error = errors.timeout_error(worker, timeout)
            self._assignment.resolve(trip.item, error, runs=True)
            self.interrupt(trip, TIMEOUT, now)
