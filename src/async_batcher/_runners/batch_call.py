"""One batch on its way through an executor.

::

    BatchCall --called in this process------> LocalOutcome
        `----pickled--> BatchRequest --to_remote_call--> RemoteCall, which the worker calls
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from async_batcher._runners.base import BatchNotStartedError, RunningBatch

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextvars import Context

    from async_batcher._pool.pickled_function import PickledFunction
    from async_batcher._runners.base import HasCallers, OnDone, OnTimeout
    from async_batcher._runners.batch_request import BatchRequest
    from async_batcher._runners.slots import Slots
    from async_batcher._worker.results import Outcome


class LocalOutcome(list[Any]):
    """The outcome of a call that ran in this process, as its one element.

    It is popped: the executor's future may be part of a cycle, and must not keep it.
    """


class BatchCall(RunningBatch):
    """The callable that is submitted for one batch. Pickled, it becomes a `run_batch.RemoteCall`.

    Args:
        slots: Where the batch runs in this process.
        pickled_function: Returns the function for a call that is pickled.
        context: What the batch runs in, in this process.
        batch: The items. None: set up only.

    Attributes:
        on_start: Called, in any thread, when the batch starts or is sent to a free worker.
        submitted: Whether the executor has it; set in any thread.
    """

    def __init__(
        self,
        slots: Slots,
        pickled_function: Callable[[], PickledFunction],
        context: Context,
        batch: list[Any] | None,
        on_done: OnDone,
        on_timeout: OnTimeout | None,
        has_callers: HasCallers | None,
    ) -> None:
        super().__init__(on_done, on_timeout, has_callers)
        self._slots = slots
        self._pickled_function = pickled_function
        self._context = context
        self._batch = batch
        self._request: BatchRequest | None = None
        self.on_start: Callable[[], object] | None = None
        self.submitted = False

    def __call__(self) -> LocalOutcome:
        if not self.is_wanted():
            return LocalOutcome([BatchNotStartedError()])
        return LocalOutcome([self._context.run(self._slots.run, self._batch, self.on_start)])

    def __reduce__(self) -> tuple[Any, ...]:
        request = self.request()
        if self.on_start is not None and request.carries_items:
            self.on_start()
        return request.to_remote_call().__reduce__()

    def request(self) -> BatchRequest:
        """Return the batch as it is sent to a worker; the first call pickles it."""
        if self._request is None:
            from async_batcher._runners.batch_request import BatchRequest

            self._request = BatchRequest(self._pickled_function(), self._batch)
        return self._request

    def read(self, reply: Any) -> Outcome | None:
        """Return the outcome. None: submit again, with what the worker lacked."""
        if isinstance(reply, LocalOutcome):
            return reply.pop()  # type: ignore[no-any-return]
        return self.request().decode_reply(reply)
