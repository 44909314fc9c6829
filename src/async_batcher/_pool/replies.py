"""Reads the replies of workers, and passes results on.

A worker gets its next batch before the results of the last one are unpickled.

Results that a generator yields come before the reply. Those that are there at the same time are
passed on together, and the channel is paused after that, so that more can collect. What has come
when a batch is resolved counts, with any outcome.
"""

from __future__ import annotations

import logging
import time
from functools import partial
from typing import TYPE_CHECKING, Any

from async_batcher._transport.protocol import CODEC_PICKLE, ENVELOPE, ReplyKind, loads
from async_batcher._transport.shared_memory import SHM_THRESHOLD

if TYPE_CHECKING:
    from async_batcher._pool.driver import WorkerDriver
    from async_batcher._pool.state.pool_state import PoolState
    from async_batcher._pool.state.worker import Trip
    from async_batcher._pool.work_item import WorkItem
    from async_batcher._pool.worker_handle import WorkerHandle
    from async_batcher._transport.framing import Message
    from async_batcher._worker.results import Outcome

_CALLBACK_RAISED = "a callback for the outcome of %r raised"

logger = logging.getLogger("async_batcher")


class ReplyReader:
    """Reads the replies of a pool's workers."""

    def __init__(self, driver: WorkerDriver, state: PoolState) -> None:
        self._driver = driver
        self._changes = driver.changes
        self._events = state.worker_events
        self._pending = state.pending
        self._waker = driver.waker

    def read(self, handle: WorkerHandle, trip: Trip, message: Message) -> None:
        """Read the reply to the work item of a trip."""
        if message.form != ENVELOPE:
            self._events.finished(handle.worker, time.monotonic())
            try:
                self._driver.carry_out()
            finally:
                if message.block_id:
                    handle.copy_out(
                        message,
                        partial(self._deliver, trip.item),
                        partial(self._resolve_item, trip.item),
                    )
                else:
                    self._deliver(trip.item, message)
            return
        seconds = self._events.reply_came(handle.worker, time.monotonic())
        read = partial(self._read_envelope, handle, trip, seconds)
        if message.block_id:
            handle.copy_out(message, read, read)
        else:
            read(message)

    def read_result(self, handle: WorkerHandle, trip: Trip, message: Message) -> None:
        """Read a result that comes before the reply to the work item of a trip."""
        item = trip.item
        if item not in self._pending:
            return
        if not item.yielded:
            item.yielded = []
            self._driver.loop.call_soon(self._pass_on, handle, trip)
        item.yielded.append(message)

    def _pass_on(self, handle: WorkerHandle, trip: Trip) -> None:
        """Pass the results on that were read together."""
        yielded = trip.item.yielded
        if handle.worker.trip is trip and yielded and _is_little(yielded):
            handle.pause()  # first: callers that resume take their time
        pass_on(trip.item)

    def _deliver(self, item: WorkItem, message: Message) -> None:
        """Pass results on."""
        is_pending = item in self._pending
        self._pending.pop(item, None)
        if self._changes.futures:
            self._changes.notify()
        if is_pending:  # last: its callers resume at once
            results = (message.form == CODEC_PICKLE, message.body, message.buffers)
            waker = self._waker
            if waker is not None:
                waker.is_held = True
            try:
                item.resolve_with_results(results)
            except Exception:
                logger.exception(_CALLBACK_RAISED, item)
            finally:
                if waker is not None:
                    waker.release()

    def _read_envelope(
        self, handle: WorkerHandle, trip: Trip, seconds: float, message: Message | BaseException
    ) -> None:
        """Read a reply that is more than results, or what was raised when it was copied.

        The worker gets nothing else before that: the reply may say what the work item needs.
        """
        try:
            if isinstance(message, BaseException):
                self._resolve_item(trip.item, message)
            else:
                self._read_reply(handle, trip, seconds, message)
        finally:
            self._events.reply_read(handle.worker, time.monotonic())
            self._driver.carry_out()

    def _read_reply(
        self, handle: WorkerHandle, trip: Trip, seconds: float, message: Message
    ) -> None:
        item, worker = trip.item, handle.worker
        try:
            reply = loads(message.body, message.buffers)
        except BaseException as exc:  # noqa: BLE001 - memory, most likely
            self._resolve_item(item, exc)
            return
        if item.is_tear_down:
            self._events.torn_down(worker, item, seconds)
            return
        if item.is_setup_only:
            was_set_up = reply == (ReplyKind.READY,) and handle.progress(trip).is_setting_up
            self._events.prepared(worker, item, seconds, was_set_up=was_set_up)
        kind = reply[0] if type(reply) is tuple and reply else None
        if kind == ReplyKind.FUNCTION_ERROR and trip.is_refresh:
            self._events.could_not_refresh(worker, item)
        if item not in self._pending:
            if kind == ReplyKind.RAISED:
                _read_late(item, reply)
            elif kind == ReplyKind.NOT_STARTED:
                worker.uncount(seconds)
            return
        try:
            outcome = item.decode_reply(reply)
        except BaseException as exc:  # noqa: BLE001 - so that the caller does not hang
            outcome = exc
        if item.is_setup_only and isinstance(outcome, BaseException):
            self._events.setup_failed(worker, outcome, time.monotonic())
        if outcome is not None:
            self._resolve_item(item, outcome)
        else:
            lacks_function = kind == ReplyKind.NEED_FUNCTION
            self._events.lacked(worker, item, seconds, time.monotonic(), function=lacks_function)

    def _resolve_item(self, item: WorkItem, outcome: Outcome) -> None:
        self._pending.pop(item, None)
        self._changes.notify()
        resolve(item, outcome)


def _is_little(yielded: list[Message]) -> bool:
    """Tell whether results are so small that a wake-up for each is most of what they cost."""
    last = yielded[-1]
    size = memoryview(last.body).nbytes + sum(map(len, last.buffers))
    return len(yielded) * size < SHM_THRESHOLD


def pass_on(item: WorkItem) -> None:
    """Pass on what a worker has yielded; an exception of the callback concerns nothing else."""
    if item.yielded:
        try:
            item.pass_on()
        except Exception:
            logger.exception(_CALLBACK_RAISED, item)


def _read_late(item: WorkItem, reply: Any) -> None:
    try:
        item.read_late(reply)
    except Exception:
        logger.exception(_CALLBACK_RAISED, item)


def resolve(item: WorkItem, outcome: Outcome) -> None:
    """Pass an outcome on; an exception of a callback concerns nothing else."""
    try:
        pass_on(item)
    finally:  # also after SystemExit
        try:
            item.resolve(outcome)
        except Exception:
            logger.exception(_CALLBACK_RAISED, item)
