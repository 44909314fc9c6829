"""What the pool's state asks for; the `WorkerDriver` carries it out, in order. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from async_batcher._pool.state.worker import Trip, Worker
    from async_batcher._pool.work_item import WorkItem
    from async_batcher._worker.results import Outcome


class StartWorker(NamedTuple):
    """Start a process for a worker."""

    worker: Worker


class RenewLauncher(NamedTuple):
    """Start later workers from a new fork server, if they come from one."""


class StopWorker(NamedTuple):
    """Have a worker without a work item run its exit handlers and exit."""

    worker: Worker


class InterruptBatch(NamedTuple):
    """Interrupt a batch that a worker runs, if it still does."""

    trip: Trip


class KillWorker(NamedTuple):
    """Kill the process of a worker."""

    worker: Worker


class CloseWorker(NamedTuple):
    """Close what is left of a worker whose process has exited, or does not tell."""

    worker: Worker


class CheckWorker(NamedTuple):
    """Report the progress of a worker past its deadline: `TimeLimits.checked`."""

    worker: Worker


class TakeBack(NamedTuple):
    """Take a work item back that waits at a worker, and report: `WorkerEvents.taken_back`."""

    trip: Trip


class Abandon(NamedTuple):
    """Have a worker end a work item early that has no callers, if its function yields results."""

    trip: Trip


class MeasureMemory(NamedTuple):
    """Report the memory of a worker: `WorkerEvents.memory_measured`."""

    worker: Worker


class ReportStartTimeout(NamedTuple):
    """Tell the launcher that a worker was not ready in time."""

    worker: Worker


class LogWarning(NamedTuple):
    """Log what a user must know, and what perhaps no caller gets as an error."""

    text: str


class Resolve(NamedTuple):
    """Pass an outcome on to the callers of a work item."""

    item: WorkItem
    outcome: Outcome


# A trip: send its work item to its worker.
Command: TypeAlias = (
    "Trip | TakeBack | Abandon | InterruptBatch | StartWorker | StopWorker | KillWorker"
    " | CloseWorker | CheckWorker | MeasureMemory | ReportStartTimeout | LogWarning | RenewLauncher"
    " | Resolve"
)
