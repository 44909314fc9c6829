"""The workers of a pool on one event loop, from its start to its stop.

::

    submit(task) --> Turns --dispatch--> an idle Member --> on_reply --> task.answered
                       ^                     |  `--> on_overdue -------> task.failed
                       `----- put back ------'  dead: not begun --> put back; begun --> task.failed
    a worker short --> a new Member --> the launcher --> on_ready --> dispatch

Rules:

- Each task is answered, failed, or in the queue, or with one member: never two of these, and always one.
- As many workers as ``max_workers`` run batches. A worker that is to be replaced stays until its successor is ready, unless it
  has done all the batches that it may do; the successor is then ordered ahead, as long before as workers need to get ready.
- Workers that die before they are ready are started again after growing pauses. When no worker lives and it has failed again and
  again, everyone who waits is told, with the last cause; the next task tries anew.
"""

from __future__ import annotations

import asyncio
import mmap
import os
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from async_batcher._deaths import exit_name, likely_cause
from async_batcher._waiter import waiters
from async_batcher._wire import Codec, decode_exception
from async_batcher.exceptions import BatchError, BatcherStoppedError, BatchTimeoutError, PoolBrokenError, WorkerDiedError
from async_batcher.pool._launch import launcher_for
from async_batcher.pool._member import GRACE, HUNG_UP, Member, State
from async_batcher.pool._processes import current_folder, forget_after_fork, search_path
from async_batcher.pool._turns import Turns

if TYPE_CHECKING:
    from contextvars import Context

    from async_batcher._outcome import Outcome
    from async_batcher._wire import Blob
    from async_batcher.pool._census import Census
    from async_batcher.pool._task import Task

# Seconds before the next start after one, two, three rounds of workers that died before they were ready. After the fourth the
# pool gives up: what fails four times in a second and a half has a cause that does not pass by itself.
_PAUSES = (0.05, 0.25, 1.0)
_LONGEST_PAUSE = 5.0  # between such rounds while other workers live
_MOST_RETURNS = 3  # times that a task which no worker has begun is handed to another
_AHEAD = 2.0  # a successor is ordered this many times as early as workers have lately needed to get ready
_STOPPED = "the pool has been stopped; start() reopens it"
_UNWANTED = "nobody waited for the batch any more, so it was ended"
_CUT_OFF = "the pool was stopped before the batch had ended"


