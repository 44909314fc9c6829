"""Which worker gets which work item. Pure.

`reconcile`, at the end of every event, brings work items and workers together.
"""

from __future__ import annotations

import math
from collections import deque
from typing import TYPE_CHECKING, Any

from async_batcher._pool.state.backlog import Backlog
from async_batcher._pool.state.commands import MeasureMemory, Resolve
from async_batcher._pool.state.setups import FunctionSetups
from async_batcher._pool.state.supervisor import Supervisor
from async_batcher._pool.state.worker import Trip, Worker, WorkerState
from async_batcher._pool.work_item import WorkItem
from async_batcher.exceptions import PoolBrokenError

if TYPE_CHECKING:
    from async_batcher._pool.state.commands import Command
    from async_batcher._pool.state.supervisor import PoolLimits, WorkerLedger
    from async_batcher._worker.results import Outcome

_LOGGED_EVENTS = 200

# Looked up for each batch; members of an enum are slow to look up in Python 3.11.
_BUSY, _IDLE, _PREPARING = WorkerState.BUSY, WorkerState.IDLE, WorkerState.PREPARING


class Assignment:
    """The work items and workers of a pool, and how they come together.

    Attributes:
        commands: What is to be done; the driver removes what it carries out.
        log: The last events, for reports of errors that should not happen.
        closing: Whether new work is refused.
        kill_at: When workers are killed that have been asked to exit.
        wake_at: When something is due next, or earlier.
    """

    def __init__(self, limits: PoolLimits, ledger: WorkerLedger) -> None:
        self.commands: deque[Command] = deque()
        self.log: deque[tuple[Any, ...]] = deque(maxlen=_LOGGED_EVENTS)
        self.setups = FunctionSetups(limits.start_timeout)
        self.supervisor = Supervisor(limits, self.setups, ledger, self.commands)
        self.backlog = Backlog()
        self.closing = False
        self.kill_at = math.inf
        self.wake_at = math.inf
        self._has_limits = limits.max_tasks is not None or limits.max_memory is not None
        self._last_seq = 0

    def reconcile(self, now: float) -> None:
        """Bring work items and workers together, and start the workers that are missing."""
        supervisor, backlog = self.supervisor, self.backlog
        while supervisor.spares and (spare := supervisor.take_spare(now)) is not None:
            spare.state = _IDLE
            supervisor.idle.append(spare)
        if backlog.assigned:
            self._send_assigned(now)
        while supervisor.idle and backlog.queue.queues:
            self.assign(backlog.queue.get(), now)
        if supervisor.changed:
            supervisor.changed = False
            if not self.closing or backlog.pending:
                supervisor.start_missing(now)
            if supervisor.start_error is not None:
                self._fail_waiting(supervisor.start_error)
            self.update_wake_up()

    def assign(self, item: WorkItem, now: float) -> None:
        """Give a work item to an idle worker, if it is still wanted."""
        if item.claim is not None and not item.is_wanted():
            self.backlog.pending.discard(item)
            return
        idle, key = self.supervisor.idle, item.key
        worker = idle[-1]  # it was busy last, so its caches are warm
        if key in worker.functions.keys:
            idle.pop()
        else:
            loaded = (worker for worker in reversed(idle) if key in worker.functions.keys)
            worker = next(loaded, worker)
            idle.remove(worker)
        worker.state = _BUSY
        self._send(worker, item, now)
        if self._has_limits:
            self.supervisor.plan_replacement(worker)

    def free(self, worker: Worker, now: float) -> None:
        """Decide what a worker does next that no longer has a work item."""
        supervisor, backlog, state = self.supervisor, self.backlog, worker.state
        if worker.trip is not None or (state is not _BUSY and state is not _PREPARING):
            pass  # it has been killed or stopped meanwhile
        elif supervisor.closing:
            supervisor.stop(worker, now)
        elif state is _PREPARING:
            self._prepare(worker, now)
        elif self._has_limits and supervisor.must_retire(worker):
            supervisor.stop(worker, now)
            backlog.unassign(worker)
        else:
            if self._has_limits and supervisor.is_to_be_measured(worker):
                self.commands.append(MeasureMemory(worker))
            worker.state = _IDLE
            supervisor.idle.append(worker)
        if backlog.queue.queues or backlog.assigned or supervisor.spares or supervisor.changed:
            self.reconcile(now)

    def _prepare(self, worker: Worker, now: float) -> None:
        """Have a worker that takes no batches yet set up the next function, or make it a spare."""
        item = self.backlog.next_assigned(worker)
        if item is None:
            functions = self.setups.functions
            missing = (key for key in functions if key not in worker.functions.keys)
            key = next(missing, None)
            if key is None:
                self.supervisor.make_spare(worker)
                return
            item = WorkItem(functions[key], None)
            item.is_abandoned = True  # it has no callers
            self.backlog.pending.add(item)
        self._send(worker, item, now)

    def _send_assigned(self, now: float) -> None:
        for worker in list(self.backlog.assigned):
            if worker.state is _IDLE:
                self.supervisor.idle.remove(worker)
                worker.state = _BUSY
            elif worker.state is WorkerState.SPARE:
                self.supervisor.spares.remove(worker)
                worker.state = _PREPARING
            else:
                continue
            item = self.backlog.next_assigned(worker)
            assert item is not None  # noqa: S101 - no list in `assigned` is empty
            self._send(worker, item, now)

    def _send(self, worker: Worker, item: WorkItem, now: float) -> None:
        self._last_seq = seq = self._last_seq + 1
        worker.trip = trip = Trip(worker, item, seq, now, worker.state is _PREPARING)
        if item.is_tear_down:
            worker.functions.discard(item.key)
        else:
            timeout = item.timeout
            if item.key != worker.functions.last and worker.functions.use(item.key):
                trip.with_function = True
                trip.setup_timeout = self.setups.timeout(item.key)
                timeout = trip.setup_timeout if timeout is None else timeout
            if timeout is not None:
                self.limit(worker, timeout, now)
        self.commands.append(trip)

    def put_back(self, item: WorkItem) -> None:
        """Let any worker run a work item, even if no worker can be started for now."""
        self.supervisor.try_again()
        self.backlog.put_back(item)

    def resolve(self, item: WorkItem, outcome: Outcome) -> None:
        """Have the callers of a work item get an outcome, unless they do not wait for it."""
        if item in self.backlog.pending:
            self.backlog.pending.discard(item)
            self.commands.append(Resolve(item, outcome))

    def _fail_waiting(self, start_error: PoolBrokenError) -> None:
        for item in self.backlog.clear_waiting():  # callers may submit more, which tries again
            error = PoolBrokenError(str(start_error))
            error.__cause__ = start_error.__cause__
            self.resolve(item, error)

    def worker_of(self, item: WorkItem) -> Worker | None:
        """Return the worker that has a work item."""
        for worker in self.supervisor.workers:
            if worker.trip is not None and worker.trip.item is item:
                return worker
        return None

    def reset(self, error: PoolBrokenError) -> list[WorkItem]:
        """Forget all workers and work items; see `PoolState.reset`."""
        items = list(self.backlog.pending)
        self.backlog.clear_waiting()
        self.backlog.pending.clear()
        outcomes = [command for command in self.commands if isinstance(command, Resolve)]
        self.commands.clear()
        self.commands.extend(outcomes)
        self.supervisor.reset(error)
        self.wake_at = self.kill_at = math.inf
        return items

    # --- time

    def limit(self, worker: Worker, seconds: float | None, now: float) -> None:
        """Set when the progress of a worker is to be checked; None: never."""
        worker.deadline = math.inf if seconds is None else now + seconds
        self.wake_at = min(self.wake_at, worker.deadline)

    def update_wake_up(self) -> None:
        deadlines = [worker.deadline for worker in self.supervisor.workers]
        self.wake_at = min(self.supervisor.retry_at, self.kill_at, *deadlines)
