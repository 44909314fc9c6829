"""Prometheus metrics and OpenTelemetry spans; each extra is loaded only when it is used."""

from __future__ import annotations

import asyncio
import functools
import gc
import subprocess
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

from async_batcher import AsyncBatcher, Later, Limit, WorkerPool, batched, current_batch, retry
from async_batcher._batching.bulk import sources
from async_batcher.exceptions import QueueFullException, WorkerDiedError
from async_batcher.failures import isolate
from tests.support import scripts
from tests.support import worker_functions as work
from tests.support.polling import turn, wait_until
from tests.support.virtual_clock import FakeBatcher, VirtualLoop, virtual_loop

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from async_batcher.integrations.opentelemetry import BatchTracer


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


@pytest.fixture(name="client")
def _client() -> Any:
    return pytest.importorskip("prometheus_client")


def sample(registry: Any, name: str, batcher: str = "one", **labels: str) -> float | None:
    """Return the value of a metric in a registry; None if there is none."""
    found: float | None = registry.get_sample_value(
        f"async_batcher_{name}", {"batcher": batcher, **labels}
    )
    return found


def pending(registry: Any) -> list[float | None]:
    """Return the numbers of queued, running and blocked items."""
    states = ("queued", "running", "blocked")
    return [sample(registry, "pending_items", state=state) for state in states]


@pytest.mark.virtual_clock
async def test_prometheus_metrics_show_what_stats_shows(client: Any) -> None:
    """Counters and histograms at the end of each batch, the gauge once a second."""
    from async_batcher.integrations.prometheus import export_metrics

    registry = client.CollectorRegistry()
    one, other = FakeBatcher(name="one", max_batch_size=2, max_queue_size=1), FakeBatcher()
    for batcher in (one, other, one):
        export_metrics(batcher, registry=registry)
    value = functools.partial(sample, registry)
    assert value("items_total", "FakeBatcher", outcome="done") == 0.0
    futures = [one.submit(0)]
    await asyncio.sleep(0)
    await turn()
    futures.append(one.submit(1))
    with pytest.raises(QueueFullException):
        one.submit(2)
    assert pending(registry) == [0.0, 0.0, 0.0]
    await asyncio.sleep(1.0)
    assert pending(registry) == [1.0, 1.0, 0.0]
    assert value("items_total", outcome="rejected") == 1.0
    await asyncio.sleep(2.0)
    one.runner.end()
    assert value("items_total", outcome="done") == 1.0
    assert value("items_total", outcome="failed") == 0.0
    one.runner.end(0, ZeroDivisionError())
    await asyncio.wait(futures)
    assert value("items_total", outcome="failed") == 1.0
    assert value("batches_total", reason="timeout") == 1.0
    assert value("batches_total", reason="slot_available") == 1.0
    assert value("batch_items_count") == value("batch_items_sum") == 2.0
    assert value("queue_wait_seconds_bucket", le="0.001") == 1.0
    assert value("queue_wait_seconds_sum") == 3.0
    assert value("batch_run_seconds_bucket", le="2.5") == 1.0
    assert value("batch_run_seconds_bucket", le="5.0") == 2.0
    assert value("batch_run_seconds_sum") == 3.0
    assert pending(registry) == [0.0, 0.0, 0.0]
    assert value("batch_items_count", "FakeBatcher") == 0.0
    assert virtual_loop().timers() == 1
    await asyncio.sleep(1.0)
    assert virtual_loop().timers() == 0, "an idle batcher wakes nothing"
    await one.stop()


@pytest.mark.virtual_clock
async def test_prometheus_counts_what_came_back_and_what_a_rate_held_back(client: Any) -> None:
    """By item; the batches have the reason "rate"."""
    from async_batcher.integrations.prometheus import export_metrics

    registry = client.CollectorRegistry()
    limits = [Limit("batches", rate=(1, 1.0))]
    batcher = FakeBatcher(name="one", max_batch_size=2, limits=limits)
    export_metrics(batcher, registry=registry)
    futures = [batcher.submit(number) for number in range(2)]
    await turn()
    batcher.runner.end(0, [0, Later(0.5)])
    await asyncio.sleep(2.0)
    batcher.runner.end()
    assert [await future for future in futures] == [0, 1]
    assert sample(registry, "items_retried_total") == 1.0
    assert sample(registry, "items_rate_limited_total") == 1.0
    assert sample(registry, "batches_total", reason="rate") == 1.0


