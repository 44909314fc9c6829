"""How due items are divided by the workers of a batcher without ``max_batch_size``.

They are divided by the free workers. A larger divisor would leave items to workers that are busy,
and make more batches than are needed.

Items of bulk calls are divided by all workers in two cases. `map` reads no more before results are
consumed: if one worker took everything, the next one that is free would have nothing to do until
then. And what a call has queued while all workers were busy would run on one of them alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from async_batcher.stats import Reason


class Shares:
    """Divides what is queued, and keeps that share until all of it has left.

    Args:
        workers: The number of workers.
        divides_single_calls: Whether items of single calls are divided, as those of bulk calls are.

    Attributes:
        bulk_until: The ticket after the last item of a bulk call.
        stream_until: The ticket after the last item of a stream.
        divided_until: The ticket after the last item that leaves in such a share; all are due.
    """

    __slots__ = (
        "_reason", "_share", "bulk_until", "divided_until", "divides_single_calls", "stream_until",
        "workers",
    )  # fmt: skip

    def __init__(self, workers: int, *, divides_single_calls: bool) -> None:
        self.workers = workers
        self.divides_single_calls = divides_single_calls
        self.bulk_until = self.stream_until = 0
        self.divided_until = 0
        self._share = 0
        self._reason: Reason = "full"  # why the first of them left

    def next_share(
        self, oldest: int, next_ticket: int, queued: int, running: int, reason: Reason
    ) -> tuple[int, Reason]:
        """Return the size of the next batch, and why it leaves.

        Args:
            oldest: The ticket of the oldest item.
            next_ticket: The ticket of the next item to come.
            queued: The number of queued items.
            running: The number of slots that are not to get a share.
            reason: Why it leaves; "full" also if it is due only because the share before it was.
        """
        if oldest >= self.divided_until:
            # Counted once: a batch may have ended before the next share is dispatched.
            free = self.workers if oldest < self.stream_until else self.workers - running
            self.divided_until = next_ticket
            self._share = -(-queued // max(1, free))
            self._reason = reason
        elif reason == "full":
            reason = self._reason
        return min(queued, self._share), reason
