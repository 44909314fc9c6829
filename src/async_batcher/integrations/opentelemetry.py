"""A span of OpenTelemetry for each batch, linked to the spans of its callers; needs the extra ``[opentelemetry]``.

`AsyncBatcher` with ``trace=True`` does it; nothing here is called by users.
"""

from __future__ import annotations

import logging
import weakref
from typing import TYPE_CHECKING, Any

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
        name: What its spans are called.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._tracer = trace.get_tracer("async_batcher")
        self._error_logged = False
        self._callers: weakref.WeakKeyDictionary[Any, SpanContext] = weakref.WeakKeyDictionary()

    def link_caller(self, future: Any) -> None:
        """Somebody waits for that future, or bulk: note the span that he is in."""
        context = trace.get_current_span().get_span_context()
        if context.is_valid:
            self._callers[future] = context

    def start_span(self, reason: Reason, size: int, futures: list[Any]) -> Span | None:
        """A batch of so many items begins, for those who wait for these futures; None if no span could be made."""
        links = [trace.Link(context) for future in futures if (context := self._callers.get(future)) is not None]
        attributes = {"async_batcher.batch.size": size, "async_batcher.batch.reason": reason}
        try:
            return self._tracer.start_span(self._name, links=links, attributes=attributes)
        except Exception:  # noqa: BLE001 - of a sampler or a processor; a batch is not to be lost for it
            self._log_once()
            return None

    def end_span(self, span: Span | None, error: BaseException | None) -> None:
        """The batch has ended, with that exception if it failed as a whole."""
        if span is None:
            return
        try:
            if error is not None:
                span.record_exception(error)
                span.set_status(trace.Status(trace.StatusCode.ERROR, type(error).__name__))
            span.end()
        except Exception:  # noqa: BLE001 - as above
            self._log_once()

    def _log_once(self) -> None:
        if not self._error_logged:
            self._error_logged = True
            logger.exception("a span could not be made or ended; whatever else goes wrong with spans is not logged")