@pytest.mark.virtual_clock
async def test_batchers_of_one_name_are_added_up(client: Any) -> None:
    """What they did before the export counts too, and what they did after they are gone."""
    from async_batcher.integrations.prometheus import export_metrics

    registry = client.CollectorRegistry()
    batchers = [FakeBatcher(name="one") for _ in range(2)]
    for batcher in batchers:
        futures = [batcher.submit(0), batcher.submit(1)]
        await turn()
        batcher.runner.end()
        assert [await future for future in futures] == [0, 1]
        export_metrics(batcher, registry=registry)
    assert sample(registry, "items_total", outcome="done") == 4.0
    running = [batcher.submit(2) for batcher in batchers]
    await asyncio.sleep(1.0)
    assert pending(registry) == [0.0, 2.0, 0.0]
    for batcher, future in zip(batchers, running, strict=True):
        batcher.runner.end()
        assert await future == 2
        await batcher.stop()
    gone = weakref.ref(batchers[0])
    del batcher, batchers
    await asyncio.sleep(1.0)
    gc.collect()
    assert gone() is None, "the metrics do not keep a batcher alive"
    assert sample(registry, "items_total", outcome="done") == 6.0
    assert pending(registry) == [0.0, 0.0, 0.0]


def test_metrics_go_on_after_a_restart_on_another_loop(client: Any) -> None:
    """The timer of the first loop, which was closed, is not waited for."""
    from async_batcher.integrations.prometheus import export_metrics

    registry = client.CollectorRegistry()
    batcher = FakeBatcher(name="one")
    export_metrics(batcher, registry=registry)

    async def run(item: int, seconds: float) -> None:
        future = batcher.submit(item)
        await asyncio.sleep(seconds)
        assert pending(registry) == [0.0, float(seconds > 1.0), 0.0]
        batcher.runner.end()
        assert await future == item

    for seconds in (0.5, 1.5):
        with asyncio.Runner(loop_factory=VirtualLoop) as runner:
            runner.run(run(1, seconds))
    assert sample(registry, "items_total", outcome="done") == 2.0


