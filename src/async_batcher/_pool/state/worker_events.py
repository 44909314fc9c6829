"""What the events of workers mean for them, and for their work items. Pure."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from async_batcher._pool import errors
from async_batcher._pool.state.commands import Abandon, CheckWorker, CloseWorker, LogWarning
from async_batcher._pool.state.worker import CHANNEL_UNREADABLE, SEND_FAILED, WorkerState

if TYPE_CHECKING:
    from collections.abc import Collection

    from async_batcher._pool.state.assignment import Assignment
    from async_batcher._pool.state.worker import Progress, Trip, Worker
    from async_batcher._pool.work_item import WorkItem

MAX_REQUEUES = 3  # times, of a work item that no worker has started
SHUTDOWN_GRACE = 2.0  # seconds for exit handlers of an idle worker
_EOF_TO_EXIT_TIMEOUT = 0.25  # seconds from the channel's end to the exit that causes it


class WorkerEvents:
    """The events of workers, from their start to their exit."""

    def __init__(self, assignment: Assignment) -> None:
        self._assignment = assignment
        self._log = assignment.log.append
        self._backlog = assignment.backlog
        self._setups = assignment.setups
        self._supervisor = assignment.supervisor

    def ready(self, worker: Worker, now: float) -> None:
        """A worker has started, and its initializer has run."""
        self._log((now, "ready", worker.pid))
        if worker.state is WorkerState.STARTING:
            self._supervisor.on_ready(worker, now)
            self._assignment.free(worker, now)

    def start_refused(self, worker: Worker, error: Exception, now: float) -> None:
        """A process could not even be prepared: no descriptors, no memory, an audit hook."""
        self._log((now, "start refused", worker.pid, repr(error)))
        self._supervisor.on_start_refused(worker, error, now)
        self._assignment.reconcile(now)

    def send_failed(
        self, worker: Worker, error: BaseException, now: float, trip: Trip | None = None
    ) -> None:
        """Something could not be sent to a worker, whose channel may hold a part of it."""
        self._log((now, "send failed", worker.pid, repr(error)))
        if trip is not None:
            if worker.trip is trip:
                worker.trip = None
            elif self._supervisor.ahead.get(worker) is trip:
                del self._supervisor.ahead[worker]
                self._assignment.reopen(worker)
            self._assignment.resolve(trip.item, error)
        if trip is None or trip.is_sent or not trip.is_waiting:
            self._supervisor.kill(worker, SEND_FAILED, now)
        self._assignment.reconcile(now)

    def staging(self, trip: Trip) -> None:
        """A work item is being copied, and will be sent later."""
        if not trip.is_waiting:
            self._assignment.limit(trip.worker, None, 0.0)

    def sent(self, trip: Trip, now: float) -> None:
        """A work item has been copied and sent."""
        worker = trip.worker
        if worker.trip is trip and worker.is_alive():
            trip.sent_at = trip.progressed_at = now
            timeout = trip.item.timeout
            self._assignment.limit(worker, trip.setup_timeout if timeout is None else timeout, now)
            self._send_held(self._supervisor.ahead.get(worker))

    def _send_held(self, trip: Trip | None) -> None:
        """Send what was held, since the work item before it was being copied."""
        if trip is None or not trip.worker.is_alive():
            return
        if trip.is_staging and not trip.is_asked_back:
            self._assignment.commands.append(trip)

    def set_up(self, worker: Worker, seq: int, now: float) -> None:
        """A worker has set up the function of its work item, whose timeout starts now."""
        self._log((now, "set up", worker.pid))
        trip = worker.trip
        if trip is None or trip.seq != seq or not worker.is_alive():
            return
        seconds, trip.sent_at = now - trip.sent_at, now
        trip.setup_timeout = None
        self._assignment.limit(worker, trip.item.timeout, now)
        self._assignment.update_wake_up()
        if trip.interrupt_reason:  # not before the set-up has ended
            self._supervisor.take_back(worker)
            self._assignment.commands.append(CheckWorker(worker))
        function = trip.item.function
        if trip.item in self._backlog.pending and function.has_setup:
            # Later workers set up the function before they take batches.
            self._setups.add(function)
            self._setups.on_done(function.key, seconds)

    def finished(self, worker: Worker, now: float) -> None:
        """A worker has run its work item; it gets the next one before the results are unpickled."""
        self._log((now, "finished", worker.pid))
        worker.end_trip(now)
        if self._supervisor.ahead:
            self._assignment.begin_next(worker, now)
        self._assignment.free(worker, now)

    def reply_came(self, worker: Worker, now: float) -> float:
        """A worker has replied with something that must be looked at before it goes on.

        Returns:
            Seconds that the work item took.
        """
        self._log((now, "reply_came", worker.pid))
        seconds = worker.end_trip(now)
        if self._supervisor.ahead:
            self._assignment.begin_next(worker, now)
        return seconds

    def reply_read(self, worker: Worker, now: float) -> None:
        """The reply of a worker has been looked at."""
        self._assignment.free(worker, now)

    def prepared(self, worker: Worker, item: WorkItem, seconds: float, *, was_set_up: bool) -> None:
        """A worker has set up a function ahead of its batches, or has loaded it already."""
        worker.uncount(seconds)
        if was_set_up and item.key in self._setups.functions:
            self._setups.on_done(item.key, seconds)

    def setup_failed(self, worker: Worker, error: BaseException, now: float) -> None:
        """A worker could not load a function ahead of its batches, or a set-up raised."""
        self._log((now, "set-up failed", worker.pid, repr(error)))
        restart = self._supervisor.restart
        is_preparing = worker.state is WorkerState.PREPARING
        if restart.waits_for(worker) and (is_preparing or not worker.is_alive()):
            if is_preparing:
                self._supervisor.stop(worker, now)
            restart.fail("a function could not be set up", error, self._supervisor.workers)

    def torn_down(self, worker: Worker, item: WorkItem, seconds: float) -> None:
        """A worker has forgotten a function, after its tear-down."""
        worker.uncount(seconds)
        self._assignment.resolve(item, [])

    def could_not_refresh(self, worker: Worker, item: WorkItem) -> None:
        """A worker could not read a function that was sent again; so it is sent once more."""
        worker.functions.mark_outdated(item.key)

    def lacked(
        self, worker: Worker, item: WorkItem, seconds: float, now: float, *, function: bool
    ) -> None:
        """A worker lacks the ``function`` of a work item, or has not run it for another reason."""
        self._log((now, "lacked", worker.pid))
        if function:
            worker.functions.discard(item.key)
        if item.is_setup_only:
            self._assignment.requeue(item)
        else:
            worker.uncount(seconds)
            self._requeue(item)
        self._assignment.reconcile(now)

    def taken_back(self, worker: Worker, taken: Collection[int], now: float) -> None:
        """Work items were taken back from a worker.

        Args:
            worker: The worker.
            taken: The numbers of their trips. The one that waited is missing if the worker has
                started it. The one before may be there, too: the worker was about to start it.
            now: When.
        """
        self._log((now, "taken back", worker.pid, len(taken)))
        waiting = self._supervisor.ahead.get(worker)
        if waiting is not None and waiting.seq in taken:
            del self._supervisor.ahead[worker]
            self._assignment.reopen(worker)
            self._requeue(waiting.item)
        elif waiting is not None:
            waiting.has_begun = True
            if not self._has_callers(waiting.item):
                self._assignment.commands.append(Abandon(waiting))
        trip = worker.trip
        if trip is not None and trip.seq in taken:
            self._requeue(trip.item)
            self._assignment.begin_next(worker, now)
            self._assignment.free(worker, now)
        self._assignment.reconcile(now)

    def unsent(self, worker: Worker, trip: Trip, now: float) -> None:
        """A work item that is being copied for a worker is not to be sent to it."""
        if trip.is_refresh:
            worker.functions.mark_outdated(trip.item.key)
        elif trip.with_function:
            worker.functions.discard(trip.item.key)
        self._requeue(trip.item)
        self._assignment.begin_next(worker, now)
        self._send_held(worker.trip)
        self._assignment.free(worker, now)

    def _has_callers(self, item: WorkItem) -> bool:
        return item in self._backlog.pending and not item.is_abandoned

    def _requeue(self, item: WorkItem) -> None:
        """Let any worker run what one has not started, if it is still wanted."""
        if item not in self._backlog.pending:
            return
        outcome = errors.unstarted_outcome(item)
        if outcome is None:
            self._assignment.requeue(item)
        else:
            item.began_at = math.inf
            self._assignment.resolve(item, outcome)

    def channel_ended(self, worker: Worker, now: float, error: Exception | None = None) -> None:
        """The process of a worker has exited, is about to, or has closed its channel.

        Args:
            worker: The worker.
            now: When.
            error: Why nothing more can be read from the channel, which is open.
        """
        self._log((now, "channel ended", worker.pid, *([] if error is None else [repr(error)])))
        if error is not None:
            if isinstance(error, MemoryError) and worker.trip is not None:
                self._assignment.resolve(worker.trip.item, error)
            self._supervisor.kill(worker, CHANNEL_UNREADABLE, now)
        elif worker.state is WorkerState.STOPPING:
            left = worker.deadline - now
            self._assignment.limit(worker, min(left, SHUTDOWN_GRACE), now)
        elif worker.is_alive():
            self._supervisor.on_channel_ended(worker)
            self._assignment.limit(worker, _EOF_TO_EXIT_TIMEOUT, now)
        self._assignment.reconcile(now)

    def exited(self, worker: Worker, progress: Progress, now: float) -> None:
        """A worker has exited, by a crash or as it should; this decides on all that follows.

        Args:
            worker: The worker, with its exit code.
            progress: What it had done of its work item.
            now: When.
        """
        self._log((now, "exited", worker.pid, worker.exit_code))
        if worker.state is WorkerState.EXITED:
            return
        trip = worker.trip
        worker.trip = None
        self._supervisor.on_exit(worker, progress, now)
        self._assignment.commands.append(CloseWorker(worker))
        waiting = self._supervisor.ahead.pop(worker, None)
        if waiting is not None and progress.started_seq >= waiting.seq:
            self._crashed(worker, waiting.item, progress, started=True)
        elif waiting is not None:
            self._requeue(waiting.item)
        if trip is not None:  # last: if it is requeued, it comes first
            if trip.is_ahead and not trip.item.is_tear_down:
                self._setups.on_failed(trip.item.key)
                error = errors.crash_error(worker, progress, started=False, in_setup=True)
                self.setup_failed(worker, error, now)
            started, in_setup = progress.started_seq >= trip.seq, progress.is_setting_up
            self._crashed(worker, trip.item, progress, started=started, in_setup=in_setup)
        elif waiting is None and worker.has_crashed and not self._supervisor.closing:
            self._assignment.commands.append(LogWarning(errors.idle_crash_text(worker)))
        self._backlog.unassign(worker)
        while (tear_down := self._backlog.next_assigned(worker)) is not None:
            self._assignment.resolve(tear_down, [])  # it ran them when it stopped
        self._assignment.reconcile(now)

    def _crashed(
        self,
        worker: Worker,
        item: WorkItem,
        progress: Progress,
        *,
        started: bool,
        in_setup: bool = False,
    ) -> None:
        """Decide on the work item of a worker that crashed, or was killed because it hung."""
        if item not in self._backlog.pending:
            return
        item.requeues += not started
        if item.is_tear_down:
            self._assignment.resolve(item, [])
        elif started or item.requeues > MAX_REQUEUES or item.is_setup_only:
            error = errors.crash_error(worker, progress, started=started, in_setup=in_setup)
            self._assignment.resolve(item, error)
        else:
            self._requeue(item)

    def memory_measured(self, worker: Worker, size: int, now: float) -> None:
        self._supervisor.on_memory(worker, size)
        self._assignment.reconcile(now)
