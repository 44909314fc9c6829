"""Metrics of batchers for Prometheus; needs the extra ``[prometheus]``.

::

    from async_batcher.integrations.prometheus import export_metrics

    tokenize = batched(tokenize_batch, name="tokenize")
    export_metrics(tokenize)

================================================  =========  =====================================
metric                                            kind       meaning
================================================  =========  =====================================
``async_batcher_pending_items{state=}``           gauge      items ``queued``, ``running`` or
                                                             ``blocked`` (the caller waits for
                                                             capacity in the queue)
``async_batcher_items_total{outcome=}``           counter    items ``done``, ``failed``,
                                                             ``cancelled``, ``timed_out`` or
                                                             ``rejected``
``async_batcher_items_retried_total``             counter    how often items went back into the
                                                             queue
``async_batcher_items_rate_limited_total``        counter    items in batches that a ``rate`` has
                                                             held back
``async_batcher_batches_total{reason=}``          counter    batches by why they left the queue:
                                                             ``full``, ``timeout`` (its
                                                             ``max_queue_time`` was over), ...
``async_batcher_batch_items``                     histogram  items per batch
``async_batcher_queue_wait_seconds``              histogram  seconds that items waited, in the
                                                             queue or for a worker; at most 16
                                                             items of each batch
``async_batcher_batch_run_seconds``               histogram  seconds that batches ran
``async_batcher_workers_started_total``           counter    worker processes that were started
``async_batcher_workers_crashed_total{cause=}``   counter    worker processes that crashed
``async_batcher_workers_recycled_total``          counter    worker processes that were recycled
================================================  =========  =====================================

Each metric also has the label ``batcher``: the batcher's option ``name``, or the name of its
function or class. Batchers of the same name are added up. `stats.Stats` has the exact definitions.

All metrics are objects of prometheus_client, so its multi-process mode works: with the environment
variable ``PROMETHEUS_MULTIPROC_DIR``, a ``MultiProcessCollector`` in any process gives the sums
over all processes. The gauge counts processes that are alive: call
``prometheus_client.multiprocess.mark_process_dead(os.getpid())`` when a process ends.

Histograms and counters are up to date when a batch has ended. While batches run, and while an
executor is being made, all metrics are brought up to date once a second. The counters of worker
processes are those of the `WorkerPool`: batchers of different names that share it show the same
numbers.
"""

from __future__ import annotations

import logging
import threading
import weakref
from contextvars import Context
from typing import TYPE_CHECKING, Any

from async_batcher._batching.instance import LIFECYCLE_ATTR
from async_batcher._pool.checks import is_worker_pool
from async_batcher._serialization.exception_text import one_line

try:
    from prometheus_client import REGISTRY, Counter, Gauge, Histogram
except ImportError as exc:
    msg = (
        "async_batcher.integrations.prometheus needs prometheus_client: "
        "pip install 'async-batcher[prometheus]'"
    )
    raise ImportError(msg) from exc

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable
    from typing import TypeAlias

    from prometheus_client import CollectorRegistry

    from async_batcher._batching.lifecycle import BatcherLifecycle
    from async_batcher._batching.scheduler import Scheduler
    from async_batcher.batcher import AsyncBatcher

    _Exported: TypeAlias = dict[tuple[Counter | Gauge, str], float]

__all__ = ["export_metrics"]

logger = logging.getLogger("async_batcher")

UPDATE_SECONDS = 1.0  # well below the usual scrape interval of 15

_BATCH_ITEMS = [2**power for power in range(13)]  # 1 to 4,096
_SECONDS = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60]


