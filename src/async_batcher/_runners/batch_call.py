"""One batch on its way through an executor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from async_batcher._runners.base import BatchNotStartedError

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable
    from contextvars import Context

    from async_batcher._pool.pickled_function import PickledFunction
    from async_batcher._pool.work_item import BatchRequest
    from async_batcher._runners.base import HasCallers, OnDone, OnTimeout
    from async_batcher._runners.slots import Slots
    from async_batcher._worker.results import Outcome


class LocalOutcome:
    """The outcome of a call that ran in this process."""

    __slots__ = ("outcome",)

    def __init__(self, outcome: Outcome) -> None:
        self.outcome: Outcome | None = outcome

    def get(self) -> Outcome | None:
        """Return it once: the executor's future may be part of a cycle, and must not keep it."""
        outcome, self.outcome = self.outcome, None
        return outcome


class BatchCall:
    """The callable that is submitted for one batch. Pickled, it becomes a `run_batch.RemoteCall`.

    Args:
        slots: Where the batch runs in this process.
        pickled_function: Returns the function for a call that is pickled.
        context: What the batch runs in, in this process.
        batch: The items. None: set up only.
        has_callers: Asked when the batch starts in this process. False: it is not run.

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
        self._slots = slots
        self._pickled_function = pickled_function
        self._context = context
        self._batch = batch
        self._has_callers = has_callers
        self._request: BatchRequest | None = None
        self.on_done = on_done
        self.on_timeout = on_timeout
        self.on_start: Callable[[], object] | None = None
        self.submitted = False
        self.timer: asyncio.TimerHandle | None = None

    def __call__(self) -> LocalOutcome:
        # It refers to the callers, thus to what is raised there, whose traceback leads here.
        has_callers, self._has_callers = self._has_callers, None
        if has_callers is not None and not has_callers():
            return LocalOutcome(BatchNotStartedError())
        del has_callers
        return LocalOutcome(self._context.run(self._slots.run, self._batch, self.on_start))

    def __reduce__(self) -> tuple[Any, ...]:
        request = self.request()
        if self.on_start is not None and request.carries_items:
            self.on_start()
        return request.job().__reduce__()

    def request(self) -> BatchRequest:
        """Return the batch as it is sent to a worker; the first call pickles it."""
        if self._request is None:
            from async_batcher._pool.work_item import BatchRequest

            self._request = BatchRequest(self._pickled_function(), self._batch)
        return self._request

    def read(self, reply: Any) -> Outcome | None:
        """Return the outcome. None: submit again, with what the worker lacked."""
        if isinstance(reply, LocalOutcome):
            return reply.get()
        return self.request().decode_reply(reply)