@pytest.mark.virtual_clock
async def test_a_metric_that_fails_fails_no_batch(
    client: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The failure is logged once."""
    from async_batcher.integrations.prometheus import export_metrics

    batcher = FakeBatcher(name="one")
    export_metrics(batcher, registry=client.CollectorRegistry())

    message = "[Errno 28] No space left on device"

    def fail(*_: Any) -> None:
        raise OSError(message)

    monkeypatch.setattr(client.Histogram, "observe", fail)
    monkeypatch.setattr(client.Counter, "inc", fail)
    for item in range(2):
        future = batcher.submit(item)
        await asyncio.sleep(2.0)
        batcher.runner.end()
        assert await future == item
    assert [record.getMessage() for record in caplog.records] == [
        f"one: metrics could not be updated (further errors are not logged): OSError: {message}"
    ]
    await batcher.stop()


@pytest.mark.usefixtures("long_graces")
async def test_worker_processes_are_counted(client: Any) -> None:
    """Also those of the next pool, after a restart of the batcher."""
    from async_batcher.integrations.prometheus import export_metrics

    registry = client.CollectorRegistry()
    batcher = batched(work.crash_in_batch, name="one", executor="process", max_workers=1)
    export_metrics(batcher, registry=registry)
    for times in (1.0, 2.0):
        await batcher.start()
        with pytest.raises(WorkerDiedError):
            await batcher("kill")
        assert await batcher("a") == "a"
        assert sample(registry, "workers_crashed_total", cause="SIGKILL") == times
        await batcher.stop()
    assert sample(registry, "workers_started_total") == 4.0


async def test_a_shared_pool_is_counted_once(client: Any) -> None:
    """Batchers of one name, such as one for each job, have the same workers."""
    from async_batcher.integrations.prometheus import export_metrics

    registry = client.CollectorRegistry()
    async with WorkerPool(1) as pool:
        for _ in range(3):
            batcher: Any = batched(work.pids, name="one", executor=pool)
            async with batcher:
                export_metrics(batcher, registry=registry)
                await batcher(0)
    assert sample(registry, "workers_started_total") == 1.0


async def test_items_are_seen_before_there_is_an_executor(
    client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A factory that takes long, or hangs, is when metrics are looked at."""
    from async_batcher.integrations import prometheus

    monkeypatch.setattr(prometheus, "UPDATE_SECONDS", 0.01)
    goes_on = threading.Event()

    def make() -> ThreadPoolExecutor:
        goes_on.wait(work.DEADLINE)
        return ThreadPoolExecutor(1)

    registry = client.CollectorRegistry()
    batcher: Any = batched(work.same, name="one", executor=make)
    prometheus.export_metrics(batcher, registry=registry)
    calls: Any = asyncio.gather(batcher(1), batcher(2))
    await wait_until(lambda: sample(registry, "pending_items", state="queued") == 2.0)
    goes_on.set()
    assert await calls == [1, 2]
    await batcher.stop()


def test_processes_are_added_up(client: Any, tmp_path: Path) -> None:
    """In the multi-process mode of prometheus_client; pending items count live processes only."""
    program = """
import asyncio, os, sys
from async_batcher import batched
from async_batcher.integrations.prometheus import export_metrics

async def main():
    async def double(batch):
        if batch[0] == 0:
            await asyncio.sleep(60)
        return [2 * item for item in batch]

    batcher = batched(double, name="one", max_queue_time=0)
    export_metrics(batcher)
    assert await batcher.process_many([1, 2, 3]) == [2, 4, 6]
    hanging = batcher.submit(0)
    await asyncio.sleep(1.5)
    os._exit(0)

asyncio.run(main())
"""
    environment = {**scripts.environment(), "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    processes = [
        subprocess.Popen([sys.executable, "-c", program], env=environment) for _ in range(2)
    ]
    assert [process.wait(3 * work.DEADLINE) for process in processes] == [0, 0]
    multiprocess = pytest.importorskip("prometheus_client.multiprocess")

    registry = client.CollectorRegistry()
    multiprocess.MultiProcessCollector(registry, path=str(tmp_path))
    assert sample(registry, "items_total", outcome="done") == 6.0
    assert sample(registry, "batch_items_bucket", le="2.0") == 0.0
    assert sample(registry, "batch_items_bucket", le="4.0") == 2.0
    assert sample(registry, "batch_run_seconds_count") == 2.0
    assert pending(registry) == [0.0, 2.0, 0.0]
    multiprocess.mark_process_dead(processes[0].pid, path=str(tmp_path))
    assert pending(registry) == [0.0, 1.0, 0.0]
    assert sample(registry, "items_total", outcome="done") == 6.0


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


def new_tracer() -> BatchTracer:
    """Return a `BatchTracer`, whose module needs the extra."""
    from async_batcher.integrations.opentelemetry import BatchTracer

    return BatchTracer()


class Halves(AsyncBatcher[int, int]):
    """Divides; fails for 0."""

    async def process_batch(self, batch: list[int]) -> list[int]:
        """Divide 10 by each item."""
        return [10 // item for item in batch]


async def test_batch_span_links_to_caller_spans(spans: tuple[Any, list[Any]]) -> None:
    """A batch's span has links to its callers' spans, and no parent."""
    tracer, ended = spans
    batcher = Halves(on_batch=new_tracer(), max_batch_size=3, max_queue_time=1.0)

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
    batcher = Halves(on_batch=new_tracer(), max_batch_size=2, on_failure=isolate())
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


@pytest.mark.parametrize("attempts", [1, 2])
async def test_span_of_a_batch_that_is_put_off(spans: tuple[Any, list[Any]], attempts: int) -> None:
    """It is an error only if an item has failed."""
    _, ended = spans

    async def put_off(batch: list[int]) -> list[int]:
        if current_batch().attempt == 1:  # type: ignore[union-attr]
            raise Later(0.0)
        return batch

    policy = retry(Later, attempts=attempts)
    async with batched(put_off, on_batch=new_tracer(), on_failure=policy) as batcher:
        (result,) = await batcher.process_many([1], return_exceptions=True)
    assert isinstance(result, int) == (attempts == 2)
    assert ended[0].events[0].name == "exception"
    assert [span.status.status_code.name for span in ended] == (
        ["ERROR"] if attempts == 1 else ["UNSET", "UNSET"]
    )


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
    batcher = Halves(on_batch=new_tracer())
    with caplog.at_level("ERROR", "async_batcher"):
        assert [await batcher.process(item) for item in (1, 2)] == [10, 5]
    await batcher.stop()
    method = {"on_start": "started", "on_end": "finished"}[stage]
    observer = f"async_batcher.integrations.opentelemetry.BatchTracer.{method}"
    text = f"the observer {observer} raised; its further exceptions are not logged"
    assert [record.message for record in caplog.records] == [
        f"{__name__}.Halves.process_batch: {text}"
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
        batcher = Looks(on_batch=new_tracer())
    with tracer.start_as_current_span("caller"):
        assert await batcher.process(1) == 1
    await batcher.stop()
    assert inside == [maker]


async def test_batch_span_without_caller_spans_has_no_links(spans: tuple[Any, list[Any]]) -> None:
    """The span of a batch whose callers have no span has no links."""
    _, ended = spans
    assert new_tracer().enqueued() is None
    for name in (None, "tens"):
        batcher = Halves(on_batch=new_tracer(), name=name)
        assert await batcher.process(1) == 10
        await batcher.stop()
    assert [(span.name, len(span.links)) for span in ended] == [
        ("batch of Halves", 0),
        ("batch of tens", 0),
    ]


async def test_one_tracer_for_batchers_of_the_same_name(spans: tuple[Any, list[Any]]) -> None:
    """Each span ends with its own batch, although names and numbers are the same."""
    tracer, ended = spans
    batch_tracer = new_tracer()
    second_has_ended = asyncio.Event()

    class Waits(AsyncBatcher[int, int]):
        async def process_batch(self, batch: list[int]) -> list[int]:
            if 0 in batch:
                raise ZeroDivisionError
            await second_has_ended.wait()
            return batch

    first, second = Waits(on_batch=batch_tracer), Waits(on_batch=batch_tracer)
    with tracer.start_as_current_span("first") as of_first:
        running = first.submit(1)
    await turn()
    with tracer.start_as_current_span("second") as of_second, pytest.raises(ZeroDivisionError):
        await second.process(0)
    second_has_ended.set()
    assert await running == 1
    await first.stop()
    await second.stop()
    batches = [span for span in ended if span.name == "batch of " + Waits.__qualname__]
    assert [span.status.status_code.name for span in batches] == ["ERROR", "UNSET"]
    assert [span.links[0].context for span in batches] == [
        of_second.get_span_context(),
        of_first.get_span_context(),
    ]


async def test_a_bulk_call_is_linked_once(
    spans: tuple[Any, list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So is a chunk of a stream; each batch of a call has its link."""
    monkeypatch.setattr(sources, "_MAX_BLOCKING_READ", work.DEADLINE)  # so it is one chunk
    tracer, ended = spans
    batcher = Halves(on_batch=new_tracer(), max_batch_size=2)
    with tracer.start_as_current_span("bulk") as bulk:
        assert await batcher.process_many([1, 2, 5]) == [10, 5, 2]
    with tracer.start_as_current_span("stream") as stream:
        assert [result async for result in batcher.map([1, 2])] == [10, 5]
    await batcher.stop()
    batches = [span for span in ended if span.name == "batch of Halves"]
    assert [[link.context for link in span.links] for span in batches] == [
        [bulk.get_span_context()],
        [bulk.get_span_context()],
        [stream.get_span_context()],
    ]


def _reciprocals(batch: list[int]) -> list[float]:
    return [1 / item for item in batch]


@pytest.mark.slow
@pytest.mark.parametrize("executor", ["thread", "process"])
async def test_spans_of_batches_in_workers(spans: tuple[Any, list[Any]], executor: Any) -> None:
    """The tracer stays in this process; the span of a failed batch has its exception."""
    _, ended = spans
    batcher = batched(_reciprocals, executor=executor, max_workers=1, on_batch=new_tracer())
    async with batcher:
        assert await batcher(2) == 0.5
        with pytest.raises(ZeroDivisionError):
            await batcher(0)
    assert [span.status.status_code.name for span in ended] == ["UNSET", "ERROR"]
    assert ended[1].status.description == "ZeroDivisionError"
    assert ended[1].events[0].attributes["exception.type"] == "ZeroDivisionError"
    assert {span.name for span in ended} == {"batch of _reciprocals"}