def export_metrics(
    batcher: AsyncBatcher[Any, Any], *, registry: CollectorRegistry = REGISTRY
) -> None:
    """Export the metrics of a batcher, with what it has counted so far.

    Call it once for each batcher, in the thread of its event loop.

    Args:
        batcher: The batcher. The metrics do not keep it alive, and outlive it.
        registry: The registry that has the metrics; that of the first call for the batcher counts.
    """
    lifecycle: BatcherLifecycle = getattr(batcher, LIFECYCLE_ATTR)
    if not isinstance(lifecycle.recorder.exporter, _Exporter):
        with _metrics_lock:  # other threads may have batchers, too
            metrics = _metrics.get(registry)
            if metrics is None:
                metrics = _metrics[registry] = _Metrics(registry)
        exporter = _Exporter(lifecycle, metrics, lifecycle.display_name(batcher))
        lifecycle.recorder.exporter = exporter
        exporter.update()
        if lifecycle.session is not None:
            exporter.session_started(lifecycle.session)


class _Metrics:
    """The metrics of all batchers in one registry."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def make(kind: Any, name: str, text: str, label: str = "", **options: Any) -> Any:
            labels = ["batcher", label] if label else ["batcher"]
            return kind(f"async_batcher_{name}", text, labels, registry=registry, **options)

        self.pending_items: Gauge = make(
            Gauge,
            "pending_items",
            "Items that a caller waits for.",
            "state",
            multiprocess_mode="livesum",
        )
        self.items: Counter = make(Counter, "items", "Items by outcome.", "outcome")
        text = "How often items went back into the queue."
        self.retried: Counter = make(Counter, "items_retried", text)
        text = "Items in batches that a rate has held back."
        self.rate_limited: Counter = make(Counter, "items_rate_limited", text)
        self.batches: Counter = make(
            Counter,
            "batches",
            "Batches by why they left the queue; timeout: max_queue_time has passed.",
            "reason",
        )
        self.batch_items: Histogram = make(
            Histogram, "batch_items", "Items per batch.", buckets=_BATCH_ITEMS
        )
        text = "Seconds that items waited, in the queue or for a worker; at most 16 of each batch."
        self.queue_wait: Histogram = make(Histogram, "queue_wait_seconds", text, buckets=_SECONDS)
        text = "Seconds that batches ran."
        self.batch_run: Histogram = make(Histogram, "batch_run_seconds", text, buckets=_SECONDS)
        text = "Worker processes that were started."
        self.workers_started: Counter = make(Counter, "workers_started", text)
        text = "Worker processes that crashed."
        self.workers_crashed: Counter = make(Counter, "workers_crashed", text, "cause")
        text = "Worker processes that were recycled."
        self.workers_recycled: Counter = make(Counter, "workers_recycled", text)
        # What was exported of pools that the user made, by name: batchers may share one.
        self.exported_of_pools: weakref.WeakKeyDictionary[Any, dict[str, _Exported]] = (
            weakref.WeakKeyDictionary()
        )


_metrics: weakref.WeakKeyDictionary[CollectorRegistry, _Metrics] = weakref.WeakKeyDictionary()
_metrics_lock = threading.Lock()


class _Exporter:
    """Adds what one batcher counts to the metrics; see `StatsExporter`.

    Metrics grow by what was counted since the last update, so that batchers of one name add up.
    """

    def __init__(self, lifecycle: BatcherLifecycle, metrics: _Metrics, name: str) -> None:
        self._lifecycle = weakref.ref(lifecycle)
        self._metrics = metrics
        self._name = name
        self._batch_items = metrics.batch_items.labels(name)
        self._queue_wait = metrics.queue_wait.labels(name)
        self._batch_run = metrics.batch_run.labels(name)
        self._exported: _Exported = {}
        self._exported_workers: _Exported = {}
        self._worker_session: Callable[[], Scheduler | None] = lambda: None
        self._timer_loop: asyncio.AbstractEventLoop | None = None  # None: no timer is armed
        self._error_logged = False

    def session_started(self, session: Scheduler) -> None:
        """Arm the timer.

        The values of another process cannot be computed when they are scraped, and no batch ends
        while all hang, or while an executor is being made, so only a timer can show that.
        """
        if session.loop is not self._timer_loop:  # the timer of a loop that was closed never fires
            self._timer_loop = session.loop
            session.loop.call_later(UPDATE_SECONDS, self._on_timer, context=Context())

    def batch_started(self) -> None:
        session = self._session()
        if session is not None:
            self.session_started(session)

    def batch_finished(self, size: int, waits: list[float], run_time: float | None) -> None:
        try:
            self._batch_items.observe(size)
            for seconds in waits:
                self._queue_wait.observe(seconds)
            if run_time is not None:
                self._batch_run.observe(run_time)
        except Exception as exc:  # noqa: BLE001 - of a full disk, for one; the batcher goes on
            self._log_once(exc)
        session = self._session()
        # To count the items of running batches takes time, so that is left to the timer.
        self.update(with_pending=session is None or not session.inflight)

    def update(self, *, with_pending: bool = True) -> None:
        """Bring counters, and the gauge, up to date."""
        try:
            if with_pending:
                self._update_pending()
            self._update_counters()
        except Exception as exc:  # noqa: BLE001 - as in `batch_finished`
            self._log_once(exc)

    def _on_timer(self) -> None:
        self._timer_loop = None
        self.update()
        session = self._session()
        if session is not None and any(session.pending().values()):
            self.session_started(session)

    def _session(self) -> Scheduler | None:
        lifecycle = self._lifecycle()
        return None if lifecycle is None else lifecycle.session

    def _update_pending(self) -> None:
        session = self._session()
        pending = {} if session is None else session.pending()
        for state in ("queued", "running", "blocked"):
            self._export(self._metrics.pending_items, pending.get(state, 0), state)

    def _update_counters(self) -> None:
        lifecycle, metrics = self._lifecycle(), self._metrics
        if lifecycle is None:
            return
        recorder, session = lifecycle.recorder, lifecycle.session
        for outcome in ("done", "failed", "cancelled", "timed_out", "rejected"):
            self._export(metrics.items, getattr(recorder, outcome), outcome)
        self._export(metrics.retried, recorder.retried)
        self._export(metrics.rate_limited, recorder.rate_limited)
        for reason, count in recorder.reasons.items():
            self._export(metrics.batches, count, reason)
        if session is not None:
            self._update_workers(session, lifecycle.options.executor)

    def _update_workers(self, session: Scheduler, executor: object) -> None:
        workers, metrics = session.inflight.runner.workers(), self._metrics
        if workers is None:
            return
        if is_worker_pool(executor):
            of_names = metrics.exported_of_pools.setdefault(executor, {})
            self._exported_workers = of_names.setdefault(self._name, {})
        elif self._worker_session() is not session:  # it has made a new pool, which counts from 0
            self._worker_session = weakref.ref(session)
            self._exported_workers = {}
        exported = self._exported_workers
        self._export(metrics.workers_started, workers.started, exported=exported)
        self._export(metrics.workers_recycled, workers.recycled, exported=exported)
        for cause, count in workers.crashed.items():
            self._export(metrics.workers_crashed, count, cause, exported=exported)

    def _export(
        self,
        metric: Counter | Gauge,
        value: float,
        label: str = "",
        *,
        exported: _Exported | None = None,
    ) -> None:
        """Add what a value has grown by since the last time."""
        if exported is None:
            exported = self._exported
        before = exported.get((metric, label))
        if value == before:
            return
        # This makes the time series, so a counter is there before it counts anything.
        series = metric.labels(self._name, label) if label else metric.labels(self._name)
        growth = value - (before or 0)
        if growth < 0 and isinstance(metric, Counter):  # a factory has made another pool
            growth = value
        series.inc(growth)
        exported[metric, label] = value

    def _log_once(self, error: Exception) -> None:
        if not self._error_logged:
            self._error_logged = True
            msg = "%s: metrics could not be updated (further errors are not logged): %s"
            logger.error(msg, self._name, one_line(error), exc_info=error)
