"""A batcher's `stats` as Prometheus metrics; needs the extra ``[prometheus]``.

::

    from prometheus_client import REGISTRY
    from async_batcher.integrations.prometheus import BatcherCollector

    REGISTRY.register(BatcherCollector(batcher, "tokenize"))

The metrics are read from the batcher when they are scraped; nothing is counted twice.
"""

from __future__ import annotations

import weakref
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from async_batcher.batcher import AsyncBatcher

try:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
    from prometheus_client.registry import Collector
except ImportError as exc:
    msg = (
        "async_batcher.integrations.prometheus needs prometheus_client: "
        "pip install 'async-batcher[prometheus]'"
    )
    raise ImportError(msg) from exc

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from prometheus_client.core import Metric

__all__ = ["BatcherCollector"]


class BatcherCollector(Collector):
    """Exports one batcher to a registry of prometheus_client.

    ===============================================  =======  ======================================
    metric                                           kind     meaning
    ===============================================  =======  ======================================
    ``async_batcher_pending_items{state=}``          gauge    items ``queued``, ``running`` or
                                                              ``blocked``
    ``async_batcher_items_total{outcome=}``          counter  items ``done``, ``failed``,
                                                              ``cancelled``, ``timed_out``,
                                                              ``rejected``
    ``async_batcher_batches_total{reason=}``         counter  batches by why they left the queue:
                                                              ``full``, ``timeout``, ...
    ``async_batcher_batch_items{quantile=}``         gauge    items in a batch
    ``async_batcher_queue_wait_seconds{quantile=}``  gauge    seconds that items waited in the queue
    ``async_batcher_batch_run_seconds{quantile=}``   gauge    seconds that batches ran
    ``async_batcher_workers_started_total``          counter  worker processes that were started
    ``async_batcher_workers_crashed_total{cause=}``  counter  worker processes that crashed
    ``async_batcher_workers_recycled_total``         counter  worker processes that were recycled
    ===============================================  =======  ======================================

    Each metric also has the label ``batcher``. Quantiles are those of the last batches. See
    `stats.Stats` for exact definitions.

    Args:
        batcher: The batcher. The collector does not keep it alive; without it there are no metrics.
        name: The value of the label ``batcher``, unique in the registry.
    """

    def __init__(self, batcher: AsyncBatcher[Any, Any], name: str) -> None:
        """Read nothing before the first scrape."""
        self._batcher = weakref.ref(batcher)
        self._name = name

    def describe(self) -> list[Metric]:
        """Return no names, so that collectors of several batchers can share a registry."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yield the current metrics; none if the batcher no longer exists."""
        batcher = self._batcher()
        if batcher is None:
            return
        stats, family = AsyncBatcher.stats(batcher), self._family
        gauge, counter = GaugeMetricFamily, CounterMetricFamily
        states = {name: getattr(stats, name) for name in ("queued", "running", "blocked")}
        yield family(gauge, "pending_items", "Items that a caller waits for.", states, "state")
        names = ("done", "failed", "cancelled", "timed_out", "rejected")
        outcomes = {name: getattr(stats, name) for name in names}
        yield family(counter, "items", "Items by outcome.", outcomes, "outcome")
        text, reasons = "Batches by why they left the queue.", asdict(stats.batches)
        yield family(counter, "batches", text, reasons, "reason")
        for name, text, sample in (
            ("batch_items", "Items in a batch.", stats.sizes),
            ("queue_wait_seconds", "Seconds that items waited in the queue.", stats.queue_waits),
            ("batch_run_seconds", "Seconds from dispatch to the end of a batch.", stats.run_times),
        ):
            quantiles = {"0.5": sample.p50, "0.95": sample.p95, "0.99": sample.p99}
            yield family(gauge, name, text, quantiles, "quantile")
        started, recycled = {"": stats.workers.started}, {"": stats.workers.recycled}
        yield family(counter, "workers_started", "Worker processes that were started.", started)
        text = "Worker processes that crashed."
        yield family(counter, "workers_crashed", text, stats.workers.crashed, "cause")
        yield family(counter, "workers_recycled", "Worker processes that were recycled.", recycled)

    def _family(
        self, kind: Any, name: str, text: str, values: Mapping[str, float], label: str = ""
    ) -> Metric:
        labels = ["batcher", label] if label else ["batcher"]
        family = kind(f"async_batcher_{name}", text, labels=labels)
        for value, number in values.items():
            family.add_metric([self._name, value] if label else [self._name], number)
        return family  # type: ignore[no-any-return]  # kind is one of two classes
