"""An OpenTelemetry span for each batch, linked to the spans of its callers.

::

    @batched(on_batch=BatchTracer())

It needs the extra ``[opentelemetry]``.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

try:
    from opentelemetry import trace
except ImportError as exc:
    msg = "BatchTracer needs opentelemetry-api: pip install 'async-batcher[opentelemetry]'"
    raise ImportError(msg) from exc

from async_batcher._worker.results import BatchRecalledError
from async_batcher.failures import Later

if TYPE_CHECKING:
    from opentelemetry.trace import Span, SpanContext

    from async_batcher.stats import BatchRecord, BatchStart

__all__ = ["BatchTracer"]


class BatchTracer:
    """Makes a span for each batch, for ``on_batch``; several batchers may share it.

    A span has the name ``"batch of"`` and the name of the batcher, the attributes
    ``async_batcher.batch.size`` and ``async_batcher.batch.reason``, and a link to each span that
    was current when an item of the batch was enqueued. The exception that a whole batch ends with
    is recorded, and makes the status of its span an error, unless it has only put items off.
    """

    def __init__(self) -> None:
        """Use the global tracer provider, also if it is set later."""
        self._tracer = trace.get_tracer("async_batcher")
        self._spans: dict[int, Span] = {}

    def _for_batcher(self) -> BatchTracer:
        """Return a tracer for one batcher: several may have the same name and numbers."""
        tracer = copy.copy(self)
        tracer._spans = {}  # noqa: SLF001 - of this class
        return tracer

    def enqueued(self) -> SpanContext | None:
        """Return the context of the span that the caller is in, or None."""
        context = trace.get_current_span().get_span_context()
        return context if context.is_valid else None

    def started(self, batch: BatchStart) -> None:
        """Start the span of a batch."""
        self._spans[batch.number] = self._tracer.start_span(
            f"batch of {batch.batcher}",
            links=[trace.Link(context) for context in batch.captured],
            attributes={
                "async_batcher.batch.size": batch.size,
                "async_batcher.batch.reason": batch.reason,
            },
        )

    def finished(self, record: BatchRecord) -> None:
        """End the span of a batch."""
        span = self._spans.pop(record.number, None)
        if span is None:  # it could not be started
            return
        if record.exception is not None:
            span.record_exception(record.exception)
            puts_off = isinstance(record.exception, Later | BatchRecalledError)
            if record.failed or not puts_off:
                name = type(record.exception).__name__
                span.set_status(trace.Status(trace.StatusCode.ERROR, name))
        span.end()
