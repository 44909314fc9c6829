"""The slots of a batcher in this process: each runs one batch at a time, with a set-up of its own.

::

    a batch --> Slots.run --> this thread's slot, or a free one, or a new one: set_up --> the batch
    stop    --> Slots.close --> tear_down_idle: each idle slot;  a busy one when its batch ends

Without a ``setup_worker`` there are none. Worker processes and the event loop have one slot each,
and do not use this module.
"""

from __future__ import annotations

import threading
from concurrent.futures import Future
from types import MethodType
from typing import TYPE_CHECKING, Any

from async_batcher._runners.slot_attributes import base_of, hook, working_for
from async_batcher._serialization.caller_exceptions import batch_numbers, begins_batch, raisable
from async_batcher._worker.results import BatchNotStartedError
from async_batcher._worker.user_function import set_up, tear_down

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from async_batcher._worker.results import OnResult, Outcome
    from async_batcher._worker.user_function import UserFunction
    from async_batcher.current import BatchFacts


class Slot:
    """One slot, made by ``thread``. The set-up binds ``attributes`` of its ``batcher``, if any."""

    __slots__ = ("_generator", "attributes", "batcher", "is_setting_up", "thread")

    def __init__(self) -> None:
        self._generator: Generator[Any, Any, Any] | None = None
        self.thread = threading.current_thread()
        self.batcher: Any = None
        self.attributes: dict[str, Any] = {}
        self.is_setting_up = False

    def set_up(self, setup: Callable[[], Any]) -> None:
        with working_for(self):
            if not isinstance(setup, MethodType) or base_of(type(setup.__self__)) is None:
                self._generator = set_up(setup)
                return
            self.batcher = setup.__self__
            with hook.installed(type(self.batcher)):
                self.is_setting_up = True
                try:
                    self._generator = set_up(setup)
                finally:
                    self.is_setting_up = False

    @property
    def tears_down(self) -> bool:
        return self._generator is not None

    def tear_down(self) -> None:
        """Run what follows the ``yield`` of the set-up."""
        if self._generator is not None:
            with working_for(self):
                tear_down(self._generator)
        self.attributes.clear()


class Slots:
    """The slots of one user function: one for each thread, or any free one for each batch.

    Attributes:
        torn_down: Done, in any thread, when the slots that were idle at `close` are torn down.
    """

    def __init__(self, function: UserFunction, *, by_thread: bool) -> None:
        self._user_function = function
        self._by_thread = by_thread
        self._lock = threading.Lock()
        self._idle: list[Slot] = []
        self._closing = False
        self._remaining = 0  # idle slots that are not torn down yet
        self.torn_down: Future[None] = Future()

    @begins_batch
    def run(
        self,
        batch: list[Any] | None,
        on_start: Callable[[], object] | None,
        on_result: OnResult | None = None,
        facts: BatchFacts | None = None,
    ) -> Outcome:
        """Run one batch (None: set up only), in a slot if there is a set-up."""
        if self._user_function.setup is None:
            return self._run(batch, on_start, on_result, facts)
        _batch_number = next(batch_numbers)  # caller_exceptions reads this frame
        try:
            slot = self._take(self._user_function.setup)
        except BaseException as exc:  # noqa: BLE001 - user code
            return raisable(exc, "setup_worker")
        if slot is None:
            return BatchNotStartedError()
        try:
            with working_for(slot):
                return self._run(batch, on_start, on_result, facts)
        finally:
            self._release(slot)

    def _run(
        self,
        batch: list[Any] | None,
        on_start: Callable[[], object] | None,
        on_result: OnResult | None,
        facts: BatchFacts | None,
    ) -> Outcome:
        if batch is None:
            return []
        if on_start is not None:
            on_start()
        return self._user_function.run(batch, on_result, facts)

    @property
    def tears_down(self) -> bool:
        return any(slot.tears_down for slot in self._idle)

    def close(self) -> bool:
        """Run no more batches; a busy slot is torn down when its batch ends.

        Return whether `tear_down_idle` is to be called now, in as many threads as there are.
        """
        with self._lock:
            if self._closing:
                return False
            self._closing = True
            self._remaining = len(self._idle)
            tears_down = self.tears_down
        if not tears_down:
            self.torn_down.set_result(None)
        return tears_down

    def tear_down_idle(self) -> None:
        """Tear down this thread's own slot and those of threads that have ended, or all.

        It returns when all slots are torn down: as many calls as threads reach each thread.
        """
        while True:
            with self._lock:
                slot = self._pop_idle(or_of_ended_thread=True)
            if slot is None:
                break
            slot.tear_down()
            with self._lock:
                self._remaining -= 1
                is_last = self._remaining == 0
            if is_last:
                self.torn_down.set_result(None)
        if self._by_thread:
            self.torn_down.result()

    def _pop_idle(self, *, or_of_ended_thread: bool = False) -> Slot | None:
        own = threading.current_thread()
        for slot in reversed(self._idle):
            is_ended = or_of_ended_thread and not slot.thread.is_alive()
            if not self._by_thread or slot.thread is own or is_ended:
                self._idle.remove(slot)
                return slot
        return None

    def _take(self, setup: Callable[[], Any]) -> Slot | None:
        with self._lock:
            if self._closing:
                return None
            slot = self._pop_idle()
        if slot is None:
            slot = Slot()
            slot.set_up(setup)
        return slot

    def _release(self, slot: Slot) -> None:
        with self._lock:
            if not self._closing:
                self._idle.append(slot)
                return
        slot.tear_down()
