"""Servers, task queues and notebooks whose programs use worker processes, each as it really runs.

Each test starts the real program, sends it work, and ends it as users do. Every result is checked,
and that no process is left.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

from tests.conftest import descendants
from tests.support import scripts
from tests.support.polling import block_until, wait_for_exit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc"),
]

SECONDS = 60.0  # for a server to start on a busy machine; only failing tests wait that long

# Made when the module is imported: with gunicorn's --preload, before the server processes fork.
_APPLICATION = """
    import json, os
    from async_batcher import WorkerPool, batched

    FACTOR = 2

    def multiply(batch):
        return [(FACTOR * number, os.getpid()) for number in batch]

    multiplied = batched(multiply, executor="process", max_workers=1)
    executor = WorkerPool(1).as_executor()

    def reply(result):
        product, worker = result
        return json.dumps([product, os.getpid(), worker]).encode()

    async def asgi(scope, receive, send):
        if scope["type"] == "lifespan":
            await receive()
            await multiplied.start()
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await multiplied.stop()
            await send({"type": "lifespan.shutdown.complete"})
        elif scope["type"] == "http":
            body = reply(await multiplied(int(scope["path"].strip("/"))))
            headers = [(b"content-length", str(len(body)).encode())]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": body})

    def wsgi(environ, start_response):
        (result,) = executor.submit(multiply, [int(environ["PATH_INFO"].strip("/"))]).result()
        start_response("200 OK", [("Content-Type", "application/json")])
        return [reply(result)]