class Crew:
    """The workers.

    Args:
        loop: The loop that they are watched on.
        context: What its callbacks run in.
        workers: How many.
        method: How they are started.
        threads: See `_worker.limit_threads`.
        start_timeout: Seconds for one to get ready.
        initializer: What each runs first, pickled with its arguments.
        max_tasks: Batches after which one is replaced.
        max_memory: Bytes of private resident memory after which one is replaced.
        census: What they are counted in.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        context: Context,
        *,
        workers: int,
        method: str,
        threads: int,
        start_timeout: float,
        initializer: Blob | None,
        max_tasks: int | None,
        max_memory: int | None,
        census: Census,
    ) -> None:
        self.loop = loop
        self.new_waiter = waiters(loop)
        self.pid = os.getpid()
        self._context = context
        self._workers = workers
        self._threads = threads
        self._start_timeout = start_timeout
        self._initializer = initializer
        self._max_tasks = max_tasks
        self._max_memory = max_memory
        self._census = census
        self._helpers = ThreadPoolExecutor(workers + 1, thread_name_prefix="async_batcher-pool")
        self._launcher = launcher_for(method, loop, self._helpers)
        self._members: list[Member] = []
        self._idle: list[Member] = []  # the one that was busy last comes last
        self._standby: list[Member] = []  # ready before their predecessors have left
        self._tasks: set[Task] = set()  # that nobody has been told the outcome of
        self._turns: Turns[Task] = Turns()
        self._pinned: dict[Member, list[Task]] = {}  # for one worker only
        self._programs: dict[bytes, tuple[Any, ...]] = {}  # what every worker that is yet to come loads before it is ready
        self._rounds = 0  # of starts that failed, one after the other
        self._retry: asyncio.TimerHandle | None = None
        self._last_failure: BaseException | None = None
        self._broken: PoolBrokenError | None = None
        self._start_seconds = 0.0
        self._has_warned = False
        self._changes: list[asyncio.Future[None]] = []
        self.closing = False
        self._ending: asyncio.Task[None] | None = None
        forget_after_fork(self)

    # What the pool asks.

    def submit(self, task: Task) -> None:
        """Have a task run."""
        if self.closing:
            task.settle(BatcherStoppedError(_STOPPED))
            return
        self._broken = None
        self._tasks.add(task)
        if len(self._members) < self._workers:
            self._fill()
        if self._idle and not self._turns.lines:
            self._assign(task)
        else:
            self._turns.put(task.source, task)

    def withdraw(self, task: Task) -> bool:
        """Take a task back.

        Returns:
            Whether no worker has it yet; one that has it runs it unseen.
        """
        is_waiting = self._turns.remove(task.source, task)
        self._tasks.discard(task)
        task.forget()
        self._note_change()
        return is_waiting

    def end(self, task: Task, *, force: bool) -> None:
        """Nobody waits for a task any more: it is not begun, or, with ``force``, ended with its worker."""
        if self._turns.remove(task.source, task):
            self._settle(task, BatchError(_UNWANTED))
            return
        member = next((member for member in self._members if member.task is task), None)
        if force and member is not None:
            self._settle(task, BatchError(_UNWANTED))
            member.kill("abandoned")
            self._fill()

    def prepare(self, program: tuple[Any, ...], tasks: list[Task]) -> int:
        """Have every worker load a program: those that are here by one of the tasks each, later ones before they are ready.

        Args:
            program: What `_worker.perform` is called with.
            tasks: As many as there may be workers.

        Returns:
            How many of the tasks will be run.
        """
        self._programs[program[0]] = program
        pairs = list(zip(self._serving(), tasks, strict=False))
        for member, task in pairs:
            self._tasks.add(task)
            self._pinned.setdefault(member, []).append(task)
        self._dispatch_pinned()
        return len(pairs)

    def dismiss(self, key: bytes) -> None:
        """Later workers need not load that program ahead."""
        self._programs.pop(key, None)

    async def start(self) -> None:
        """Start every worker, and wait until all are ready.

        Raises:
            PoolBrokenError: None can be started.
            BatcherStoppedError: The pool was stopped meanwhile.
        """
        self._broken = None
        self._fill()
        while not self.closing:
            if self._broken is not None:
                raise PoolBrokenError(str(self._broken)) from self._broken.__cause__
            if len(self._serving()) >= self._workers:
                return
            if self._rounds > len(_PAUSES):
                msg = (
                    f"only {len(self._serving())} of {self._workers} workers could be started, which go on; "
                    f"of the others the last one: {self._last_failure!r}"
                )
                raise PoolBrokenError(msg) from self._last_failure
            await self._change()
        raise BatcherStoppedError(_CUT_OFF)

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
                        while self._tasks or any(member.state is State.BUSY for member in self._members):
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
            for member in self._members:
                member.abandon()
            self._launcher.abandon()
            self._members.clear()
            self._helpers.shutdown(wait=False)

    def forget(self) -> None:
        """In a forked child: close what belongs to the parent."""
        self.closing = True
        for member in self._members:
            member.forget()
        self._launcher.forget()

    @property
    def members(self) -> list[Member]:
        """Its workers, those that are starting or ending too."""
        return list(self._members)

    def memory_of(self, member: Member) -> int:
        """Bytes of private resident memory of a worker; its peak where the system tells no better, 0 where it tells nothing."""
        try:
            fields = Path("/proc", str(member.pid), "statm").read_text().split()
            return (int(fields[1]) - int(fields[2])) * mmap.PAGESIZE
        except (OSError, ValueError, IndexError):
            return member.peak if member.state is not State.GONE else 0

    # What its members tell.

    def on_ready(self, member: Member) -> None:
        """A worker has started."""
        self._rounds = 0
        self._start_seconds = member.start_seconds
        self._standby.append(member)
        self._promote()
        self._note_change()

    def on_start_timeout(self, member: Member) -> None:
        """A worker was not ready in time, and has been killed; what was to start it may be why."""
        self._launcher.give_up_on(member)

    def on_idle(self, member: Member) -> None:
        """A worker can take the next batch."""
        if self._max_tasks is not None and member.batches >= self._max_tasks:
            self._let_go(member)
            return
        if self._max_memory is not None and not member.is_outgrown and self.memory_of(member) > self._max_memory:
            member.is_outgrown = member.is_retiring = True
            self._fill()
        self._idle.append(member)
        if self._standby:
            self._promote()
        if self._pinned:
            self._dispatch_pinned()
        if self._turns.lines:
            self._dispatch()
        if self._changes:
            self._note_change()

    def on_answers(self, task: Task, answers: Blob) -> None:
        """A task has been done."""
        if task in self._tasks:
            outcome = task.crossing.answers(answers)
            self._tasks.discard(task)
            if self._changes:
                self._note_change()
            task.answer(outcome)  # last: who waits may go on at once

    def on_reply(self, member: Member, task: Task, reply: Any) -> None:
        """A worker says something else of a task, most often what it lacks."""
        if task not in self._tasks:
            return
        try:
            outcome = task.crossing.read(reply)
        except BaseException as exc:  # noqa: BLE001 - nobody is to wait for ever because a reply cannot be read
            outcome = exc
        if outcome is None or reply[0] == "ready":
            member.batches -= 1  # it has run none: it asks for what it lacks, or has loaded a program
        if outcome is not None:
            self._settle(task, outcome)
            return
        member.unlearn(task.key)
        self._turns.put_back(task.source, task)
        self._dispatch()

    def on_overdue(self, member: Member, task: Task) -> None:
        """A worker was ended since its task ran for too long."""
        msg = (
            f"the batch ran for longer than {task.timeout} seconds, and worker process {member.pid} was ended with it. Raise the "
            "timeout, make batches smaller, or find out what hangs"
        )
        self._settle(task, BatchTimeoutError(msg))
        self._fill()

    def on_failed(self, task: Task, error: BaseException) -> None:
        """What a worker answered cannot be taken."""
        self._settle(task, error)

    def on_lost(self, member: Member, task: Task, *, has_begun: bool) -> None:
        """A worker died with a task."""
        if task not in self._tasks:
            return
        task.returns += not has_begun
        if has_begun or task.returns > _MOST_RETURNS:
            self._settle(task, _death(member, has_begun=has_begun))
        else:
            self._turns.put_back(task.source, task)
            self._dispatch()
        self._fill()

    def on_gone(self, member: Member) -> None:
        """A worker's process has ended."""
        self._members.remove(member)
        for some in (self._idle, self._standby):
            if member in some:
                some.remove(member)
        for task in self._pinned.pop(member, []):
            self._turns.put_back(task.source, task)
        if self._ending is None:
            self._census.gone(member)
            if not member.was_ready:
                self._on_failed_start(member)
        self._promote()
        self._fill()
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

    def _serving(self) -> list[Member]:
        """The workers that take batches, or hold one."""
        return [m for m in self._members if m.state in (State.IDLE, State.BUSY) and m not in self._standby]

    def _fill(self) -> None:
        """Start the workers that are missing."""
        if self._retry is not None or self._ending is not None or (self.closing and not self._tasks):
            return
        if self._broken is not None:  # until somebody asks again
            return
        alive = sum(member.is_alive() for member in self._members)
        retiring = sum(member.is_retiring and member.is_alive() for member in self._members)
        for _ in range(self._workers + retiring - alive):
            if not self._context.run(self._launch):
                return

    def _launch(self) -> bool:
        try:
            member = Member(self.loop, self, self._helpers)
        except OSError as exc:  # no descriptors, no memory
            self._pause(exc, has_raised=False)
            return False
        self._members.append(member)
        self._census.starts += 1
        self._launcher.launch(member, member.ends)
        member.introduce(self._settings(), self._start_timeout)
        return True

    def _settings(self) -> dict[str, Any]:
        process = sys.modules.get("multiprocessing.process")
        return {
            "threads": self._threads,
            "path": search_path(),
            "argv": list(sys.argv),
            "folder": current_folder(),
            "authkey": bytes(process.current_process().authkey) if process is not None else None,  # for managers' proxies
            "initializer": self._initializer,
            "programs": list(self._programs.values()),
        }

    def _promote(self) -> None:
        """Let successors take the places of workers that have left, or that have grown too large and are idle."""
        while self._standby:
            if len(self._serving()) >= self._workers:
                outgrown = next((member for member in self._idle if member.is_outgrown), None)
                if outgrown is None:
                    return
                self._idle.remove(outgrown)
                outgrown.leave()
            self.on_idle(self._standby.pop(0))

    def _let_go(self, member: Member) -> None:
        """A worker has done all the batches that it may do."""
        member.leave()
        for task in self._pinned.pop(member, []):
            self._turns.put_back(task.source, task)
        self._promote()
        self._fill()
        self._dispatch()
        self._note_change()

    def _order_successor(self, member: Member, max_tasks: int) -> None:
        """Order one when the worker is about to begin the last batches that it may do."""
        left = max_tasks - member.batches - 1
        mean = member.busy_seconds / member.batches if member.batches else float("inf")
        if left == 0 or left * mean <= _AHEAD * self._start_seconds:
            member.is_retiring = True
            self._fill()

    def _on_failed_start(self, member: Member) -> None:
        if member.unfit is not None:
            self._pause(decode_exception(Codec(), member.unfit), has_raised=True)
        else:
            self._pause(member.start_error or _death(member, has_begun=False), has_raised=False)

    def _pause(self, cause: BaseException, *, has_raised: bool) -> None:
        """A worker was not ready in the end: try again after a pause, or give up."""
        self._last_failure = cause
        if self._retry is None:
            self._rounds += 1
            pause = _PAUSES[self._rounds - 1] if self._rounds <= len(_PAUSES) else _LONGEST_PAUSE
            self._retry = self.loop.call_later(pause, self._again)
        if any(member.is_alive() for member in self._members):
            return
        if has_raised or self._rounds > len(_PAUSES):
            self._give_up("the initializer raised" if has_raised else "workers end before they are ready", cause)

    def _again(self) -> None:
        self._retry = None
        self._fill()

    def _give_up(self, why: str, cause: BaseException) -> None:
        self._cancel_retry()
        self._rounds = 0
        msg = f"the pool cannot start a worker, {why}: {type(cause).__name__}: {cause}. The next call tries anew"
        self._broken = PoolBrokenError(msg)
        self._broken.__cause__ = cause
        for task in [*self._turns.clear(), *(task for tasks in self._pinned.values() for task in tasks)]:
            error = PoolBrokenError(msg)
            error.__cause__ = cause
            self._settle(task, error)
        self._pinned.clear()
        self._note_change()

    def _cancel_retry(self) -> None:
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None

    # Its tasks.

    def _dispatch(self) -> None:
        """Give idle workers what waits."""
        while self._idle and self._turns.lines:
            self._assign(self._turns.take())

    def _assign(self, task: Task) -> None:
        """Give an idle worker a task, if it is still wanted."""
        if task.departs is not None and not task.is_wanted():
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
        if self._max_tasks is not None and not member.is_retiring:
            self._order_successor(member, self._max_tasks)

    def _dispatch_pinned(self) -> None:
        for member in list(self._idle):
            tasks = self._pinned.get(member)
            if tasks:
                task = tasks.pop()
                if not tasks:
                    del self._pinned[member]
                self._idle.remove(member)
                member.run(task)

    def _settle(self, task: Task, outcome: Outcome) -> None:
        self._tasks.discard(task)
        task.settle(outcome)
        if self._changes:
            self._note_change()

    # Its end.

    def _end(self, *, force: bool) -> asyncio.Task[None]:
        """The task that ends everything; it is one, whoever asks."""
        if force:
            self._abort()
        if self._ending is None:
            self._cancel_retry()
            self._ending = self.loop.create_task(self._end_all(), context=self._context.copy())
        return self._ending

    def _abort(self) -> None:
        self._turns.clear()
        self._pinned.clear()
        for task in list(self._tasks):
            self._settle(task, BatcherStoppedError(_CUT_OFF))
        self._kill_all()

    def _kill_all(self) -> None:
        for member in self.members:
            member.kill()

    def _end_at_once(self) -> None:
        # Not by a task: the loop may come to its end before the task does, and what the task had left would live on.
        self._abort()
        self._cancel_retry()
        self.abandon()

    async def _end_all(self) -> None:
        try:
            await self._end_one_after_the_other()
        except asyncio.CancelledError:  # with every task of a loop that ends
            self._end_at_once()
            raise

    async def _end_one_after_the_other(self) -> None:
        for member in self.members:
            if member.state is State.IDLE:
                member.leave()
            elif member.state in (State.STARTING, State.BUSY):
                member.kill()
        grace = self.loop.call_later(GRACE, self._kill_all)
        while self._members:
            await self._change()
        grace.cancel()
        await self._launcher.close()
        self._helpers.shutdown()

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


def _death(member: Member, *, has_begun: bool) -> WorkerDiedError:
    """The error for the task that a worker died with, or the cause of a start that failed."""
    if not member.was_ready:
        what = "before it was ready"
    elif has_begun:
        what = "while it ran the batch, which is lost and may have run in part"
    else:
        what = "before it had begun the batch, as others had before it"
    cause = likely_cause([member.exit_code], runs_main=False)
    if member.killed_for == HUNG_UP:
        cause = "It had closed its channel to the pool, and was killed: something closes file descriptors that are not its own."
    msg = f"worker process {member.pid} ({exit_name(member.exit_code)}) ended {what}. {cause}"
    return WorkerDiedError(msg, pid=member.pid, exit_code=member.exit_code, may_have_run=has_begun)
