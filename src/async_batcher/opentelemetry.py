"""A span of OpenTelemetry for each batch, linked to the spans of its callers; needs the extra ``[opentelemetry]``.

`AsyncBatcher` with ``trace=True`` does it; nothing here is called by users.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

try:
    from opentelemetry import trace
except ImportError as exc:
    msg = "trace=True needs opentelemetry-api: pip install 'async-batcher[opentelemetry]'"
    raise ImportError(msg) from exc

if TYPE_CHECKING:
    from collections.abc import Iterable

    from opentelemetry.trace import Span, SpanContext

    from async_batcher.stats import Reason

__all__: list[str] = []


class BatchTracer:
    """Makes the spans of one batcher.

    Args:
        name: What its spans are called.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._tracer = trace.get_tracer("async_batcher")
        self._callers: weakref.WeakKeyDictionary[Any, SpanContext] = weakref.WeakKeyDictionary()

    def called(self, future: Any) -> None:
        """Somebody waits for that future: note the span that he is in."""
        context = trace.get_current_span().get_span_context()
        if context.is_valid:
            self._callers[future] = context

    def begin(self, reason: Reason, futures: Iterable[Any]) -> Span:
        """A batch begins, for those who wait for these futures."""
        futures = list(futures)
        links = [trace.Link(context) for future in futures if (context := self._callers.get(future)) is not None]
        attributes = {"async_batcher.batch.size": len(futures), "async_batcher.batch.reason": reason}
        return self._tracer.start_span(self._name, links=links, attributes=attributes)

    def end(self, span: Span, error: BaseException | None) -> None:
        """The batch has ended, with that exception if it failed as a whole."""
        if error is not None:
            span.record_exception(error)
            span.set_status(trace.Status(trace.StatusCode.ERROR, type(error).__name__))
        span.end()
