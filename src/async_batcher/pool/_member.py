"""One worker, as its pool sees it.

::

    STARTING --ready--> IDLE --run--> BUSY --reply--> IDLE ...      a batch at a time
        |                 |             |
        |                 `--leave------|--> LEAVING (will end by itself)
        `-----------------+-------------'--> DYING (killed, or its channel has closed) --its process has ended--> GONE

Rules:

- A death is the end of the channel or of the process, whichever is seen first. What the worker had sent before still counts.
- Nothing is written to or read from the channel with a call that may block; what is copied to or from shared memory is copied
  in a helper thread where it is long.
"""

from __future__ import annotations

import contextlib
import enum
import os
import pickle
import signal
import time
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, Protocol

from async_batcher import _frames, _shm
from async_batcher._child import SHARED_FROM
from async_batcher._status import SIZE as STATUS_SIZE
from async_batcher._status import Status
from async_batcher._worker import MAX_PROGRAMS
from async_batcher.pool._blocks import Blocks
from async_batcher.pool._channel import Channel
from async_batcher.pool._processes import Ends

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable
    from concurrent.futures import Executor

    from async_batcher._wire import Failure
    from async_batcher.pool._blocks import Block
    from async_batcher.pool._task import Task

# Bytes that are copied on the loop's thread: about a tenth of a millisecond's work, as long as a trip to a helper thread takes.
COPIED_HERE = 1 << 20

_PATIENCE_WITH_THE_DEAD = 1.0  # seconds for the news of how a process ended that has closed its channel, or was killed


class State(enum.Enum):
    """What a worker is doing."""

    STARTING = "starting"
    IDLE = "idle"
    BUSY = "busy"
    LEAVING = "leaving"
    DYING = "dying"
    GONE = "gone"


class Crew(Protocol):
    """Who is told of a worker; always on the loop's thread."""

    def on_ready(self, member: Member) -> None:
        """It can take a batch."""

    def on_idle(self, member: Member) -> None:
        """It has answered, and can take the next batch."""

    def on_reply(self, member: Member, task: Task, reply: Any) -> None:
        """The reply to a task is here."""

    def on_overdue(self, member: Member, task: Task) -> None:
        """It was killed, since the task ran for too long."""

    def on_failed(self, task: Task, error: BaseException) -> None:
        """The reply to a task cannot be taken."""

    def on_lost(self, member: Member, task: Task, *, has_begun: bool) -> None:
        """It died with this task."""

    def on_gone(self, member: Member) -> None:
        """Its process has ended."""

    def on_no_room(self, error: OSError) -> None:
        """There was no shared memory to be had."""


