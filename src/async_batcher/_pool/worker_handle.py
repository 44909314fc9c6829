"""The parent's end of one worker: its process, its channel and its shared memory.

Rules:

- A worker has exited when its process has; the end of its channel starts a short wait for that.
  What the worker had sent before still counts.
- Nothing is written to or read from the channel with a call that may block.
- Nothing is decided here: what happens goes to the driver, which says what to do.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import time
from functools import partial
from typing import TYPE_CHECKING, Any

from async_batcher._pool.processes import resource_tracker
from async_batcher._pool.processes.memory import private_memory
from async_batcher._pool.processes.process_watcher import ChildFds, interrupt, kill
from async_batcher._pool.state.worker import Progress, StartFailure, WorkerState
from async_batcher._transport import framing, shared_memory
from async_batcher._transport.channel import Channel
from async_batcher._transport.protocol import MessageKind, encode_batch, loads
from async_batcher._transport.status_page import SIZE as STATUS_SIZE
from async_batcher._transport.status_page import StatusPage
from async_batcher._transport.token_pipe import TokenPipe
from async_batcher._transport.worker_blocks import WorkerBlocks

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from async_batcher._eventloop.guarded_loop import GuardedLoop
    from async_batcher._pool.driver import WorkerDriver
    from async_batcher._pool.state.worker import Trip, Worker
    from async_batcher._transport.protocol import Content, WorkerSettings

# Of each batch, so plain ints: Python compares those without a call.
_RUN, _REPLY = int(MessageKind.RUN), int(MessageKind.REPLY)
_RUN_AHEAD, _RESULT = int(MessageKind.RUN_AHEAD), int(MessageKind.RESULT)

logger = logging.getLogger("async_batcher")


class WorkerHandle:
    """One worker; calls the driver's ``on_*`` methods on the loop's thread.

    Attributes:
        worker: What the pool's state knows of it.
        child_fds: What the process inherits.
        drain: Reads what the worker has sent.
        pause: Lets results collect; see `Channel.pause`.
        copy_out: Copies results out of shared memory; see `WorkerBlocks.copy_out`.
    """

    def __init__(
        self,
        worker: Worker,
        loop: GuardedLoop,
        driver: WorkerDriver,
        thread_pool: Executor,
    ) -> None:
        self.worker = worker
        self._driver = driver
        self._has_exited = False
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
            self._tokens = TokenPipe()
            undo.callback(os.close, self._tokens.child_fd)
            undo.callback(self._tokens.close)
            on_message, on_end = self._on_message, self._on_channel_end
            self._channel = Channel(loop, on_message, on_end, driver.on_internal_error)
            undo.callback(os.close, self._channel.child_fd)
            undo.callback(self._channel.close)
            undo.callback(self._channel.stop)
            self.drain, self.pause = self._channel.drain, self._channel.pause
            send, on_shm_exhausted = self._channel.send, driver.on_shm_exhausted
            self._blocks = WorkerBlocks(loop, send, thread_pool, on_shm_exhausted)
            self.copy_out, tokens = self._blocks.copy_out, self._tokens.child_fd
            self.child_fds = ChildFds(self._channel.child_fd, status, life_pipe, tokens)
            undo.pop_all()

    def __repr__(self) -> str:
        worker = self.worker
        parts = [f"number={worker.number}", f"pid={worker.pid}"]
        parts += [worker.public_state, f"batches={worker.batches}"]
        if worker.trip is not None and worker.trip.item.is_tear_down:
            parts.append("tearing down a function")
        elif worker.trip is not None:
            doing = "setting up" if self._status.is_setting_up(worker.trip.seq) else "running"
            parts.append(f"{doing} {worker.trip.item.name}")
        if worker.kill_reason:
            how = "killed" if worker.is_killed else "interrupted"
            parts.append(f"{how} ({worker.kill_reason})")
        return f"<{type(self).__name__} {' '.join(parts)}>"

    # --- commands

    def send_init(self, settings: WorkerSettings) -> None:
        """Send ``settings`` (see `WorkerSettings`) when there is a process."""
        self._init_message = framing.encode(MessageKind.INIT, body=pickle.dumps(settings, 5))

    def send(self, trip: Trip) -> None:
        """Send a work item to the worker, unless it was killed or taken back meanwhile.

        The worker runs them in order, so one that waits is held while the one before is being
        copied; the state commands it again.
        """
        current = self.worker.trip
        if trip.is_asked_back:  # `take_back` says that it will not run
            return
        if current is not trip:
            if not trip.is_waiting:
                return
            if current is not None and current.is_staging:
                trip.is_staging = True
                return
        was_held, trip.is_staging = trip.is_staging, False
        trip.bytes_sent = self._channel.bytes_sent
        item = trip.item
        if item.is_tear_down:
            self._channel.send(framing.encode(MessageKind.TEAR_DOWN, seq=trip.seq, key=item.key))
            return
        if self._needs_tracker:
            self._send_tracker()
        payload = item.function.payload if trip.with_function else None
        content = encode_batch(payload, item.definitions, item.items, item.facts)
        form, body, buffers = content
        if buffers:
            block_id = self._blocks.stage(buffers, partial(self._on_copied, trip, content))
            if block_id is None:
                trip.is_staging = True
                self._driver.events.staging(trip)
                return
            self._send_batch(trip, content, block_id)
        elif self._blocks.blocks:
            self._send_batch(trip, content, 0)
        else:
            kind = _RUN_AHEAD if trip.is_waiting else _RUN
            if trip.is_waiting:
                trip.is_sent = True
                self._tokens.put(trip.seq)
            self._channel.send(framing.encode(kind, form, trip.seq, item.key, body))
        if was_held:
            self._driver.events.sent(trip, time.monotonic())

    def _on_copied(self, trip: Trip, content: Content, block_id: int) -> None:
        """Send a batch whose buffers a helper has copied, if it is still wanted."""
        worker, driver = self.worker, self._driver
        trip.is_staging = False
        if not worker.is_alive():
            return
        if trip.is_asked_back or (worker.trip is not trip and not trip.is_waiting):
            self._blocks.discard(block_id)
            return
        try:
            self._send_batch(trip, content, block_id)
        except Exception as exc:  # noqa: BLE001 - memory, most likely, or an audit hook
            driver.report(driver.events.send_failed, worker, exc, trip=trip)
        else:
            driver.report(driver.events.sent, trip)

    def take_back(self, trip: Trip) -> set[int]:
        """Take back ``trip``, which waits, and what else the worker has not started.

        Returns:
            The numbers of the trips that it will not run; see `WorkerEvents.taken_back`.
        """
        taken = self._tokens.take_all()
        if not trip.is_sent:
            taken.add(trip.seq)
        if trip.seq in taken:
            self._blocks.free_waiting()
        return taken

    def abandon(self, trip: Trip) -> None:
        """Have the worker close the generator of a batch when it yields next."""
        # That of a later batch counts: it has begun, so this one has ended.
        self._status.abandoned_seq = max(self._status.abandoned_seq, trip.seq)

    def stop(self) -> None:
        """Have the worker run its exit handlers and exit."""
        self._log("stopping worker %s", self.worker.pid)
        self._channel.send(framing.encode(MessageKind.STOP))

    def interrupt(self, trip: Trip) -> None:
        """Interrupt the user code of a batch; if the batch has ended, nothing happens."""
        self._log("interrupting worker %s (%s)", self.worker.pid, self.worker.kill_reason)
        self._status.mark_interrupted(trip.seq)
        if self.worker.pid is not None and not self._has_exited:
            interrupt(self.worker.pid)

    def kill(self) -> None:
        """Kill the process, or have it killed as soon as it exists."""
        worker = self.worker
        self._log("killing worker %s (%s)", worker.pid, worker.kill_reason or "shutdown")
        self._channel.stop()
        self._close_life_pipe()
        if worker.pid is not None and not self._has_exited:
            kill(worker.pid)

    def close(self) -> None:
        """Close what is left of a process that exited, or whose exit status does not come."""
        if self.worker.pid is not None:
            self._log("worker %s exited with status %s", self.worker.pid, self.worker.exit_code)
        self._channel.stop()
        self.close_fds()
        self._status.close()

    def close_without_loop(self) -> None:
        """Kill the process, and close everything, without the loop."""
        if self.worker.pid is not None and not self._has_exited:
            kill(self.worker.pid)
        self.worker.state = WorkerState.EXITED
        self.close_fds()

    def close_fds(self) -> None:
        """Close this process's descriptors, without the loop."""
        self._channel.close()
        self._close_life_pipe()
        self._tokens.close()
        self._blocks.close()

    # --- queries

    def progress(self, trip: Trip | None) -> Progress:
        """Return what the worker has done of a trip; first read what it has sent: `drain`."""
        status, sent = self._status, self._channel.bytes_sent
        rest = status.started_seq, status.is_running, status.failure
        if trip is None:
            return Progress(None, False, 0, *rest)  # noqa: FBT003 - it sets nothing up
        return Progress(status.started_at(trip.seq), status.is_setting_up(trip.seq), sent, *rest)

    @property
    def tears_down(self) -> bool:
        """Whether there may be tear-downs in the worker."""
        return self._status.tears_down

    def memory(self, limit: int = 0) -> int:
        """Return the worker's private memory in bytes; see `private_memory`.

        Where /proc does not tell, that is the peak of its resident memory, or 0.
        """
        try:
            return private_memory(self.worker.pid, limit)
        except Exception:  # noqa: BLE001 - it has exited, there is no /proc, or an audit hook
            return self._status.peak_rss if self.worker.state is not WorkerState.EXITED else 0

    # --- callbacks of the launcher

    def on_started(self, pid: int) -> None:
        worker = self.worker
        worker.pid = pid
        self._log("worker %s started", pid)
        if not worker.is_alive():  # killed meanwhile
            kill(pid)
            return
        try:
            self._send_tracker()
            self._channel.send(self._init_message)
        except Exception as exc:  # noqa: BLE001 - an audit hook, most likely
            worker.start_failure = StartFailure(exc)
            self._driver.report(self._driver.events.send_failed, worker, exc)
        self._init_message = []

    def on_start_failed(self, error: BaseException) -> None:
        self._log("a worker could not be started: %r", error)
        self._has_exited = True
        self._driver.on_start_failed(self, error)

    def on_exit(self, exit_code: int | None) -> None:
        if self._has_exited:
            return
        self._has_exited = True
        self.worker.exit_code = exit_code
        self._driver.on_exit(self)

    # --- messages

    def _send_tracker(self) -> None:
        """Send the program's resource tracker, if that runs."""
        fd = resource_tracker.descriptor()
        self._needs_tracker = fd is None
        if fd is not None:
            self._channel.send(framing.encode(MessageKind.TRACKER), [fd])

    def _send_batch(self, trip: Trip, content: Content, block_id: int) -> None:
        """Send a batch, its buffers in a block, or in the message if its id is 0."""
        form, body, buffers = content
        kind, seq, key = _RUN, trip.seq, trip.item.key
        result_id = self._blocks.lease_largest() if self._blocks.blocks else 0
        if trip.is_waiting:
            kind = _RUN_AHEAD
            self._blocks.keep_for_waiting(block_id, result_id)
        if not block_id:
            pieces = framing.encode(kind, form, seq, key, body, 0, result_id, (), buffers)
        else:
            sizes = list(map(len, buffers))
            pieces = framing.encode(kind, form, seq, key, body, block_id, result_id, sizes)
        if trip.is_waiting:
            trip.is_sent = True
            self._tokens.put(seq)
        self._channel.send(pieces)

    def _on_message(self, message: framing.Message) -> None:
        kind, worker, driver = message.kind, self.worker, self._driver
        if kind == _REPLY:
            trip = worker.trip
            if trip is not None and trip.seq == message.seq:
                if self._blocks.blocks:
                    self._blocks.on_reply(message)
                driver.replies.read(self, trip, message)
        elif kind == _RESULT:
            trip = worker.trip
            if trip is not None and trip.seq == message.seq:
                driver.replies.read_result(self, trip, message)
        elif kind == MessageKind.BEGUN:
            driver.report(driver.events.set_up, worker, message.seq)
        elif kind == MessageKind.READY:
            seconds = time.monotonic() - worker.created_at
            self._log("worker %s ready after %.3f s", worker.pid, seconds)
            driver.report(driver.events.ready, worker)
        elif kind == MessageKind.INIT_FAILED:
            driver.on_initializer_raised(worker, loads(message.body))
        else:
            self._blocks.on_message(message)

    def _on_channel_end(self, error: Exception | None) -> None:
        if not self._has_exited:
            self._driver.report(self._driver.events.channel_ended, self.worker, error=error)

    def _close_life_pipe(self) -> None:
        if self._life_pipe != -1:
            life_pipe, self._life_pipe = self._life_pipe, -1  # first: it is closed once only
            os.close(life_pipe)

    def _log(self, text: str, *args: Any) -> None:
        logger.debug(f"%s: {text}", self._driver.name, *args)  # noqa: G004 - no user's text
