"""A batch that runs, as its session sees it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    import asyncio

    from async_batcher._recovery import Rerun
    from async_batcher.runners import End
    from async_batcher.stats import Reason

    Entry: TypeAlias = tuple[Any, asyncio.Future[Any]]  # an item and who waits for it


class Run:
    """A batch that runs.

    Attributes:
        futures: Who waits for its items; empty once they have been told that it takes too long.
        size: Its items.
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
        "began", "end", "futures", "is_ending", "is_lost", "items", "queue_time", "reason", "rerun", "size", "span",
    )  # fmt: skip

    def __init__(
        self,
        futures: list[asyncio.Future[Any]],
        items: list[Any] | None,
        rerun: Rerun[Entry] | None,
        reason: Reason,
        queue_time: float,
        began: float,
    ) -> None:
        self.futures = futures
        self.size = len(futures)
        self.items = items
        self.rerun = rerun
        self.reason = reason
        self.queue_time = queue_time
        self.began = began
        self.span: Any = None
        self.end: End | None = None
        self.is_lost = self.is_ending = False
