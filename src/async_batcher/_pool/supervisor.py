"""The workers of a pool: starting, replacing and stopping them.

::

    a worker is missing --> WorkerStarter --> set-ups: preparing --> spare --> idle <--> busy
            ^                                     |                             |
            |                                     `--> failed: back off,        | max_tasks or
            |                                          or report `on_broken`    | max_memory
            `-------------------------------------------------------------------'

Rules:

- ``max_workers`` workers run batches. A worker that is to be replaced stays until its replacement
  is ready, unless it has run all the batches that it may run. So its replacement is started ahead,
  by as long as workers need to get ready.
- Where functions have a set-up, a worker is ready when it has run the set-ups of all functions in
  the pool, and the one that it replaces works until then.
- Workers that exit before they are ready are started again after growing delays. If no worker is
  left and starts failed again and again, `on_broken` gets the last cause; the next call tries
  again.
"""

from __future__ import annotations

import math
import mmap
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from async_batcher._pool.errors import crash_error
from async_batcher._pool.processes.exit_status import exit_status_name
from async_batcher._pool.setups import FunctionSetups
from async_batcher._pool.worker_handle import (
    SHUTDOWN_GRACE,
    TEAR_DOWN_GRACE,
    WorkerHandle,
    WorkerState,
)
from async_batcher._serialization.codec import Codec
from async_batcher._serialization.exception_text import one_line
from async_batcher._serialization.remote_exception import decode_exception
from async_batcher.exceptions import PoolBrokenError
from async_batcher.stats import WorkerCounts

if TYPE_CHECKING:
    import asyncio

    from async_batcher._pool.dispatcher import PoolDispatcher
    from async_batcher._pool.pickled_function import PickledFunction
    from async_batcher._pool.pool_options import PoolOptions
    from async_batcher._pool.processes.worker_starter import WorkerStarter

# Seconds before the next start, after one, two, three failed rounds in a row. After the fourth the
# pool reports the failure: what fails four times in a second and a half will not fix itself.
_BACKOFF_DELAYS = (0.05, 0.25, 1.0)
_MAX_BACKOFF_DELAY = 5.0  # seconds, while other workers live
_REPLACEMENT_LEAD_FACTOR = 2.0  # times the seconds that workers need to get ready


class WorkerLedger:
    """The counts of one pool, over all its starts and stops."""

    def __init__(self) -> None:
        self.started = 0
        self._crashed: Counter[str] = Counter()
        self._recycled = 0

    def record_exit(self, worker: WorkerHandle) -> None:
        """Count a worker that exited while the pool was not stopping."""
        if worker.stopped:
            self._recycled += 1
        else:
            self._crashed[worker.kill_reason or exit_status_name(worker.exit_code)] += 1

    def counts(self) -> WorkerCounts:
        return WorkerCounts(self.started, dict(self._crashed), self._recycled)


