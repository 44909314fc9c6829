"""Callers that wait until the queue has capacity: first come, first served.

While the list is not empty the queue is full, also for an item that would cost less than the first:
what frees capacity calls `Waitlist.admit`.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from itertools import count
from typing import TYPE_CHECKING, Any

from async_batcher._batching.bulk.slices import Slice

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterable

    from async_batcher._batching.bulk.slices import BulkFuture
    from async_batcher._batching.queue.batch_queue import BatchQueue
    from async_batcher._batching.queue.lane import Entry
    from async_batcher._batching.queue.lane_queue import LaneQueue

_numbers = count()


class WaitlistEntry:
    """An item on the waitlist; later, the handle of that item in the queue.

    Attributes:
        number: Counts the entries of all batchers.
        ticket: Of the item in the queue, once it is there.
        flush_on_entry: Whether it is due as soon as it is in the queue.
    """

    __slots__ = ("flush_on_entry", "future", "item", "number", "ticket")

    def __init__(self, item: Any, future: asyncio.Future[Any] | Slice | BulkFuture) -> None:
        self.item = item
        self.number = next(_numbers)
        self.future: Any = future
        self.ticket: int | None = None
        self.flush_on_entry = False

    @property
    def size(self) -> int:
        """Items that wait."""
        return 1

    def enqueue(self, queue: Any, now: float) -> bool:
        """Move to the queue, as far as it has capacity; return whether nothing is left to move."""
        self.ticket = queue.add(now, self.item, self.future)
        return self.ticket is not None

    def to_lanes(self, queue: LaneQueue) -> WaitlistEntry:
        """Return the entry for a queue with lanes; a single item keeps the entry, as its handle."""
        self.item = queue.prepare(self.item)
        return self

    def pop(self) -> tuple[Any, bool]:
        """Remove the first item, and return its future and whether it was the last one."""
        return self.future, True


class BulkWaitlistEntry(WaitlistEntry):
    """Items of a bulk call, which enter the queue as far as it has capacity.

    Attributes:
        item: All items of the bulk call.
        future: The slice of it that still waits.
    """

    __slots__ = ()

    @property
    def size(self) -> int:
        """Items that wait."""
        rest: Slice = self.future
        return rest.size

    def enqueue(self, queue: BatchQueue[Any, Any], now: float) -> bool:
        """Move as many items as the queue has capacity for."""
        rest: Slice = self.future
        part = rest.split(queue.free_capacity)
        enqueue_slice(queue, now, self.item[part.start : part.start + part.size], part)
        if not rest.size:
            rest.bulk.waitlist_entry = None
        return not rest.size

    def to_lanes(self, queue: LaneQueue) -> WaitlistEntry:
        rest: Slice = self.future
        indices = range(rest.start, rest.start + rest.size)
        prepared = [(queue.prepare(self.item[i]), Slice(rest.bulk, i, 1)) for i in indices]
        entry = rest.bulk.waitlist_entry = PreparedWaitlistEntry(prepared, rest.bulk)
        entry.flush_on_entry = self.flush_on_entry
        return entry


class PreparedWaitlistEntry(WaitlistEntry):
    """Items of a bulk call that have keys and costs.

    Attributes:
        item: Each item that waits, with its slice.
        future: The bulk call.
    """

    __slots__ = ()

    def __init__(self, prepared: list[tuple[Entry, Slice]], bulk: BulkFuture) -> None:
        super().__init__(deque(prepared), bulk)

    @property
    def size(self) -> int:
        """Items that wait."""
        return len(self.item)

    def fits(self, queue: LaneQueue) -> bool:
        """Tell whether the queue has capacity for all of them."""
        return queue.has_capacity([entry for entry, _ in self.item])

    def enqueue(self, queue: Any, now: float) -> bool:
        """Move as many items as the queue has capacity for."""
        bulk: BulkFuture = self.future
        while self.item:
            entry, part = self.item[0]
            ticket = queue.add(now, entry, part)
            if ticket is None:
                return False
            part.ticket = ticket
            bulk.queued.add(part)
            self.item.popleft()
        bulk.waitlist_entry = None
        return True

    def pop(self) -> tuple[Any, bool]:
        """Remove the first item, and return its slice and whether it was the last one."""
        _, part = self.item.popleft()
        return part, not self.item

    def to_lanes(self, queue: LaneQueue) -> WaitlistEntry:  # noqa: ARG002 - it has them
        return self


def enqueue_slice(queue: BatchQueue[Any, Any], now: float, items: list[Any], part: Slice) -> bool:
    """Enqueue the items of a slice, and return whether the queue had capacity for all of them."""
    ticket = queue.add_many(now, items, part, of_stream=part.bulk.of_stream)
    if ticket is None:
        return False
    part.ticket = ticket
    part.bulk.queued.add(part)
    return True


class Waitlist:
    """The waitlist of a queue.

    Args:
        queue: The queue.
        fail: Called with a future and the exception that its key raised when it was compared.

    Attributes:
        entries: First come, first served.
    """

    def __init__(
        self,
        queue: BatchQueue[Any, Any] | LaneQueue,
        fail: Callable[[Any, Exception], None],
    ) -> None:
        self._queue = queue
        self._fail = fail
        self.entries: OrderedDict[WaitlistEntry, None] = OrderedDict()

    def __len__(self) -> int:
        """Items that wait."""
        return sum(entry.size for entry in self.entries)

    def append(self, entry: WaitlistEntry) -> None:
        self.entries[entry] = None

    def remove(self, entry: WaitlistEntry) -> bool:
        """Remove an entry, and return whether it was still there."""
        if entry not in self.entries:
            return False
        del self.entries[entry]
        return True

    def admit(self, now: float, others: Iterable[Waitlist] = ()) -> None:
        """Move the first entries to the queue, as far as it has capacity.

        Args:
            now: The time.
            others: Those of batchers that share a limit: of all, what came first is moved first.
        """
        waiting = [self, *others]
        while waiting := [waitlist for waitlist in waiting if waitlist.entries]:
            first = min(waiting, key=Waitlist.first_number)
            if not first.admit_first(now):
                waiting.remove(first)

    def first_number(self) -> int:
        return next(iter(self.entries)).number

    def admit_first(self, now: float) -> bool:
        """Move the first entry as far as there is capacity; return whether the next may follow."""
        if not self._queue.free_capacity:
            return False
        entry = next(iter(self.entries))
        error: Exception | None = None
        try:
            is_moved = entry.enqueue(self._queue, now)
        except Exception as exc:  # noqa: BLE001 - of the key, when it is compared
            error = exc
            future, is_moved = entry.pop()
        if is_moved:
            del self.entries[entry]
        if error is not None:
            self._fail(future, error)
            return True
        if entry.flush_on_entry:
            self._queue.flush()
        return is_moved

    def use_lanes(self, queue: LaneQueue) -> None:
        """Let the entries wait for another queue, in their order."""
        self._queue = queue
        self.entries = OrderedDict.fromkeys(entry.to_lanes(queue) for entry in self.entries)

    def flush(self) -> None:
        """Make what waits now due as soon as it is in the queue."""
        for entry in self.entries:
            entry.flush_on_entry = True

    def futures(self) -> list[Any]:
        """Return the futures of all entries."""
        return [entry.future for entry in self.entries]

    def clear(self) -> list[Any]:
        """Remove all entries, and return their futures."""
        futures = self.futures()
        self.entries.clear()
        return futures
