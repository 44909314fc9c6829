"""A pool on one event loop, from its start to its stop, as the pool and the runner see it.

What is decided is in `PoolState`; what happens to processes, in `WorkerDriver`.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

from async_batcher._eventloop.future import future_factory
from async_batcher._eventloop.lifecycle import Session
from async_batcher._pool.driver import WorkerDriver
from async_batcher._pool.processes.process_watcher import close_after_fork
from async_batcher._pool.processes.worker_starter import WorkerStarter
from async_batcher._pool.state.pool_state import PoolState
from async_batcher._pool.state.supervisor import PoolLimits
from async_batcher._pool.state.worker import WorkerState
from async_batcher._worker.imports import check_not_importing
from async_batcher.exceptions import BatcherStoppedError, PoolBrokenError

if TYPE_CHECKING:
    from collections.abc import Collection, Coroutine, Hashable
    from contextvars import Context

    from async_batcher._pool.pickled_function import PickledFunction
    from async_batcher._pool.pool_options import PoolOptions
    from async_batcher._pool.state.ledger import WorkerLedger
    from async_batcher._pool.state.worker import Worker
    from async_batcher._pool.work_item import WorkItem
    from async_batcher._pool.worker_handle import WorkerHandle


class PoolDispatcher(Session):
    """Takes work items for the workers, and starts and stops all of them."""

    noun = "pool"

    def __init__(
        self,
        name: str,
        loop: asyncio.AbstractEventLoop,
        context: Context,
        options: PoolOptions,
        ledger: WorkerLedger,
    ) -> None:
        check_not_importing()
        super().__init__(loop, context)
        self.name = name
        self.new_future = future_factory(loop)
        limits = PoolLimits(
            options.size,
            options.start_timeout,
            options.max_tasks_per_child,
            options.max_memory_per_child,
        )
        self._state = PoolState(limits, ledger)
        self._driver = WorkerDriver(
            name, loop, self._state, lambda driver: WorkerStarter(context, driver, options)
        )
        close_after_fork(self)

    def __repr__(self) -> str:
        state = self._state
        states = Counter(worker.public_state for worker in state.supervisor.workers)
        waiting, unresolved = state.counts()
        parts = [
            "stopping" if self.closing else "running",
            f"workers=[{', '.join(f'{count} {state}' for state, count in states.items())}]",
            f"queued={waiting}",
            f"unresolved={unresolved}",
        ]
        return f"<{self.name} {' '.join(parts)}>"

    def workers(self) -> list[WorkerHandle]:
        """Return the workers, including those that start, stop or exit."""
        return list(self._driver.handles.values())

    # --- work items

    def submit(self, work_item: WorkItem) -> None:
        try:
            self._state.submitted(work_item, time.monotonic())
        except Exception as exc:  # noqa: BLE001 - so that no call hangs
            self._driver.on_internal_error(exc, work_item)
        self._driver.carry_out()

    def is_waiting(self, work_item: WorkItem) -> bool:
        """Tell whether a work item that is not resolved has not been begun by a worker."""
        return self._state.assignment.worker_of(work_item) is None

    def withdraw(self, work_item: WorkItem) -> None:
        """Forget a work item; a worker that has it finishes it."""
        work_item.detach()
        self._driver.report(self._state.withdrawn, work_item)

    def cancel(self, work_item: WorkItem, *, force: bool) -> None:
        """Cancel a work item whose callers were all cancelled; see `PoolState.cancelled`."""
        self._driver.report(self._state.cancelled, work_item, force=force)

    def recall(self, client: Hashable) -> None:
        """Hand the batches of a client back that have not been begun; see `PoolState.recalled`."""
        self._driver.report(self._state.recalled, client)

    def abort(self, client: Hashable, error: BaseException) -> None:
        """Resolve what a client that is stopped by force still has here; kill set-ups for it.

        A worker that runs one of its work items finishes it.
        """
        in_setup = self._driver.workers_in_setup()
        self._driver.report(self._state.aborted, client, error, in_setup=in_setup)

    # --- functions

    def preload(self, function: PickledFunction, work_items: list[WorkItem]) -> int:
        """Have every worker load and set up a function; see `PoolState.preloaded`."""
        return self._driver.report(self._state.preloaded, function, work_items) or 0

    def refresh(self, function: PickledFunction) -> None:
        """Have workers read a function again that has been pickled again."""
        self._driver.report(self._state.refreshed, function.key)

    def forget_setup(self, key: bytes) -> None:
        """Have later workers not set up a function before their first batch."""
        self._state.setups.forget(key)

    async def forget_function(self, key: bytes, timeout: float | None) -> None:  # noqa: ASYNC109
        """Have every worker forget a function after its tear-down.

        Args:
            key: The function's key.
            timeout: Seconds until workers that run the tear-down are killed. None disables it.
        """
        state = self._state
        self._driver.report(state.forgotten, key)
        try:
            async with asyncio.timeout(timeout):
                # With a timeout, busy workers tear down after their batches.
                while state.waits_for_tear_downs(key, busy=timeout is None):
                    await self._driver.changes.wait()
        except TimeoutError:
            self._driver.report(state.tear_downs_expired, key)

    # --- starting and stopping

    async def start(self) -> None:
        """Start every worker, and wait until all are active; see `WorkerPool.start`."""
        self._driver.report(self._state.started)
        while not self.closing:
            if self._state.supervisor.is_full():
                return
            await self._driver.changes.wait()
        msg = "the pool was stopped before all its workers were ready"
        raise BatcherStoppedError(msg)

    async def restart_workers(self) -> None:
        """Replace every worker; see `WorkerPool.restart_workers`."""
        restart = self._state.supervisor.restart
        outdated = self._driver.report(self._state.restarted) or []
        while True:
            if self.closing:  # first: a stop ends the workers, too
                msg = "the pool was stopped before all its workers were replaced"
                raise BatcherStoppedError(msg)
            if all(worker.state is WorkerState.EXITED for worker in outdated):
                return
            if restart.error is not None:
                raise PoolBrokenError(str(restart.error)) from restart.error.__cause__
            await self._driver.changes.wait()

    async def drain(self) -> None:
        self._state.close()
        self._driver.changes.notify()  # `start` gives up
        while self._state.has_unfinished_work():
            await self._driver.changes.wait()

    def fail_all(self) -> None:
        self._shut_down(tearing_down=self._driver.workers_with_tear_downs())

    def end(self) -> Coroutine[Any, Any, None]:
        if not self.forced:
            self._shut_down()
        self._driver.changes.notify()  # `start` gives up
        return self._end()

    def _shut_down(self, tearing_down: Collection[Worker] = ()) -> None:
        event = self._state.shut_down
        self._driver.report(event, force=self.forced, tearing_down=tearing_down)
        self._driver.starter.cancel_starts()

    async def _end(self) -> None:
        # A killed process runs no code any longer, but it holds its memory, ports and devices until
        # it has exited. So a stop waits for that: a millisecond, or 0.1 s if it has a gigabyte.
        try:
            while self._state.supervisor.workers:
                await self._driver.changes.wait()
            await self._driver.close()
        except asyncio.CancelledError:  # as every task is when its loop shuts down
            self.close_now()

    def close_now(self) -> None:
        """Kill all workers, not in a task: the loop may close before the task ends."""
        self.closing = self.forced = True
        self._shut_down()
        self.close_without_loop()

    def close_without_loop(self) -> None:
        """Kill all workers without the loop, which has closed or is about to."""
        self.closing = True
        self._state.close()
        if not self.is_inherited:
            self._driver.close_without_loop()

    def close_after_fork(self) -> None:
        """Close, in a forked child, what belongs to the parent."""
        self.closing = True
        self._driver.close_after_fork()

    def debug_state(self) -> dict[str, Any]:
        """Return what the pool knows; see `WorkerPool.debug_state`."""
        assignment = self._state.assignment
        waiting, unresolved = self._state.counts()
        return {
            "now": time.monotonic(),
            "workers": [repr(handle) for handle in self.workers()],
            "queued": waiting,
            "unresolved": unresolved,
            "due_at": assignment.wake_at,
            "commands": [repr(command) for command in assignment.commands],
            "events": list(assignment.log),
        }