class Supervisor:
    """The workers of a pool, ``size`` of them.

    Attributes:
        workers: All workers, those that start or exit too.
        idle: Workers that can take a batch; the last one was busy last.
        spares: Workers that are ready, and wait for another one's place.
        preparing: Workers that set up functions before they take batches.
        start_error: Why no worker can be started for now.
    """

    def __init__(
        self,
        dispatcher: PoolDispatcher,
        starter: WorkerStarter,
        options: PoolOptions,
        ledger: WorkerLedger,
    ) -> None:
        self.size = options.size
        self.max_tasks = options.max_tasks_per_child
        self.max_memory = options.max_memory_per_child
        self.workers: list[WorkerHandle] = []
        self.idle: list[WorkerHandle] = []
        self.spares: list[WorkerHandle] = []
        self.preparing: list[WorkerHandle] = []
        self.setups = FunctionSetups(options.start_timeout)
        self.start_error: PoolBrokenError | None = None
        self._dispatcher = dispatcher
        self._starter = starter
        self._ledger = ledger
        self._failed_starts = 0  # rounds in a row
        self._retry_timer: asyncio.TimerHandle | None = None
        self._last_failure: BaseException | None = None
        self._closing = False

    # --- queries

    def active(self) -> list[WorkerHandle]:
        """Return the workers that take batches, or run one."""
        waiting = [*self.spares, *self.preparing]
        states = (WorkerState.IDLE, WorkerState.BUSY)
        return [w for w in self.workers if w.state in states and w not in waiting]

    def state_of(self, worker: WorkerHandle) -> WorkerState:
        """Return a worker's state; one that sets up functions ahead is still starting."""
        preparing = worker in self.preparing and worker.is_alive()
        return WorkerState.STARTING if preparing else worker.state

    def is_full(self) -> bool:
        """Tell whether all workers are active.

        Raises:
            PoolBrokenError: Some cannot be started for now.
        """
        if self.start_error is not None:
            raise PoolBrokenError(str(self.start_error)) from self.start_error.__cause__
        count = len(self.active())
        if 0 < count < self.size and self._failed_starts > len(_BACKOFF_DELAYS):
            failure = self._last_failure
            why = one_line(failure) if failure is not None else "unknown"
            msg = (
                f"only {count} of {self.size} workers could be started, and they go on working. "
                f"Last failure: {why}"
            )
            raise PoolBrokenError(msg) from failure
        return count >= self.size

    # --- starting

    def spawn_missing(self) -> None:
        """Start the workers that are missing."""
        if self._retry_timer is not None or self._closing or not self._dispatcher.needs_workers():
            return
        if self.start_error is not None:  # until the next call
            return
        alive = sum(worker.is_alive() for worker in self.workers)
        replaced = sum(worker.has_replacement and worker.is_alive() for worker in self.workers)
        try:
            for _ in range(self.size + replaced - alive):
                self._starter.start(self._add)
        except Exception as exc:  # noqa: BLE001 - no descriptors, no memory, an audit hook
            self._back_off(exc, initializer_raised=False)  # last: a callback may call this again

    def _add(self, worker: WorkerHandle) -> None:
        self.workers.append(worker)
        self._ledger.started += 1

    def on_ready(self, worker: WorkerHandle) -> None:
        self._failed_starts = 0
        self.setups.start_seconds = worker.start_seconds
        self.preparing.append(worker)

    def on_start_timeout(self, worker: WorkerHandle) -> None:
        self._starter.on_start_timeout(worker)

    def next_function(self, worker: WorkerHandle) -> PickledFunction | None:
        """Return the next function that a worker is to set up; None makes it a spare."""
        for key, function in self.setups.functions.items():
            if key not in worker.loaded_functions:
                return function
        self.preparing.remove(worker)
        self.spares.append(worker)
        return None

    # --- replacing

    def next_replacement(self) -> WorkerHandle | None:
        """Return a spare for a free place; stop an idle worker that waits to be replaced."""
        if not self.spares:
            return None
        if len(self.active()) >= self.size:
            old = next((worker for worker in self.idle if worker.retire_when_replaced), None)
            if old is None:
                return None
            self.idle.remove(old)
            old.stop()
        return self.spares.pop(0)

    def plan_replacement(self, worker: WorkerHandle) -> None:
        """Start a replacement if the batch that a worker has just started is one of its last."""
        left = self.max_tasks - worker.batches - 1 if self.max_tasks is not None else math.inf
        mean = worker.busy_seconds / worker.batches if worker.batches else math.inf
        lead = _REPLACEMENT_LEAD_FACTOR * self.setups.ready_seconds()
        if left <= 0 or left * mean <= lead:
            worker.has_replacement = True
            self.spawn_missing()

    def may_retire(self, worker: WorkerHandle) -> bool:
        """Tell whether a worker stops now, and does not wait for its replacement's set-ups."""
        if self.spares or self.max_tasks == 1 or not self.setups.has_setups():
            return True
        worker.retire_when_replaced = True
        return False

    def check_memory(self, worker: WorkerHandle) -> None:
        """Start a replacement for a worker that uses too much memory."""
        if self.max_memory is not None and memory_of(worker) > self.max_memory:
            worker.retire_when_replaced = worker.has_replacement = True
            self.spawn_missing()

    def on_exit(self, worker: WorkerHandle) -> None:
        self.workers.remove(worker)
        for group in (self.idle, self.spares, self.preparing):
            if worker in group:
                group.remove(worker)
        if self._closing:
            return
        self._ledger.record_exit(worker)
        if worker.ever_ready:
            return
        if worker.init_failure is not None:
            error = decode_exception(Codec(), worker.init_failure)
            self._back_off(error, initializer_raised=True)
        else:
            error = worker.start_error or crash_error(worker, started=False)
            self._back_off(error, initializer_raised=False)

    # --- start failures

    def _back_off(self, cause: BaseException, *, initializer_raised: bool) -> None:
        """Retry later; report the failure if no worker is left and retries are pointless."""
        self._last_failure = cause
        if self._retry_timer is None:
            self._failed_starts += 1
            exhausted = self._failed_starts > len(_BACKOFF_DELAYS)
            delay = _MAX_BACKOFF_DELAY if exhausted else _BACKOFF_DELAYS[self._failed_starts - 1]
            self._retry_timer = self._dispatcher.loop.call_later(delay, self._retry)
        if any(worker.is_alive() for worker in self.workers):
            return
        if initializer_raised:
            self._fail("the initializer raised", cause)
        elif self._failed_starts > len(_BACKOFF_DELAYS):
            self._fail("workers exit before they are ready", cause)

    def _retry(self) -> None:
        self._retry_timer = None
        self.spawn_missing()

    def _fail(self, why: str, cause: BaseException) -> None:
        self._cancel_retry()
        self._failed_starts = 0
        msg = (
            f"the pool cannot start a worker ({why}): {one_line(cause)}. The next call tries again"
        )
        self.start_error = PoolBrokenError(msg)
        self.start_error.__cause__ = cause
        self._dispatcher.on_broken(msg, cause)

    def _cancel_retry(self) -> None:
        if self._retry_timer is not None:
            self._retry_timer.cancel()
            self._retry_timer = None

    # --- stopping

    def begin_shutdown(self) -> None:
        """Start no more workers, and count no more exits."""
        self._closing = True
        self._cancel_retry()

    def kill_all(self) -> None:
        for worker in list(self.workers):
            worker.kill()

    def shutdown_forced(self) -> asyncio.TimerHandle:
        """Kill all workers except idle ones with tear-downs, which get time to run them.

        Returns:
            The timer that kills those, too; the caller must cancel it.
        """
        for worker in list(self.workers):
            can_stop = worker.is_alive() or worker.state is WorkerState.STOPPING
            if not can_stop or not worker.can_tear_down:
                worker.kill()
            elif worker.state is WorkerState.IDLE:
                worker.stop()
        return self._dispatcher.loop.call_later(SHUTDOWN_GRACE, self.kill_all)

    def shutdown_idle(self) -> asyncio.TimerHandle:
        """Stop idle workers, and kill the others.

        Returns:
            The timer that kills workers which do not stop in time; the caller must cancel it.
        """
        for worker in list(self.workers):
            if worker.state is WorkerState.IDLE:
                worker.stop()
            elif worker.state in (WorkerState.STARTING, WorkerState.BUSY):
                worker.kill()
        grace = TEAR_DOWN_GRACE if self.setups.has_setups() else SHUTDOWN_GRACE
        return self._dispatcher.loop.call_later(grace, self.kill_all)

    async def close(self) -> None:
        """Close what starts workers, when all have exited."""
        await self._starter.close()

    def close_without_loop(self) -> None:
        self._closing = True
        if not self._dispatcher.loop.is_closed():
            self._cancel_retry()
        for worker in self.workers:
            worker.close_without_loop()
        self.workers.clear()
        self._starter.close_without_loop()

    def close_after_fork(self) -> None:
        for worker in self.workers:
            worker.close_fds()
        self._starter.close_after_fork()


def memory_of(worker: WorkerHandle) -> int:
    """Return a worker's private resident memory in bytes.

    Where /proc does not tell, that is the peak of its resident memory, or 0.
    """
    try:
        fields = Path("/proc", str(worker.pid), "statm").read_text().split()
        return (int(fields[1]) - int(fields[2])) * mmap.PAGESIZE
    except Exception:  # noqa: BLE001 - it has exited, there is no /proc, or an audit hook
        return worker.peak_rss if worker.state is not WorkerState.EXITED else 0
