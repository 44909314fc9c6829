"""What can go wrong, and whose fault it is.

::

    AsyncBatchException                   everything below
    |
    |  the caller's side
    |-- QueueFullException                max_queue_size items already wait
    |-- ItemTimeoutError                  no result within the item's own timeout             (also TimeoutError)
    |-- BatcherStoppedError               stopped, or stopped before the item's batch ended   (also RuntimeError)
    |-- SerializationError                something that must cross to a worker cannot        (also TypeError)
    |
    |  process_batch's side
    |-- BadResultError                    not one result per item                             (also ValueError)
    |-- BatchError                        raised what controls the program's flow, or cannot be carried
    |-- BatchTimeoutError                 ran for longer than batch_timeout                   (also TimeoutError)
    |
    |  the workers' side
    |-- WorkerDiedError                   a worker process ended while it had the batch
    `-- PoolBrokenError                   the pool or the executor can run nothing, or none can be made

Anything else that a caller sees is what ``process_batch`` raised. A caller that is alone gets the object
itself, which is left as it is. Each of several gets a copy with the type, args, text, attributes, notes,
traceback and causes of the original. A note on the copy names the item's place in the batch, the function and
the worker process. What comes out of a worker process is a copy too; the traceback there is the cause of the
last exception in its chain of causes.

Every class here can be pickled.
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
    """The root of every error that this package makes."""


class QueueFullException(AsyncBatchException):
    """The queue holds ``max_queue_size`` items; this one was not taken. Try again later, or shed load."""


class ItemTimeoutError(AsyncBatchException, TimeoutError):
    """The item had no result within its ``timeout``, or within ``item_timeout``.

    One that was still queued has left the queue and is never run; the message says so.
    """


class BatcherStoppedError(AsyncBatchException, RuntimeError):
    """The batcher has been stopped, or was stopped before the item's batch had ended."""


class SerializationError(AsyncBatchException, TypeError):
    """The function, an item or a result cannot be pickled here or unpickled there; the message says which part."""


class BadResultError(AsyncBatchException, ValueError):
    """``process_batch`` returned something other than one result per item."""


class BatchError(AsyncBatchException):
    """``process_batch`` raised something that cannot be raised as itself in the caller.

    ``SystemExit``, ``KeyboardInterrupt``, ``GeneratorExit``, ``StopIteration`` and ``CancelledError`` mean something else to
    an event loop. An exception in a worker process stays there if it can be carried neither by pickle nor by its class, args and
    state. The message has its text.

    Attributes:
        original_type: The qualified name of what was raised, ``"builtins.SystemExit"`` for example.
    """

    def __init__(self, message: str, *, original_type: str = "") -> None:
        """Keep the name of what was raised."""
        super().__init__(message)
        self.original_type = original_type


class BatchTimeoutError(AsyncBatchException, TimeoutError):
    """A batch ran for longer than its timeout allows, or every slot is taken by batches that did.

    The worker process of a `WorkerPool` that ran it has been ended; a coroutine has been cancelled; a call in a thread or in a
    standard pool cannot be ended, and runs on unseen.
    """


class WorkerDiedError(AsyncBatchException):
    """A worker process ended while it had the batch.

    Attributes:
        pid: The process id of the worker that died; None when several may be meant.
        exit_code: Its exit code; negative: the number of the signal that ended it; None when unknown.
        may_have_run: Whether the batch may have run, in whole or in part, before the death.
    """

    def __init__(self, message: str, *, pid: int | None = None, exit_code: int | None = None, may_have_run: bool = True) -> None:
        """Keep what is known of the death."""
        super().__init__(message)
        self.pid = pid
        self.exit_code = exit_code
        self.may_have_run = may_have_run


class PoolBrokenError(AsyncBatchException):
    """No worker can be started, the executor is broken or shut down, or its factory failed; the message says what to do."""
