"""One batch on its way through an executor.

::

    BatchCall --called in this process------> ResultBuffer, for yielded results; LocalOutcome
        `----pickled--> BatchRequest --to_remote_call--> RemoteCall, which the worker calls
"""

from __future__ import annotations

import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from async_batcher._runners.base import RunningBatch
from async_batcher._worker.results import BatchNotStartedError

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable
    from contextvars import Context

    from async_batcher._pool.pickled_function import PickledFunction
    from async_batcher._runners.base import HasCallers, OnDone, OnResults, OnTimeout
    from async_batcher._runners.batch_request import BatchRequest
    from async_batcher._runners.slots import Slots
    from async_batcher._worker.results import Outcome
    from async_batcher.current import BatchFacts


# Seconds between wake-ups of the loop for the results of one batch. A wake-up costs some 20 us in
# both threads, and callers hardly notice a millisecond.
_FLUSH_INTERVAL = 0.001


class LocalOutcome(list[Any]):
    """The outcome of a call that ran in this process, as its one element.

    It is popped: the executor's future may be part of a cycle, and must not keep it.
    """


class ResultBuffer:
    """Results of a batch that runs in a thread, on their way to the event loop.

    The first one wakes the loop. It then looks for more at intervals, until none has come.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, on_results: OnResults) -> None:
        self._loop = loop
        self._on_results = on_results
        self._lock = threading.Lock()
        self._results: list[Any] = []
        self._wakes_up = False  # whether the loop will take them
        self._timer: asyncio.TimerHandle | None = None

    def put(self, result: Any) -> None:
        """Add a result, in any thread."""
        with self._lock:
            self._results.append(result)
            wakes_up, self._wakes_up = self._wakes_up, True
        if not wakes_up:
            with suppress(RuntimeError):  # the loop has closed: no caller is left
                self._loop.call_soon_threadsafe(self.flush)

    def flush(self) -> None:
        """Deliver what has come, on the loop's thread, and again later."""
        if self._deliver():
            self._timer = self._loop.call_later(_FLUSH_INTERVAL, self.flush)

    def close(self) -> None:
        """Deliver what has come, which is all."""
        if self._timer is not None:
            self._timer.cancel()
        self._deliver()

    def _deliver(self) -> bool:
        with self._lock:
            results, self._results = self._results, []
            self._wakes_up = bool(results)
        if results:
            self._on_results(results)
        return bool(results)


class BatchCall(RunningBatch):
    """The callable that is submitted for one batch. Pickled, it becomes a `run_batch.RemoteCall`.

    Args:
        loop: The batcher's.
        slots: Where the batch runs in this process.
        pickled_function: Returns the function for a call that is pickled.
        context: What the batch runs in, in this process.
        batch: The items. None: set up only.
        facts: See `Runner.submit`, as for the callbacks.

    Attributes:
        on_start: Called, in any thread, when the batch starts or is sent to a free worker.
        submitted: Whether the executor has it; set in any thread.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        slots: Slots,
        pickled_function: Callable[[], PickledFunction],
        context: Context,
        batch: list[Any] | None,
        on_done: OnDone,
        on_timeout: OnTimeout | None,
        has_callers: HasCallers | None,
        on_results: OnResults | None,
        facts: BatchFacts | None = None,
    ) -> None:
        super().__init__(on_done, on_timeout, has_callers, on_results)
        self._loop = loop
        self._slots = slots
        self._pickled_function = pickled_function
        self._context = context
        self._batch = batch
        self._facts = facts
        self._request: BatchRequest | None = None
        self._buffer: ResultBuffer | None = None
        self.on_start: Callable[[], object] | None = None
        self.submitted = False

    def __call__(self) -> LocalOutcome:
        if not self.is_wanted():
            return LocalOutcome([BatchNotStartedError()])
        arguments = (self._batch, self.on_start, self.take, self._facts)
        return LocalOutcome([self._context.run(self._slots.run, *arguments)])

    def _pass_on(self, on_results: OnResults, result: Any) -> None:
        if self._buffer is None:
            self._buffer = ResultBuffer(self._loop, on_results)
        self._buffer.put(result)

    def finish(self, outcome: Outcome) -> None:
        if self._buffer is not None:
            self._buffer.close()
        super().finish(outcome)

    def __reduce__(self) -> tuple[Any, ...]:
        request = self.request()
        if self.on_start is not None and request.carries_items:
            self.on_start()
        return request.to_remote_call().__reduce__()

    def request(self) -> BatchRequest:
        """Return the batch as it is sent to a worker; the first call pickles it."""
        if self._request is None:
            from async_batcher._runners.batch_request import BatchRequest

            self._request = BatchRequest(self._pickled_function(), self._batch, self._facts)
        return self._request

    def read(self, reply: Any) -> Outcome | None:
        """Return the outcome. None: submit again, with what the worker lacked."""
        if isinstance(reply, LocalOutcome):
            return reply.pop()  # type: ignore[no-any-return]
        return self.request().decode_reply(reply)
