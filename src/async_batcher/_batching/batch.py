"""A batch, from the queue to delivery."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Generic, TypeAlias, TypeVar

from async_batcher._batching.bulk.slices import (
    BulkFuture,
    Slice,
    merge_into_slices,
    split_into_items,
)
from async_batcher._batching.queue.lane import Entry

if TYPE_CHECKING:
    import asyncio

    from async_batcher._batching.failures.isolation import Rerun
    from async_batcher._batching.item_timeouts import ItemTimeouts
    from async_batcher._batching.queue.lane import Lane
    from async_batcher._runners.base import BatchHandle
    from async_batcher._serialization.caller_exceptions import CallerExceptions
    from async_batcher.current import BatchFacts
    from async_batcher.stats import Reason

    ItemFuture: TypeAlias = asyncio.Future[Any] | Slice  # of an item of a batch, or of several
    CallerFuture: TypeAlias = asyncio.Future[Any] | BulkFuture  # what a caller awaits

T = TypeVar("T")
F = TypeVar("F")

# In the place of a future whose result was delivered early; it is done.
_DELIVERED: Final = BulkFuture(0)


class EarlyPart:
    """What was delivered of a batch before it ended.

    Attributes:
        size: Its number of items, from the first one on.
        failed: How many of them failed.
        exceptions: Those of the batch.
    """

    __slots__ = ("exceptions", "failed", "size")

    def __init__(self, exceptions: CallerExceptions) -> None:
        self.size = self.failed = 0
        self.exceptions = exceptions


class Batch(Generic[T, F]):
    """Items that run together.

    Attributes:
        items: Handed to the runner; the user's code may change the list.
        futures: What their callers await, in order; empty after they were resolved early.
        enqueued_at: When the items came; empty for a rerun.
        reason: Why it left the queue.
        size: Its number of items.
        rerun: The part of a failed batch that this is.
        has_slices: Whether some futures stand for several items; before dispatch, whether some may.
        retried: Items that were requeued to be tried again.
        number: Counts the batches of its batcher, from 1; 0 before it is dispatched.
        started_at: The loop's time when it was dispatched, or began after it had waited for a
            worker.
        handle: Its runner's, if it can be cancelled.
        slot_leaked: Whether it timed out and runs on.
        cancelling: Whether it is being cancelled because it has no callers.
        early: What was delivered before it ended; None if nothing was.
    """

    __slots__ = (
        "_entries", "_resolved_prefix", "cancelling", "early", "enqueued_at", "futures", "handle",
        "has_slices", "items", "number", "reason", "rerun", "retried", "size", "slot_leaked",
        "started_at",
    )  # fmt: skip

    def __init__(
        self,
        items: list[T],
        futures: list[F],
        enqueued_at: list[float],
        tickets: list[int],
        reason: Reason,
    ) -> None:
        self.items = items
        self.futures: list[Any] = futures
        self.enqueued_at = enqueued_at
        self.reason = reason
        self.size = len(items)
        self.rerun: Rerun[Entry] | None = None
        self.has_slices = False
        self.retried = 0
        self.number = 0
        self.started_at = 0.0
        self.handle: BatchHandle | None = None
        self.slot_leaked = self.cancelling = False
        self.early: EarlyPart | None = None
        self._resolved_prefix = 0  # futures from the first on that are known to be done
        # One for each item; until they are needed, what they are made from.
        self._entries: list[Entry] | tuple[list[T], list[int]] = (items.copy(), tickets)

    @classmethod
    def of_entries(
        cls, entries: list[Entry], reason: Reason, rerun: Rerun[Entry] | None = None
    ) -> Batch[Any, Any]:
        """Make a batch of what a `LaneQueue` had, or what runs again."""
        items = [entry.item for entry in entries]
        futures = [entry.future for entry in entries]
        enqueued_at = [] if rerun is not None else [entry.enqueued_at for entry in entries]
        batch: Batch[Any, Any] = Batch(items, futures, enqueued_at, [], reason)
        batch._entries = entries
        batch.rerun = rerun
        batch.has_slices = any(type(future) is Slice for future in futures)
        return batch

    def __repr__(self) -> str:
        """Its size, reason, and how many items have a caller."""
        return f"<Batch of {self.size} ({self.reason}), {self.pending_items} pending>"

    def leave_queue(self) -> None:
        """Let bulk calls know what is no longer queued: one `Slice` for adjacent items of each."""
        if isinstance(self._entries, list):
            for future in self.futures:
                if type(future) is Slice:
                    future.bulk.queued.discard(future)
            return
        self.futures = merge_into_slices(self.futures)
        self.has_slices = any(type(future) is Slice for future in self.futures)

    @property
    def queue_time(self) -> float:
        """Seconds that its oldest item was queued."""
        return self.started_at - self.enqueued_at[0] if self.enqueued_at else 0.0

    @property
    def pending_items(self) -> int:
        """Items with a caller."""
        return sum(
            future.size if type(future) is Slice else 1
            for future in self.futures
            if not future.done()
        )

    def has_callers(self) -> bool:
        """Tell whether a caller is left; callable in any thread, and amortised O(1)."""
        futures, resolved = self.futures, self._resolved_prefix
        while resolved < len(futures) and futures[resolved].done():
            resolved += 1
        self._resolved_prefix = resolved
        return resolved < len(futures)

    def callers(self) -> list[CallerFuture]:
        """Return the futures of its callers, one for each bulk call."""
        return [future.bulk if isinstance(future, Slice) else future for future in self.futures]

    @property
    def lane(self) -> Lane | None:
        """Where it was queued, in a `LaneQueue`."""
        return self._entries[0].lane if isinstance(self._entries, list) else None

    @property
    def key(self) -> Any:
        """The key of its items."""
        return self._entries[0].key if isinstance(self._entries, list) else None

    @property
    def attempt(self) -> int:
        """How often an item of it has been tried at most, with this time."""
        if isinstance(self._entries, list):
            return max(entry.attempt for entry in self._entries)
        return 1

    @property
    def first_tries(self) -> int:
        """Items that are tried for the first time, and have not run before."""
        if isinstance(self._entries, list):
            return sum(entry.attempt == 1 and not entry.has_run for entry in self._entries)
        return self.size

    def entries(self) -> list[Entry]:
        """Return all items, each with its own future; ask before they have results."""
        if isinstance(self._entries, tuple):
            futures = split_into_items(self.futures)
            self._entries = [
                Entry(item, future, ticket)
                for item, ticket, future in zip(*self._entries, futures, strict=True)
            ]
        return self._entries

    def facts(self, timeouts: ItemTimeouts) -> BatchFacts | None:
        """What it knows of itself in its runner; None: the defaults."""
        first, last = timeouts.first_and_last(self)
        has_defaults = isinstance(self._entries, tuple) or (self.key is None and self.attempt == 1)
        return None if first is None and has_defaults else (self.key, self.attempt, first, last)

    def begin_early(self, exceptions: CallerExceptions) -> EarlyPart:
        """Prepare for results before the end: each item has a future, or a slice, of its own."""
        self.futures = split_into_items(self.futures)
        self.early = EarlyPart(exceptions)
        return self.early

    def drop_delivered(self, early: EarlyPart, count: int) -> None:
        """Release the next ``count`` futures, which have their results."""
        # In their place, so that `has_callers` may run meanwhile, and the others keep their index.
        self.futures[early.size : early.size + count] = [_DELIVERED] * count
        early.size += count
