"""What the two kinds of queues share: the slots, the limits, and when there is a batch. Pure."""

from __future__ import annotations

import math
import sys
from typing import Final

from async_batcher._serialization.exception_text import counted

# The wake-up time of a batch that is full, flushed or closing, and so due at any time.
ALREADY_DUE: Final = -math.inf
NEVER: Final = math.inf


class QueueBase:
    """A queue without its items.

    Attributes:
        max_queue_size: Items that are queued at most.
        next_wakeup: When there is a batch: `ALREADY_DUE`, a time, or `NEVER` without items or free
            slots.
        wakeup_changed: Whether `next_wakeup` changed since the user of the queue last reset this
            flag.
        running: Batches that hold a slot.
        leaked_slots: Those of them that timed out and cannot be stopped.
    """

    __slots__ = (
        "_ahead", "_closing", "_concurrency", "_max_batch_size", "_max_queue_time", "_was_blocked",
        "leaked_slots", "max_queue_size", "next_wakeup", "running", "wakeup_changed",
    )  # fmt: skip

    def __init__(
        self,
        *,
        max_batch_size: int = sys.maxsize,
        max_queue_time: float = 0.0,
        concurrency: int = 1,
        max_queue_size: int = sys.maxsize,
        ahead: int = 0,
    ) -> None:
        self._max_batch_size = max_batch_size
        self._max_queue_time = max_queue_time
        self._concurrency = concurrency
        self._ahead = ahead
        self.max_queue_size = max_queue_size
        self._closing = False
        self._was_blocked = False  # a due batch was blocked by a missing slot
        self.running = 0
        self.leaked_slots = 0
        self.next_wakeup: float = NEVER
        self.wakeup_changed = False

    @property
    def may_dispatch_full(self) -> bool:
        """Whether a batch that cannot grow may leave."""
        return self.running < self._concurrency + self._ahead

    @property
    def all_slots_leaked(self) -> bool:
        """Whether nothing that is queued can ever leave, unless a leaked slot is released."""
        return self.leaked_slots >= self._concurrency

    def fullness(self, size: int) -> str:  # noqa: ARG002 - all that are full are so for any number
        """Return what is queued, and what may be, where ``size`` more items do not fit."""
        return f"{counted(len(self), 'item')} queued, max_queue_size={self.max_queue_size}"

    def __len__(self) -> int:
        """Queued items."""
        raise NotImplementedError

    def leak_slot(self) -> None:
        """Count a running batch that timed out and cannot be stopped."""
        self.leaked_slots += 1
        self._update()

    def close(self) -> None:
        """Accept no more items; from now on every queued item is due."""
        self._closing = True
        self._update()

    def resize(self, *, max_batch_size: int, max_queue_time: float) -> None:
        """Change the limits of the batches that have not left yet."""
        self._max_batch_size = max_batch_size
        self._max_queue_time = max_queue_time
        self._update()

    def _update(self) -> None:
        """Compute what follows from the limits, the slots and the items."""
        raise NotImplementedError

    def _set_wakeup(self, wakeup: float) -> None:
        if wakeup != self.next_wakeup:
            self.next_wakeup = wakeup
            self.wakeup_changed = True
