"""The example service under uvicorn with two server processes."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import re
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest

from tests.conftest import descendants
from tests.support import scripts
from tests.support.polling import wait_for_exit

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path

for _needed in ("fastapi", "httpx", "prometheus_client", "uvicorn"):
    pytest.importorskip(_needed)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc"),
]

SECONDS = 60.0  # two servers start, on a busy machine; only failing tests wait that long


class Service:
    """The running service.

    Attributes:
        process: The parent process of uvicorn.
        client: Sends requests; each has a connection of its own.
        metrics: The folder of the metrics.
    """

    def __init__(self, folder: Path) -> None:
        self.metrics = folder / "metrics"
        self.metrics.mkdir()
        self._log = folder / "log"
        socket = str(folder / "socket")
        command = [
            *(sys.executable, "-m", "uvicorn", "service:app", "--workers", "2", "--uds", socket),
            *("--app-dir", str(scripts.ROOT / "tests/examples")),
            "--timeout-worker-healthcheck=60",  # the tests halt server processes
        ]
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                command,
                cwd=folder,
                env={**scripts.environment(), "PROMETHEUS_MULTIPROC_DIR": str(self.metrics)},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        import httpx

        self.client: Any = httpx.AsyncClient(
            transport=httpx.AsyncHTTPTransport(
                uds=socket,
                limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
            ),
            base_url="http://service",
            timeout=SECONDS,
        )

    async def get(self, path: str, **params: str) -> tuple[int, str]:
        """Return the status and the text of a response."""
        response = await self.client.get(path, params=params)
        return response.status_code, response.text

    def log(self) -> str:
        """Return what uvicorn and the service have printed."""
        return self._log.read_text()

    def servers(self) -> list[int]:
        """Return the ids of the server processes that have exported metrics."""
        files = self.metrics.glob("counter_*.db")
        return [int(path.stem.removeprefix("counter_")) for path in files]

    def workers(self) -> set[int]:
        """Return the ids of the worker processes, and of what starts them."""
        return {worker for server in self.servers() for worker in descendants(server)}

    def metric(self, name: str, **labels: str) -> float:
        """Return the sum of a metric over the server processes."""
        from prometheus_client import CollectorRegistry, multiprocess

        registry = CollectorRegistry()
        multiprocess.MultiProcessCollector(registry, path=str(self.metrics))
        labels["batcher"] = "digests"
        return registry.get_sample_value(f"async_batcher_{name}", labels) or 0.0

    def pending(self) -> float:
        """Return the number of items that the server processes have."""
        return sum(self.metric("pending_items", state=state) for state in ("queued", "running"))

    async def until(self, condition: Callable[[], object]) -> None:
        """Wait until a condition is true; no event announces the change."""
        deadline = time.monotonic() + SECONDS
        while not condition():
            assert time.monotonic() < deadline, self.log()
            assert self.process.poll() is None, self.log()
            await asyncio.sleep(0.05)

    async def close(self) -> None:
        """End all its processes."""
        await self.client.aclose()
        self.process.terminate()
        try:
            self.process.wait(SECONDS)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@pytest.fixture(name="service")
async def _service(tmp_path: Path) -> AsyncIterator[Service]:
    """Start the service, and wait until both server processes are ready."""
    service = Service(tmp_path)
    try:
        await service.until(lambda: service.log().count("Application startup complete") == 2)
        yield service
    finally:
        await service.close()


@contextlib.contextmanager
def halted(*pids: int) -> Iterator[None]:
    """Halt processes meanwhile."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def expected(text: str) -> str:
    """Return the digest of a text."""
    return hashlib.pbkdf2_hmac("sha256", text.encode(), b"", 10_000).hex()


async def test_both_servers_answer(service: Service) -> None:
    """Each has workers of its own, and the metrics are sums over both."""
    servers = service.servers()
    assert len(servers) == 2
    for server in servers:
        with halted(server):
            assert await service.get("/ready") == (200, "")
            assert await service.get("/digest", text="a") == (200, expected("a"))
    assert service.metric("items_total", outcome="done") == 2.0
    status, metrics = await service.get("/metrics")
    assert status == 200
    for line in (
        'items_total{batcher="digests",outcome="done"} 2.0',
        'batch_items_bucket{batcher="digests",le="1.0"} 2.0',
        'batch_run_seconds_count{batcher="digests"} 2.0',
        'queue_wait_seconds_count{batcher="digests"} 2.0',
        'workers_started_total{batcher="digests"} 2.0',
    ):
        assert f"\nasync_batcher_{line}\n" in metrics


async def test_a_client_hangs_up(service: Service) -> None:
    """Its item is cancelled, although its batch is already at a worker."""
    with halted(*service.workers()):
        request = asyncio.create_task(service.get("/digest", text="a"))
        await service.until(lambda: service.pending() == 1.0)
        request.cancel()
        await asyncio.wait([request])
        await service.until(lambda: service.metric("items_total", outcome="cancelled") == 1.0)
        assert service.pending() == 0.0
    assert await service.get("/digest", text="b") == (200, expected("b"))
    assert service.metric("items_total", outcome="done") == 1.0


async def test_an_overload(service: Service) -> None:
    """A server with many queued items is not ready, and refuses items beyond its limit."""
    idle, busy = service.servers()
    texts = [str(number) for number in range(150)]
    with halted(*service.workers()):
        with halted(idle):
            requests = [asyncio.create_task(service.get("/digest", text=text)) for text in texts]
            await service.until(lambda: service.metric("items_total", outcome="rejected"))
            assert (await service.get("/ready"))[0] == 503
        with halted(busy):
            assert (await service.get("/ready"))[0] == 200
    responses = await asyncio.gather(*requests)
    accepted = {
        text: response
        for text, response in zip(texts, responses, strict=True)
        if response[0] == 200
    }
    assert accepted == {text: (200, expected(text)) for text in accepted}
    assert len(accepted) >= 100
    refused = [body for status, body in responses if status == 503]
    assert len(accepted) + len(refused) == len(texts)
    assert all(re.match(r"the queue is full \(100 items queued", body) for body in refused)


async def test_sigterm_under_load(service: Service) -> None:
    """Every client whose request was accepted gets its result, and no process is left."""
    texts = [str(number) for number in range(60)]
    processes = descendants(service.process.pid)
    assert set(service.servers()) | service.workers() <= processes
    with halted(*service.workers()):
        requests = [asyncio.create_task(service.get("/digest", text=text)) for text in texts]
        await service.until(lambda: service.pending() == len(texts))
        service.process.terminate()
        await service.until(lambda: service.log().count("Shutting down") == 2)
        assert not any(request.done() for request in requests)
    assert await asyncio.gather(*requests) == [(200, expected(text)) for text in texts]
    assert await asyncio.to_thread(service.process.wait, SECONDS) == 0, service.log()
    await wait_for_exit(processes)
    assert list(service.metrics.glob("gauge_*")) == []
    assert service.metric("items_total", outcome="done") == len(texts)
    assert "Traceback" not in service.log()
