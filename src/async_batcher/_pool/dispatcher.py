"""A pool on one event loop, from its start to its stop: which worker gets which task, and what becomes of each.

::

    submit(task) --> FairQueue --dispatch--> an idle WorkerHandle --> on_reply --> task.answered
                       ^                     |  `--> on_overdue -------> task.failed
                       `----- put back ------'  dead: not begun --> put back; begun --> task.failed

Who the workers are is the `Supervisor`'s matter.

Rules:

- Each task is answered, failed, or in the queue, or with one member: never two of these, and always one.
- When no worker can be started, everyone who waits is told, with the last cause; the next task tries anew.
"""

from __future__ import annotations

import asyncio
import os
import warnings
from typing import TYPE_CHECKING, Any

from async_batcher._eventloop.future import future_factory
from async_batcher._pool.fair_queue import FairQueue
from async_batcher._pool.process_watcher import close_after_fork
from async_batcher._pool.supervisor import Supervisor, crash_error
from async_batcher._pool.work_item import TearDownItem, WorkItem
from async_batcher._pool.worker_handle import SLOW_SET_UP, WorkerHandle, WorkerState
from async_batcher._transport.protocol import ReplyKind
from async_batcher.exceptions import BatchError, BatcherStoppedError, BatchTimeoutError, PoolBrokenError, WorkerDiedError

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextvars import Context

    from async_batcher._pool.pickled_function import PickledFunction
    from async_batcher._pool.supervisor import SupervisorCallbacks
    from async_batcher._serialization.codec import Payload
    from async_batcher._worker.results import Outcome

_MAX_REQUEUES = 3  # times that a task which no worker has begun is handed to another
_STOPPED_MSG = "the pool has been stopped; start() reopens it"
_ABANDONED_MSG = "nobody waited for the batch any more, so it was ended"
_STOPPED_MIDWAY_MSG = "the pool was stopped before the batch had ended"


