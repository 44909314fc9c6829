"""A pool on one event loop, from its start to its stop: which worker gets which work item.

::

    submit --> FairQueue --assign--> an idle WorkerHandle --> on_results --> the caller
                   ^                   |  `-- timed out ---> on_timeout --> BatchTimeoutError
                   `---- requeue ------'     crashed: not started --> requeue
                                                      started ------> WorkerDiedError

The `Supervisor` starts, replaces and stops the workers.

Rules:

- A work item is in the queue, assigned to one worker, or resolved; never two of these.
- If no worker can be started, all queued work items get `PoolBrokenError` with the last cause. The
  next work item tries again.
"""

from __future__ import annotations

import asyncio
import warnings
from collections import Counter
from typing import TYPE_CHECKING, Any

from async_batcher._eventloop.future import future_factory
from async_batcher._eventloop.lifecycle import Session
from async_batcher._pool import errors
from async_batcher._pool.fair_queue import FairQueue
from async_batcher._pool.processes.process_watcher import close_after_fork
from async_batcher._pool.work_item import TearDownItem, WorkItem
from async_batcher._pool.worker_handle import SETUP_TIMEOUT, WorkerState
from async_batcher._transport.protocol import ReplyKind
from async_batcher.exceptions import PoolBrokenError

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Hashable
    from contextvars import Context

    from async_batcher._pool.pickled_function import PickledFunction
    from async_batcher._pool.supervisor import Supervisor
    from async_batcher._pool.worker_handle import WorkerHandle
    from async_batcher._serialization.codec import Payload
    from async_batcher._worker.results import Outcome

MAX_REQUEUES = 3  # of a work item that no worker has started


