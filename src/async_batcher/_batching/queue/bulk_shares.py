"""How items of bulk calls are spread over the workers of a batcher without ``max_batch_size``."""

from __future__ import annotations


class BulkShares:
    """Divides what is queued by the workers, and keeps that share until all of it has left.

    Args:
        workers: The number of workers.

    Attributes:
        bulk_until: The ticket after the last item of a bulk call.
    """

    __slots__ = ("_divided_until", "_share", "bulk_until", "workers")

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self.bulk_until = 0
        self._divided_until = 0  # the ticket after the last item that leaves in such a share
        self._share = 0

    def next_share(self, oldest: int, next_ticket: int, queued: int) -> int:
        """Return the size of the next batch.

        Args:
            oldest: The ticket of the oldest item.
            next_ticket: The ticket of the next item to come.
            queued: The number of queued items.
        """
        if oldest >= self._divided_until:
            self._divided_until = next_ticket
            self._share = -(-queued // self.workers)
        return min(queued, self._share)