class PoolDispatcher:
    """The workers at work.

    Args:
        loop: The loop that they are watched on.
        context: What its callbacks run in.
        make_staff: Makes the workers.

    Attributes:
        supervisor: The workers.
        new_waiter: Makes what a call waits on.
        closing: Whether it takes no more.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        context: Context,
        make_staff: Callable[[asyncio.AbstractEventLoop, Context, SupervisorCallbacks], Supervisor],
    ) -> None:
        self.loop = loop
        self.new_waiter = future_factory(loop)
        self.pid = os.getpid()
        self._context = context
        self._tasks: set[WorkItem] = set()  # that nobody has been told the outcome of
        self._turns: FairQueue[WorkItem] = FairQueue()
        self._pinned: dict[WorkerHandle, list[WorkItem]] = {}  # for one worker only
        self._has_warned = False
        self._changes: list[asyncio.Future[None]] = []
        self.closing = False
        self._ending: asyncio.Task[None] | None = None
        self._late: asyncio.TimerHandle | None = None  # kills the workers that do not end by themselves
        self._is_forced = False
        self.staff = make_staff(loop, context, self)
        self._idle = self.staff.idle
        close_after_fork(self)

    # What the pool asks.

    def submit(self, task: WorkItem) -> None:
        """Have a task run."""
        if self.closing:
            task.resolve(BatcherStoppedError(_STOPPED_MSG))
            return
        supervisor = self.staff
        supervisor.broken = None
        self._tasks.add(task)
        if self._idle and not self._turns.lines:
            self._assign(task)
        else:
            self._turns.put(task.client, task)
        if (
            len(supervisor.members) < supervisor.size
        ):  # one that has been ended may still be among them: who ended it has filled its place
            supervisor.fill()  # last: it may give up, and tell all that wait

    def withdraw(self, task: WorkItem) -> bool:
        """Take a task back.

        Returns:
            Whether no worker has it yet; one that has it runs it unseen.
        """
        is_waiting = self._turns.remove(task.client, task)
        self._tasks.discard(task)
        task.detach()
        self._note_change()
        return is_waiting

    def end(self, task: WorkItem, *, force: bool) -> None:
        """All callers of a task are gone: never begin it; with ``force``, end it with its worker.

        A set-up that takes longer than callers wait must be able to finish. So a worker that runs one goes on for
        `Supervisor.patience_without_callers`, which grows with each attempt, and is killed then.
        """
        if self._turns.remove(task.client, task):
            self._settle(task, BatchError(_ABANDONED_MSG))
            return
        member = next((member for member in self.staff.members if member.task is task), None)
        if member is None:
            return
        task.is_abandoned = True
        if force:
            self._settle(task, BatchError(_ABANDONED_MSG))
        if not force or member.is_preparing():
            member.watch_set_up(self.staff.patience_without_callers(task.key))
        else:
            member.kill("abandoned")
            self.staff.fill()

    def cut_off(self, task: WorkItem) -> None:
        """Take a task back whose batcher is stopped by force; a set-up that runs for it is ended with its worker."""
        self.withdraw(task)
        for pinned in self._pinned.values():
            if task in pinned:
                pinned.remove(task)
        for member in self.staff.members:
            if member.task is task and member.is_preparing():
                member.kill("stopped")
                self.staff.fill()
                return

    def prepare(self, program: PickledFunction, tasks: list[WorkItem]) -> int:
        """Have every worker load and set up a function: those that are here by one of the tasks each, later ones ahead.

        Args:
            program: The function, sealed.
            tasks: As many as there may be workers.

        Returns:
            How many of the tasks will be run.
        """
        self.staff.programs[program.key] = program
        pairs = list(zip(self.staff.serving(), tasks, strict=False))
        for member, task in pairs:
            self._tasks.add(task)
            self._pinned.setdefault(member, []).append(task)
        self._dispatch_pinned()
        return len(pairs)

    async def dismiss(self, key: bytes, seconds: float | None) -> None:
        """Have every worker that has loaded a function drop it, after its tear-down; later workers need not load it.

        Args:
            key: Names the function.
            seconds: How long the workers may take, before those that are at the tear-down are ended; None: as long as it takes.
        """
        supervisor = self.staff
        supervisor.forget_program(key)
        for member in supervisor.members:
            if key in member.known and (member.is_alive() or member.state is WorkerState.LEAVING):
                pinned = self._pinned.setdefault(member, [])
                if not any(isinstance(task, TearDownItem) and task.key == key for task in pinned):
                    pinned.append(TearDownItem(key))
                    self._tasks.add(pinned[-1])
                if member in supervisor.standby:
                    supervisor.standby.remove(member)
                    supervisor.preparing.append(member)
                    self._get_ready(member)
        self._dispatch_pinned()
        try:
            async with asyncio.timeout(seconds):
                while tasks := self._tear_downs(key):
                    if seconds is not None and not any(member.task in tasks for member in supervisor.members):
                        break  # the workers that are busy tear down after their batches
                    await self._change()
        except TimeoutError:
            tasks = self._tear_downs(key)
            for member in supervisor.members:
                if member.task in tasks:
                    member.kill("tear-down timeout")
            supervisor.fill()

    def _tear_downs(self, key: bytes) -> list[WorkItem]:
        return [task for task in self._tasks if isinstance(task, TearDownItem) and task.key == key]

    async def start(self) -> None:
        """Start every worker, and wait until all are ready.

        Raises:
            PoolBrokenError: None can be started.
            BatcherStoppedError: The pool was stopped meanwhile.
        """
        self.staff.broken = None
        self.staff.fill()
        while not self.closing:
            if self.staff.is_complete():
                return
            await self._change()
        raise BatcherStoppedError(_STOPPED_MIDWAY_MSG)

    async def close(self, *, force: bool, timeout: float | None) -> None:  # noqa: ASYNC109 - it bounds one stage of several
        """Take no more, run what waits, and end every process.

        Raises:
            TimeoutError: It took longer than ``timeout``; what had not ended by then has failed.
        """
        self.closing = True
        self._note_change()
        expired = False
        try:
            if not force:
                try:
                    async with asyncio.timeout(timeout):
                        # What somebody has left is not cut off either: it may be half way through writing something.
                        while self._has_work():
                            await self._change()
                except TimeoutError:
                    expired = True
            await asyncio.shield(self._end(force=force or expired))
        except asyncio.CancelledError:
            ending = self._end(force=True)
            while not ending.done():
                try:
                    await asyncio.wait([ending])
                except asyncio.CancelledError:
                    continue
            raise
        if expired:
            msg = f"the pool did not come to its end within {timeout} seconds; it has been stopped by force"
            raise TimeoutError(msg)

    def drop(self) -> None:
        """Nobody holds the pool any more: end, by force."""
        self.closing = True
        self._end_at_once()

    def abandon(self) -> None:
        """The loop has closed without `close`, or is about to: end every process without it."""
        self.closing = True
        self._tasks.clear()
        if os.getpid() == self.pid:
            self.staff.abandon()

    def forget(self) -> None:
        """In a forked child: close what belongs to the parent."""
        self.closing = True
        self.staff.forget()

    # What its staff asks and tells.

    def has_work(self) -> bool:
        """Whether there is, or may yet come, something for a worker to do."""
        return not self.closing or bool(self._tasks)

    def on_broken(self, message: str, cause: BaseException) -> None:
        """No worker can be had for now."""
        tasks = self._turns.clear() + [task for pinned in self._pinned.values() for task in pinned]
        self._pinned.clear()
        for task in tasks:  # who is told may bring another, which begins anew
            error = PoolBrokenError(message)
            error.__cause__ = cause
            self._settle(task, error)
        self._note_change()

    # What its members tell.

    def on_ready(self, member: WorkerHandle) -> None:
        """A worker has started."""
        self.staff.started(member)
        self._get_ready(member)

    def on_start_timeout(self, member: WorkerHandle) -> None:
        """A worker was not ready in time, and has been killed."""
        self.staff.late(member)

    def patience(self, task: WorkItem) -> float:
        """See `Supervisor.patience`."""
        return self.staff.patience(task.key)

    def on_slow_set_up(self, member: WorkerHandle, task: WorkItem) -> None:
        """End a worker whose set-up takes too long, unless a caller waits for it without a limit."""
        if task in self._tasks and not task.is_abandoned and task.timeout is None:
            return
        if member not in self.staff.preparing:  # else `on_lost` notes it
            self.staff.note_failed_setup(task.key)
        if task.is_abandoned:
            self.staff.note_unwanted_setup(task.key)
        member.kill(SLOW_SET_UP)
        msg = (
            f"loading the function and running setup_worker took longer than {self.staff.patience(task.key):g} seconds, and "
            f"worker process {member.pid} was killed. Find out what hangs, raise start_timeout of the WorkerPool, or await "
            "start() first, which has no time limit"
        )
        error = WorkerDiedError(msg, pid=member.pid, may_have_run=False)
        self._settle(task, BatchError(_ABANDONED_MSG) if task.is_abandoned else error)
        self.staff.fill()

    def on_begun(self, task: WorkItem, seconds: float) -> None:
        """A worker has loaded and set up a function: later ones are to do so before they take batches."""
        if task in self._tasks and task.function.has_setup:
            self.staff.programs[task.key] = task.function
            self.staff.note_set_up(task.key, seconds)

    def on_idle(self, member: WorkerHandle) -> None:
        """A worker can take the next batch."""
        supervisor = self.staff
        if supervisor.preparing and member in supervisor.preparing:
            self._get_ready(member)
            return
        if supervisor.max_tasks is not None and member.batches >= supervisor.max_tasks and supervisor.may_leave(member):
            self._let_go(member)
            return
        if supervisor.max_memory is not None and not member.is_outgrown:
            supervisor.weigh(member)
        self._idle.append(member)
        if supervisor.standby:
            self._promote()
        if self._pinned:
            self._dispatch_pinned()
        if self._turns.lines:
            self._dispatch()
        if self._changes:
            self._note_change()

    def on_answers(self, task: WorkItem, answers: Payload) -> None:
        """A task has been done."""
        if task in self._tasks:
            outcome = task.decode_results(answers)
            self._tasks.discard(task)
            if self._changes:
                self._note_change()
            task.resolve_with_results(outcome)  # last: who waits may go on at once

    def on_reply(self, member: WorkerHandle, task: WorkItem, reply: Any) -> None:
        """A worker says something else of a task, most often what it lacks."""
        if isinstance(task, TearDownItem):
            member.uncount()
            self._settle(task, [])
            if self._is_forced:
                member.leave()
            return
        if task.is_preparation:
            seconds = member.uncount()
            if reply[0] == ReplyKind.READY and seconds is not None and task.key in self.staff.programs:
                self.staff.note_set_up(task.key, seconds)
        if task not in self._tasks:
            return
        try:
            outcome = task.decode_reply(reply)
        except BaseException as exc:  # noqa: BLE001 - nobody is to wait for ever because a reply cannot be read
            outcome = exc
        if outcome is None and not task.is_preparation:
            member.uncount()  # it has run none: it asks for what it lacks
        if outcome is not None:
            self._settle(task, outcome)
            return
        member.unlearn(task.key)
        self._put_back(task)
        self._dispatch()

    def on_overdue(self, member: WorkerHandle, task: WorkItem) -> None:
        """A worker was ended since its task ran for too long."""
        msg = (
            f"the batch ran for longer than {task.timeout} seconds, and worker process {member.pid} was ended with it. Raise the "
            "timeout, make batches smaller, or find out what hangs"
        )
        self._settle(task, BatchTimeoutError(msg))
        self.staff.fill()

    def on_failed(self, task: WorkItem, error: BaseException) -> None:
        """What a worker answered cannot be taken."""
        self._settle(task, error)

    def on_lost(self, member: WorkerHandle, task: WorkItem, *, has_begun: bool) -> None:
        """A worker died with a task."""
        if member in self.staff.preparing and not isinstance(task, TearDownItem):
            self.staff.note_failed_setup(task.key)
        if task not in self._tasks:
            return
        task.requeues += not has_begun
        if isinstance(task, TearDownItem):
            self._settle(task, [])
        elif has_begun or task.requeues > _MAX_REQUEUES or task.is_preparation:
            self._settle(task, crash_error(member, has_begun=has_begun))
        elif task.is_abandoned:
            self._settle(task, BatchError(_ABANDONED_MSG))
        else:
            self._put_back(task)
            self._dispatch()
        self.staff.fill()

    def on_gone(self, member: WorkerHandle) -> None:
        """A worker's process has ended."""
        self._put_back_pinned(member)
        for task in self._pinned.pop(member, []):  # it has left, with its tear-downs
            self._settle(task, [])
        self.staff.gone(member)
        self._promote()
        self.staff.fill()
        self._dispatch()
        self._note_change()

    def on_no_room(self, error: OSError) -> None:
        """There was no shared memory to be had."""
        if not self._has_warned:
            self._has_warned = True
            text = (
                f"there is no shared memory for a large batch ({error}); it goes through a socket instead, which is slower. Give "
                "the program more memory, or make batches smaller"
            )
            self.loop.call_soon(warnings.warn, text, RuntimeWarning)  # by itself: a filter may make an error of it

    # Its workers.

    def _get_ready(self, member: WorkerHandle) -> None:
        """Have a worker that does not take batches yet do what it must before, or let it take its place."""
        if member.state is not WorkerState.IDLE:
            return
        if self._pinned.get(member):
            self._run_pinned(member)
            return
        program = self.staff.next_program(member)
        if program is None:
            self._promote()
            self._note_change()
            return
        task = WorkItem(program, None)
        task.is_abandoned = True  # no caller waits for it
        self._tasks.add(task)
        member.run(task)

    def _promote(self) -> None:
        """Let successors take their places."""
        while (member := self.staff.successor()) is not None:
            self.on_idle(member)

    def _let_go(self, member: WorkerHandle) -> None:
        """A worker has done all the batches that it may do."""
        member.leave()
        self._put_back_pinned(member)
        self._promote()
        self.staff.fill()
        self._dispatch()
        self._note_change()

    # Its tasks.

    def _dispatch(self) -> None:
        """Give idle workers what waits."""
        while self._idle and self._turns.lines:
            self._assign(self._turns.take())

    def _assign(self, task: WorkItem) -> None:
        """Give an idle worker a task, if it is still wanted."""
        if task.claim is not None and not task.is_wanted():
            self._tasks.discard(task)
            self._note_change()
            return
        idle = self._idle
        member = idle[-1]  # the one that was busy last, since its caches are warm; rather one that has the program
        if task.key in member.known:
            idle.pop()
        else:
            member = next((member for member in reversed(idle) if task.key in member.known), member)
            idle.remove(member)
        member.run(task)
        if self.staff.max_tasks is not None and not member.is_retiring:
            self.staff.order_successor(member)

    def _dispatch_pinned(self) -> None:
        for member in list(self._idle):
            if self._pinned.get(member):
                self._idle.remove(member)
                self._run_pinned(member)

    def _run_pinned(self, member: WorkerHandle) -> None:
        tasks = self._pinned[member]
        task = tasks.pop()
        if not tasks:
            del self._pinned[member]
        if isinstance(task, TearDownItem):
            member.tear_down(task)
        else:
            member.run(task)

    def _put_back(self, task: WorkItem) -> None:
        """A task waits again; should the pool have given up meanwhile, it tries anew."""
        self.staff.broken = None
        self._turns.put_back(task.client, task)

    def _put_back_pinned(self, member: WorkerHandle) -> None:
        """What was for that worker only is for any, but for what it does by itself when it leaves."""
        pinned = self._pinned.pop(member, [])
        own = [task for task in pinned if isinstance(task, TearDownItem)]
        if own:
            self._pinned[member] = [*own]
        for task in pinned:
            if task not in own:
                self._put_back(task)

    def _has_work(self) -> bool:
        """Whether something is under way that a stop waits for, which the set-ups of workers that take no batches yet are not."""
        away = self.staff.preparing
        own = {member.task for member in away if not isinstance(member.task, TearDownItem)}
        return bool(self._tasks - own) or any(m.state is WorkerState.BUSY and m not in away for m in self.staff.members)

    def _settle(self, task: WorkItem, outcome: Outcome) -> None:
        self._tasks.discard(task)
        task.resolve(outcome)
        if self._changes:
            self._note_change()

    # Its end.

    def _end(self, *, force: bool) -> asyncio.Task[None]:
        """The task that ends everything; it is one, whoever asks."""
        if force and not self._is_forced:
            self._is_forced = True
            self._abort()
            self._set_late(self.staff.end_by_force())
        if self._ending is None:
            self.staff.begin_to_close()
            self._ending = self.loop.create_task(self._end_all(), context=self._context.copy())
        return self._ending

    def _abort(self) -> None:
        self._turns.clear()
        self._pinned.clear()
        for task in list(self._tasks):
            self._settle(task, BatcherStoppedError(_STOPPED_MIDWAY_MSG))

    def _end_at_once(self) -> None:
        # Not by a task: the loop may come to its end before the task does, and what the task had left would live on.
        self._abort()
        self.staff.kill_all()
        self.abandon()

    def _set_late(self, timer: asyncio.TimerHandle | None) -> None:
        if self._late is not None:
            self._late.cancel()
        self._late = timer

    async def _end_all(self) -> None:
        try:
            await self._end_one_after_the_other()
        except asyncio.CancelledError:  # with every task of a loop that ends
            self._end_at_once()
            raise

    async def _end_one_after_the_other(self) -> None:
        if not self._is_forced:
            self._set_late(self.staff.send_home())
        while self.staff.members:
            await self._change()
        self._set_late(None)
        await self.staff.close()

    # Waiting for a change.

    async def _change(self) -> None:
        change: asyncio.Future[None] = self.loop.create_future()
        self._changes.append(change)
        await change

    def _note_change(self) -> None:
        for change in self._changes:
            if not change.done():
                change.set_result(None)
        self._changes.clear()
