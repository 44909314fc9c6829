"""A batch that runs, as the loop's side sees it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

from async_batcher._batching.bulk import Slice

if TYPE_CHECKING:
    import asyncio

    from async_batcher._batching.bulk import BulkFuture
    from async_batcher._batching.isolation import Rerun
    from async_batcher._runners.base import CancelBatch
    from async_batcher.stats import Reason

    ItemFuture: TypeAlias = asyncio.Future[Any] | Slice  # who waits for an item of a batch, or for several
    Entry: TypeAlias = tuple[Any, ItemFuture]  # an item and who waits for it


class Batch:
    """A batch that runs.

    Attributes:
        futures: Who waits for its items, in their order; empty once they have been told that it takes too long.
        size: Its items.
        has_slices: Whether some of them wait for more than one item.
        items: They themselves, where they may have to be run again.
        rerun: What it is a part of, if it is run again.
        reason: Why it left the queue.
        queue_time: Seconds that its oldest item had waited.
        started_at: When it left.
        span: That of OpenTelemetry, if there is one.
        cancel: Ends it before its time, if anything can.
        slot_leaked: Whether its waiters have been told that it takes too long.
        cancelling: Whether it is being ended, since nobody waits any more.
    """

    __slots__ = (
        "_resolved_prefix", "cancel", "cancelling", "futures", "has_slices", "items", "queue_time",
        "reason", "rerun", "size", "slot_leaked", "span", "started_at",
    )  # fmt: skip

    def __init__(
        self,
        futures: list[ItemFuture],
        size: int,
        items: list[Any] | None,
        rerun: Rerun[Entry] | None,
        reason: Reason,
        queue_time: float,
        began: float,
    ) -> None:
        self.futures = futures
        self.size = size
        self.items = items
        self.rerun = rerun
        self.reason = reason
        self.queue_time = queue_time
        self.started_at = began
        self.span: Any = None
        self.cancel: CancelBatch | None = None
        self._resolved_prefix = 0  # of the futures, so many from the first one on are known to be done
        self.has_slices = self.slot_leaked = self.cancelling = False

    @property
    def pending_items(self) -> int:
        """Items that somebody still waits for."""
        return sum(future.size if type(future) is Slice else 1 for future in self.futures if not future.done())

    def has_callers(self) -> bool:
        """Whether somebody still waits; in any thread. However often that is asked, it looks at each about once."""
        futures, told = self.futures, self._resolved_prefix
        while told < len(futures) and futures[told].done():
            told += 1
        self._resolved_prefix = told
        return told < len(futures)

    def callers(self) -> list[asyncio.Future[Any] | BulkFuture]:
        """Who has waited for its items: a future, or a bulk for each share."""
        return [future.bulk if isinstance(future, Slice) else future for future in self.futures]

    def entries(self) -> list[Entry]:
        """Its items that somebody still waits for, each with who does; of those that are kept."""
        waiters: list[ItemFuture] = []
        for future in self.futures:
            waiters += future.split_all() if type(future) is Slice else [future]
        return [entry for entry in zip(self.items or (), waiters, strict=True) if not entry[1].done()]
