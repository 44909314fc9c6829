"""A batch, from the queue to delivery."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, TypeAlias, TypeVar

from async_batcher._batching.bulk.slices import Slice, merge_into_slices

if TYPE_CHECKING:
    import asyncio

    from async_batcher._batching.bulk.slices import BulkFuture
    from async_batcher._batching.isolation import Rerun
    from async_batcher._runners.base import BatchHandle
    from async_batcher.stats import Reason

    ItemFuture: TypeAlias = asyncio.Future[Any] | Slice  # of an item of a batch, or of several
    Entry: TypeAlias = tuple[Any, ItemFuture]  # an item and its future

T = TypeVar("T")
F = TypeVar("F")


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
        kept_items: A copy of the items, if they may have to run again.
        started_at: The loop's time when it was dispatched, or began after it had waited for a
            worker.
        span: Its OpenTelemetry span.
        handle: Its runner's, if it can be cancelled.
        slot_leaked: Whether it timed out and runs on.
        cancelling: Whether it is being cancelled because it has no callers.
    """

    __slots__ = (
        "_resolved_prefix", "cancelling", "enqueued_at", "futures", "handle", "has_slices", "items",
        "kept_items", "reason", "rerun", "size", "slot_leaked", "span", "started_at",
    )  # fmt: skip

    def __init__(
        self,
        items: list[T],
        futures: list[F],
        enqueued_at: list[float],
        reason: Reason,
        rerun: Rerun[Entry] | None = None,
    ) -> None:
        self.items = items
        self.futures: list[Any] = futures
        self.enqueued_at = enqueued_at
        self.reason = reason
        self.size = len(items)
        self.rerun = rerun
        self.has_slices = False
        self.kept_items: list[T] | None = None
        self.started_at = 0.0
        self.span: Any = None
        self.handle: BatchHandle | None = None
        self.slot_leaked = self.cancelling = False
        self._resolved_prefix = 0  # futures from the first on that are known to be done

    def __repr__(self) -> str:
        """Its size, reason, and how many items have a caller."""
        return f"<Batch of {self.size} ({self.reason}), {self.pending_items} pending>"

    def merge_slices(self) -> None:
        """Replace the futures of a bulk call, one for each item, by one `Slice`."""
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
        """Whether a caller is left; callable in any thread, and amortised O(1)."""
        futures, resolved = self.futures, self._resolved_prefix
        while resolved < len(futures) and futures[resolved].done():
            resolved += 1
        self._resolved_prefix = resolved
        return resolved < len(futures)

    def callers(self) -> list[asyncio.Future[Any] | BulkFuture]:
        """The futures of its callers, one for each bulk call."""
        return [future.bulk if isinstance(future, Slice) else future for future in self.futures]

    def entries(self) -> list[Entry]:
        """The kept items that have a caller, each with its future."""
        futures: list[ItemFuture] = []
        for future in self.futures:
            futures += future.split_all() if type(future) is Slice else [future]
        pairs = zip(self.kept_items or (), futures, strict=True)
        return [entry for entry in pairs if not entry[1].done()]