class Member:
    """One worker.

    Args:
        loop: The loop that watches its channel.
        crew: Who is told.
        helpers: Threads for what would hold the loop up.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, crew: Crew, helpers: Executor) -> None:
        self._loop = loop
        self._crew = crew
        self._helpers = helpers
        self.state = State.STARTING
        self.pid: int | None = None
        self.exit_code: int | None = None
        self.batches = 0
        self.busy_seconds = 0.0
        self.made_at = time.monotonic()
        self.start_seconds = 0.0
        self.was_ready = False
        self.start_error: BaseException | None = None  # why it never was
        self.unfit: Failure | None = None  # what its initializer raised
        self.is_retiring = False  # a successor has been ordered
        self.is_outgrown = False  # it is to leave as soon as that is ready
        self.task: Task | None = None
        self._number = 0  # of the task, as the status page knows it
        self._departed_at = 0.0
        self._known: OrderedDict[str, None] = OrderedDict()  # programs that the worker keeps, as it keeps them
        self._need = 0  # bytes of shared memory that it takes
        self._timer: asyncio.TimerHandle | None = None
        self._has_ended = False
        status = _shm.nameless(STATUS_SIZE)
        self._status = Status(os.dup(status))
        life, self._life = os.pipe()
        self._channel = Channel(loop, self._on_frame, self._on_end_of_channel)
        self._blocks = Blocks(lambda message, descriptors: self._channel.send(message, descriptors=descriptors))
        self.ends = Ends(self._channel.theirs, status, life)

    # What its pool asks of it.

    def run(self, task: Task) -> None:
        """Send it a task; it must be idle."""
        self.state = State.BUSY
        self.task = task
        self._number += 1
        head, bulk = _frames.pack(task.message(with_program=self._learns(task.key)))
        self._need = _shm.need_of(bulk)
        if self._need < SHARED_FROM:
            self._depart(head, bulk, None, [])
            return
        block = self._blocks.lend(self._need)
        if self._need <= COPIED_HERE and block is not None:
            self._depart(head, [], block, _shm.write(block.fd, bulk))
        else:
            self._copy_and_depart(head, bulk, block)

    def introduce(self, settings: dict[str, Any], timeout: float) -> None:
        """Send what it needs to get ready.

        Args:
            settings: See `_child`.
            timeout: Seconds that it may take.
        """
        for program in settings["programs"]:
            self._learns(program[0])
        self._channel.send(("init", settings))
        self._set_timer(timeout, self._on_start_timeout)

    def knows(self, key: str) -> bool:
        """Whether the worker has that program."""
        return key in self._known

    def unlearn(self, key: str) -> None:
        """The worker says that it has not that program."""
        self._known.pop(key, None)

    def leave(self) -> None:
        """Let it end by itself, which it does at once: it is idle."""
        self.state = State.LEAVING
        self._channel.send(("leave",))

    def kill(self) -> None:
        """End it now, whatever it does."""
        if self.state is State.GONE:
            return
        self.state = State.DYING
        self._channel.stop()
        self._close_life()
        if self._has_ended:
            self._bury()
        elif self.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            self._set_timer(_PATIENCE_WITH_THE_DEAD, self._bury)

    def abandon(self) -> None:
        """End it without the loop, which has closed."""
        if self.pid is not None and not self._has_ended:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
        self.state = State.GONE
        self.forget()

    def forget(self) -> None:
        """Close what is ours, and leave the loop alone: it has closed, or is the parent's of a forked child."""
        self._channel.close()
        self._close_life()
        self._blocks.close()

    def is_alive(self) -> bool:
        """Whether it is, or will be, of use."""
        return self.state in (State.STARTING, State.IDLE, State.BUSY)

    def begun_at(self) -> float | None:
        """When it began its task, on `time.monotonic`; None if it has not."""
        return self._status.begun_at(self._number)

    @property
    def peak(self) -> int:
        """See `Status.peak`."""
        return self._status.peak

    # What its launcher tells.

    def started(self, pid: int) -> None:
        """There is a process."""
        self.pid = pid
        if self.state is State.DYING:
            self.kill()

    def not_started(self, error: BaseException) -> None:
        """There is none."""
        self._has_ended = True
        self.start_error = self.start_error or error
        self._bury()

    def ended(self, exit_code: int | None) -> None:
        """The process has ended."""
        if self._has_ended:
            return
        self._has_ended = True
        self.exit_code = exit_code
        if self.state is not State.GONE:
            if self.state is not State.LEAVING:
                self.state = State.DYING
            self._channel.read_the_rest()
            self._bury()

    # Its tasks.

    def _learns(self, key: str) -> bool:
        """Note that the worker will have that program.

        Returns:
            Whether it must be sent.
        """
        is_new = key not in self._known
        self._known[key] = None
        self._known.move_to_end(key)
        if len(self._known) > MAX_PROGRAMS:
            self._known.popitem(last=False)
        return is_new

    def _depart(self, head: bytes, bulk: list[memoryview], block: Block | None, places: _shm.Places) -> None:
        """Send the task, its buffers in the message or in a block."""
        assert self.task is not None  # noqa: S101 - `run` has set it
        target = self._blocks.lend_largest()
        self._departed_at = time.monotonic()
        source = 0 if block is None else block.name
        self._channel.send(("run", self._number, head, source, places, 0 if target is None else target.name), bulk)
        if self.task.timeout is not None:
            self._set_timer(self.task.timeout, self._on_timeout)

    def _copy_and_depart(self, head: bytes, bulk: list[memoryview], block: Block | None) -> None:
        """The same with a long copy, or a block that is yet to be made: in a helper thread."""
        need = self._need
        if block is not None:
            block.copying = True

        def copy() -> tuple[int, int, _shm.Places] | OSError:
            try:
                if block is not None:
                    return block.fd, block.size, _shm.write(block.fd, bulk)
                size = _shm.size_for(need)
                fd = _shm.nameless(size)
                try:
                    return fd, size, _shm.write(fd, bulk)
                except BaseException:
                    os.close(fd)
                    raise
            except OSError as exc:
                return exc

        def copied(done: asyncio.Future[Any]) -> None:
            result = done.result()
            lent = block
            if lent is not None:
                self._blocks.copied(lent, is_free=isinstance(result, OSError))
            elif not isinstance(result, OSError):
                lent = self._blocks.adopt(result[0], result[1])
            if self.state is not State.BUSY:
                return  # it has died; the task has been taken from it
            if isinstance(result, OSError):
                self._crew.on_no_room(result)
                self._depart(head, bulk, None, [])
            else:
                self._depart(head, [], lent, result[2])

        self._aside(copy, copied)

    def _on_reply(self, head: bytes, bulk: list[Any], name: int, places: _shm.Places, held: list[int]) -> None:
        self._cancel_timer()
        task, self.task = self.task, None
        assert task is not None  # noqa: S101 - asked by the caller
        self.batches += 1
        self.busy_seconds += time.monotonic() - self._departed_at
        self._blocks.returned(held, max([self._need, *(offset + size for offset, size in places)]), name)
        if self.state is State.BUSY:
            self.state = State.IDLE
        try:
            if not name:
                self._take(task, head, lambda: bulk)
            elif sum(size for _, size in places) > COPIED_HERE:
                self._copy_out(task, head, self._blocks[name], places)
            else:
                block = self._blocks[name]
                self._take(task, head, lambda: _shm.read(block.fd, places))
                block.is_free = True
        finally:
            if self.state is State.IDLE:
                self._crew.on_idle(self)

    def _copy_out(self, task: Task, head: bytes, block: Block, places: _shm.Places) -> None:
        """Copy the results out in a helper thread; the worker may go on with another block meanwhile."""
        block.copying = True

        def copied(done: asyncio.Future[Any]) -> None:
            self._blocks.copied(block, is_free=True)
            self._take(task, head, done.result)

        self._aside(lambda: _shm.read(block.fd, places), copied)

    def _take(self, task: Task, head: bytes, bulk: Callable[[], list[Any]]) -> None:
        """Hand over the reply to a task."""
        try:
            reply = _frames.unpack(head, bulk())
        except BaseException as exc:  # noqa: BLE001 - memory, most likely; nobody is to wait for ever because of it
            self._crew.on_failed(task, exc)
        else:
            self._crew.on_reply(self, task, reply)

    def _make_room(self, need: int) -> None:
        """The worker asks for a block for its results."""
        fitting = self._blocks.lend(need)
        if fitting is not None:
            self._channel.send(("room", fitting.name))
            return
        size = _shm.size_for(need)

        def made(done: asyncio.Future[Any]) -> None:
            try:
                fd = done.result()
            except OSError as exc:
                self._crew.on_no_room(exc)
                self._channel.send(("room", 0))
                return
            block = self._blocks.adopt(fd, size)
            if block is not None:
                self._channel.send(("room", block.name))

        self._aside(lambda: _shm.nameless(size), made)

    def _aside(self, work: Callable[[], Any], then: Callable[[asyncio.Future[Any]], None]) -> None:
        """Do something in a helper thread, and then the rest here."""
        try:
            done = self._loop.run_in_executor(self._helpers, work)
        except RuntimeError:  # no thread can be started: better here than not at all
            done = self._loop.create_future()
            try:
                done.set_result(work())
            except Exception as exc:  # noqa: BLE001 - as the helper thread would
                done.set_exception(exc)
        done.add_done_callback(then)

    # What comes over its channel.

    def _on_frame(self, parts: list[Any]) -> None:
        match pickle.loads(parts[0]):  # noqa: S301 - our own
            case ("reply", number, head, name, places, held):
                if number == self._number and self.task is not None:
                    self._on_reply(head, parts[1:], name, places, held)
            case ("room", need):
                self._make_room(need)
            case ("ready",):
                self.start_seconds = time.monotonic() - self.made_at
                self._cancel_timer()
                if self.state is State.STARTING:
                    self.was_ready = True
                    self.state = State.IDLE
                    self._crew.on_ready(self)
            case ("unfit", failure):
                self.unfit = failure

    def _on_end_of_channel(self) -> None:
        if self.state is State.LEAVING:
            self._set_timer(_PATIENCE_WITH_THE_DEAD, self.kill)
        elif not self._has_ended:
            self.kill()

    # Its time.

    def _on_start_timeout(self) -> None:
        self._timer = None
        self.start_error = TimeoutError("it was not ready within start_timeout; it has been killed")
        self.kill()

    def _on_timeout(self) -> None:
        self._timer = None
        task = self.task
        self._channel.read_the_rest()  # the answer may be here: some loops look at their timers first
        if task is None or self.task is not task or task.timeout is None:
            return
        now = time.monotonic()
        begun = self.begun_at()
        if begun is None:
            # It was idle, and has not so much as begun: stopped, or starved of the processor. Another worker shall do it.
            rest = self._departed_at + max(task.timeout, _PATIENCE_WITH_THE_DEAD) - now
        else:
            rest = begun + task.timeout - now
        if rest > 0:
            self._set_timer(rest, self._on_timeout)
            return
        self.task = None
        self.kill()
        if begun is None:
            self._crew.on_lost(self, task, has_begun=False)
        else:
            self._crew.on_overdue(self, task)

    def _set_timer(self, seconds: float, callback: Callable[[], None]) -> None:
        self._cancel_timer()
        self._timer = self._loop.call_later(seconds, callback)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # Its end.

    def _close_life(self) -> None:
        if self._life != -1:
            os.close(self._life)
            self._life = -1

    def _bury(self) -> None:
        """Its process has ended, or will not say how it does."""
        task, self.task = self.task, None
        has_begun = self.begun_at() is not None
        self.state = State.GONE
        self._cancel_timer()
        self._channel.stop()
        self.forget()
        self._status.close()
        if task is not None:
            self._crew.on_lost(self, task, has_begun=has_begun)
        self._crew.on_gone(self)
