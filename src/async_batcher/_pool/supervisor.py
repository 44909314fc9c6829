"""The workers of a pool: who is there, who takes another's place, and what is done when they will not start.

::

    a worker short --> a new WorkerHandle --> the launcher --> set up: standby --successor--> idle <--> busy
          ^                                   |                                          |
          |                                   `--- not ready: a pause, or giving up      | all its batches done, or grown
          `------------------------------------------------------------------------------'

Rules:

- As many workers as ``max_workers`` run batches. A worker that is to be replaced stays until its successor is ready, unless it
  has done all the batches that it may do; the successor is then ordered ahead, as long before as workers need to get ready.
- Where functions have a set-up, a worker is ready when it has run the set-ups of all that run in the pool, and the one that it
  replaces goes on until then. A set-up that kills its worker, or never returns, is left to that function's next batch.
- Workers that die before they are ready are started again after growing pauses. When no worker lives and it has failed again and
  again, the owner is told, with the last cause; when somebody asks again it is tried anew.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from async_batcher._eventloop.future import resolve
from async_batcher._pool.exit_status import exit_status_name, probable_cause
from async_batcher._pool.interpreter import arguments, cause_of_no_start, current_dir, search_path
from async_batcher._pool.launchers import launcher_for
from async_batcher._pool.worker_handle import (
    CHANNEL_CLOSED,
    SHUTDOWN_GRACE,
    TEAR_DOWN_GRACE,
    WorkerCallbacks,
    WorkerHandle,
    WorkerState,
)
from async_batcher._serialization.codec import Codec
from async_batcher._serialization.exception_text import one_line
from async_batcher._serialization.remote_exception import decode_exception
from async_batcher._transport.protocol import EXIT_INTERNAL_ERROR
from async_batcher.exceptions import PoolBrokenError, WorkerDiedError

if TYPE_CHECKING:
    import asyncio
    from contextvars import Context

    from async_batcher._pool.pickled_function import PickledFunction
    from async_batcher._pool.worker_ledger import WorkerLedger
    from async_batcher._serialization.codec import Payload
    from async_batcher._transport.protocol import WorkerSettings

# Seconds before the next start after one, two, three rounds of workers that died before they were ready. After the fourth the
# pool gives up: what fails four times in a second and a half has a cause that does not pass by itself.
_BACKOFF_DELAYS = (0.05, 0.25, 1.0)
_MAX_BACKOFF_DELAY = 5.0  # between such rounds while other workers live
_PATIENCE_WITH_SETUPS = 4.0  # times the seconds that one took before, and at least ``start_timeout``
_UNWANTED_SETUP = 2.0  # seconds that a set-up without callers gets, twice as many after each that was ended
_MOST_FAILED_SETUPS = 3  # workers that may end while they set up a function ahead; what kills one may be no fault of the set-up
_REPLACEMENT_LEAD_FACTOR = 2.0  # a successor is ordered this many times as early as workers have lately needed to get ready


class SupervisorCallbacks(WorkerCallbacks, Protocol):
    """Whose workers they are."""

    def has_work(self) -> bool:
        """Whether there is, or may yet come, something for a worker to do."""

    def on_broken(self, message: str, cause: BaseException) -> None:
        """No worker can be had for now."""


class Supervisor:
    """The workers.

    Args:
        loop: The loop that they are watched on.
        context: What they are started in.
        owner: Who is told of them.
        workers: How many.
        method: How they are started.
        threads: See `bootstrap.limit_blas_threads`.
        start_timeout: Seconds for one to get ready.
        initializer: What each runs first, pickled with its arguments.
        max_tasks: Batches after which one is replaced.
        max_memory: Bytes of private resident memory after which one is replaced.
        ledger: What they are counted in.

    Attributes:
        size: How many there are to be.
        members: All, those that are starting or ending too.
        idle: Those that can take a batch; the one that was busy last comes last.
        standby: Those that are ready before their predecessors have left.
        preparing: Those that have started, and load and set up functions before they take batches.
        programs: The functions that they load and set up, by their keys.
        broken: Why no worker can be had for now.
        max_tasks: See above.
        max_memory: See above.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        context: Context,
        owner: SupervisorCallbacks,
        *,
        workers: int,
        method: str,
        threads: int,
        start_timeout: float,
        initializer: Payload | None,
        max_tasks: int | None,
        max_memory: int | None,
        ledger: WorkerLedger,
    ) -> None:
        self.size = workers
        self.members: list[WorkerHandle] = []
        self.idle: list[WorkerHandle] = []
        self.standby: list[WorkerHandle] = []
        self.preparing: list[WorkerHandle] = []
        self.programs: dict[bytes, PickledFunction] = {}
        self._setup_seconds: dict[bytes, float] = {}  # that each of them took lately
        self._unwanted_setups: dict[bytes, float] = {}  # seconds that the next one of a function gets without callers
        self._failed_setups: dict[bytes, int] = {}  # one after the other, by the keys of functions
        self.broken: PoolBrokenError | None = None
        self.max_tasks = max_tasks
        self.max_memory = max_memory
        self._loop = loop
        self._context = context
        self._owner = owner
        self._threads = threads
        self._start_timeout = start_timeout
        self._initializer = initializer
        self._census = ledger
        self._helpers = ThreadPoolExecutor(workers + 1, thread_name_prefix="async_batcher-pool")
        self._launcher = launcher_for(method, loop, self._helpers)
        self._rounds = 0  # of starts that failed, one after the other
        self._retry: asyncio.TimerHandle | None = None
        self._last_failure: BaseException | None = None
        self._start_seconds = 0.0  # what the last one needed to get ready
        self._is_closing = False

    # Who is there.

    def serving(self) -> list[WorkerHandle]:
        """The workers that take batches, or hold one."""
        away = [*self.standby, *self.preparing]
        return [m for m in self.members if m.state in (WorkerState.IDLE, WorkerState.BUSY) and m not in away]

    def state_of(self, member: WorkerHandle) -> WorkerState:
        """What a worker is doing; one that loads and sets up functions before it takes batches is starting."""
        return WorkerState.STARTING if member in self.preparing and member.is_alive() else member.state

    def is_complete(self) -> bool:
        """Whether all are there.

        Raises:
            PoolBrokenError: They will not be, for now.
        """
        if self.broken is not None:
            raise PoolBrokenError(str(self.broken)) from self.broken.__cause__
        count = len(self.serving())
        if 0 < count < self.size and self._rounds > len(_BACKOFF_DELAYS):
            msg = (
                f"only {count} of {self.size} workers could be started, which go on; of the others the last one: "
                f"{one_line(self._last_failure) if self._last_failure is not None else 'not known'}"
            )
            raise PoolBrokenError(msg) from self._last_failure
        return count >= self.size

    def memory_of(self, member: WorkerHandle) -> int:
        """Bytes of private resident memory of a worker; its peak where the system tells no better, 0 where it tells nothing."""
        try:
            fields = Path("/proc", str(member.pid), "statm").read_text().split()
            return (int(fields[1]) - int(fields[2])) * mmap.PAGESIZE
        except Exception:  # noqa: BLE001 - it has ended, there is no /proc, or an audit hook
            return member.peak if member.state is not WorkerState.GONE else 0

    # They come.

    def fill(self) -> None:
        """Start the workers that are missing."""
        if self._retry is not None or self._is_closing or not self._owner.has_work():
            return
        if self.broken is not None:  # until somebody asks again
            return
        alive = sum(member.is_alive() for member in self.members)
        retiring = sum(member.is_retiring and member.is_alive() for member in self.members)
        try:
            for _ in range(self.size + retiring - alive):
                self._context.run(self._start_one)
        except Exception as exc:  # noqa: BLE001 - no descriptors, no memory, an audit hook
            self._pause(exc, has_raised=False)  # last, and outside the context: the callback may come back here

    def _start_one(self) -> None:
        member = WorkerHandle(self._loop, self._owner, self._helpers)
        self.members.append(member)
        self._census.starts += 1
        try:
            member.introduce(self._settings(), self._start_timeout)
            self._launcher.launch(member, member.ends)
        except BaseException as exc:
            member.ends.close()
            self._loop.call_soon(member.not_started, exc)
            if not isinstance(exc, Exception):  # Ctrl-C
                raise

    def _settings(self) -> WorkerSettings:
        process = sys.modules.get("multiprocessing.process")
        return {
            "threads": self._threads,
            "path": search_path(),
            "argv": arguments(),
            "folder": current_dir(),
            "authkey": bytes(process.current_process().authkey) if process is not None else None,  # for managers' proxies
            "initializer": self._initializer,
        }

    def started(self, member: WorkerHandle) -> None:
        """A worker has started, and may load and set up functions."""
        self._rounds = 0
        self._start_seconds = member.start_seconds
        self.preparing.append(member)

    def next_program(self, member: WorkerHandle) -> PickledFunction | None:
        """The next function for a worker that is preparing; None when it has them all, and is ready."""
        for key, program in self.programs.items():
            if key not in member.known:
                return program
        self.preparing.remove(member)
        self.standby.append(member)
        return None

    def note_set_up(self, key: bytes, seconds: float) -> None:
        """A function has been loaded and set up somewhere, which took so long."""
        self._setup_seconds[key] = seconds
        self._failed_setups.pop(key, None)
        self._unwanted_setups.pop(key, None)

    def note_failed_setup(self, key: bytes) -> None:
        """A worker ended while it loaded and set up a function ahead; after several, that is left to the function's batches."""
        self._failed_setups[key] = self._failed_setups.get(key, 0) + 1
        if self._failed_setups[key] >= _MOST_FAILED_SETUPS:
            self._forget_setups(key)

    def note_unwanted_setup(self, key: bytes) -> None:
        """A set-up without callers was ended: allow the next one twice as long, so that a slow one finishes at last."""
        self._unwanted_setups[key] = 2 * max(_UNWANTED_SETUP, self._unwanted_setups.get(key, 0.0))

    def patience(self, key: bytes) -> float:
        """Seconds that a worker which takes no batches yet gets for loading and setting up a function."""
        return max(self._start_timeout, self._expected(key))

    def patience_without_callers(self, key: bytes) -> float:
        """Seconds that loading and setting up a function gets for a batch whose callers are all gone."""
        wanted = max(_UNWANTED_SETUP, self._expected(key), self._unwanted_setups.get(key, 0.0))
        return min(wanted, self.patience(key))

    def forget_program(self, key: bytes) -> None:
        """Later workers need not load and set up that function ahead."""
        self._forget_setups(key)
        self._unwanted_setups.pop(key, None)

    def _expected(self, key: bytes) -> float:
        return _PATIENCE_WITH_SETUPS * self._setup_seconds.get(key, 0.0)

    def _forget_setups(self, key: bytes) -> None:
        self.programs.pop(key, None)
        self._setup_seconds.pop(key, None)
        self._failed_setups.pop(key, None)

    def late(self, member: WorkerHandle) -> None:
        """A worker was not ready in time, and has been killed; what was to start it may be why."""
        self._launcher.give_up_on(member)

    # They take another's place.

    def successor(self) -> WorkerHandle | None:
        """Who takes the place of one that has left, or of one that has grown too large and is idle, which then leaves."""
        if not self.standby:
            return None
        if len(self.serving()) >= self.size:
            outgrown = next((member for member in self.idle if member.is_outgrown), None)
            if outgrown is None:
                return None
            self.idle.remove(outgrown)
            outgrown.leave()
        return self.standby.pop(0)

    def order_successor(self, member: WorkerHandle) -> None:
        """Order one for a worker that has just begun a batch, if it is one of the last that it may do."""
        left = self.max_tasks - member.batches - 1 if self.max_tasks is not None else math.inf
        mean = member.busy_seconds / member.batches if member.batches else math.inf
        if left <= 0 or left * mean <= _REPLACEMENT_LEAD_FACTOR * (self._start_seconds + sum(self._setup_seconds.values())):
            member.is_retiring = True
            self.fill()

    def may_leave(self, member: WorkerHandle) -> bool:
        """Whether a worker that has done its batches leaves at once, and does not wait for the set-ups of its successor."""
        if self.standby or self.max_tasks == 1 or not any(program.has_setup for program in self.programs.values()):
            return True
        member.is_outgrown = True
        return False

    def weigh(self, member: WorkerHandle) -> None:
        """Order one for a worker that has grown too large."""
        if self.max_memory is not None and self.memory_of(member) > self.max_memory:
            member.is_outgrown = member.is_retiring = True
            self.fill()

    def gone(self, member: WorkerHandle) -> None:
        """A worker's process has ended."""
        self.members.remove(member)
        for some in (self.idle, self.standby, self.preparing):
            if member in some:
                some.remove(member)
        if self._is_closing:
            return
        self._census.gone(member)
        if member.was_ready:
            return
        if member.unfit is not None:
            self._pause(decode_exception(Codec(), member.unfit), has_raised=True)
        else:
            self._pause(member.start_error or crash_error(member, has_begun=False), has_raised=False)

    # They will not start.

    def _pause(self, cause: BaseException, *, has_raised: bool) -> None:
        """A worker was not ready in the end: try again after a pause, or give up."""
        self._last_failure = cause
        if self._retry is None:
            self._rounds += 1
            pause = _BACKOFF_DELAYS[self._rounds - 1] if self._rounds <= len(_BACKOFF_DELAYS) else _MAX_BACKOFF_DELAY
            self._retry = self._loop.call_later(pause, self._again)
        if any(member.is_alive() for member in self.members):
            return
        if has_raised or self._rounds > len(_BACKOFF_DELAYS):
            self._give_up("the initializer raised" if has_raised else "workers end before they are ready", cause)

    def _again(self) -> None:
        self._retry = None
        self.fill()

    def _give_up(self, why: str, cause: BaseException) -> None:
        self._cancel_retry()
        self._rounds = 0
        msg = f"the pool cannot start a worker, {why}: {one_line(cause)}. The next call tries anew"
        self.broken = PoolBrokenError(msg)
        self.broken.__cause__ = cause
        self._owner.on_broken(msg, cause)

    def _cancel_retry(self) -> None:
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None

    # They go.

    def begin_to_close(self) -> None:
        """No more are started, and no end of one is news."""
        self._is_closing = True
        self._cancel_retry()

    def kill_all(self) -> None:
        """End all now."""
        for member in list(self.members):
            member.kill()

    def end_by_force(self) -> asyncio.TimerHandle:
        """Kill all that have nothing to tear down, or are busy; let the others tear down and end by themselves.

        Returns:
            The timer that kills late ones, which is to be cancelled.
        """
        for member in list(self.members):
            if not (member.is_alive() or member.state is WorkerState.LEAVING) or not member.tears_down:
                member.kill()
            elif member.state is WorkerState.IDLE:
                member.leave()
        return self._loop.call_later(SHUTDOWN_GRACE, self.kill_all)

    def send_home(self) -> asyncio.TimerHandle:
        """Have the idle ones end by themselves, and kill the others; the timer kills late ones, and is to be cancelled."""
        for member in list(self.members):
            if member.state is WorkerState.IDLE:
                member.leave()
            elif member.state in (WorkerState.STARTING, WorkerState.BUSY):
                member.kill()
        tears_down = any(program.has_setup for program in self.programs.values())
        return self._loop.call_later(TEAR_DOWN_GRACE if tears_down else SHUTDOWN_GRACE, self.kill_all)

    async def close(self) -> None:
        """End what has started them, when all have gone."""
        await self._launcher.close()
        ended = self._loop.create_future()

        def shut_down() -> None:
            self._helpers.shutdown()
            with contextlib.suppress(RuntimeError):  # the loop has closed
                self._loop.call_soon_threadsafe(resolve, ended, None)

        try:  # aside: a helper may still copy a large batch for which nobody waits any more
            thread = threading.Thread(target=shut_down, name="async_batcher-pool-end", daemon=True)
            thread.start()
        except RuntimeError:  # none to be had
            self._helpers.shutdown()
        else:
            await ended
            thread.join()  # it has nothing left to do

    def abandon(self) -> None:
        """End every process without the loop, which has closed, or is about to."""
        self._is_closing = True
        if not self._loop.is_closed():
            self._cancel_retry()
        for member in self.members:
            member.abandon()
        self._launcher.abandon()
        self.members.clear()
        self._helpers.shutdown(wait=False)

    def forget(self) -> None:
        """In a forked child: close what belongs to the parent."""
        for member in self.members:
            member.forget()
        self._launcher.forget()


