"""One worker, as its pool sees it.

::

    STARTING --ready--> IDLE --run--> BUSY --reply--> IDLE ...      a batch at a time
        |                 |             |
        |                 `--leave------|--> LEAVING (will end by itself)
        `-----------------+-------------'--> DYING (killed, or its channel has closed) --its process has ended--> GONE

Rules:

- A death is the end of the channel or of the process, whichever is seen first. What the worker had sent before still counts.
- Nothing is written to or read from the channel with a call that may block.
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

from async_batcher._pool import resource_tracker
from async_batcher._pool.process_watcher import ChildFds, kill
from async_batcher._pool.work_item import TearDownItem
from async_batcher._transport import framing, shared_memory
from async_batcher._transport.block_staging import BlockStager
from async_batcher._transport.channel import Channel
from async_batcher._transport.protocol import CODEC_PICKLE, ENVELOPE, MAX_CACHED_FUNCTIONS, MessageKind, encode_batch, loads
from async_batcher._transport.status_page import SIZE as STATUS_SIZE
from async_batcher._transport.status_page import StatusPage

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable
    from concurrent.futures import Executor

    from async_batcher._pool.work_item import WorkItem
    from async_batcher._serialization.codec import Payload
    from async_batcher._serialization.remote_exception import PickledException
    from async_batcher._transport.block_pool import BlockLease
    from async_batcher._transport.protocol import Content, WorkerSettings

CHANNEL_CLOSED = "closed channel"  # why one is killed that goes on without it
SLOW_SET_UP = "set-up timeout"  # why one is killed that does not finish a set-up

# Looked up for each batch, and members of an enum are slow to look up in Python 3.11.
_RUN, _REPLY = MessageKind.RUN, MessageKind.REPLY

SHUTDOWN_GRACE = 2.0  # seconds for an idle worker to end by itself; its exit handlers run then
TEAR_DOWN_GRACE = 30.0  # seconds, if tear-downs run then too

_EXIT_STATUS_TIMEOUT = 1.0  # seconds for the news of how a process ended that was killed
_STOP_TIMEOUT = 30.0  # seconds for one whose successor is there; it may be halted
_EOF_TO_EXIT_TIMEOUT = 0.25  # seconds for one to end whose channel has closed, as the end of a process closes it


class WorkerState(enum.Enum):
    """What a worker is doing."""

    STARTING = "starting"
    IDLE = "idle"
    BUSY = "busy"
    LEAVING = "leaving"
    DYING = "dying"
    GONE = "gone"


class WorkerCallbacks(Protocol):
    """Who is told of a worker; always on the loop's thread."""

    def on_ready(self, member: WorkerHandle) -> None:
        """It can take a batch."""

    def on_start_timeout(self, member: WorkerHandle) -> None:
        """It was not ready in time, and has been killed."""

    def patience(self, task: WorkItem) -> float:
        """Seconds for loading and setting up the function of this task, once no caller waits for that without a limit."""

    def on_slow_set_up(self, member: WorkerHandle, task: WorkItem) -> None:
        """The worker has loaded and set up the function of this task for longer than `patience`."""

    def on_begun(self, task: WorkItem, seconds: float) -> None:
        """The function of this task has been loaded and set up, which took so long, and the task begins."""

    def on_idle(self, member: WorkerHandle) -> None:
        """It has answered, and can take the next batch."""

    def on_answers(self, task: WorkItem, answers: Payload) -> None:
        """A task has been done."""

    def on_reply(self, member: WorkerHandle, task: WorkItem, reply: Any) -> None:
        """The worker says something else of a task."""

    def on_overdue(self, member: WorkerHandle, task: WorkItem) -> None:
        """It was killed, since the task ran for too long."""

    def on_failed(self, task: WorkItem, error: BaseException) -> None:
        """The reply to a task cannot be taken."""

    def on_lost(self, member: WorkerHandle, task: WorkItem, *, has_begun: bool) -> None:
        """It died with this task."""

    def on_gone(self, member: WorkerHandle) -> None:
        """Its process has ended."""

    def on_no_room(self, error: OSError) -> None:
        """There was no shared memory to be had."""


