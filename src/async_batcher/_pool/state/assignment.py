"""Which worker gets which work item. Pure.

::

    queue --assign--> a worker that is idle, which runs it --> reply
      |  ^                             ^
      |  `------- taken back --------. | reply to what it ran before
      `----send_ahead--> waits at a worker that is busy

Rules:

- `reconcile`, at the end of every event, brings work items and workers together.
- A work item is sent ahead while no worker is idle, to one that has loaded its function. One waits
  at a worker. One with a ``claim`` is not sent: its future can be cancelled until it starts.
- It is taken back when another worker is idle, and when its worker is interrupted, killed or to be
  replaced. The worker may have started it: only the driver can tell, with
  `WorkerEvents.taken_back`.
"""

from __future__ import annotations

import math
from collections import deque
from typing import TYPE_CHECKING, Any

from async_batcher._pool import errors
from async_batcher._pool.state.backlog import Backlog
from async_batcher._pool.state.commands import Abandon, CheckWorker, MeasureMemory, Resolve
from async_batcher._pool.state.setups import FunctionSetups
from async_batcher._pool.state.supervisor import Supervisor
from async_batcher._pool.state.worker import ABANDONED, Trip, Worker, WorkerState
from async_batcher._pool.work_item import WorkItem
from async_batcher.exceptions import PoolBrokenError

if TYPE_CHECKING:
    from async_batcher._pool.state.commands import Command
    from async_batcher._pool.state.ledger import WorkerLedger
    from async_batcher._pool.state.supervisor import PoolLimits
    from async_batcher._worker.results import Outcome

