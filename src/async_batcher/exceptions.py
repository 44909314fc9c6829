"""The errors of this package, and whose fault each one is.

::

    AsyncBatchException          root of all below
    |
    |  the caller's side
    |-- QueueFullException       the queue already holds max_queue_size items
    |-- ItemTimeoutError         no result within the item's timeout            (also TimeoutError)
    |-- BatcherStoppedError      the batcher stopped before the batch ended     (also RuntimeError)
    |-- SerializationError       function, item or result cannot be pickled     (also TypeError)
    |
    |  process_batch's side
    |-- BadResultError           not one result per item                        (also ValueError)
    |-- BatchError               control flow was raised, or cannot be pickled
    |-- BatchTimeoutError        the batch ran for longer than batch_timeout    (also TimeoutError)
    |
    |  the workers' side
    |-- WorkerDiedError          a worker process ended with the batch, or none was started for it
    `-- PoolBrokenError          the pool or executor cannot run anything

All of them can be pickled.

A caller gets any other exception as ``process_batch`` raised it. The only caller of a batch gets
the object itself, unchanged, when it is raised for the first time; after that, a copy. Each of
several callers gets a copy: the type, args, text, attributes, notes, traceback and causes are those
of the original, and a note names the index of the item, the function and the worker process.

An exception from a worker process is a copy, too. The last exception in its chain of causes has the
traceback from the worker as its cause.
"""

from __future__ import annotations

__all__ = [
    "AsyncBatchException",
    "BadResultError",
    "BatchError",
    "BatchTimeoutError",
    "BatcherStoppedError",
    "ItemTimeoutError",
    "PoolBrokenError",
    "QueueFullException",
    "SerializationError",
    "WorkerDiedError",
]


class AsyncBatchException(Exception):  # noqa: N818 - the name that programs written for 0.2.2 catch
    """The root of all errors that this package raises."""


class QueueFullException(AsyncBatchException):
    """The queue holds ``max_queue_size`` items and rejected this one.

    Try again later, or shed load.
    """


class ItemTimeoutError(AsyncBatchException, TimeoutError):
    """The item had no result within its ``timeout``, or within ``item_timeout``.

    The message says whether the item was still queued. If so, it was removed: it
    does not run, or not again. It also says how often the item has been tried, if
    that is more than once.
    """


class BatcherStoppedError(AsyncBatchException, RuntimeError):
    """The batcher was stopped before the call, or before the item's batch ended."""


class SerializationError(AsyncBatchException, TypeError):
    """The function, an item or a result cannot be pickled or unpickled.

    The message names the part that cannot be pickled.
    """


class BadResultError(AsyncBatchException, ValueError):
    """``process_batch`` returned something other than one result per item."""


class BatchError(AsyncBatchException):
    """``process_batch`` raised what cannot be raised in the caller as itself.

    ``SystemExit``, ``KeyboardInterrupt``, ``GeneratorExit``, ``StopIteration`` and
    ``CancelledError`` have another meaning for an event loop. An exception in a worker process
    cannot leave it if neither pickle nor its class, args and state can reproduce it. The message
    has the text of the original exception.

    Attributes:
        original_type: The qualified name of the type that was raised, such as
            ``"builtins.SystemExit"``.
    """

    def __init__(self, message: str, *, original_type: str = "") -> None:
        """Create an error with a message and the qualified name of the original type."""
        super().__init__(message)
        self.original_type = original_type


class BatchTimeoutError(AsyncBatchException, TimeoutError):
    """A batch ran for longer than ``batch_timeout``, or such batches hold all slots.

    A `WorkerPool` interrupts the batch, and kills its worker process 0.5 seconds later; a coroutine
    is cancelled. A call in a thread or in a standard pool cannot be stopped: it runs on, and its
    results are discarded.
    """


class WorkerDiedError(AsyncBatchException):
    """A worker process ended while it had the batch, or none could be started for it.

    Attributes:
        pid: The process id of the worker; None if it may be one of several.
        exit_code: The exit code of the worker, or minus the number of the signal that killed it;
            None if unknown.
        may_have_run: Whether the batch may have run, in whole or in part, before the worker ended.
    """

    def __init__(
        self,
        message: str,
        *,
        pid: int | None = None,
        exit_code: int | None = None,
        may_have_run: bool = True,
    ) -> None:
        """Create an error with a message and the known facts about the worker."""
        super().__init__(message)
        self.pid = pid
        self.exit_code = exit_code
        self.may_have_run = may_have_run


class PoolBrokenError(AsyncBatchException):
    """The pool or executor cannot run anything.

    No worker can be started, the executor is broken or shut down, or its factory failed. The
    message says what to do.
    """
