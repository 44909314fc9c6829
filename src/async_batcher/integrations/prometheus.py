"""A batcher's `stats` as metrics of Prometheus; needs the extra ``[prometheus]``.

::

    from prometheus_client import REGISTRY
    from async_batcher.integrations.prometheus import BatcherCollector

    REGISTRY.register(BatcherCollector(batcher, "tokenize"))

Nothing is counted twice: the metrics are read from the batcher when they are scraped.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from async_batcher.batcher import AsyncBatcher

try:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
    from prometheus_client.registry import Collector
except ImportError as exc:
    msg = "async_batcher.integrations.prometheus needs prometheus_client: pip install 'async-batcher[prometheus]'"
    raise ImportError(msg) from exc

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prometheus_client.core import Metric

    from async_batcher.stats import Quantiles

__all__ = ["BatcherCollector"]


class BatcherCollector(Collector):
    """Shows one batcher to a registry of prometheus_client.

    ==============================================  =========  ================================================================
    metric                                          kind       meaning
    ==============================================  =========  ================================================================
    ``async_batcher_pending_items{state=}``         gauge      items ``queued``, ``running``, or ``blocked``
    ``async_batcher_items_total{outcome=}``         counter    items ``done``, ``failed``, ``cancelled``, ``timed_out``, ...
    ``async_batcher_batches_total{reason=}``        counter    batches by why they left: ``full``, ``timeout``, ...
    ``async_batcher_batch_items{quantile=}``        gauge      items in a batch, of the last batches
    ``async_batcher_queue_wait_seconds{quantile=}`` gauge      seconds that items waited in the queue, of the last batches
    ``async_batcher_batch_run_seconds{quantile=}``  gauge      seconds that batches ran, of the last ones
    ``async_batcher_worker_starts_total``           counter    worker processes that were started
    ``async_batcher_worker_deaths_total{cause=}``   counter    worker processes that died
    ``async_batcher_worker_replacements_total``     counter    worker processes that were replaced as planned
    ==============================================  =========  ================================================================

    Each has the label ``batcher`` too. See `stats.Stats` for what they mean.

    Args:
        batcher: Whose figures they are. It is not kept alive; when it has gone, there are no metrics.
        name: The label ``batcher``, by which it is told from others in the same registry.
    """

    def __init__(self, batcher: AsyncBatcher[Any, Any], name: str) -> None:
        """Nothing is read before the first scrape."""
        self._batcher = weakref.ref(batcher)
        self._name = name

    def describe(self) -> list[Metric]:
        """Nothing ahead, so that collectors of several batchers can be registered side by side."""
        return []

    def collect(self) -> Iterator[Metric]:
        """The metrics, as they are now."""
        batcher = self._batcher()
        if batcher is None:
            return
        stats = AsyncBatcher.stats(batcher)
        now = self._gauge("pending_items", "Items that a caller waits for.", "state")
        for state in ("queued", "running", "blocked"):
            now.add_metric([self._name, state], getattr(stats, state))
        yield now
        items = self._counter("items", "Items by what became of them.", "outcome")
        for outcome in ("done", "failed", "cancelled", "timed_out", "rejected"):
            items.add_metric([self._name, outcome], getattr(stats, outcome))
        yield items
        batches = self._counter("batches", "Batches by the reason for which they left the queue.", "reason")
        for reason in ("full", "timeout", "slot_available", "drain", "isolation"):
            batches.add_metric([self._name, reason], getattr(stats.batches, reason))
        yield batches
        yield self._quantiles("batch_items", "Items in a batch, of the last batches.", stats.sizes)
        yield self._quantiles("queue_wait_seconds", "Seconds that items waited in the queue.", stats.queue_waits)
        yield self._quantiles(
            "batch_run_seconds", "Seconds from when a batch left the queue until it had ended.", stats.run_times
        )
        starts = self._counter("workers_started", "Worker processes that were started.")
        starts.add_metric([self._name], stats.workers.started)
        yield starts
        deaths = self._counter("workers_crashed", "Worker processes that died, by cause.", "cause")
        for cause, count in stats.workers.crashed.items():
            deaths.add_metric([self._name, cause], count)
        yield deaths
        replacements = self._counter("workers_recycled", "Worker processes that were replaced as planned.")
        replacements.add_metric([self._name], stats.workers.recycled)
        yield replacements

    def _gauge(self, name: str, text: str, *labels: str) -> GaugeMetricFamily:
        return GaugeMetricFamily(f"async_batcher_{name}", text, labels=["batcher", *labels])

    def _counter(self, name: str, text: str, *labels: str) -> CounterMetricFamily:
        return CounterMetricFamily(f"async_batcher_{name}", text, labels=["batcher", *labels])

    def _quantiles(self, name: str, text: str, quantiles: Quantiles) -> GaugeMetricFamily:
        family = self._gauge(name, text, "quantile")
        for label, value in (("0.5", quantiles.p50), ("0.95", quantiles.p95), ("0.99", quantiles.p99)):
            family.add_metric([self._name, label], value)
        return family