"""

# Which package, its arguments, and how many server processes answer.
_SERVERS: dict[str, tuple[str, list[str], int]] = {
    "uvicorn": (
        "uvicorn",
        # A busy machine does not start a server in 5 seconds.
        ["application:asgi", "--workers", "2", "--timeout-worker-healthcheck=60", "--uds=SOCKET"],
        2,
    ),
    "uvicorn reload": ("uvicorn", ["application:asgi", "--reload", "--uds", "SOCKET"], 1),
    "gunicorn asgi": (
        "gunicorn",
        ["application:asgi", "--preload", "-w2", "-kuvicorn_worker.UvicornWorker", "-bunix:SOCKET"],
        2,
    ),
    "gunicorn own asgi": (
        "gunicorn",
        ["application:asgi", "--preload", "-w2", "-kasgi", "-bunix:SOCKET"],
        2,
    ),
    "gunicorn sync": ("gunicorn", ["application:wsgi", "--preload", "-w2", "-bunix:SOCKET"], 2),
    "gunicorn threads": (
        "gunicorn",
        ["application:wsgi", "--preload", "-w2", "-kgthread", "--threads=4", "-bunix:SOCKET"],
        2,
    ),
    "hypercorn": ("hypercorn", ["application:asgi", "-w2", "-bunix:SOCKET"], 2),
}


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=SECONDS)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(SECONDS)
        self.sock.connect(self._path)


class Program:
    """A program in a process group of its own.

    Attributes:
        folder: Its current folder.
        process: Its first process.
    """

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.folder = folder
        self._log = folder / "log"
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, *arguments],
                cwd=folder,
                env=scripts.environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def log(self) -> str:
        """Return what it has printed."""
        return self._log.read_text()

    def until(self, condition: Callable[[], object]) -> None:
        """Wait until a condition is true; no event announces the change."""
        deadline = time.monotonic() + SECONDS
        while not condition():
            assert time.monotonic() < deadline, self.log()
            assert self.process.poll() is None, self.log()
            time.sleep(0.05)

    def get(self, number: int) -> tuple[int, int, int]:
        """Return the product, the server process and the worker process of one request."""
        connection = _UnixConnection(str(self.folder / "socket"))
        with contextlib.closing(connection):
            connection.request("GET", f"/{number}")
            response = connection.getresponse()
            assert response.status == 200, self.log()
            product, server, worker = json.loads(response.read())
        return product, server, worker

    def answers(self) -> bool:
        """Return whether it takes requests."""
        try:
            return bool(self.get(1))
        except (OSError, http.client.HTTPException):
            return False

    def end(self) -> str:
        """End it by SIGTERM, check that no process is left, and return what it has printed."""
        family = {*descendants(self.process.pid), self.process.pid}
        self.process.terminate()
        self.process.wait(SECONDS)
        asyncio.run(wait_for_exit(family))
        assert "Traceback" not in self.log(), self.log()
        return self.log()


@contextlib.contextmanager
def running(folder: Path, *arguments: str) -> Iterator[Program]:
    """Run a program, and kill it in the end."""
    program = Program(folder, *arguments)
    try:
        yield program
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(program.process.pid, signal.SIGKILL)
        program.process.wait()


@contextlib.contextmanager
def serving(folder: Path, name: str) -> Iterator[Program]:
    """Run a server with the application until it answers."""
    package, arguments, _ = _SERVERS[name]
    pytest.importorskip(package)
    if "uvicorn_worker" in "".join(arguments):
        pytest.importorskip("uvicorn_worker")
    (folder / "application.py").write_text(textwrap.dedent(_APPLICATION))
    path = str(folder / "socket")
    arguments = [argument.replace("SOCKET", path) for argument in arguments]
    with running(folder, "-m", package, *arguments) as program:
        program.until(program.answers)
        yield program


@pytest.mark.parametrize("name", _SERVERS)
def test_a_server(tmp_path: Path, name: str) -> None:
    """Each server process has a worker of its own; SIGTERM leaves no process."""
    processes = _SERVERS[name][2]
    with serving(tmp_path, name) as program:
        pairs: set[tuple[int, int]] = set()

        def get(number: int) -> bool:
            product, server, worker = program.get(number)
            pairs.add((server, worker))
            return product == 2 * number

        with ThreadPoolExecutor(8) as clients:
            # Which server process takes a connection is chance.
            program.until(lambda: all(clients.map(get, range(40))) and len(pairs) >= processes)
        assert len(pairs) == processes
        assert {len(set(ids)) for ids in zip(*pairs, strict=True)} == {processes}
        assert {pid for pair in pairs for pid in pair} <= descendants(program.process.pid)
        program.end()


def test_a_reload(tmp_path: Path) -> None:
    """After a change of the module, a new server process and new workers use it."""
    with serving(tmp_path, "uvicorn reload") as program:
        before = program.get(3)
        assert before[0] == 6
        file = tmp_path / "application.py"
        file.write_text(file.read_text().replace("FACTOR = 2", "FACTOR = 5"))
        program.until(lambda: program.answers() and program.get(3)[0] == 15)
        block_until(lambda: not any(map(scripts.is_alive, before[1:])))
        program.end()


@pytest.mark.parametrize("name", ["gunicorn asgi", "gunicorn sync"])
def test_gunicorn_replaces_server_processes(tmp_path: Path, name: str) -> None:
    """SIGHUP ends the server processes with their workers, as does the crash of one."""
    with serving(tmp_path, name) as program:
        servers = {program.get(number)[1] for number in range(20)}
        before = {*servers, *(pid for server in servers for pid in descendants(server))}
        program.process.send_signal(signal.SIGHUP)
        block_until(lambda: not any(map(scripts.is_alive, before)))
        program.until(program.answers)
        _, server, _ = program.get(1)
        family = {server, *descendants(server)}
        os.kill(server, signal.SIGKILL)
        block_until(lambda: not any(map(scripts.is_alive, family)))
        program.until(program.answers)
        assert program.get(4)[0] == 8
        program.end()


_TASKS = """
    import asyncio, os
    from celery import Celery
    from async_batcher import WorkerPool, batched

    app = Celery("tasks", broker="filesystem://", backend="file://FOLDER/results")
    app.conf.broker_transport_options = {
        "data_folder_in": "FOLDER/queue",
        "data_folder_out": "FOLDER/queue",
        "control_folder": "FOLDER/control",
    }
    app.conf.broker_connection_retry_on_startup = True
    executor = WorkerPool(1).as_executor()

    def double(batch):
        return [(2 * number, os.getpid()) for number in batch]

    async def with_batcher(number):
        async with batched(double, executor="process", max_workers=1) as batcher:
            return await batcher(number)

    @app.task
    def by_batcher(number):
        return [*asyncio.run(with_batcher(number)), os.getpid()]

    @app.task
    def by_executor(number):
        return [*executor.submit(double, [number]).result()[0], os.getpid()]
