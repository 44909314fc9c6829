"""The work items of a pool: for any worker, for a certain one, or at a worker. Pure.

Rules:

- A work item that is not resolved waits for any worker, waits for a certain worker, or is at a
  worker; never two of these.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from async_batcher._pool.state.fair_queue import FairQueue

if TYPE_CHECKING:
    from async_batcher._pool.state.worker import Worker
    from async_batcher._pool.work_item import WorkItem


class Backlog:
    """The work items that are not resolved.

    Attributes:
        pending: All of them.
        queue: Those that wait for any worker.
        assigned: Those that wait for a certain worker; the last one is next.
    """

    def __init__(self) -> None:
        self.pending: dict[WorkItem, None] = {}
        self.queue: FairQueue[WorkItem] = FairQueue()
        self.assigned: dict[Worker, list[WorkItem]] = {}

    def put(self, item: WorkItem) -> None:
        self.pending[item] = None
        self.queue.put(item.client, item)

    def assign(self, worker: Worker, item: WorkItem) -> None:
        self.pending[item] = None
        self.assigned.setdefault(worker, []).append(item)

    def requeue(self, item: WorkItem) -> None:
        """Let any worker run an item, before all others."""
        self.queue.put_front(item.client, item)

    def next_assigned(self, worker: Worker) -> WorkItem | None:
        """Take out the next work item for a certain worker."""
        items = self.assigned.get(worker)
        if not items:
            return None
        item = items.pop()
        if not items:
            del self.assigned[worker]
        return item

    def unassign(self, worker: Worker) -> None:
        """Let any worker run what was for a certain one, except tear-downs, which only it can."""
        items = self.assigned.pop(worker, [])
        tear_downs = [item for item in items if item.is_tear_down]
        if tear_downs:
            self.assigned[worker] = tear_downs
        for item in items:
            if not item.is_tear_down:
                self.requeue(item)

    def remove(self, item: WorkItem) -> None:
        """Forget a work item."""
        self.take_out(item)
        self.pending.pop(item, None)

    def take_out(self, item: WorkItem) -> bool:
        """Have no worker get a work item; return whether it waited."""
        for worker, items in self.assigned.items():
            if item in items:
                items.remove(item)
                if not items:
                    del self.assigned[worker]
                return True
        return self.queue.remove(item.client, item)

    def clear_waiting(self) -> list[WorkItem]:
        """Take out the work items that wait; they are to be resolved."""
        items = self.queue.clear() + [item for items in self.assigned.values() for item in items]
        self.assigned.clear()
        return items

    def tear_downs(self, key: bytes) -> list[WorkItem]:
        """Return the tear-downs of a function that have not ended."""
        return [item for item in self.pending if item.is_tear_down and item.key == key]
