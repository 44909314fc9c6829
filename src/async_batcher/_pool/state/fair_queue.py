"""A round-robin queue for a pool that several clients share. Pure.

Rules:

- Clients are served in turn, in the order in which they began to wait; each client's values are
  first in, first out. So a client with a thousand batches delays another's by one batch at most.
- A value that is put back comes before everything else.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator

T = TypeVar("T")


class FairQueue(Generic[T]):
    """A queue that serves its clients in turn.

    Attributes:
        queues: The queue of each client, the next one first; none is empty.
    """

    def __init__(self) -> None:
        self.queues: OrderedDict[Hashable, deque[T]] = OrderedDict()

    def __len__(self) -> int:
        return sum(map(len, self.queues.values()))

    def __iter__(self) -> Iterator[T]:
        for queue in self.queues.values():
            yield from queue

    def values_of(self, client: Hashable) -> list[T]:
        """Return what one client has in the queue, in order."""
        return list(self.queues.get(client, ()))

    def put(self, client: Hashable, value: T) -> None:
        self.queues.setdefault(client, deque()).append(value)

    def put_front(self, client: Hashable, value: T) -> None:
        """Put a value back that was taken out, ahead of everything else."""
        self.queues.setdefault(client, deque()).appendleft(value)
        self.queues.move_to_end(client, last=False)

    def get(self) -> T:
        """Take out the next value; raise LookupError if there is none."""
        if not self.queues:
            msg = "the queue is empty"
            raise LookupError(msg)
        client, queue = next(iter(self.queues.items()))
        value = queue.popleft()
        if queue:
            self.queues.move_to_end(client)
        else:
            del self.queues[client]
        return value

    def remove(self, client: Hashable, value: T) -> bool:
        """Take out one value; return whether it was in the queue."""
        queue = self.queues.get(client)
        if queue is None or value not in queue:
            return False
        queue.remove(value)
        if not queue:
            del self.queues[client]
        return True

    def clear(self) -> list[T]:
        """Take out everything."""
        values = list(self)
        self.queues.clear()
        return values
