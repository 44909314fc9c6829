"""What the batch that runs here knows of itself: `current_batch`.

::

    InFlightBatches.dispatch --BatchFacts--> runner --pickled, if not all are defaults--> worker
                                                `--> running_batch, while process_batch runs
                                                           `--> current_batch() --> BatchInfo

Rules:

- A batch that does not ask costs one ``set`` and one ``reset`` of a context variable.
- Deadlines travel as times of `time.monotonic`, which all processes of a machine share.
- Imports no asyncio: workers import this module.
"""

from __future__ import annotations

from contextvars import Context, ContextVar, copy_context
from dataclasses import dataclass
from time import monotonic
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from async_batcher._worker.identity import worker_number

if TYPE_CHECKING:
    from contextvars import Token

__all__ = ["BatchInfo", "current_batch"]

# The key, the attempt, and the first and the last deadline. None stands for `_DEFAULTS`.
BatchFacts: TypeAlias = tuple[Any, int, float | None, float | None]

_DEFAULTS: Final[BatchFacts] = (None, 1, None, None)

# The size of the batch that runs in this context, its facts, and what runs it.
running_batch: ContextVar[tuple[int, BatchFacts | None, object] | None] = ContextVar(
    "async_batcher.running_batch", default=None
)


@dataclass(frozen=True, slots=True)
class BatchInfo:
    """What a batch knows of itself; `current_batch` returns it.

    Attributes:
        key: Key that all of its items share. None: its items have no key.
        size: Number of items that ``process_batch`` was called with.
        attempt: How often an item of it has been tried, this time included: the largest number.
            That a part of a failed batch runs alone (`isolate`) does not count.
        seconds_to_first_deadline: Seconds until the first of the items times out; 0 or less if it
            has. None: no item has a deadline.
        seconds_to_last_deadline: Seconds until the last of the items times out. Work that takes
            longer is wasted. None: some items have no deadline.
        worker: `worker_number` of this process. None: it is not a worker of a `WorkerPool`.
    """

    key: Any
    size: int
    attempt: int
    seconds_to_first_deadline: float | None
    seconds_to_last_deadline: float | None
    worker: int | None


def current_batch() -> BatchInfo | None:
    """Return information about the running batch; call it in ``process_batch``.

    It works in coroutines, threads, worker processes and interpreters, and in generators until
    their last result. A model server may pass its time limit on::

        def process_batch(self, batch):
            seconds = current_batch().seconds_to_first_deadline
            return self.client.predict(batch, timeout=60 if seconds is None else seconds)

    Deadlines are those of ``item_timeout`` and of the ``timeout`` of single calls. The seconds
    count from the call of this function.

    Returns:
        The record. None where no batch runs: in ``setup_worker``, in an ``initializer``, in a call
        of ``WorkerPool.run``, and after the batch has ended. Tasks that a batch starts, and
        functions that it passes to ``asyncio.to_thread``, have its context and get its record.
        Other threads that it starts get None.
    """
    running = running_batch.get()
    if running is None:
        return None
    size, facts, _ = running
    key, attempt, first, last = facts or _DEFAULTS
    now = monotonic()
    return BatchInfo(
        key,
        size,
        attempt,
        None if first is None else first - now,
        None if last is None else last - now,
        worker_number(),
    )


def leave_batch(token: Token[Any]) -> None:
    """Undo a ``set`` of `running_batch` in a coroutine."""
    try:  # noqa: SIM105 - contextlib.suppress would double the cost
        running_batch.reset(token)
    except ValueError:  # it is closed in another context, since its loop has ended
        pass


def context_outside_of_batches() -> Context:
    """Copy the context for what may be made in a batch, and runs outside of it."""
    context = copy_context()
    context.run(running_batch.set, None)
    return context