def crash_error(member: WorkerHandle, *, has_begun: bool) -> WorkerDiedError:
    """The error for the task that a worker died with, or the cause of a start that failed."""
    if not member.was_ready:
        what = "before it was ready"
    elif member.was_preparing:
        what = "while it loaded the function or ran setup_worker"
    elif has_begun:
        what = "while it ran the batch, which is lost and may have run in part"
    else:
        what = "before it had begun the batch, as others had before it"
    cause = probable_cause([member.exit_code], runs_main=False)
    if not member.was_ready and (member.exit_code or 0) > 0:
        cause = cause_of_no_start()
    if member.killed_because == CHANNEL_CLOSED and member.exit_code is not None:
        cause = (
            "It had closed its channel to the pool, and was killed: something closes file descriptors that are not its own, or "
            "has put another program in its place."
        )
    elif member.exit_code == EXIT_INTERNAL_ERROR:
        cause = (
            "Its own code failed, as standard error tells: memory or file descriptors were used up, or process_batch has left a "
            "signal's handler or a descriptor of the worker's in a state that it cannot go on with."
        )
    msg = f"worker process {member.pid} ({exit_status_name(member.exit_code)}) ended {what}. {cause}"
    return WorkerDiedError(msg, pid=member.pid, exit_code=member.exit_code, may_have_run=has_begun)
