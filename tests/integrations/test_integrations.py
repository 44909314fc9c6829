"""Prometheus metrics and OpenTelemetry spans; each extra is loaded only when it is used."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from async_batcher import AsyncBatcher
from tests.support.polling import turn
from tests.support.virtual_clock import FakeBatcher

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.mark.parametrize(
    ("module", "extra"), [("prometheus", "prometheus"), ("opentelemetry", "opentelemetry")]
)
def test_missing_extra_is_named(module: str, extra: str) -> None:
    """An import without the extra says what to install."""
    blocked = {"prometheus": "prometheus_client", "opentelemetry": "opentelemetry"}[module]
    program = (
        f"import sys; sys.modules[{blocked!r}] = None; import async_batcher.integrations.{module}"
    )
    finished = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert f"pip install 'async-batcher[{extra}]'" in finished.stderr.splitlines()[-1]


def test_extras_are_imported_lazily() -> None:
    """Neither a batcher nor its `stats` imports the extras."""
    program = """
import asyncio, sys
from async_batcher import batched
async def main():
    async def same(batch): return batch
    batcher = batched(same)
    await batcher(1)
    batcher.stats()
    await batcher.stop()
asyncio.run(main())
print([name for name in sys.modules if name.partition(".")[0] in ("prometheus_client", "opentelemetry")])
"""
    finished = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert finished.stdout.strip() == "[]"


# ---- Prometheus


@pytest.mark.virtual_clock
async def test_prometheus_metrics_match_stats() -> None:
    """The metrics show `stats`, and several batchers share one registry."""
    client = pytest.importorskip("prometheus_client")
    from async_batcher.integrations.prometheus import BatcherCollector

    registry = client.CollectorRegistry()
    one, other = FakeBatcher(max_batch_size=2, max_queue_size=1), FakeBatcher()
    registry.register(BatcherCollector(one, "one"))
    registry.register(BatcherCollector(other, "other"))

    def value(name: str, **labels: str) -> float | None:
        found: float | None = registry.get_sample_value(
            f"async_batcher_{name}", {"batcher": "one", **labels}
        )
        return found

    assert value("items_total", outcome="done") == 0.0
    futures = [one.submit(0)]
    await asyncio.sleep(0)
    await turn()
    futures.append(one.submit(1))
    assert value("pending_items", state="running") == 1.0
    assert value("pending_items", state="queued") == 1.0
    await asyncio.sleep(3.0)
    one.runner.end()
    one.runner.end(0, ZeroDivisionError())
    await asyncio.wait(futures)
    assert value("items_total", outcome="done") == 1.0
    assert value("items_total", outcome="failed") == 1.0
    assert value("batches_total", reason="timeout") == 1.0
    assert value("batches_total", reason="slot_available") == 1.0
    assert value("batch_items", quantile="0.5") == 1.0
    assert value("queue_wait_seconds", quantile="0.99") == 3.0
    assert value("batch_run_seconds", quantile="0.99") == 3.0
    assert value("workers_started_total") == 0.0
    assert value("workers_recycled_total") == 0.0
    text = client.generate_latest(registry).decode()
    assert text.count("# TYPE async_batcher_items_total counter") >= 1
    assert 'async_batcher_items_total{batcher="other",outcome="done"} 0.0' in text
    await one.stop()


def test_collector_does_not_keep_its_batcher_alive() -> None:
    """The collector of a batcher that no longer exists has no metrics."""
    pytest.importorskip("prometheus_client")
    from async_batcher.integrations.prometheus import BatcherCollector

    batcher = FakeBatcher()
    collector = BatcherCollector(batcher, "one")
    assert list(collector.collect())
    del batcher
    gc.collect()
    assert list(collector.collect()) == []


# ---- OpenTelemetry


@pytest.fixture(name="spans")
def _spans(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, list[Any]]]:
    """Return a tracer, and the list of ended spans."""
    pytest.importorskip("opentelemetry.sdk")
    from opentelemetry import trace
    from opentelemetry.sdk.trace import SpanProcessor, TracerProvider

    ended: list[Any] = []

    class Kept(SpanProcessor):
        def on_end(self, span: Any) -> None:
            ended.append(span)

    provider = TracerProvider()
    provider.add_span_processor(Kept())
    monkeypatch.setattr(trace, "get_tracer", provider.get_tracer)
    yield provider.get_tracer("callers"), ended
    provider.shutdown()


class Halves(AsyncBatcher[int, int]):
    """Divides; fails for 0."""

    async def process_batch(self, batch: list[int]) -> list[int]:
        """Divide 10 by each item."""
        return [10 // item for item in batch]


async def test_batch_span_links_to_caller_spans(spans: tuple[Any, list[Any]]) -> None:
    """A batch's span has links to its callers' spans, and no parent."""
    tracer, ended = spans
    batcher = Halves(trace=True, max_batch_size=3, max_queue_time=1.0)

    async def call(item: int) -> Any:
        with tracer.start_as_current_span(f"call {item}"):
            return await batcher.process(item)

    calls = [asyncio.create_task(one) for one in (call(1), call(2), batcher.process(5))]
    assert [await one for one in calls] == [10, 5, 2]
    await batcher.stop()
    batch = next(span for span in ended if span.name == "batch of Halves")
    callers = {span.context.span_id for span in ended if span.name.startswith("call")}
    assert {link.context.span_id for link in batch.links} == callers
    assert len(callers) == 2
    assert batch.parent is None
    assert dict(batch.attributes) == {
        "async_batcher.batch.size": 3,
        "async_batcher.batch.reason": "full",
    }
    assert batch.status.is_ok or batch.status.is_unset


async def test_span_of_a_failed_batch_records_the_exception(spans: tuple[Any, list[Any]]) -> None:
    """It records the exception; reruns have spans and links of their own."""
    tracer, ended = spans
    batcher = Halves(trace=True, max_batch_size=2, isolate_failures=True)
    with tracer.start_as_current_span("caller") as caller:
        outcomes = await asyncio.gather(
            batcher.submit(0), batcher.submit(1), return_exceptions=True
        )
    assert [type(outcome) for outcome in outcomes] == [ZeroDivisionError, int]
    await batcher.stop()
    batches = [span for span in ended if span.name == "batch of Halves"]
    assert [span.attributes["async_batcher.batch.reason"] for span in batches] == [
        "full",
        "isolation",
        "isolation",
    ]
    assert [span.status.status_code.name for span in batches].count("ERROR") == 2
    assert batches[0].events[0].name == "exception"
    assert all(link.context == caller.get_span_context() for span in batches for link in span.links)
    assert [len(span.links) for span in batches] == [2, 1, 1]


@pytest.mark.parametrize("stage", ["on_start", "on_end"])
async def test_failing_tracer_fails_no_batch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, stage: str
) -> None:
    """Batches run although the tracer fails, and the failure is logged once."""
    pytest.importorskip("opentelemetry.sdk")
    from opentelemetry import trace
    from opentelemetry.sdk.trace import SpanProcessor, TracerProvider

    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError

    processor = SpanProcessor()
    monkeypatch.setattr(processor, stage, fail)
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(processor)
    monkeypatch.setattr(trace, "get_tracer", provider.get_tracer)
    batcher = Halves(trace=True)
    with caplog.at_level("ERROR", "async_batcher"):
        assert [await batcher.process(item) for item in (1, 2)] == [10, 5]
    await batcher.stop()
    assert [record.message.partition(" could")[0] for record in caplog.records] == [
        "The span 'batch of Halves'"
    ]


async def test_batch_runs_in_the_span_of_its_batcher(spans: tuple[Any, list[Any]]) -> None:
    """A batch runs in the context, and so the span, in which its batcher was made."""
    from opentelemetry import trace

    tracer, _ = spans
    inside = []

    class Looks(AsyncBatcher[int, int]):
        async def process_batch(self, batch: list[int]) -> list[int]:
            inside.append(trace.get_current_span())
            return batch

    with tracer.start_as_current_span("maker") as maker:
        batcher = Looks(trace=True)
    with tracer.start_as_current_span("caller"):
        assert await batcher.process(1) == 1
    await batcher.stop()
    assert inside == [maker]


async def test_batch_span_without_caller_spans_has_no_links(spans: tuple[Any, list[Any]]) -> None:
    """The span of a batch whose callers have no span has no links."""
    _, ended = spans
    batcher = Halves(trace=True)
    assert await batcher.process(1) == 10
    await batcher.stop()
    assert [(span.name, len(span.links)) for span in ended] == [("batch of Halves", 0)]
