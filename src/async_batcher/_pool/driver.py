"""Carries out what a pool's state commands, and reports what happens to the workers.

::

    PoolState --commands--> WorkerDriver --> WorkerHandle, WorkerStarter, callers
        ^                        |                |
        `-------- events --------+-- ReplyReader -'

Rules:

- Commands are carried out in order, even if one of them causes more, or raises.
- An exception that should not happen, in any callback of the loop, breaks the pool, so that every
  call ends: see `on_internal_error`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import warnings
from typing import TYPE_CHECKING, Any, TypeVar

from async_batcher._eventloop.changes import Changes, DeadlineTimer
from async_batcher._eventloop.future import waker_of
from async_batcher._eventloop.guarded_loop import GuardedLoop
from async_batcher._pool.errors import internal_error, shm_exhausted_text
from async_batcher._pool.replies import ReplyReader, resolve
from async_batcher._pool.state.commands import (
    Abandon,
    CheckWorker,
    CloseWorker,
    InterruptBatch,
    KillWorker,
    LogWarning,
    MeasureMemory,
    RenewLauncher,
    ReportStartTimeout,
    Resolve,
    StartWorker,
    StopWorker,
    TakeBack,
)
from async_batcher._pool.state.worker import (
    INITIALIZER_FAILED,
    START_FAILED,
    Progress,
    StartFailure,
    Trip,
    WorkerState,
)
from async_batcher._serialization.codec import Codec
from async_batcher._serialization.remote_exception import decode_exception
from async_batcher.exceptions import SerializationError

if TYPE_CHECKING:
    from collections.abc import Callable

    from async_batcher._pool.processes.worker_starter import WorkerStarter
    from async_batcher._pool.state.pool_state import PoolState
    from async_batcher._pool.state.worker import Worker
    from async_batcher._pool.work_item import WorkItem
    from async_batcher._pool.worker_handle import WorkerHandle
    from async_batcher._serialization.remote_exception import PickledException

_CLOSE_TIMEOUT = 30.0  # seconds for helper threads that still copy large batches

R = TypeVar("R")

logger = logging.getLogger("async_batcher")


class WorkerDriver:
    """The worker processes of a pool.

    Args:
        name: The pool's, for log lines.
        loop: The event loop.
        state: Decides.
        make_starter: Makes what starts processes.

    Attributes:
        handles: The handle of each worker that has one.
        replies: Reads replies.
        events: What workers do, for `report`.
        changes: What a start or a stop waits for.
        waker: Wakes the callers of calls and batches on the loop.
    """

    def __init__(
        self,
        name: str,
        loop: asyncio.AbstractEventLoop,
        state: PoolState,
        make_starter: Callable[[WorkerDriver], WorkerStarter],
    ) -> None:
        self.name = name
        self.loop = guarded = GuardedLoop(loop, self.on_internal_error)
        self.handles: dict[Worker, WorkerHandle] = {}
        self._make_starter = make_starter
        self.starter = make_starter(self)
        self._state = state
        self._assignment = state.assignment
        self.events = state.worker_events
        self.changes = Changes(guarded)
        self.waker = waker_of(loop)
        self._timer = DeadlineTimer(guarded, self._tick)
        self._shm_warning_given = False
        self.replies = ReplyReader(self, state)
        self._handlers: dict[type, Callable[[Any], None]] = {
            StartWorker: self._start,
            StopWorker: self._for_handle(lambda handle, _: handle.stop()),
            InterruptBatch: self._for_handle(
                lambda handle, command: handle.interrupt(command.trip)
            ),
            KillWorker: self._for_handle(lambda handle, _: handle.kill()),
            CloseWorker: self._close,
            CheckWorker: self._check,
            MeasureMemory: self._measure_memory,
            TakeBack: self._take_back,
            Abandon: self._for_handle(lambda handle, command: handle.abandon(command.trip)),
            RenewLauncher: lambda _: self.starter.renew(),
            ReportStartTimeout: self._report_start_timeout,
            LogWarning: lambda command: logger.warning("%s: %s", name, command.text),
            Resolve: lambda command: resolve(command.item, command.outcome),
        }

    # --- commands

    def carry_out(self) -> None:
        """Carry out all commands of the state, and set the timer for what is due next.

        Called after every event: one that causes no command may have set a deadline.
        """
        commands = self._assignment.commands
        command: Any = None
        try:
            while commands:
                command = commands.popleft()
                if type(command) is Trip:  # nearly always
                    handle = self.handles.get(command.worker)
                    if handle is not None:
                        handle.send(command)
                else:
                    self._handlers[type(command)](command)
        except Exception as exc:  # noqa: BLE001 - so that no call hangs
            if type(command) is Trip:  # memory, most likely, or an audit hook
                self.report(self.events.send_failed, command.worker, exc, trip=command)
            else:
                self.on_internal_error(exc)
        finally:
            if commands:  # one of them raised
                self.loop.call_soon(self.carry_out)
            wake_at = self._assignment.wake_at
            if wake_at != self._timer.due_at:
                self._timer.set(wake_at)
            if self.changes.futures:
                self.changes.notify()

    def on_internal_error(self, error: Exception, item: WorkItem | None = None) -> None:
        """Fail all calls and kill all workers, since the state may be wrong; start anew.

        Args:
            error: What was raised.
            item: A work item that the state may not know yet.
        """
        events = list(self._assignment.log)
        logger.critical(
            "%s: internal error, please report it; the last events: %s",
            self.name,
            events,
            exc_info=error,
        )
        items = self._state.reset(internal_error(error, events))
        try:
            self._start_anew()
        finally:
            for lost in items if item is None else [*items, item]:
                resolve(lost, internal_error(error, events))
            self.loop.call_soon(self.carry_out)  # outcomes may be left

    def _start_anew(self) -> None:
        """Kill all workers and what started them."""
        handles = list(self.handles.values())
        self.handles.clear()
        for handle in handles:
            try:
                handle.kill()
                handle.close()
            except Exception:
                logger.exception("%s: a worker could not be closed", self.name)
        starter, self.starter = self.starter, self._make_starter(self)
        starter.close_without_loop()

    def _start(self, command: StartWorker) -> None:
        worker, state = command.worker, self._state
        for function in list(state.setups.functions.values()):  # with what is bound now
            with contextlib.suppress(SerializationError):  # of which the next batch fails
                if function.refresh(rename=False):
                    state.refreshed(function.key, time.monotonic())
        try:
            self.starter.start(worker)
        except Exception as exc:  # noqa: BLE001 - no descriptors, no memory, an audit hook
            self.events.start_refused(worker, exc, time.monotonic())

    def _for_handle(self, act: Callable[[WorkerHandle, Any], None]) -> Callable[[Any], None]:
        """Return what carries out a command that concerns a handle, if the worker has one."""

        def carry_out(command: Any) -> None:
            handle = self.handles.get(getattr(command, "trip", command).worker)
            if handle is not None:
                act(handle, command)

        return carry_out

    def _close(self, command: CloseWorker) -> None:
        handle = self.handles.get(command.worker)
        if handle is not None:
            handle.close()
            del self.handles[command.worker]

    def _check(self, command: CheckWorker) -> None:
        worker = command.worker
        trip, handle = worker.trip, self.handles.get(worker)
        if handle is None:
            self._state.time_limits.checked(worker, trip, Progress(), time.monotonic())
            return
        try:
            handle.drain()  # the reply may be here: some loops run timers first
        finally:  # a task that is resumed may raise SystemExit
            if worker in self.handles:
                now, progress = time.monotonic(), handle.progress(trip)
                self._state.time_limits.checked(worker, trip, progress, now)

    def _take_back(self, command: TakeBack) -> None:
        worker = command.trip.worker
        handle = self.handles.get(worker)
        taken = () if handle is None else handle.take_back(command.trip)
        self.events.taken_back(worker, taken, time.monotonic())

    def _measure_memory(self, command: MeasureMemory) -> None:
        handle = self.handles.get(command.worker)
        if handle is not None:
            size = handle.memory(self._state.supervisor.limits.max_memory or 0)
            self.events.memory_measured(command.worker, size, time.monotonic())

    def _report_start_timeout(self, command: ReportStartTimeout) -> None:
        handle = self.handles.get(command.worker)
        if handle is not None:
            self.starter.on_start_timeout(handle)

    # --- stopping

    def workers_with_tear_downs(self) -> list[Worker]:
        """Return the workers that run tear-downs, or run them when they are stopped."""
        return [
            worker
            for worker, handle in self.handles.items()
            if handle.tears_down
            and (worker.trip is None or worker.trip.item.is_tear_down)
            and worker.ever_ready
            and worker.state is not WorkerState.EXITING
        ]

    def workers_in_setup(self) -> list[Worker]:
        """Return the workers that load and set up functions."""
        return [
            worker
            for worker, handle in self.handles.items()
            if handle.progress(worker.trip).is_setting_up
        ]

    async def close(self) -> None:
        """Close what starts workers, when all have exited."""
        self._timer.cancel()
        try:
            async with asyncio.timeout(_CLOSE_TIMEOUT):
                await self.starter.close()
        except TimeoutError:
            self.starter.close_without_loop()

    def close_without_loop(self) -> None:
        if not self.loop.is_closed():
            self._timer.cancel()
        for handle in self.handles.values():
            handle.close_without_loop()
        self.handles.clear()
        self._state.supervisor.workers.clear()
        self._assignment.commands.clear()
        self.starter.close_without_loop()

    def close_after_fork(self) -> None:
        for handle in self.handles.values():
            handle.close_fds()
        self.starter.close_after_fork()

    # --- time

    def _tick(self, halted: float) -> None:
        self._state.time_limits.tick(time.monotonic(), halted)
        self.carry_out()

    # --- what handles report

    def report(self, event: Callable[..., R], *args: Any, **facts: Any) -> R | None:
        """Tell the state of an event, and do what it says.

        Returns:
            What the event's method does; None if it raised.
        """
        try:
            result = event(*args, time.monotonic(), **facts)
        except Exception as exc:  # noqa: BLE001 - so that no call hangs
            self.on_internal_error(exc)
            return None
        self.carry_out()
        return result

    def on_initializer_raised(self, worker: Worker, failure: PickledException) -> None:
        error = decode_exception(Codec(), failure)
        worker.start_failure = StartFailure(error, "the initializer raised", INITIALIZER_FAILED)

    def on_start_failed(self, handle: WorkerHandle, error: BaseException) -> None:
        """No process could be started for a worker, or it cannot be watched."""
        failure = StartFailure(error, cause=START_FAILED)
        handle.worker.start_failure = handle.worker.start_failure or failure
        self.on_exit(handle)

    def on_exit(self, handle: WorkerHandle) -> None:
        worker = handle.worker
        try:
            handle.drain()
        finally:  # a task that is resumed may raise SystemExit, or close the pool
            if worker in self.handles:
                self.report(self.events.exited, worker, handle.progress(worker.trip))

    def on_shm_exhausted(self, error: OSError) -> None:
        if self._shm_warning_given:
            return
        self._shm_warning_given = True
        # By itself: a filter may turn the warning into an error.
        text = shm_exhausted_text(error)
        self.loop.call_soon_unguarded(warnings.warn, text, RuntimeWarning)
