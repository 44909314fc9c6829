"""The parent's object for one worker: its process, its channel and the work item that it has.

::

    STARTING --ready--> IDLE --assign--> BUSY --reply--> IDLE ...       one work item at a time
        |                 |                |
        |                 `----stop--------|--> STOPPING (exits by itself) --------------------.
        `-----------------+----------------'--> EXITING (killed, or crashed) --exit status--> EXITED

Rules:

- A crash is the end of the channel or of the process, whichever is seen first. What the worker had
  sent before still counts.
- Nothing is written to or read from the channel with a call that may block.
"""

from __future__ import annotations

import contextlib
import enum
import logging
import os
import pickle
import signal
import time
from collections import OrderedDict
from typing import TYPE_CHECKING

from async_batcher._pool.processes import resource_tracker
from async_batcher._pool.processes.process_watcher import ChildFds, kill
from async_batcher._pool.work_item import TearDownItem
from async_batcher._transport import framing, shared_memory
from async_batcher._transport.channel import Channel
from async_batcher._transport.protocol import (
    CODEC_PICKLE,
    ENVELOPE,
    MAX_CACHED_FUNCTIONS,
    MessageKind,
    encode_batch,
    loads,
)
from async_batcher._transport.status_page import SIZE as STATUS_SIZE
from async_batcher._transport.status_page import StatusPage
from async_batcher._transport.worker_blocks import WorkerBlocks

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable
    from concurrent.futures import Executor

    from async_batcher._pool.dispatcher import PoolDispatcher
    from async_batcher._pool.work_item import WorkItem
    from async_batcher._serialization.remote_exception import PickledException
    from async_batcher._transport.protocol import Content, WorkerSettings

# Reasons for killing a worker, as `WorkerCounts.crashed` shows them.
CHANNEL_CLOSED = "closed channel"
SETUP_TIMEOUT = "set-up timeout"

SHUTDOWN_GRACE = 2.0  # seconds for exit handlers of an idle worker
TEAR_DOWN_GRACE = 30.0  # seconds, if tear-downs run, too
_EXIT_STATUS_TIMEOUT = 1.0  # seconds to wait for the exit status after SIGKILL
_STOP_TIMEOUT = 30.0  # seconds for a replaced worker, which may be halted
_EOF_TO_EXIT_TIMEOUT = 0.25  # seconds from the channel's end to the exit that causes it

# Looked up for each batch; members of an enum are slow to look up in Python 3.11.
_RUN, _REPLY = MessageKind.RUN, MessageKind.REPLY

logger = logging.getLogger("async_batcher")


class WorkerState(enum.Enum):
    """What a worker is doing."""

    STARTING = "starting"
    IDLE = "idle"
    BUSY = "busy"
    STOPPING = "stopping"
    EXITING = "exiting"
    EXITED = "exited"