class WorkerHandle:
    """One worker.

    Args:
        loop: The loop that watches its channel.
        listener: Who is told.
        helpers: Threads for what would hold the loop up.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, listener: WorkerCallbacks, helpers: Executor) -> None:
        self._loop = loop
        self._listener = listener
        self.state = WorkerState.STARTING
        self.pid: int | None = None
        self.exit_code: int | None = None
        self.batches = 0
        self.busy_seconds = 0.0
        self.made_at = time.monotonic()
        self.start_seconds = 0.0
        self.was_ready = False
        self.start_error: BaseException | None = None  # why it never was
        self.unfit: PickledException | None = None  # what its initializer raised
        self.is_retiring = False  # a successor has been ordered
        self.is_outgrown = False  # it is to leave as soon as that is ready
        self.is_leaving = False  # it was let go
        self.was_preparing = False  # a function was being loaded and set up when it ended
        self._killed_for = ""
        self.task: WorkItem | None = None
        self.known: OrderedDict[bytes, None] = OrderedDict()  # programs that the worker keeps, as it keeps them
        self._latest = b""  # of them, the one that was used last
        self._number = 0  # of the task, as the status page knows it
        self._departed_at = 0.0
        self._answered_in = 0.0  # seconds that the last task took
        self._moved_at = 0.0  # when the task was last seen to be on its way
        self._taken = 0  # of the channel, then
        self._patience: float | None = None  # seconds for loading and setting up the task's function; None: it has that
        self._timer: asyncio.TimerHandle | None = None
        self._has_ended = False
        self._introduction: list[bytes | memoryview] = []
        self._lacks_tracker = False
        with contextlib.ExitStack() as undo:  # there may be no descriptors left
            status = shared_memory.create_anonymous(STATUS_SIZE)
            undo.callback(os.close, status)
            self._status = StatusPage(os.dup(status))
            undo.callback(self._status.close)
            life, self._life = os.pipe()
            undo.callback(os.close, life)
            undo.callback(self._close_life)
            self._channel = Channel(loop, self._on_message, self._on_end_of_channel)
            undo.callback(os.close, self._channel.child_fd)
            undo.callback(self._channel.close)
            undo.callback(self._channel.stop)
            self._freight = BlockStager(loop, self._channel, helpers, listener.on_no_room)
            self._blocks = self._freight.blocks
            self.ends = ChildFds(self._channel.child_fd, status, life)
            undo.pop_all()

    # What its pool asks of it.

    def run(self, task: WorkItem) -> None:
        """Send it a task; it must be idle."""
        self.state = WorkerState.BUSY
        self.task = task
        if self._lacks_tracker:
            self._share_tracker()
        self._number += 1
        with_program = task.key != self._latest and self._learns(task.key)
        self._patience = self._listener.patience(task) if with_program else None
        content = encode_batch(task.function.payload if with_program else None, task.definitions, task.items)
        bulk = content[2]
        if bulk:
            self._freight.stage(bulk, lambda lent: self._depart(content, lent), lambda: self.state is WorkerState.BUSY)
        else:
            self._depart(content, None)

    def watch_set_up(self, patience: float) -> None:
        """Report when loading and setting up the function takes longer than ``patience`` seconds, as no caller waits for it."""
        if self._patience is not None and self.state is WorkerState.BUSY:
            self._patience = min(self._patience, patience)
            self._set_timer(max(0.0, self._departed_at + self._patience - time.monotonic()), self._on_timeout)

    def tear_down(self, task: TearDownItem) -> None:
        """Have it drop a function; it must be idle."""
        self.state = WorkerState.BUSY
        self.task = task
        self._number += 1
        self.unlearn(task.key)
        self._departed_at = time.monotonic()
        self._channel.send(framing.encode(MessageKind.TEAR_DOWN, seq=self._number, key=task.key))

    def uncount(self) -> float | None:
        """The task that it has just answered was no batch.

        Returns:
            Seconds that it took to load and set up a function; None if it had it already.
        """
        self.batches -= 1
        self.busy_seconds -= self._answered_in
        return self._answered_in if self._status.is_preparing(self._number) else None

    def introduce(self, settings: WorkerSettings, timeout: float) -> None:
        """Have it sent what it needs to get ready, once there is a process.

        Args:
            settings: See `main`.
            timeout: Seconds that it may take.
        """
        self._introduction = framing.encode(MessageKind.INIT, body=pickle.dumps(settings, 5))
        self._set_timer(timeout, self._on_start_timeout)

    def unlearn(self, key: bytes) -> None:
        """The worker says that it has not that program."""
        self._latest = b""
        self.known.pop(key, None)

    def leave(self) -> None:
        """Let it end by itself, which it does when its exit handlers have run: it is idle."""
        self.state = WorkerState.LEAVING
        self.is_leaving = True
        self._set_timer(_STOP_TIMEOUT, self.kill)
        self._channel.send(framing.encode(MessageKind.STOP))

    def kill(self, why: str = "") -> None:
        """End it now, whatever it does."""
        if self.state is WorkerState.GONE:
            return
        self._killed_for = self._killed_for or why
        self.state = WorkerState.DYING
        self._channel.stop()
        self._close_life()
        if self._has_ended:
            self._bury()
        else:
            if self.pid is not None:  # else what starts it may be stuck
                kill(self.pid)
            self._set_timer(_EXIT_STATUS_TIMEOUT, self._bury)

    def abandon(self) -> None:
        """End it without the loop, which has closed."""
        if self.pid is not None and not self._has_ended:
            kill(self.pid)
        self.state = WorkerState.GONE
        self._cancel_timer()
        self.forget()

    def forget(self) -> None:
        """Close what is ours, and leave the loop alone: it has closed, or is the parent's of a forked child."""
        self._channel.close()
        self._close_life()
        self._blocks.close()

    @property
    def killed_because(self) -> str:
        """Why its pool ended it, if there was a reason in itself; empty where it is known to have ended otherwise before."""
        return self._killed_for if self.exit_code in (None, -signal.SIGKILL) else ""

    def is_alive(self) -> bool:
        """Whether it is, or will be, of use."""
        return self.state in (WorkerState.STARTING, WorkerState.IDLE, WorkerState.BUSY)

    def begun_at(self) -> float | None:
        """When it began its task, on `time.monotonic`; None if it has not."""
        return self._status.started_at(self._number)

    def is_preparing(self) -> bool:
        """Whether it loads and sets up the function of its task, which has not begun."""
        return self.task is not None and self._status.is_preparing(self._number)

    @property
    def tears_down(self) -> bool:
        """Whether it may have something to tear down, and can do so now."""
        return self._status.tears_down and (
            self.state in (WorkerState.IDLE, WorkerState.LEAVING) or isinstance(self.task, TearDownItem)
        )

    @property
    def peak(self) -> int:
        """See `StatusPage.peak_rss`."""
        return self._status.peak_rss

    # What its launcher tells.

    def started(self, pid: int) -> None:
        """There is a process."""
        self.pid = pid
        if self.state is WorkerState.DYING:
            self.kill()
        elif self.state is WorkerState.GONE:
            kill(pid)
        else:
            try:
                self._share_tracker()
                self._channel.send(self._introduction)
            except Exception as exc:  # noqa: BLE001 - an audit hook, most likely
                self.start_error = exc
                self.kill()
            self._introduction = []

    def not_started(self, error: BaseException) -> None:
        """There is none."""
        self._has_ended = True
        self.start_error = self.start_error or error
        if self.state is not WorkerState.GONE:
            self._bury()

    def ended(self, exit_code: int | None) -> None:
        """The process has ended."""
        if self._has_ended:
            return
        self._has_ended = True
        self.exit_code = exit_code
        if self.state is not WorkerState.GONE:
            if self.state is not WorkerState.LEAVING:
                self.state = WorkerState.DYING
            self._channel.drain()
        if self.state is not WorkerState.GONE:  # who got the rest may have ended everything
            self._bury()

    # Its tasks.

    def _learns(self, key: bytes) -> bool:
        """Note that the worker will have that program.

        Returns:
            Whether it must be sent.
        """
        self._latest = key
        is_new = key not in self.known
        self.known[key] = None
        self.known.move_to_end(key)
        if len(self.known) > MAX_CACHED_FUNCTIONS:
            self.known.popitem(last=False)
        return is_new

    def _share_tracker(self) -> None:
        """Give it the program's resource tracker, if that runs."""
        fd = resource_tracker.descriptor()
        self._lacks_tracker = fd is None
        if fd is not None:
            self._channel.send(framing.encode(MessageKind.TRACKER), [fd])

    def _depart(self, content: Content, lent: BlockLease | None) -> None:
        """Send the task, its buffers in the message or in a block."""
        task = self.task
        assert task is not None  # noqa: S101 - `run` has set it
        form, body, bulk = content
        target = self._blocks.acquire_largest() if self._blocks.leases else None
        room = 0 if target is None else target.block_id
        if lent is None:
            pieces = framing.encode(_RUN, form, self._number, 0, room, task.key, (), body, bulk)
        else:
            pieces = framing.encode(_RUN, form, self._number, lent.block_id, room, task.key, list(map(len, bulk)), body)
        self._departed_at = self._moved_at = time.monotonic()
        self._channel.send(pieces)
        limit = task.timeout if task.timeout is not None else self._patience
        if limit is not None:
            self._set_timer(limit, self._on_timeout)

    def _on_reply(self, task: WorkItem, message: framing.Message) -> None:
        if self._timer is not None:
            self._cancel_timer()
        self.task = None
        self.batches += 1
        self._answered_in = time.monotonic() - self._departed_at
        self.busy_seconds += self._answered_in
        if self._blocks.leases:
            self._freight.on_reply(message)
        unpack = self._unpack if message.block_id else self._take
        if self.state is not WorkerState.BUSY:
            unpack(task, message)
            return
        self.state = WorkerState.IDLE
        if message.form == ENVELOPE:  # it may be asking for what this task needs
            try:
                unpack(task, message)
            finally:
                if self.state is WorkerState.IDLE:
                    self._listener.on_idle(self)
        else:  # it gets the next batch before this one's results are unpacked
            try:
                self._listener.on_idle(self)
            finally:
                unpack(task, message)

    def _unpack(self, task: WorkItem, message: framing.Message) -> None:
        """Hand over the reply to a task when its results have been copied out of shared memory."""
        self._freight.copy_out(
            message, lambda message: self._take(task, message), lambda exc: self._listener.on_failed(task, exc)
        )

    def _take(self, task: WorkItem, message: framing.Message) -> None:
        """Hand over the reply to a task."""
        form = message.form
        if form != ENVELOPE:
            self._listener.on_answers(task, (form == CODEC_PICKLE, message.body, message.buffers))
            return
        try:
            reply = loads(message.body, message.buffers)
        except BaseException as exc:  # noqa: BLE001 - memory, most likely; nobody is to wait for ever because of it
            self._listener.on_failed(task, exc)
        else:
            self._listener.on_reply(self, task, reply)

    # What comes over its channel.

    def _on_message(self, message: framing.Message) -> None:
        kind = message.kind
        if kind == _REPLY:
            if message.seq == self._number and self.task is not None:
                self._on_reply(self.task, message)
        elif kind == MessageKind.BEGUN:
            if message.seq == self._number and self.task is not None:
                self._on_begun(self.task)
        elif kind == MessageKind.NEED_BLOCK:
            self._freight.grant(message.sizes[0])
        elif kind == MessageKind.BLOCKS_IN_USE:
            self._freight.in_use = loads(message.body)
        elif kind == MessageKind.READY:
            self.start_seconds = time.monotonic() - self.made_at
            self._cancel_timer()
            if self.state is WorkerState.STARTING:
                self.was_ready = True
                self.state = WorkerState.IDLE
                self._listener.on_ready(self)
        elif kind == MessageKind.INIT_FAILED:
            self.unfit = loads(message.body)

    def _on_begun(self, task: WorkItem) -> None:
        """The time of its task runs from here: what came before is no batch's."""
        now = time.monotonic()
        seconds, self._departed_at = now - self._departed_at, now
        self._cancel_timer()
        if task.timeout is not None:
            self._set_timer(task.timeout, self._on_timeout)
        self._listener.on_begun(task, seconds)

    def _on_end_of_channel(self) -> None:
        if self.state is WorkerState.LEAVING:
            self._set_timer(SHUTDOWN_GRACE, self.kill)
        elif not self._has_ended:
            self.state = WorkerState.DYING
            self._set_timer(_EOF_TO_EXIT_TIMEOUT, self._on_hung_up)

    def _on_hung_up(self) -> None:
        self.kill(CHANNEL_CLOSED)

    # Its time.

    def _on_start_timeout(self) -> None:
        self._timer = None
        self.start_error = TimeoutError("it was not ready within start_timeout; it has been killed")
        self.kill("start timeout")
        self._listener.on_start_timeout(self)

    def _on_timeout(self) -> None:
        self._timer = None
        task = self.task
        self._channel.drain()  # the answer may be here: some loops look at their timers first
        if task is None or self.task is not task:
            return
        now = time.monotonic()
        begun = self.begun_at()
        if self._patience is not None and (self.is_preparing() or (begun is None and task.timeout is None)):
            rest = self._departed_at + self._patience - now
            if rest > 0:
                self._set_timer(rest, self._on_timeout)
            elif self.is_preparing() or task.is_abandoned:
                self._listener.on_slow_set_up(self, task)
            else:  # the worker is stopped, or starved of the processor
                self._set_timer(self._patience, self._on_timeout)
            return
        if task.timeout is None:
            return
        if begun is None:
            if self._channel.bytes_sent != self._taken:  # a large one without shared memory is on its way
                self._taken = self._channel.bytes_sent
                self._moved_at = now
            # It was idle, and has not so much as begun: stopped, or starved of the processor. Another worker shall do it.
            rest = self._moved_at + max(task.timeout, _EXIT_STATUS_TIMEOUT) - now
        else:
            rest = begun + task.timeout - now
        if rest > 0:
            self._set_timer(rest, self._on_timeout)
            return
        self.task = None
        self.kill("timeout")
        if begun is None:
            self._listener.on_lost(self, task, has_begun=False)
        else:
            self._listener.on_overdue(self, task)

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
        self.was_preparing = self.is_preparing()
        task, self.task = self.task, None
        has_begun = self.begun_at() is not None
        self.state = WorkerState.GONE
        self._cancel_timer()
        self._channel.stop()
        self.forget()
        self._status.close()
        if task is not None:
            self._listener.on_lost(self, task, has_begun=has_begun)
        self._listener.on_gone(self)
