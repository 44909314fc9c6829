"""The slots of a batcher in this process: each runs one batch at a time, with a set-up of its own.

::

    a batch --> Slots.run --> this thread's slot, or a free one --> set_up, once --> process_batch
    stop    --> Slots.close --> tear_down_idle: each idle slot;  a busy one when its batch ends

Worker processes and the event loop have one slot each, and do not use this module.
"""

from __future__ import annotations

import threading
from types import MethodType
from typing import TYPE_CHECKING, Any

from async_batcher._runners.slot_attributes import current, hook_of
from async_batcher._serialization.caller_exceptions import begins_batch, order, raisable
from async_batcher._worker.user_function import set_up, tear_down

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from async_batcher._worker.results import Outcome
    from async_batcher._worker.user_function import UserFunction


class Slot:
    """One slot, made by ``thread``. The set-up binds ``attributes`` of its ``batcher``, if any."""

    __slots__ = (
        "_generator", "_setup", "attributes", "batcher", "is_set_up", "is_setting_up", "thread",
    )  # fmt: skip

    def __init__(self, setup: Callable[[], Any]) -> None:
        self._setup = setup
        self._generator: Generator[Any, Any, Any] | None = None
        self.thread = threading.current_thread()
        self.batcher: Any = None
        if isinstance(setup, MethodType) and hook_of(setup.__self__) is not None:
            self.batcher = setup.__self__
        self.attributes: dict[str, Any] = {}
        self.is_set_up = self.is_setting_up = False

    def set_up(self) -> None:
        hook = hook_of(self.batcher)
        self.is_setting_up = True
        try:
            if hook is not None:
                hook.install(type(self.batcher))
            self._generator = set_up(self._setup)
        finally:
            self.is_setting_up = False
            if hook is not None:
                hook.uninstall()
        self.is_set_up = True

    @property
    def tears_down(self) -> bool:
        return self._generator is not None

    def tear_down(self) -> None:
        """Run what follows the ``yield`` of the set-up, once."""
        generator, self._generator = self._generator, None
        if generator is not None:
            previous, current.slot = current.slot, self
            try:
                tear_down(generator)
            finally:
                current.slot = previous
        self.is_set_up = False
        self.attributes.clear()


class Slots:
    """The slots of one user function: one for each thread, or any free one for each batch."""

    def __init__(self, function: UserFunction, *, by_thread: bool) -> None:
        self._user_function = function
        self._local = threading.local()
        self._by_thread = by_thread
        self._lock = threading.Lock()
        self._idle: list[Slot] = []
        self._closing = False
        self._remaining = 0  # idle slots that are not torn down yet
        self._all_torn_down = threading.Event()
        self._on_torn_down: Callable[[], object] = self._all_torn_down.set

    @begins_batch
    def run(self, batch: list[Any] | None, on_start: Callable[[], object] | None) -> Outcome | None:
        """Run one batch (None: set up only) in a slot; return None if the slots are closed."""
        _began = next(order)
        slot = self._take()
        if slot is None:
            return None
        previous, current.slot = current.slot, slot
        try:
            if not slot.is_set_up:
                try:
                    slot.set_up()
                except BaseException as exc:  # noqa: BLE001 - user code
                    return raisable(exc, "setup_worker")
            if batch is None:
                return []
            if on_start is not None:
                on_start()
            return self._user_function.run(batch)
        finally:
            current.slot = previous
            self._release(slot)

    @property
    def tears_down(self) -> bool:
        return any(slot.tears_down for slot in self._idle)

    def close(self, on_torn_down: Callable[[], object]) -> bool:
        """Run no more batches; a busy slot is torn down when its batch ends.

        Return whether there is something to tear down. Then call `tear_down_idle` in each thread;
        ``on_torn_down`` is called, in any thread, when the slots that are idle now are torn down.
        """
        with self._lock:
            if self._closing:
                return False
            self._closing = True
            self._remaining = len(self._idle)
            self._on_torn_down = on_torn_down
            return self.tears_down

    def tear_down_idle(self) -> None:
        """Tear down this thread's own slot and those of threads that have ended, or all.

        It returns when all slots are torn down: as many calls as threads reach each thread.
        """
        while True:
            with self._lock:
                slot = self._pick()
                if slot is None:
                    slot = next((slot for slot in self._idle if not slot.thread.is_alive()), None)
                if slot is None:
                    break
                self._idle.remove(slot)
            slot.tear_down()
            with self._lock:
                self._remaining -= 1
                is_last = self._remaining == 0
            if is_last:
                self._all_torn_down.set()
                self._on_torn_down()
        if self._by_thread:
            self._all_torn_down.wait()

    def _pick(self) -> Slot | None:
        if not self._by_thread:
            return self._idle[-1] if self._idle else None
        own = getattr(self._local, "slot", None)
        return own if own in self._idle else None

    def _take(self) -> Slot | None:
        with self._lock:
            if self._closing:
                return None
            slot = self._pick()
            if slot is not None:
                self._idle.remove(slot)
        if slot is None:
            assert self._user_function.setup is not None  # noqa: S101 - or there were no slots
            slot = self._local.slot = Slot(self._user_function.setup)
        return slot

    def _release(self, slot: Slot) -> None:
        with self._lock:
            if not self._closing:
                self._idle.append(slot)
                return
        slot.tear_down()
