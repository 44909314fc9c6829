"""An OpenTelemetry span for each batch, linked to the spans of its callers.

`AsyncBatcher` uses this module with ``trace=True``, which needs the extra ``[opentelemetry]``.
"""

from __future__ import annotations

import logging
import weakref
from typing import TYPE_CHECKING, Any

from async_batcher._serialization.exception_text import one_line

try:
    from opentelemetry import trace
except ImportError as exc:
    msg = "trace=True needs opentelemetry-api: pip install 'async-batcher[opentelemetry]'"
    raise ImportError(msg) from exc

if TYPE_CHECKING:
    from opentelemetry.trace import Span, SpanContext

    from async_batcher.stats import Reason

__all__: list[str] = []

logger = logging.getLogger("async_batcher")


class BatchTracer:
    """Makes the spans of one batcher.

    Args:
        name: The name of each span.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._tracer = trace.get_tracer("async_batcher")
        self._error_logged = False
        self._callers: weakref.WeakKeyDictionary[Any, SpanContext] = weakref.WeakKeyDictionary()

    def link_caller(self, future: Any) -> None:
        """Record the span that the caller of ``future`` is in."""
        context = trace.get_current_span().get_span_context()
        if context.is_valid:
            self._callers[future] = context

    def start_span(self, reason: Reason, size: int, futures: list[Any]) -> Span | None:
        """Start the span of a batch of ``size`` items; None if it cannot be made."""
        contexts = [self._callers.get(future) for future in futures]
        links = [trace.Link(context) for context in contexts if context is not None]
        attributes = {"async_batcher.batch.size": size, "async_batcher.batch.reason": reason}
        try:
            return self._tracer.start_span(self._name, links=links, attributes=attributes)
        except Exception as exc:  # noqa: BLE001 - of a sampler or processor; the batch must run
            self._log_once(exc)
            return None

    def end_span(self, span: Span | None, error: BaseException | None) -> None:
        """End the span of a batch; ``error`` is what the whole batch raised, or None."""
        if span is None:
            return
        try:
            if error is not None:
                span.record_exception(error)
                span.set_status(trace.Status(trace.StatusCode.ERROR, type(error).__name__))
            span.end()
        except Exception as exc:  # noqa: BLE001 - of a processor; the callers must get their results
            self._log_once(exc)

    def _log_once(self, error: Exception) -> None:
        if not self._error_logged:
            self._error_logged = True
            msg = "The span %r could not be started or ended (further errors are not logged): %s"
            logger.error(msg, self._name, one_line(error), exc_info=error)