class PoolDispatcher(Session):
    """Assigns work items to workers."""

    noun = "pool"

    def __init__(
        self,
        name: str,
        loop: asyncio.AbstractEventLoop,
        context: Context,
        make_supervisor: Callable[[PoolDispatcher], Supervisor],
    ) -> None:
        super().__init__(loop, context)
        self.name = name
        self.new_future = future_factory(loop)
        self._pending: set[WorkItem] = set()  # work items that are not resolved
        self._queue: FairQueue[WorkItem] = FairQueue()
        self._assigned_to: dict[WorkerHandle, list[WorkItem]] = {}  # for one worker only
        self._shm_warning_given = False
        self._change_futures: list[asyncio.Future[None]] = []
        self._kill_timer: asyncio.TimerHandle | None = None  # for workers that do not stop
        self.supervisor = make_supervisor(self)
        self._idle = self.supervisor.idle
        close_after_fork(self)

    def __repr__(self) -> str:
        states = Counter(self.supervisor.state_of(w).value for w in self.supervisor.workers)
        parts = [
            "stopping" if self.closing else "running",
            f"workers=[{', '.join(f'{count} {state}' for state, count in states.items())}]",
            f"queued={len(self._queue)}",
            f"unresolved={len(self._pending)}",
        ]
        return f"<{self.name} {' '.join(parts)}>"

    # --- called by the pool and the runner

    def submit(self, work_item: WorkItem) -> None:
        if self.closing:
            work_item.resolve(errors.pool_stopped_error())
            return
        supervisor = self.supervisor
        supervisor.start_error = None
        self._pending.add(work_item)
        if self._idle and not self._queue.queues:
            self._assign(work_item)
        else:
            self._queue.put(work_item.client, work_item)
        # Killed workers may still be listed; their replacements were started when they were killed.
        if len(supervisor.workers) < supervisor.size:
            supervisor.spawn_missing()  # last: it may call `on_broken`

    def withdraw(self, work_item: WorkItem) -> None:
        """Forget a work item; a worker that has it finishes it."""
        self._queue.remove(work_item.client, work_item)
        self._pending.discard(work_item)
        work_item.detach()
        self._notify()

    def cancel(self, work_item: WorkItem, *, force: bool) -> None:
        """Cancel a work item whose callers were all cancelled.

        Args:
            work_item: The work item, which is not started if it is queued.
            force: Whether to kill the worker that runs it. But a set-up that takes longer than
                callers wait must be able to finish: it gets `FunctionSetups.abandoned_timeout`.
        """
        if self._queue.remove(work_item.client, work_item):
            self._resolve(work_item, errors.abandoned_error())
            return
        workers = self.supervisor.workers
        worker = next((worker for worker in workers if worker.work_item is work_item), None)
        if worker is None:
            return
        work_item.is_abandoned = True
        if force:
            self._resolve(work_item, errors.abandoned_error())
        if not force or worker.is_setting_up():
            worker.limit_setup(self.supervisor.setups.abandoned_timeout(work_item.key))
        else:
            worker.kill("abandoned")
            self.supervisor.spawn_missing()

    def abort(self, client: Hashable, error: BaseException) -> None:
        """Resolve what a client that is stopped by force still has here; kill set-ups for it.

        A worker that runs one of its work items finishes it.
        """
        for work_item in [item for item in self._pending if item.client is client]:
            self._queue.remove(client, work_item)
            for assigned in self._assigned_to.values():
                if work_item in assigned:
                    assigned.remove(work_item)
            self._resolve(work_item, error)
            for worker in self.supervisor.workers:
                if worker.work_item is work_item and worker.is_setting_up():
                    worker.kill("stopped")
                    self.supervisor.spawn_missing()
                    break

    def preload(self, function: PickledFunction, work_items: list[WorkItem]) -> int:
        """Have every worker load and set up a function, later workers before their first batch.

        Args:
            function: The function, pickled.
            work_items: One for each of ``max_workers`` workers.

        Returns:
            How many of the work items will run: one for each active worker.
        """
        self.supervisor.setups.functions[function.key] = function
        pairs = list(zip(self.supervisor.active(), work_items, strict=False))
        for worker, work_item in pairs:
            self._pending.add(work_item)
            self._assigned_to.setdefault(worker, []).append(work_item)
        self._dispatch_assigned()
        return len(pairs)

    async def forget_function(self, key: bytes, timeout: float | None) -> None:  # noqa: ASYNC109
        """Have every worker forget a function after its tear-down.

        Args:
            key: The function's key.
            timeout: Seconds until workers that run the tear-down are killed. None disables it.
        """
        supervisor = self.supervisor
        supervisor.setups.forget(key)
        for worker in supervisor.workers:
            can_run = worker.is_alive() or worker.state is WorkerState.STOPPING
            if key not in worker.loaded_functions or not can_run:
                continue
            assigned = self._assigned_to.setdefault(worker, [])
            if not any(isinstance(item, TearDownItem) and item.key == key for item in assigned):
                assigned.append(TearDownItem(key))
                self._pending.add(assigned[-1])
            if worker in supervisor.spares:
                supervisor.spares.remove(worker)
                supervisor.preparing.append(worker)
                self._prepare(worker)
        self._dispatch_assigned()
        try:
            async with asyncio.timeout(timeout):
                while tear_downs := self._pending_tear_downs(key):
                    current = [worker.work_item for worker in supervisor.workers]
                    if timeout is not None and not any(item in tear_downs for item in current):
                        break  # busy workers tear down after their batches
                    await self._wait_for_change()
        except TimeoutError:
            tear_downs = self._pending_tear_downs(key)
            for worker in supervisor.workers:
                if worker.work_item in tear_downs:
                    worker.kill("tear-down timeout")
            supervisor.spawn_missing()

    def _pending_tear_downs(self, key: bytes) -> list[WorkItem]:
        return [i for i in self._pending if isinstance(i, TearDownItem) and i.key == key]

    async def start(self) -> None:
        """Start every worker, and wait until all are active; see `WorkerPool.start`."""
        self.supervisor.start_error = None
        self.supervisor.spawn_missing()
        while not self.closing:
            if self.supervisor.is_full():
                return
            await self._wait_for_change()
        raise errors.stopped_midway_error()

    def close_now(self) -> None:
        """Kill all workers, not in a task: the loop may close before the task ends."""
        self.closing = True
        self._fail_pending()
        self.supervisor.kill_all()
        self.close_without_loop()

    def close_without_loop(self) -> None:
        """Kill all workers without the loop, which has closed or is about to."""
        self.closing = True
        self._pending.clear()
        if not self.is_inherited:
            self.supervisor.close_without_loop()

    def close_after_fork(self) -> None:
        """Close, in a forked child, what belongs to the parent."""
        self.closing = True
        self.supervisor.close_after_fork()

    # --- called by the supervisor

    def needs_workers(self) -> bool:
        return not self.closing or bool(self._pending)

    def on_broken(self, message: str, cause: BaseException) -> None:
        assigned = [item for items in self._assigned_to.values() for item in items]
        work_items = self._queue.clear() + assigned
        self._assigned_to.clear()
        for work_item in work_items:  # a caller may submit another one, which tries again
            error = PoolBrokenError(message)
            error.__cause__ = cause
            self._resolve(work_item, error)
        self._notify()

    # --- called by worker handles

    def on_ready(self, worker: WorkerHandle) -> None:
        self.supervisor.on_ready(worker)
        self._prepare(worker)

    def on_start_timeout(self, worker: WorkerHandle) -> None:
        self.supervisor.on_start_timeout(worker)

    def setup_timeout(self, work_item: WorkItem) -> float:
        return self.supervisor.setups.timeout(work_item.key)

    def on_setup_timeout(self, worker: WorkerHandle, work_item: WorkItem) -> None:
        """Kill a worker whose set-up takes too long, unless a caller waits without a timeout."""
        is_pending = work_item in self._pending
        if is_pending and not work_item.is_abandoned and work_item.timeout is None:
            return
        setups = self.supervisor.setups
        if worker not in self.supervisor.preparing:  # else `on_crash` counts it
            setups.on_failed(work_item.key)
        if work_item.is_abandoned:
            setups.on_abandoned_timeout(work_item.key)
        worker.kill(SETUP_TIMEOUT)
        if work_item.is_abandoned:
            self._resolve(work_item, errors.abandoned_error())
        else:
            seconds = setups.timeout(work_item.key)
            self._resolve(work_item, errors.setup_timeout_error(worker, seconds))
        self.supervisor.spawn_missing()

    def on_setup_done(self, work_item: WorkItem, seconds: float) -> None:
        """Have later workers set up a function before they take batches."""
        function = work_item.function
        if work_item in self._pending and function.has_setup:
            self.supervisor.setups.functions[work_item.key] = function
            self.supervisor.setups.on_done(work_item.key, seconds)

    def on_idle(self, worker: WorkerHandle) -> None:
        supervisor = self.supervisor
        if supervisor.preparing and worker in supervisor.preparing:
            self._prepare(worker)
            return
        max_tasks = supervisor.max_tasks
        if max_tasks is not None and worker.batches >= max_tasks and supervisor.may_retire(worker):
            self._retire(worker)
            return
        if supervisor.max_memory is not None and not worker.retire_when_replaced:
            supervisor.check_memory(worker)
        self._idle.append(worker)
        if supervisor.spares:
            self._activate_spares()
        if self._assigned_to:
            self._dispatch_assigned()
        if self._queue.queues:
            self._dispatch()
        if self._change_futures:
            self._notify()

    def on_results(self, work_item: WorkItem, results: Payload) -> None:
        if work_item in self._pending:
            outcome = work_item.decode_results(results)
            self._pending.discard(work_item)
            if self._change_futures:
                self._notify()
            work_item.resolve_with_results(outcome)  # last: the caller may resume at once

    def on_reply(self, worker: WorkerHandle, work_item: WorkItem, reply: Any) -> None:
        if isinstance(work_item, TearDownItem):
            worker.uncount()
            self._resolve(work_item, [])
            if self.forced:
                worker.stop()
            return
        if work_item.is_preparation:
            seconds = worker.uncount()
            setups = self.supervisor.setups
            if (
                reply[0] == ReplyKind.READY
                and seconds is not None
                and work_item.key in setups.functions
            ):
                setups.on_done(work_item.key, seconds)
        if work_item not in self._pending:
            return
        try:
            outcome = work_item.decode_reply(reply)
        except BaseException as exc:  # noqa: BLE001 - so that the caller does not hang
            outcome = exc
        if outcome is None and not work_item.is_preparation:
            worker.uncount()  # it ran nothing: it asks for what it lacks
        if outcome is not None:
            self._resolve(work_item, outcome)
            return
        worker.forget_function(work_item.key)
        self._requeue(work_item)
        self._dispatch()

    def on_bad_reply(self, work_item: WorkItem, error: BaseException) -> None:
        self._resolve(work_item, error)

    def on_timeout(self, worker: WorkerHandle, work_item: WorkItem) -> None:
        self._resolve(work_item, errors.timeout_error(worker, work_item.timeout))
        self.supervisor.spawn_missing()

    def on_crash(self, worker: WorkerHandle, work_item: WorkItem, *, started: bool) -> None:
        if worker in self.supervisor.preparing and not isinstance(work_item, TearDownItem):
            self.supervisor.setups.on_failed(work_item.key)
        if work_item not in self._pending:
            return
        work_item.requeues += not started
        if isinstance(work_item, TearDownItem):
            self._resolve(work_item, [])
        elif started or work_item.requeues > MAX_REQUEUES or work_item.is_preparation:
            self._resolve(work_item, errors.crash_error(worker, started=started))
        elif work_item.is_abandoned:
            self._resolve(work_item, errors.abandoned_error())
        else:
            self._requeue(work_item)
            self._dispatch()
        self.supervisor.spawn_missing()

    def on_exit(self, worker: WorkerHandle) -> None:
        self._requeue_assigned(worker)
        for tear_down in self._assigned_to.pop(worker, []):  # it ran them when it stopped
            self._resolve(tear_down, [])
        self.supervisor.on_exit(worker)
        self._replace_and_dispatch()

    def on_shm_exhausted(self, error: OSError) -> None:
        if self._shm_warning_given:
            return
        self._shm_warning_given = True
        text = (
            f"no shared memory for a large batch ({error}); it is sent through a socket instead, "
            "which is slower. Give the program more memory, or make batches smaller"
        )
        # By itself: a filter may turn the warning into an error.
        self.loop.call_soon(warnings.warn, text, RuntimeWarning)

    # --- workers

    def _prepare(self, worker: WorkerHandle) -> None:
        """Have a worker that takes no batches yet set up the next function, or make it a spare."""
        if worker.state is not WorkerState.IDLE:
            return
        if self._assigned_to.get(worker):
            self._run_assigned(worker)
            return
        function = self.supervisor.next_function(worker)
        if function is None:
            self._activate_spares()
            self._notify()
            return
        work_item = WorkItem(function, None)
        work_item.is_abandoned = True  # it has no callers
        self._pending.add(work_item)
        worker.assign(work_item)

    def _activate_spares(self) -> None:
        while (worker := self.supervisor.next_replacement()) is not None:
            self.on_idle(worker)

    def _retire(self, worker: WorkerHandle) -> None:
        """Stop a worker that has run all the batches that it may run."""
        worker.stop()
        self._requeue_assigned(worker)
        self._replace_and_dispatch()

    def _replace_and_dispatch(self) -> None:
        self._activate_spares()
        self.supervisor.spawn_missing()
        self._dispatch()
        self._notify()

    # --- work items

    def _dispatch(self) -> None:
        while self._idle and self._queue.queues:
            self._assign(self._queue.get())

    def _assign(self, work_item: WorkItem) -> None:
        """Give a work item to an idle worker, if it is still wanted."""
        if work_item.claim is not None and not work_item.is_wanted():
            self._pending.discard(work_item)
            self._notify()
            return
        idle = self._idle
        worker = idle[-1]  # it was busy last, so its caches are warm
        key = work_item.key
        if key in worker.loaded_functions:
            idle.pop()
        else:
            loaded = (worker for worker in reversed(idle) if key in worker.loaded_functions)
            worker = next(loaded, worker)
            idle.remove(worker)
        worker.assign(work_item)
        if self.supervisor.max_tasks is not None and not worker.has_replacement:
            self.supervisor.plan_replacement(worker)

    def _dispatch_assigned(self) -> None:
        for worker in list(self._idle):
            if self._assigned_to.get(worker):
                self._idle.remove(worker)
                self._run_assigned(worker)

    def _run_assigned(self, worker: WorkerHandle) -> None:
        work_items = self._assigned_to[worker]
        work_item = work_items.pop()
        if not work_items:
            del self._assigned_to[worker]
        if isinstance(work_item, TearDownItem):
            worker.tear_down(work_item)
        else:
            worker.assign(work_item)

    def _requeue(self, work_item: WorkItem) -> None:
        """Put a work item back; if the pool reported a failed start meanwhile, try again."""
        self.supervisor.start_error = None
        self._queue.put_front(work_item.client, work_item)

    def _requeue_assigned(self, worker: WorkerHandle) -> None:
        """Let any worker run what was assigned to one, except tear-downs, which run as it stops."""
        assigned = self._assigned_to.pop(worker, [])
        tear_downs = [item for item in assigned if isinstance(item, TearDownItem)]
        if tear_downs:
            self._assigned_to[worker] = [*tear_downs]
        for work_item in assigned:
            if work_item not in tear_downs:
                self._requeue(work_item)

    def _has_unfinished_work(self) -> bool:
        """Tell whether a stop must wait; set-ups of workers that take no batches do not count."""
        preparing = self.supervisor.preparing
        items = (worker.work_item for worker in preparing)
        setups = {item for item in items if not isinstance(item, TearDownItem)}
        return bool(self._pending - setups) or any(
            worker.state is WorkerState.BUSY and worker not in preparing
            for worker in self.supervisor.workers
        )

    def _resolve(self, work_item: WorkItem, outcome: Outcome) -> None:
        self._pending.discard(work_item)
        work_item.resolve(outcome)
        if self._change_futures:
            self._notify()

    # --- shutdown

    async def drain(self) -> None:
        self._notify()  # `start` gives up
        # Withdrawn work items count, too: they may be writing something.
        while self._has_unfinished_work():
            await self._wait_for_change()

    def fail_all(self) -> None:
        self._fail_pending()
        self._set_kill_timer(self.supervisor.shutdown_forced())

    def _fail_pending(self) -> None:
        self._queue.clear()
        self._assigned_to.clear()
        for work_item in list(self._pending):
            self._resolve(work_item, errors.stopped_midway_error())

    def end(self) -> Coroutine[Any, Any, None]:
        self.supervisor.begin_shutdown()  # now, before another exit is seen
        self._notify()  # `start` gives up
        return self._end()

    async def _end(self) -> None:
        try:
            if not self.forced:
                self._set_kill_timer(self.supervisor.shutdown_idle())
            while self.supervisor.workers:
                await self._wait_for_change()
            self._set_kill_timer(None)
            await self.supervisor.close()
        except asyncio.CancelledError:  # as every task is when its loop shuts down
            self.close_now()

    def _set_kill_timer(self, timer: asyncio.TimerHandle | None) -> None:
        if self._kill_timer is not None:
            self._kill_timer.cancel()
        self._kill_timer = timer

    # --- changes

    async def _wait_for_change(self) -> None:
        change: asyncio.Future[None] = self.loop.create_future()
        self._change_futures.append(change)
        await change

    def _notify(self) -> None:
        for change in self._change_futures:
            if not change.done():
                change.set_result(None)
        self._change_futures.clear()
