"""What a pool decides: events in, commands out. Pure.

::

    submitted --> Backlog ----Trip----> a worker --finished--> `ReplyReader` passes the results on
                     ^                     |  `-- timed out --> BatchTimeoutError
                     `----- requeued ------'   exited: not started --> requeued
                                                       started ------> WorkerDiedError

An event is a method: of `PoolState` what callers ask for, of `WorkerEvents` what workers do, of
`TimeLimits` what time does. It changes the state and adds to `Assignment.commands`, which the
`WorkerDriver` carries out, and reports on with more events. `Assignment.reconcile` brings work
items and workers together at the end of every event; the `Supervisor` knows which workers there are
to be.

Rules:

- An event happens at ``now``, on `time.monotonic`. Nothing here asks for the time or does I/O.
- If no worker can be started, all waiting work items get `PoolBrokenError` with the last cause. The
  next work item tries again.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from async_batcher._pool import errors
from async_batcher._pool.state.assignment import Assignment
from async_batcher._pool.state.commands import Abandon, CheckWorker, RenewLauncher, Resolve
from async_batcher._pool.state.time_limits import TimeLimits
from async_batcher._pool.state.worker import (
    ABANDONED,
    BATCHER_STOPPED,
    TEAR_DOWN_TIMEOUT,
    WorkerState,
)
from async_batcher._pool.state.worker_events import SHUTDOWN_GRACE, WorkerEvents
from async_batcher._pool.work_item import TearDownItem, WorkItem

if TYPE_CHECKING:
    from collections.abc import Collection, Hashable

    from async_batcher._pool.pickled_function import PickledFunction
    from async_batcher._pool.state.ledger import WorkerLedger
    from async_batcher._pool.state.supervisor import PoolLimits
    from async_batcher._pool.state.worker import Worker
    from async_batcher.exceptions import PoolBrokenError

TEAR_DOWN_GRACE = 30.0  # seconds for exit handlers of an idle worker, if tear-downs run, too


class PoolState:
    """The state of a pool on one event loop, from its start to its stop.

    Attributes:
        assignment: What is to be done, and when.
        worker_events: What workers do.
        time_limits: What is due when.
        pending: The work items that are not resolved; `ReplyReader` removes those that it resolves.
        supervisor: The workers.
        setups: The functions that new workers set up first.
    """

    def __init__(self, limits: PoolLimits, ledger: WorkerLedger) -> None:
        self.assignment = assignment = Assignment(limits, ledger)
        self.worker_events = WorkerEvents(assignment)
        self.time_limits = TimeLimits(assignment, self.worker_events)
        self.supervisor = self._supervisor = assignment.supervisor
        self._backlog = assignment.backlog
        self.pending = assignment.backlog.pending
        self.setups = self._setups = assignment.setups

    # --- what callers ask for

    def submitted(self, item: WorkItem, now: float) -> None:
        assignment, supervisor, backlog = self.assignment, self._supervisor, self._backlog
        assignment.log.append((now, "submitted"))
        if assignment.closing:
            assignment.commands.append(Resolve(item, errors.pool_stopped_error()))
            return
        if supervisor.start_error is not None:
            supervisor.try_again()
        if supervisor.idle and not backlog.queue.queues:
            backlog.pending[item] = None
            assignment.assign(item, now)
        else:
            item.began_at = math.inf
            if backlog.queue.queues or not assignment.send_one_ahead(item, now):
                backlog.put(item)
        if supervisor.changed:
            assignment.reconcile(now)

    def cancelled(self, item: WorkItem, now: float, *, force: bool) -> None:
        """All callers of a work item were cancelled.

        Args:
            item: The work item, which is not started if it waits.
            now: When.
            force: Whether to interrupt the worker that has it. But a set-up that takes longer than
                callers wait must be able to finish: it gets `FunctionSetups.abandoned_timeout`.
        """
        self.assignment.log.append((now, "cancelled", force))
        worker = self.assignment.worker_of(item)
        if worker is None or worker.trip is None:
            if self._backlog.take_out(item):
                self.assignment.resolve(item, errors.abandoned_error())
            elif self.assignment.take_back(item, interrupt=force):
                item.is_abandoned = True
            self.assignment.reconcile(now)
            return
        item.is_abandoned = True
        trip = worker.trip
        if self._unsend(item, now):
            self.assignment.reconcile(now)
            return
        self.assignment.commands.append(Abandon(trip))
        if force:
            self.assignment.resolve(item, errors.abandoned_error(), runs=True)
            trip.interrupt_reason = ABANDONED
        if trip.setup_timeout is not None:
            limit = self._setups.abandoned_timeout(item.key)
            trip.setup_timeout = limit = min(trip.setup_timeout, limit)
            self.assignment.limit(worker, limit, trip.sent_at)
        elif force:
            # If the worker has begun what waits there, the reply to this one has come: look first.
            self._supervisor.take_back(worker)
            self.assignment.commands.append(CheckWorker(worker))
        self.assignment.reconcile(now)

    def recalled(self, client: Hashable, now: float) -> None:
        """The batches of a client that no worker has begun are to get `BatchRecalledError`.

        It is one event for all of them: none is sent to a worker where another has waited.
        """
        self.assignment.log.append((now, "recalled"))
        items = {item for item in self._backlog.pending if item.client is client}
        for item in items:
            item.is_recalled = not item.is_setup_only
        for item in self._backlog.queue.values_of(client):  # in order, which costs less
            if item.is_recalled:
                self._backlog.take_out(item)
                self.assignment.resolve(item, errors.recalled_error())
        for worker, waiting in self._supervisor.ahead.items():
            if waiting.item in items:
                self._supervisor.take_back(worker)
        for worker in list(self._supervisor.workers):
            trip = worker.trip
            if trip is not None and trip.is_staging and trip.item.is_recalled:
                self.worker_events.unsent(worker, trip, now)
        self.assignment.reconcile(now)

    def withdrawn(self, item: WorkItem, now: float) -> None:
        """A work item is no longer wanted; a worker that has it finishes it."""
        self.assignment.log.append((now, "withdrawn"))
        self._backlog.remove(item)
        self._unsend(item, now)
        self.assignment.take_back(item)
        self.assignment.reconcile(now)

    def _unsend(self, item: WorkItem, now: float) -> bool:
        """Do not send a work item that is being copied; return whether it was."""
        worker = self.assignment.worker_of(item)
        if worker is None or worker.trip is None or not worker.trip.is_staging:
            return False
        self.worker_events.unsent(worker, worker.trip, now)
        return True

    def aborted(
        self,
        client: Hashable,
        error: BaseException,
        now: float,
        *,
        in_setup: Collection[Worker],
    ) -> None:
        """A client is stopped by force.

        Args:
            client: The client.
            error: What its work items get; a worker that runs one of them finishes it.
            now: When.
            in_setup: The workers that set up functions; they are killed if it is for the client.
        """
        self.assignment.log.append((now, "aborted"))
        for worker in in_setup:
            if worker.trip is not None and worker.trip.item.client is client:
                self._supervisor.kill(worker, BATCHER_STOPPED, now)
        items = [item for item in self._backlog.pending if item.client is client]
        for item in items:  # first, so that no worker gets one when another is taken from it
            if not self._backlog.take_out(item):
                self.assignment.take_back(item)
            self.assignment.resolve(item, error)
        for item in items:
            has_it = self.assignment.worker_of(item)
            if not self._unsend(item, now) and has_it is not None and has_it.trip is not None:
                self.assignment.commands.append(Abandon(has_it.trip))
        self.assignment.reconcile(now)

    def preloaded(self, function: PickledFunction, items: list[WorkItem], now: float) -> int:
        """Have every worker load and set up a function, later workers before their first batch.

        Returns:
            How many of the work items will run: one for each active worker.
        """
        self.assignment.log.append((now, "preloaded"))
        if self.assignment.closing:
            return 0
        self._setups.add(function)
        pairs = list(zip(self._supervisor.active(), items, strict=False))
        for worker, item in pairs:
            self._backlog.assign(worker, item)
        self.assignment.reconcile(now)
        return len(pairs)

    def refreshed(self, key: bytes, now: float) -> None:
        """A function has been pickled again; workers that have loaded it get the new pickle."""
        self.assignment.log.append((now, "refreshed"))
        for worker in self._supervisor.workers:
            worker.functions.mark_outdated(key)

    def forgotten(self, key: bytes, now: float) -> None:
        """Have every worker forget a function, after its tear-down."""
        self.assignment.log.append((now, "forgotten"))
        self._setups.forget(key)
        torn_down = self._backlog.tear_downs(key)
        for worker in self._supervisor.workers:
            can_run = worker.is_alive() or worker.state is WorkerState.STOPPING
            if key not in worker.functions.keys or not can_run:
                continue
            assigned = self._backlog.assigned.get(worker, ())
            if not any(item in torn_down for item in assigned):
                self._backlog.assign(worker, TearDownItem(key))
        self.assignment.reconcile(now)

    def waits_for_tear_downs(self, key: bytes, *, busy: bool) -> bool:
        """Tell whether workers have tear-downs of a function to run; without ``busy``, now."""
        tear_downs = self._backlog.tear_downs(key)
        return bool(tear_downs) and (busy or any(map(self.assignment.worker_of, tear_downs)))

    def tear_downs_expired(self, key: bytes, now: float) -> None:
        """The tear-downs of a function have taken too long."""
        self.assignment.log.append((now, "tear-downs expired"))
        for item in self._backlog.tear_downs(key):
            worker = self.assignment.worker_of(item)
            if worker is not None:
                self._supervisor.kill(worker, TEAR_DOWN_TIMEOUT, now)
        self.assignment.reconcile(now)

    def started(self, now: float) -> None:
        """All workers are wanted, before there is work for them."""
        self.assignment.log.append((now, "started"))
        self._supervisor.try_again()
        self.assignment.reconcile(now)

    def restarted(self, now: float) -> list[Worker]:
        """All workers are to be replaced, one after another; return them."""
        self.assignment.log.append((now, "restarted"))
        outdated = list(self._supervisor.workers)
        self._supervisor.try_again()
        self._supervisor.restart.begin(outdated)
        self._supervisor.changed = True
        self.assignment.commands.append(RenewLauncher())
        self.assignment.reconcile(now)
        return outdated

    # --- stopping

    def counts(self) -> tuple[int, int]:
        """Return how many work items wait for any worker, and how many are not resolved."""
        waiting = len(self._backlog.queue) + len(self._supervisor.ahead)
        return waiting, len(self._backlog.pending)

    def reset(self, error: PoolBrokenError) -> list[WorkItem]:
        """Forget all workers and work items, and return those that are not resolved.

        Args:
            error: Why; a start that is waiting gets it.
        """
        return self.assignment.reset(error)

    def close(self) -> None:
        """Refuse new work."""
        self.assignment.closing = True

    def has_unfinished_work(self) -> bool:
        """Tell whether a stop must wait; set-ups of workers that take no batches do not count."""
        ahead = {
            worker.trip.item
            for worker in self._supervisor.workers
            if worker.state is WorkerState.PREPARING and worker.trip is not None
        }
        wanted = {item for item in self._backlog.pending if item.is_tear_down or item not in ahead}
        return bool(wanted) or any(
            # Withdrawn work items count, too: they may be writing something.
            worker.state is WorkerState.BUSY
            for worker in self._supervisor.workers
        )

    def shut_down(self, now: float, *, force: bool, tearing_down: Collection[Worker]) -> None:
        """Stop all workers; with ``force``, at once.

        Args:
            now: When.
            force: Whether to fail all work, and kill the workers that have any.
            tearing_down: Workers that have tear-downs to run: they are stopped even then.
        """
        self.assignment.log.append((now, "shut down", force))
        supervisor = self._supervisor
        self.close()
        supervisor.close()
        if force:
            self._backlog.clear_waiting()
            for item in list(self._backlog.pending):
                self.assignment.resolve(item, errors.stopped_midway_error())
        for worker in list(supervisor.workers):
            may_finish = not force or worker in tearing_down
            if worker.can_stop() and may_finish:
                supervisor.stop(worker, now)
            elif not may_finish or (worker.is_alive() and worker not in tearing_down):
                supervisor.kill(worker, "", now)
        has_tear_downs = not force and self._setups.has_setups()
        grace = TEAR_DOWN_GRACE if has_tear_downs else SHUTDOWN_GRACE
        self.assignment.kill_at = now + grace
        self.assignment.update_wake_up()
