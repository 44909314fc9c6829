"""The workers of a pool: which are to be started, replaced and stopped. Pure.

Rules:

- ``size`` workers run batches. A worker that is to be replaced stays until its replacement is
  ready, unless it has run all the batches that it may run. So its replacement is started ahead, by
  as long as workers need to get ready.
- Where functions have a set-up, a new worker runs the set-ups of all functions in the pool before
  it takes batches, and the one that it replaces works until then.
- Each worker has a number below ``size``. Workers share one only while one of them is replaced by
  the other, or exits; two that take batches never do.
- Workers that exit before they are ready are started again after growing delays. If no worker has
  been ready and starts fail again and again, `start_error` is set until the next call tries again.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

from async_batcher._pool.errors import crash_error
from async_batcher._pool.state.commands import KillWorker, StartWorker, StopWorker, TakeBack
from async_batcher._pool.state.restart import Restart
from async_batcher._pool.state.worker import (
    START_FAILED,
    StartFailure,
    Worker,
    WorkerState,
    staying_workers,
)
from async_batcher._serialization.exception_text import one_line
from async_batcher.exceptions import PoolBrokenError

if TYPE_CHECKING:
    from collections import deque

    from async_batcher._pool.state.commands import Command
    from async_batcher._pool.state.ledger import WorkerLedger
    from async_batcher._pool.state.setups import FunctionSetups
    from async_batcher._pool.state.worker import Progress, Trip

# Seconds before the next start, after one, two, three failed rounds in a row. After the fourth the
# pool reports the failure: what fails four times in a second and a half will not fix itself.
_BACKOFF_DELAYS = (0.05, 0.25, 1.0)
_MAX_BACKOFF_DELAY = 5.0  # seconds, while other workers live
_REPLACEMENT_LEAD_FACTOR = 2.0  # times the seconds that workers need to get ready
EXIT_STATUS_TIMEOUT = 1.0  # seconds to wait for the exit status after SIGKILL
_STOP_TIMEOUT = 30.0  # seconds for a replaced worker, which may be halted


class PoolLimits(NamedTuple):
    """The options of a pool that decisions depend on; see `WorkerPool`."""

    size: int
    start_timeout: float = 60.0
    max_tasks: int | None = None
    max_memory: int | None = None


class Supervisor:
    """The workers of a pool.

    Attributes:
        workers: All workers, those that start or exit too.
        idle: Workers that can take a batch; the last one was busy last.
        ahead: The trips that wait at busy workers.
        spares: Workers that are ready, and wait for another one's place.
        changed: Whether workers may be missing, or have new deadlines.
        start_error: Why no worker can be started for now.
        retry_at: When the next start is tried, after one that failed.
        restart: What replaces all workers.
    """

    def __init__(
        self,
        limits: PoolLimits,
        setups: FunctionSetups,
        ledger: WorkerLedger,
        commands: deque[Command],
    ) -> None:
        self.limits = limits
        self.workers: list[Worker] = []
        self.idle: list[Worker] = []
        self.spares: list[Worker] = []
        self.ahead: dict[Worker, Trip] = {}
        self.changed = True
        self.start_error: PoolBrokenError | None = None
        self.retry_at = math.inf
        self.closing = False
        self.restart = Restart(commands)
        self._setups = setups
        self._ledger = ledger
        self._commands = commands
        self._failed_rounds = 0  # in a row
        self._last_failure: BaseException | None = None

    # --- queries

    def active(self) -> list[Worker]:
        """Return the workers that take batches, or run one."""
        states = (WorkerState.IDLE, WorkerState.BUSY)
        return [worker for worker in self.workers if worker.state in states]

    def is_full(self) -> bool:
        """Tell whether all workers are active.

        Raises:
            PoolBrokenError: Some cannot be started for now.
        """
        if self.start_error is not None:
            raise PoolBrokenError(str(self.start_error)) from self.start_error.__cause__
        count, size = len(self.active()), self.limits.size
        if 0 < count < size and self._failed_rounds > len(_BACKOFF_DELAYS):
            failure = self._last_failure
            why = one_line(failure) if failure is not None else "unknown"
            msg = (
                f"only {count} of {size} workers could be started, and they go on working. "
                f"Last failure: {why}"
            )
            raise PoolBrokenError(msg) from failure
        return count >= size

    # --- starting

    def start_missing(self, now: float) -> None:
        """Start the workers that are missing, unless failed starts delay it."""
        if self.retry_at < math.inf or self.closing or self.start_error is not None:
            return
        if self.restart.outdated:
            old = self.restart.advance([*self.idle, *self.active()])
            if old is not None:
                self.take_back(old)
        size, timeout = self.limits.size, self.limits.start_timeout
        while len(staying := staying_workers(self.workers)) < size:
            worker = Worker(now, timeout, _free_number(size, self.workers, staying))
            self.workers.append(worker)
            self._ledger.started += 1
            self._commands.append(StartWorker(worker))

    def try_again(self) -> None:
        """Start workers again, although the last starts failed."""
        if self.start_error is not None:
            self.start_error = None
            self.changed = True

    def on_ready(self, worker: Worker, now: float) -> None:
        worker.deadline = math.inf
        worker.ever_ready = self.changed = True
        worker.state = WorkerState.PREPARING
        self._failed_rounds = 0
        self._setups.start_seconds = now - worker.created_at

    def on_start_refused(self, worker: Worker, error: Exception, now: float) -> None:
        """Forget a worker that could not even be prepared for its process."""
        worker.state = WorkerState.EXITED
        self.workers.remove(worker)
        self.changed = True
        self._ledger.started -= 1
        self._back_off(StartFailure(error, cause=START_FAILED), now)

    # --- replacing

    def make_spare(self, worker: Worker) -> None:
        worker.state = WorkerState.SPARE
        self.spares.append(worker)

    def take_spare(self, now: float) -> Worker | None:
        """Take a spare for a free place; stop the idle worker that waits to be replaced by it."""
        active = {worker.number: worker for worker in self.active()}
        for spare in self.spares:
            old = active.get(spare.number)
            if old is None or (old.retire_when_replaced and old.state is WorkerState.IDLE):
                if old is not None:
                    self.stop(old, now)
                self.spares.remove(spare)
                self.changed = True
                return spare
        return None

    def plan_replacement(self, worker: Worker) -> None:
        """Order a replacement if the batch that a worker is about to start is one of its last."""
        max_tasks = self.limits.max_tasks
        if max_tasks is None or worker.has_replacement:
            return
        left = max_tasks - worker.batches - 1
        mean = worker.busy_seconds / worker.batches if worker.batches else math.inf
        lead = _REPLACEMENT_LEAD_FACTOR * self._setups.ready_seconds()
        if left <= 0 or left * mean <= lead:
            worker.has_replacement = self.changed = True

    def must_retire(self, worker: Worker) -> bool:
        """Tell whether a worker has run all its batches, and need not wait for its replacement."""
        max_tasks = self.limits.max_tasks
        if max_tasks is None or worker.batches < max_tasks:
            return False
        if max_tasks == 1 or not self._setups.has_setups():
            return True
        if any(spare.number == worker.number for spare in self.spares):
            return True
        worker.retire_when_replaced = True
        if not worker.has_replacement:  # a restart has failed while it ran its last batch
            worker.has_replacement = self.changed = True
        return False

    def is_to_be_measured(self, worker: Worker) -> bool:
        """Tell whether the memory of a worker decides on its replacement."""
        return self.limits.max_memory is not None and not worker.retire_when_replaced

    def on_memory(self, worker: Worker, size: int) -> None:
        """Order a replacement for a worker that uses too much memory."""
        limit = self.limits.max_memory
        if limit is not None and size > limit and worker.is_alive():
            worker.retire_when_replaced = worker.has_replacement = self.changed = True
            self.take_back(worker)

    def may_wait_at(self, worker: Worker) -> bool:
        """Tell whether a work item may be sent ahead to a worker, which will run it."""
        max_tasks = self.limits.max_tasks
        return (
            worker.state is WorkerState.BUSY
            and worker.trip is not None  # else its reply is being read
            and not worker.trip.interrupt_reason
            and worker not in self.ahead
            and not worker.retire_when_replaced
            and not self.closing
            and (max_tasks is None or worker.batches + 2 <= max_tasks)  # it runs one now
        )

    # --- stopping

    def stop(self, worker: Worker, now: float) -> None:
        """Have a worker without a work item exit by itself."""
        self._remove_from_ready(worker)
        if worker.state is not WorkerState.INTERRUPTED:  # else it is killed at its deadline
            worker.stopped = True
            worker.deadline = now + _STOP_TIMEOUT
        worker.state = WorkerState.STOPPING
        self.changed = True
        self._commands.append(StopWorker(worker))

    def kill(self, worker: Worker, reason: str, now: float) -> None:
        """Kill a worker in any state."""
        if worker.state is WorkerState.EXITED:
            return
        self._remove_from_ready(worker)
        self.take_back(worker)  # first: it may be about to start that
        worker.mark_killed(reason)
        worker.deadline = now + EXIT_STATUS_TIMEOUT
        self.changed = True
        self._commands.append(KillWorker(worker))

    def take_back(self, worker: Worker) -> None:
        """Take back what waits at a worker, if it has not started that."""
        trip = self.ahead.get(worker)
        if trip is not None and not trip.is_asked_back:
            trip.is_asked_back = True
            self._commands.append(TakeBack(trip))

    def on_channel_ended(self, worker: Worker) -> None:
        """Take a worker out whose channel has ended: it has exited, or is about to."""
        self._remove_from_ready(worker)
        worker.state = WorkerState.EXITING

    def on_exit(self, worker: Worker, progress: Progress, now: float) -> None:
        """Count a worker that exited; back off if it was never ready."""
        self._remove_from_ready(worker)
        worker.state = WorkerState.EXITED
        worker.deadline = math.inf
        self.workers.remove(worker)
        self.changed = True
        if self.closing:
            return
        self._ledger.record_exit(worker)
        if self.retry_at < math.inf and not any(one.is_alive() for one in self.workers):
            self.retry_at = min(self.retry_at, now + _BACKOFF_DELAYS[-1])  # it was the last one
        if not worker.ever_ready:
            crash = StartFailure(crash_error(worker, progress, started=False))
            self._back_off(worker.start_failure or crash, now)

    def close(self) -> None:
        """Start no more workers, and count no more exits."""
        self.closing = True
        self.retry_at = math.inf

    def reset(self, error: PoolBrokenError) -> None:
        """Forget all workers; none can be started until the next call, because of ``error``."""
        for worker in self.workers:
            worker.state, worker.trip = WorkerState.EXITED, None
        groups: tuple[Any, ...] = (self.workers, self.idle, self.spares, self.ahead)
        for group in groups:
            group.clear()
        self.retry_at = math.inf
        self.start_error = error

    def _remove_from_ready(self, worker: Worker) -> None:
        for group in (self.idle, self.spares):
            if worker in group:
                group.remove(worker)

    # --- start failures

    def _back_off(self, failure: StartFailure, now: float) -> None:
        """Retry later; report the failure if no worker is left and retries are pointless."""
        self._last_failure = failure.error
        if self.retry_at == math.inf:
            delays = (*_BACKOFF_DELAYS, _MAX_BACKOFF_DELAY)
            self.retry_at = now + delays[min(self._failed_rounds, len(_BACKOFF_DELAYS))]
            self._failed_rounds += 1
        alive = [worker for worker in self.workers if worker.is_alive()]
        exhausted = self._failed_rounds > len(_BACKOFF_DELAYS)
        again = "workers exit before they are ready"
        if failure.cause == START_FAILED:
            again = "no worker process can be started"
        why = failure.why or (again if exhausted else "")
        if self.restart.outdated and why:
            self.restart.fail(why, failure.error, self.workers)
        if any(worker.ever_ready for worker in alive) or (alive and not exhausted):
            return  # one that starts may get ready
        if why:
            self._give_up(why, failure.error)

    def retry(self) -> None:
        """Try again after the delay."""
        self.retry_at = math.inf
        self.changed = True

    def _give_up(self, why: str, cause: BaseException) -> None:
        self.retry_at = math.inf
        self._failed_rounds = 0
        cause_text = one_line(cause).rstrip(".")
        self.start_error = PoolBrokenError(
            f"the pool cannot start a worker ({why}): {cause_text}. The next call tries again"
        )
        self.start_error.__cause__ = cause


def _free_number(size: int, workers: list[Worker], staying: list[Worker]) -> int:
    """Return the lowest number that no worker has; or that of one to replace, or that exits."""
    present = {worker.number for worker in workers}
    taken = {worker.number for worker in staying}
    free = (number for number in range(size) if number not in taken)
    return min(free, key=lambda number: (number in present, number))