"""


@pytest.mark.parametrize("pool", ["prefork", "threads", "solo"])
def test_celery(tmp_path: Path, pool: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks use batchers and executors, also in the daemonic processes of the prefork pool."""
    pytest.importorskip("celery")
    for folder in ("queue", "control", "results"):
        (tmp_path / folder).mkdir()
    text = textwrap.dedent(_TASKS).replace("FOLDER", str(tmp_path))
    (tmp_path / "tasks.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    options = ("--loglevel=INFO", "--without-gossip", "--without-mingle", "--without-heartbeat")
    with running(
        tmp_path, "-m", "celery", "-A", "tasks", "worker", "--pool", pool, "-c2", *options
    ) as program:
        program.until(lambda: "ready." in program.log())
        calls = "[getattr(tasks, name).delay(n) for n in range(4) for name in NAMES]"
        client = f"""
            import json, tasks
            NAMES = "by_batcher", "by_executor"
            results = [call.get(timeout={SECONDS}) for call in {calls}]
            print(json.dumps(results))
        """
        results = json.loads(scripts.run_script(tmp_path, client))
        assert [product for product, _, _ in results] == [0, 0, 2, 2, 4, 4, 6, 6]
        celery = {server for _, _, server in results}
        assert not celery & {worker for _, worker, _ in results}
        assert (program.process.pid in celery) == (pool != "prefork")
        program.end()


_IMPORTS = "import asyncio, os\nfrom async_batcher import WorkerPool, batched"
_DEFINE = """
@batched(executor="process", max_workers=1)
def f(batch):
    return [(FACTOR * n, os.getpid()) for n in batch]
"""
_CALL = "print(*(await f(21)))"
_HANG = """
import time
@batched(executor="process", max_workers=1)
def hang(batch):
    time.sleep(600)
"""


@pytest.mark.leaves_things  # descriptors of ZeroMQ; processes are checked here
def test_a_notebook(tmp_path: Path) -> None:
    """Functions of cells run in workers; an interrupt ends a call, a restart the workers."""
    jupyter_client: Any = pytest.importorskip("jupyter_client")
    pytest.importorskip("ipykernel")
    manager, client = jupyter_client.manager.start_new_kernel(
        startup_timeout=SECONDS, kernel_name="python3", env=scripts.environment()
    )
    try:

        def run(code: str) -> str:
            """Return what a cell prints, or the name of its error."""
            printed: list[str] = []

            def collect(message: dict[str, Any]) -> None:
                content = message["content"]
                printed.append(content.get("text", "") or content.get("ename", ""))

            client.execute_interactive(code, timeout=SECONDS, output_hook=collect)
            return "".join(printed).strip()

        def product() -> int:
            """Return the product, and check that the batch ran in a worker."""
            result, worker = map(int, run(_CALL).split())
            assert worker in descendants(manager.provisioner.pid)
            return result

        cells = (_IMPORTS, "FACTOR = 2", _DEFINE, _HANG)
        assert [run(cell) for cell in cells] == [""] * 4
        assert product() == 42
        assert [run(cell) for cell in ("FACTOR = 4", _DEFINE)] == ["", ""]  # the cell again
        assert product() == 84
        pid = manager.provisioner.pid
        assert run("await hang.start()") == ""
        message = client.execute(f"open({str(tmp_path / 'begun')!r}, 'w').close(); await hang(1)")
        block_until((tmp_path / "begun").exists)
        manager.interrupt_kernel()
        reply = client.get_shell_msg(timeout=SECONDS)
        while reply["parent_header"].get("msg_id") != message:
            reply = client.get_shell_msg(timeout=SECONDS)
        assert reply["content"]["status"] == "error"
        assert product() == 84
        worker = int(run(_CALL).split()[1])
        assert run("await f.stop()") == ""
        assert not scripts.is_alive(worker)
        assert run("await f.start()") == ""
        family = descendants(pid)
        manager.restart_kernel(now=True)
        asyncio.run(wait_for_exit(family))
        client.wait_for_ready(timeout=SECONDS)
        assert [run(cell) for cell in cells] == [""] * 4
        assert product() == 42
        family = descendants(manager.provisioner.pid)
    finally:
        client.stop_channels()
        manager.shutdown_kernel()
    asyncio.run(wait_for_exit(family))