_LOGGED_EVENTS = 200
_MAX_OVERTAKEN = 4  # later work items for each worker, by one that waits at a worker

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
        # Busy workers at which nothing waits, perhaps; see `Supervisor.may_wait_at`.
        self._open: dict[Worker, None] = {}
        self._has_limits = limits.max_tasks is not None or limits.max_memory is not None
        self._last_seq = 0
        self._overtaken_at = 0  # the sequence number at which `_asks_overtaken_back` looks again

    def reconcile(self, now: float) -> None:
        """Bring work items and workers together, and start the workers that are missing."""
        supervisor, backlog = self.supervisor, self.backlog
        while supervisor.spares and (spare := supervisor.take_spare(now)) is not None:
            spare.state = _IDLE
            supervisor.idle.append(spare)
        if backlog.assigned:
            self._send_assigned(now)
        while supervisor.idle and backlog.queue.queues:
            item = backlog.queue.get()
            item.began_at = now
            self.assign(item, now)
        if self._open and backlog.queue.queues:
            self.send_ahead(now)
        if supervisor.idle and supervisor.ahead:
            self._take_some_back()
        if supervisor.changed:
            supervisor.changed = False
            if not self.closing or backlog.pending:
                supervisor.start_missing(now)
            if supervisor.start_error is not None:
                self._fail_waiting(supervisor.start_error)
            self.update_wake_up()
            if supervisor.spares:  # for one of which a restart may have marked a worker
                self.reconcile(now)

    def assign(self, item: WorkItem, now: float) -> None:
        """Give a work item to an idle worker, if it is still wanted."""
        if item.claim is not None and not item.is_wanted():
            self.backlog.pending.pop(item, None)
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

    def send_ahead(self, now: float) -> None:
        """Send what waits for any worker to busy workers that have loaded its function."""
        queue = self.backlog.queue
        while queue.queues:
            item = queue.get()
            if not self.send_one_ahead(item, now):
                queue.put_front(item.client, item)
                return

    def send_one_ahead(self, item: WorkItem, now: float) -> bool:
        """Send a work item to a busy worker that has loaded its function, if there is one."""
        worker = self._open_worker(item.key) if item.claim is None else None
        if worker is None or self._asks_overtaken_back():
            return False
        del self._open[worker]
        self.backlog.pending[item] = None
        self._last_seq = seq = self._last_seq + 1
        trip = Trip(worker, item, seq, now, False)  # noqa: FBT003 - `is_ahead`
        trip.is_waiting = True
        if item.key != worker.functions.last:
            worker.functions.use(item.key)
        self.supervisor.ahead[worker] = trip
        self.commands.append(trip)
        return True

    def _asks_overtaken_back(self) -> bool:
        """Take back what waits at a worker that is busy for long, while others go on."""
        if self._last_seq < self._overtaken_at:  # nearly always; the first only gets later
            return False
        first = next(iter(self.supervisor.ahead.values()), None)
        if first is None or first.is_asked_back:
            return False
        self._overtaken_at = first.seq + _MAX_OVERTAKEN * self.supervisor.limits.size + 1
        is_overtaken = self._last_seq >= self._overtaken_at
        if is_overtaken:
            self.supervisor.take_back(first.worker)
        return is_overtaken

    def reopen(self, worker: Worker) -> None:
        """Note that what waited at a worker has been taken back."""
        if worker.state is _BUSY:
            self._open[worker] = None

    def _open_worker(self, key: bytes) -> Worker | None:
        closed: list[Worker] = []
        found = None
        for worker in self._open:
            if not self.supervisor.may_wait_at(worker) or worker in self.backlog.assigned:
                if not worker.retire_when_replaced:  # a restart that fails undoes that
                    closed.append(worker)
            elif key in worker.functions.keys and key not in worker.functions.outdated:
                found = worker
                break
        for worker in closed:
            del self._open[worker]  # until it gets its next work item
        return found

    def _take_some_back(self) -> None:
        """Take back what has waited longest at busy workers, as much as idle workers can run."""
        supervisor = self.supervisor
        trips = [trip for trip in supervisor.ahead.values() if not trip.is_asked_back]
        asked = sum(t.is_asked_back and not t.has_begun for t in supervisor.ahead.values())
        for trip in trips[: max(0, len(supervisor.idle) - asked)]:
            supervisor.take_back(trip.worker)

    def begin_next(self, worker: Worker, now: float) -> None:
        """Note that a worker runs what waited there, if anything did, in place of its last trip."""
        worker.trip = trip = self.supervisor.ahead.pop(worker, None)
        if worker.is_alive():
            worker.deadline = math.inf
        if trip is not None:
            trip.is_waiting = False
            trip.sent_at = trip.progressed_at = now
            trip.item.began_at = now
            if trip.interrupt_reason:
                self.resolve(trip.item, errors.abandoned_error(), runs=True)
                self.commands.append(CheckWorker(worker))
            if worker.state is _BUSY:
                self._open[worker] = None
                if trip.item.timeout is not None and not trip.is_staging:
                    self.limit(worker, trip.item.timeout, now)
                if self._has_limits:
                    self.supervisor.plan_replacement(worker)
                    self._measure(worker)

    def free(self, worker: Worker, now: float) -> None:
        """Decide what a worker does next that no longer has a work item."""
        supervisor, backlog, state = self.supervisor, self.backlog, worker.state
        if worker.trip is not None and state is _BUSY:  # it runs what waited there
            if not (
                supervisor.idle or backlog.queue.queues or supervisor.spares or supervisor.changed
            ):
                return
        elif worker.trip is not None or (state is not _BUSY and state is not _PREPARING):
            if state is WorkerState.INTERRUPTED and worker.trip is None:
                supervisor.stop(worker, now)
        elif supervisor.closing:
            supervisor.stop(worker, now)
        elif state is _PREPARING:
            self._prepare(worker, now)
        elif self._has_limits and supervisor.must_retire(worker):
            supervisor.stop(worker, now)
            backlog.unassign(worker)
        else:
            if self._has_limits:
                self._measure(worker)
            worker.state = _IDLE
            supervisor.idle.append(worker)
        if (
            backlog.queue.queues
            or supervisor.ahead
            or backlog.assigned
            or supervisor.spares
            or supervisor.changed
        ):
            self.reconcile(now)

    def _measure(self, worker: Worker) -> None:
        if self.supervisor.is_to_be_measured(worker):
            self.commands.append(MeasureMemory(worker))

    def _prepare(self, worker: Worker, now: float) -> None:
        """Have a worker that takes no batches yet set up the next function, or make it a spare."""
        item = self.backlog.next_assigned(worker)
        if item is None:
            function = self.setups.next_missing(worker.functions.keys)
            if function is None:
                self.supervisor.make_spare(worker)
                return
            item = WorkItem(function, None)
            item.is_abandoned = True  # it has no callers
            self.backlog.pending[item] = None
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
            if item.key != worker.functions.last:
                is_new = item.key not in worker.functions.keys
                trip.with_function = worker.functions.use(item.key)
                if is_new:
                    trip.setup_timeout = self.setups.timeout(item.key)
                    timeout = trip.setup_timeout if timeout is None else timeout
            if timeout is not None:
                self.limit(worker, timeout, now)
        if trip.with_function and trip.setup_timeout is None:  # `Trip.is_refresh`
            self._open.pop(worker, None)
        elif worker.state is _BUSY:
            self._open[worker] = None
        self.commands.append(trip)

    def requeue(self, item: WorkItem) -> None:
        """Let any worker run a work item, even if no worker can be started for now."""
        self.supervisor.try_again()
        item.began_at = math.inf
        self.backlog.requeue(item)

    def resolve(self, item: WorkItem, outcome: Outcome, *, runs: bool = False) -> None:
        """Have the callers of a work item get an outcome, unless they do not wait for it."""
        if runs and item.counts_until_end:
            item.verdict = outcome
        elif item in self.backlog.pending:
            self.backlog.pending.pop(item, None)
            self.commands.append(Resolve(item, outcome))

    def _fail_waiting(self, start_error: PoolBrokenError) -> None:
        for item in self.backlog.clear_waiting():  # callers may submit more, which tries again
            error = PoolBrokenError(str(start_error))
            error.__cause__ = start_error.__cause__
            self.resolve(item, error)

    def take_back(self, item: WorkItem, *, interrupt: bool = False) -> bool:
        """Take back, or interrupt, what waits at a worker; return whether it is at one."""
        for worker, trip in self.supervisor.ahead.items():
            if trip.item is item:
                trip.interrupt_reason = ABANDONED if interrupt else ""
                if trip.is_asked_back:  # the worker has started it
                    self.commands.append(Abandon(trip))
                self.supervisor.take_back(worker)
                return True
        return False

    def worker_of(self, item: WorkItem) -> Worker | None:
        """Return the worker that runs a work item."""
        for worker in self.supervisor.workers:
            if (trip := worker.trip) is not None and trip.item is item:  # other threads may ask
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
        self._open.clear()
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
