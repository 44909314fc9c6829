"""A batch that runs, as the loop's side sees it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

from async_batcher._batching.bulk import Share

if TYPE_CHECKING:
    import asyncio

    from async_batcher._batching.bulk import Bulk
    from async_batcher._batching.isolation import Rerun
    from async_batcher._runners.base import End
    from async_batcher.stats import Reason

    InBatch: TypeAlias = asyncio.Future[Any] | Share  # who waits for an item of a batch, or for several
    Entry: TypeAlias = tuple[Any, InBatch]  # an item and who waits for it


class Run:
    """A batch that runs.

    Attributes:
        futures: Who waits for its items, in their order; empty once they have been told that it takes too long.
        size: Its items.
        has_shares: Whether some of them wait for more than one item.
        items: They themselves, where they may have to be run again.
        rerun: What it is a part of, if it is run again.
        reason: Why it left the queue.
        queue_time: Seconds that its oldest item had waited.
        began: When it left.
        span: That of OpenTelemetry, if there is one.
        end: Ends it before its time, if anything can.
        is_lost: Whether its waiters have been told that it takes too long.
        is_ending: Whether it is being ended, since nobody waits any more.
    """

    __slots__ = (
        "_told", "began", "end", "futures", "has_shares", "is_ending", "is_lost",
        "items", "queue_time", "reason", "rerun", "size", "span",
    )  # fmt: skip

    def __init__(
        self,
        futures: list[InBatch],
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
        self.began = began
        self.span: Any = None
        self.end: End | None = None
        self._told = 0  # of the futures, so many from the first one on are known to be done
        self.has_shares = self.is_lost = self.is_ending = False

    @property
    def waited_for(self) -> int:
        """Items that somebody still waits for."""
        return sum(future.size if type(future) is Share else 1 for future in self.futures if not future.done())

    def is_wanted(self) -> bool:
        """Whether somebody still waits; in any thread. However often that is asked, it looks at each about once."""
        futures, told = self.futures, self._told
        while told < len(futures) and futures[told].done():
            told += 1
        self._told = told
        return told < len(futures)

    def waiters(self) -> list[asyncio.Future[Any] | Bulk]:
        """Who has waited for its items: a future, or a bulk for each share."""
        return [future.bulk if isinstance(future, Share) else future for future in self.futures]

    def entries(self) -> list[Entry]:
        """Its items that somebody still waits for, each with who does; of those that are kept."""
        waiters: list[InBatch] = []
        for future in self.futures:
            waiters += future.singly() if type(future) is Share else [future]
        return [entry for entry in zip(self.items or (), waiters, strict=True) if not entry[1].done()]