class WorkerHandle:
    """One worker; calls the dispatcher's ``on_*`` methods on the loop's thread."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, dispatcher: PoolDispatcher, thread_pool: Executor
    ) -> None:
        self._loop = loop
        self._dispatcher = dispatcher
        self.state = WorkerState.STARTING
        self.pid: int | None = None
        self.exit_code: int | None = None
        self.batches = 0
        self.busy_seconds = 0.0
        self.start_seconds = 0.0
        self._created_at = time.monotonic()
        self.ever_ready = False
        self.start_error: BaseException | None = None
        self.init_failure: PickledException | None = None  # what the initializer raised
        self.has_replacement = False
        self.retire_when_replaced = False
        self.stopped = False  # on purpose
        self.exited_in_setup = False
        self._kill_reason = ""
        self._exited = False
        self.work_item: WorkItem | None = None
        self.loaded_functions: OrderedDict[bytes, None] = OrderedDict()  # the worker's cache
        self._last_function = b""  # the one that was used last
        self._seq = 0  # number of the work item
        self._sent_at = 0.0
        self._last_duration = 0.0  # seconds of the last work item
        self._last_progress_at = 0.0  # when sending the work item last progressed
        self._bytes_sent = 0  # by the channel, then
        self._setup_timeout: float | None = None  # None: the function is set up
        self._timer: asyncio.TimerHandle | None = None
        self._init_message: list[bytes | memoryview] = []
        self._needs_tracker = False
        with contextlib.ExitStack() as undo:  # there may be no descriptors left
            status = shared_memory.create_anonymous(STATUS_SIZE)
            undo.callback(os.close, status)
            self._status = StatusPage(os.dup(status))
            undo.callback(self._status.close)
            life_pipe, self._life_pipe = os.pipe()
            undo.callback(os.close, life_pipe)
            undo.callback(self._close_life_pipe)
            self._channel = Channel(loop, self._on_message, self._on_eof)
            undo.callback(os.close, self._channel.child_fd)
            undo.callback(self._channel.close)
            undo.callback(self._channel.stop)
            on_shm_exhausted = dispatcher.on_shm_exhausted
            self._blocks = WorkerBlocks(loop, self._channel.send, thread_pool, on_shm_exhausted)
            self.child_fds = ChildFds(self._channel.child_fd, status, life_pipe)
            undo.pop_all()

    def __repr__(self) -> str:
        parts = [f"pid={self.pid}", self.state.value, f"batches={self.batches}"]
        if isinstance(self.work_item, TearDownItem):
            parts.append("tearing down a function")
        elif self.work_item is not None:
            doing = "setting up" if self.is_setting_up() else "running"
            parts.append(f"{doing} {self.work_item.name}")
        if self._kill_reason:
            parts.append(f"killed ({self._kill_reason})")
        return f"<{type(self).__name__} {' '.join(parts)}>"

    # --- commands

    def send_init(self, settings: WorkerSettings, timeout: float) -> None:
        """Send ``settings`` (see `main`) when there is a process; limit the time to get ready."""
        body = pickle.dumps(settings, 5)
        self._init_message = framing.encode(MessageKind.INIT, body=body)
        self._set_timer(timeout, self._on_start_timeout)

    def assign(self, work_item: WorkItem) -> None:
        """Send a work item to the worker, which must be idle."""
        self.state = WorkerState.BUSY
        self.work_item = work_item
        if self._needs_tracker:
            self._send_tracker()
        self._seq += 1
        key = work_item.key
        with_function = key != self._last_function and self._mark_loaded(key)
        self._setup_timeout = self._dispatcher.setup_timeout(work_item) if with_function else None
        payload = work_item.function.payload if with_function else None
        content = encode_batch(payload, work_item.definitions, work_item.items)
        buffers = content[2]
        if buffers:
            self._blocks.stage(buffers, lambda block_id: self._send_item(content, block_id))
        else:
            self._send_item(content, 0)

    def tear_down(self, work_item: TearDownItem) -> None:
        """Have the worker, which must be idle, forget a function after its tear-down."""
        self.state = WorkerState.BUSY
        self.work_item = work_item
        self._seq += 1
        self.forget_function(work_item.key)
        self._sent_at = time.monotonic()
        message = framing.encode(MessageKind.TEAR_DOWN, seq=self._seq, key=work_item.key)
        self._channel.send(message)

    def limit_setup(self, seconds: float) -> None:
        """Limit loading and setting up the function, since no caller waits for it any longer."""
        if self._setup_timeout is not None and self.state is WorkerState.BUSY:
            self._setup_timeout = min(self._setup_timeout, seconds)
            remaining = self._sent_at + self._setup_timeout - time.monotonic()
            self._set_timer(max(0.0, remaining), self._on_timeout)

    def uncount(self) -> float | None:
        """Take the last work item out of the counts: it was not a batch.

        Returns:
            Seconds that it took to load and set up a function; None if it did not.
        """
        self.batches -= 1
        self.busy_seconds -= self._last_duration
        return self._last_duration if self._status.is_preparing(self._seq) else None

    def forget_function(self, key: bytes) -> None:
        self._last_function = b""
        self.loaded_functions.pop(key, None)

    def stop(self) -> None:
        """Have the worker, which must be idle, run its exit handlers and exit."""
        logger.debug("%s: stopping worker %s", self._dispatcher.name, self.pid)
        self.state = WorkerState.STOPPING
        self.stopped = True
        self._set_timer(_STOP_TIMEOUT, self.kill)
        self._channel.send(framing.encode(MessageKind.STOP))

    def kill(self, reason: str = "") -> None:
        """Kill the worker in any state."""
        if self.state is WorkerState.EXITED:
            return
        why = reason or self._kill_reason or "shutdown"
        logger.debug("%s: killing worker %s (%s)", self._dispatcher.name, self.pid, why)
        self._kill_reason = self._kill_reason or reason
        self.state = WorkerState.EXITING
        self._channel.stop()
        self._close_life_pipe()
        if self._exited:
            self._reap()
        else:
            if self.pid is not None:  # else the launcher may be stuck
                kill(self.pid)
            self._set_timer(_EXIT_STATUS_TIMEOUT, self._reap)

    def close_without_loop(self) -> None:
        if self.pid is not None and not self._exited:
            kill(self.pid)
        self.state = WorkerState.EXITED
        self._cancel_timer()
        self.close_fds()

    def close_fds(self) -> None:
        """Close this process's descriptors, without the loop."""
        self._channel.close()
        self._close_life_pipe()
        self._blocks.close()

    # --- queries

    @property
    def kill_reason(self) -> str:
        """Why the pool killed it; empty if it exited otherwise before."""
        return self._kill_reason if self.exit_code in (None, -signal.SIGKILL) else ""

    def is_alive(self) -> bool:
        """Tell whether it can take work items, or will."""
        return self.state in (WorkerState.STARTING, WorkerState.IDLE, WorkerState.BUSY)

    def started_at(self) -> float | None:
        """Return when it started its work item, on `time.monotonic`; None if it has not."""
        return self._status.started_at(self._seq)

    def is_setting_up(self) -> bool:
        """Tell whether it loads and sets up the function of its work item."""
        return self.work_item is not None and self._status.is_preparing(self._seq)

    @property
    def can_tear_down(self) -> bool:
        """Whether there may be tear-downs, and it is free to run them."""
        is_free = self.state in (WorkerState.IDLE, WorkerState.STOPPING)
        return self._status.tears_down and (is_free or isinstance(self.work_item, TearDownItem))

    @property
    def peak_rss(self) -> int:
        return self._status.peak_rss

    # --- callbacks of the launcher

    def on_started(self, pid: int) -> None:
        self.pid = pid
        logger.debug("%s: worker %s started", self._dispatcher.name, pid)
        if self.state is WorkerState.EXITING:
            self.kill()
        elif self.state is WorkerState.EXITED:
            kill(pid)
        else:
            try:
                self._send_tracker()
                self._channel.send(self._init_message)
            except Exception as exc:  # noqa: BLE001 - an audit hook, most likely
                self.start_error = exc
                self.kill()
            self._init_message = []

    def on_start_failed(self, error: BaseException) -> None:
        logger.debug("%s: a worker could not be started: %r", self._dispatcher.name, error)
        self._exited = True
        self.start_error = self.start_error or error
        if self.state is not WorkerState.EXITED:
            self._reap()

    def on_exit(self, exit_code: int | None) -> None:
        if self._exited:
            return
        self._exited = True
        self.exit_code = exit_code
        if self.state is not WorkerState.EXITED:
            if self.state is not WorkerState.STOPPING:
                self.state = WorkerState.EXITING
            self._channel.drain()
        if self.state is not WorkerState.EXITED:  # a caller that got the rest may have closed it
            self._reap()

    # --- work items

    def _mark_loaded(self, key: bytes) -> bool:
        """Note that the worker will have a function; return whether it must be sent."""
        self._last_function = key
        is_new = key not in self.loaded_functions
        self.loaded_functions[key] = None
        self.loaded_functions.move_to_end(key)
        if len(self.loaded_functions) > MAX_CACHED_FUNCTIONS:
            self.loaded_functions.popitem(last=False)
        return is_new

    def _send_tracker(self) -> None:
        """Send the program's resource tracker, if that runs."""
        fd = resource_tracker.descriptor()
        self._needs_tracker = fd is None
        if fd is not None:
            self._channel.send(framing.encode(MessageKind.TRACKER), [fd])

    def _send_item(self, content: Content, block_id: int) -> None:
        """Send the work item, its buffers in the message or in a leased block."""
        if self.state is not WorkerState.BUSY:  # it was killed while the buffers were copied
            return
        work_item = self.work_item
        assert work_item is not None  # noqa: S101 - `assign` has set it
        form, body, buffers = content
        seq, key = self._seq, work_item.key
        result_id = self._blocks.lease_largest() if self._blocks.blocks else 0
        if not block_id:
            pieces = framing.encode(_RUN, form, seq, 0, result_id, key, (), body, buffers)
        else:
            sizes = list(map(len, buffers))
            pieces = framing.encode(_RUN, form, seq, block_id, result_id, key, sizes, body)
        self._sent_at = self._last_progress_at = time.monotonic()
        self._channel.send(pieces)
        limit = work_item.timeout if work_item.timeout is not None else self._setup_timeout
        if limit is not None:
            self._set_timer(limit, self._on_timeout)

    def _on_reply(self, work_item: WorkItem, message: framing.Message) -> None:
        if self._timer is not None:
            self._cancel_timer()
        self.work_item = None
        self.batches += 1
        self._last_duration = time.monotonic() - self._sent_at
        self.busy_seconds += self._last_duration
        if self._blocks.blocks:
            self._blocks.on_reply(message)
        deliver = self._copy_out if message.block_id else self._deliver
        if self.state is not WorkerState.BUSY:
            deliver(work_item, message)
            return
        self.state = WorkerState.IDLE
        if message.form == ENVELOPE:  # it may ask for what this work item needs
            try:
                deliver(work_item, message)
            finally:
                if self.state is WorkerState.IDLE:
                    self._dispatcher.on_idle(self)
        else:  # the worker gets the next batch before this one's results are unpickled
            try:
                self._dispatcher.on_idle(self)
            finally:
                deliver(work_item, message)

    def _copy_out(self, work_item: WorkItem, message: framing.Message) -> None:
        """Deliver a reply when its results have been copied out of shared memory."""
        self._blocks.copy_out(
            message,
            lambda message: self._deliver(work_item, message),
            lambda exc: self._dispatcher.on_bad_reply(work_item, exc),
        )

    def _deliver(self, work_item: WorkItem, message: framing.Message) -> None:
        form = message.form
        if form != ENVELOPE:
            results = form == CODEC_PICKLE, message.body, message.buffers
            self._dispatcher.on_results(work_item, results)
            return
        try:
            reply = loads(message.body, message.buffers)
        except BaseException as exc:  # noqa: BLE001 - memory, most likely
            self._dispatcher.on_bad_reply(work_item, exc)
        else:
            self._dispatcher.on_reply(self, work_item, reply)

    # --- messages

    def _on_message(self, message: framing.Message) -> None:
        kind = message.kind
        if kind == _REPLY:
            if message.seq == self._seq and self.work_item is not None:
                self._on_reply(self.work_item, message)
        elif kind == MessageKind.BEGUN:
            if message.seq == self._seq and self.work_item is not None:
                self._on_setup_done(self.work_item)
        elif kind == MessageKind.NEED_BLOCK:
            self._blocks.grant(message.sizes[0])
        elif kind == MessageKind.BLOCKS_IN_USE:
            self._blocks.in_use = loads(message.body)
        elif kind == MessageKind.READY:
            self._on_ready()
        elif kind == MessageKind.INIT_FAILED:
            self.init_failure = loads(message.body)

    def _on_ready(self) -> None:
        self.start_seconds = time.monotonic() - self._created_at
        self._cancel_timer()
        if self.state is WorkerState.STARTING:
            name, seconds = self._dispatcher.name, self.start_seconds
            logger.debug("%s: worker %s ready after %.3f s", name, self.pid, seconds)
            self.ever_ready = True
            self.state = WorkerState.IDLE
            self._dispatcher.on_ready(self)

    def _on_setup_done(self, work_item: WorkItem) -> None:
        """Start the timeout of the work item: the set-up does not count."""
        now = time.monotonic()
        seconds, self._sent_at = now - self._sent_at, now
        self._cancel_timer()
        if work_item.timeout is not None:
            self._set_timer(work_item.timeout, self._on_timeout)
        self._dispatcher.on_setup_done(work_item, seconds)

    def _on_eof(self) -> None:
        if self.state is WorkerState.STOPPING:
            self._set_timer(SHUTDOWN_GRACE, self.kill)
        elif not self._exited:
            self.state = WorkerState.EXITING
            self._set_timer(_EOF_TO_EXIT_TIMEOUT, lambda: self.kill(CHANNEL_CLOSED))

    # --- timers

    def _on_start_timeout(self) -> None:
        self._timer = None
        msg = "the worker was not ready within start_timeout, so it was killed"
        self.start_error = TimeoutError(msg)
        self.kill("start timeout")
        self._dispatcher.on_start_timeout(self)

    def _on_timeout(self) -> None:
        self._timer = None
        work_item = self.work_item
        self._channel.drain()  # the reply may be here: some loops run timers first
        if work_item is None or self.work_item is not work_item:
            return
        now = time.monotonic()
        started_at = self.started_at()
        if self._setup_timeout is not None and (
            self.is_setting_up() or (started_at is None and work_item.timeout is None)
        ):
            self._check_setup_timeout(work_item, self._setup_timeout, now)
            return
        if work_item.timeout is None:
            return
        if started_at is None:
            # A long message without shared memory may still be on its way. If it is not, the worker
            # was idle and has not started: it is halted or starved, so another one is to run this.
            if self._channel.bytes_sent != self._bytes_sent:
                self._bytes_sent = self._channel.bytes_sent
                self._last_progress_at = now
            limit = max(work_item.timeout, _EXIT_STATUS_TIMEOUT)
            remaining = self._last_progress_at + limit - now
        else:
            remaining = started_at + work_item.timeout - now
        if remaining > 0:
            self._set_timer(remaining, self._on_timeout)
            return
        self.work_item = None
        self.kill("timeout")
        if started_at is None:
            self._dispatcher.on_crash(self, work_item, started=False)
        else:
            self._dispatcher.on_timeout(self, work_item)

    def _check_setup_timeout(self, work_item: WorkItem, timeout: float, now: float) -> None:
        remaining = self._sent_at + timeout - now
        if remaining > 0:
            self._set_timer(remaining, self._on_timeout)
        elif self.is_setting_up() or work_item.is_abandoned:
            self._dispatcher.on_setup_timeout(self, work_item)
        else:  # the worker is halted, or starved of the processor
            self._set_timer(timeout, self._on_timeout)

    def _set_timer(self, seconds: float, callback: Callable[[], None]) -> None:
        self._cancel_timer()
        self._timer = self._loop.call_later(seconds, callback)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # --- exit

    def _close_life_pipe(self) -> None:
        if self._life_pipe != -1:
            os.close(self._life_pipe)
            self._life_pipe = -1

    def _reap(self) -> None:
        """Close what is left of a process that exited, or whose exit status does not come."""
        if self.pid is not None:
            name, code = self._dispatcher.name, self.exit_code
            logger.debug("%s: worker %s exited with status %s", name, self.pid, code)
        self.exited_in_setup = self.is_setting_up()
        work_item, self.work_item = self.work_item, None
        started = self.started_at() is not None
        self.state = WorkerState.EXITED
        self._cancel_timer()
        self._channel.stop()
        self.close_fds()
        self._status.close()
        if work_item is not None:
            self._dispatcher.on_crash(self, work_item, started=started)
        self._dispatcher.on_exit(self)
