"""The line of those who wait until the queue has room: first come, first served.

While anyone is in it, the queue is full: whoever makes room there calls `Waitlist.admit` at once.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import asyncio

    from async_batcher._batching.bulk import Slice
    from async_batcher._batching.queue import BatchQueue


class WaitlistEntry:
    """A place in the line; later, what is known of its item in the queue.

    Attributes:
        item: What is to go into the queue.
        future: Who waits for it.
        ticket: That of the item, once it is in the queue.
        flush_on_entry: Whether it is due at once when it gets there.
    """

    __slots__ = ("flush_on_entry", "future", "item", "ticket")

    def __init__(self, item: Any, future: asyncio.Future[Any] | Slice) -> None:
        self.item = item
        self.future: Any = future
        self.ticket: int | None = None
        self.flush_on_entry = False

    @property
    def size(self) -> int:
        """Items that wait here."""
        return 1

    def enqueue(self, queue: BatchQueue[Any, Any], now: float) -> bool:
        """Go into the queue, which has room; says whether all has."""
        self.ticket = queue.add(now, self.item, self.future)
        return True


class BulkWaitlistEntry(WaitlistEntry):
    """A place in the line for many items of one bulk, which go in as there is room.

    Attributes:
        item: All items of the bulk.
        future: The share of it that is still in the line.
    """

    __slots__ = ()

    @property
    def size(self) -> int:
        """Items that wait here."""
        share: Slice = self.future
        return share.size

    def enqueue(self, queue: BatchQueue[Any, Any], now: float) -> bool:
        """Go into the queue as far as there is room; says whether all has."""
        rest: Slice = self.future
        share = rest.split(queue.free_capacity)
        enqueue_many(queue, now, self.item[share.start : share.start + share.size], share)
        if not rest.size:
            rest.bulk.waitlist_entry = None
        return not rest.size


def enqueue_many(queue: BatchQueue[Any, Any], now: float, items: list[Any], share: Slice) -> bool:
    """Have the items of a share enter the queue, if there is room for all of them; says whether there was."""
    ticket = queue.add_many(now, items, share)
    if ticket is None:
        return False
    share.ticket = ticket
    share.bulk.queued.add(share)
    return True


class Waitlist:
    """The line in front of a queue.

    Args:
        queue: The queue.
    """

    def __init__(self, queue: BatchQueue[Any, Any]) -> None:
        self._queue = queue
        self._entries: OrderedDict[WaitlistEntry, None] = OrderedDict()

    def __bool__(self) -> bool:
        """Whether anyone waits."""
        return bool(self._entries)

    def __len__(self) -> int:
        """How many items wait."""
        return sum(place.size for place in self._entries)

    def append(self, place: WaitlistEntry) -> None:
        """Wait at its end."""
        self._entries[place] = None

    def remove(self, place: WaitlistEntry) -> bool:
        """Wait no more; says whether it was still in the line."""
        if place not in self._entries:
            return False
        del self._entries[place]
        return True

    def admit(self, now: float) -> None:
        """Let the first ones into the queue, as far as there is room."""
        while self._entries and self._queue.has_capacity:
            place = next(iter(self._entries))
            if place.enqueue(self._queue, now):
                del self._entries[place]
            if place.flush_on_entry:
                self._queue.flush()

    def flush(self) -> None:
        """What waits now is due at once when it gets into the queue."""
        for place in self._entries:
            place.flush_on_entry = True

    def clear(self) -> list[Any]:
        """Send everybody away.

        Returns:
            Who waited.
        """
        waiting = [place.future for place in self._entries]
        self._entries.clear()
        return waiting
