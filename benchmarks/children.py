"""A rival's process: started once for each loop, told "one round" as often as is wanted.

The far side is ``rivals/_protocol.py``: one line of JSON in, one line of JSON out.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

from benchmarks.environments import NotAvailableError, python_with

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

RIVALS = Path(__file__).parent / "rivals"
OLD_VERSION = "0.2.2"
_PATIENCE = 10.0  # seconds for a process to end once its input has
_HANGS = 120.0  # seconds after which a rival that does not answer counts as one that never will

OURS = "async_batcher"
DISTRIBUTION = "async-batcher"  # ours, and of what we succeed
OLD = f"async-batcher {OLD_VERSION}"
ONE_BY_ONE = "async_batcher, submit and gather"
OURS_ISOLATING = "async_batcher, isolate_failures"
OURS_IN_THREADS = "async_batcher, threads"
BATCHED = "batched"
RAY_SERVE = "Ray Serve"
OUR_POOL = "async_batcher.WorkerPool"
STANDARD_POOL = "ProcessPoolExecutor"
BY_HAND = "no batching"
STREAMED = "async_batcher, streamed"
THREADS = "ThreadPoolExecutor"
NEAREST_POOLS = (STANDARD_POOL, "loky", "pebble")
OTHER_POOLS = ("aiomultiprocess", "joblib")
SCRIPTS = {
    OURS: "ours.py",
    OLD: "old_async_batcher.py",
    "aiodataloader": "data_loader.py",
    BATCHED: "batched_processor.py",
    RAY_SERVE: "ray_serve.py",
    "bare futures": "bare_futures.py",
    BY_HAND: "by_hand.py",
    OUR_POOL: "worker_pool.py",
    STANDARD_POOL: "standard_pool.py",
    "loky": "loky_pool.py",
    "pebble": "pebble_pool.py",
    "aiomultiprocess": "aiomultiprocess_pool.py",
    "joblib": "joblib_pool.py",
    THREADS: "thread_pool.py",
    "memory copy": "memory_copy.py",
    "bare pipe": "bare_pipe.py",
    "bare loop": "bare_loop.py",
    STREAMED: "streamed.py",
}

# What is not installed beside us, and what else it has there, in the same version as here.
_ENVIRONMENTS = {OLD: {DISTRIBUTION: OLD_VERSION}, RAY_SERVE: {"ray[serve]": "2.60.0"}}
_ALIKE = {OLD: ["uvloop", "scikit-learn", "scipy", "numpy"], RAY_SERVE: ["uvloop"]}


class Child:
    """One rival on one loop, in a process of its own.

    Args:
        rival: Its name, one of `SCRIPTS`.
        loop: ``"asyncio"`` or ``"uvloop"``.

    Attributes:
        facts: What it said of itself: versions of the rival, of Python and of the loop.

    Raises:
        NotAvailableError: It cannot be had here.
    """

    def __init__(self, rival: str, loop: str) -> None:
        self.rival = rival
        python = [str(python_for(rival, loop))]
        if rival in _ENVIRONMENTS:
            python.append("-E")  # or a PYTHONPATH of ours would have 0.2.2's name find our own package, and measure it
        self._process = subprocess.Popen(  # noqa: S603 - our own script
            [*python, "-u", str(RIVALS / SCRIPTS[rival]), loop],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._requests = cast("IO[str]", self._process.stdin)
        self._replies = cast("IO[str]", self._process.stdout)
        self.facts: dict[str, str] = {}
        try:
            self.facts = self._hear()
        except BaseException:
            self.close()
            raise

    def ask(self, question: str, load: dict[str, Any]) -> dict[str, float]:
        """Have it run one round.

        Returns:
            What it measured, by name, in seconds and counts.

        Raises:
            NotAvailableError: This rival has no answer to that question, and says why.
            RuntimeError: It answered wrongly, or failed.
        """
        try:
            self._requests.write(json.dumps({"question": question, **load}) + "\n")
            self._requests.flush()
        except OSError as exc:
            msg = f"{self.rival} has ended, with exit status {self._process.wait()}"
            raise RuntimeError(msg) from exc
        return self._hear()

    @property
    def has_ended(self) -> bool:
        """Whether its process has."""
        return self._process.poll() is not None

    def close(self) -> None:
        """End the process."""
        with contextlib.suppress(BrokenPipeError):
            self._requests.close()
        try:
            self._process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._replies.close()

    def _hear(self) -> dict[str, Any]:
        # A reply is one line, and nothing is said that was not asked for: nothing is left in the buffer when we come here.
        if sys.platform != "win32" and not select.select([self._replies], [], [], _HANGS)[0]:
            os.killpg(self._process.pid, signal.SIGKILL)  # with all the processes that it has started
            self._process.wait()
            msg = f"{self.rival} has not answered for {_HANGS:.0f} s"
            raise RuntimeError(msg)
        line = self._replies.readline()
        if not line:
            msg = f"{self.rival} has ended, with exit status {self._process.wait()}"
            raise RuntimeError(msg)
        try:
            reply: dict[str, Any] = json.loads(line)
        except ValueError as exc:
            msg = f"{self.rival} has said something that is no reply"
            raise RuntimeError(msg) from exc
        if "unavailable" in reply:
            raise NotAvailableError(reply["unavailable"])
        if "failed" in reply:
            msg = f"{self.rival}: {reply['failed']}"
            raise RuntimeError(msg)
        return reply


class Children:
    """Every rival's process, started when it is first needed; a context manager that ends them all."""

    def __init__(self) -> None:
        self._children: dict[tuple[str, str], Child | NotAvailableError] = {}

    def get(self, rival: str, loop: str) -> Child:
        """The process of that rival on that loop.

        Raises:
            NotAvailableError: It cannot be had here.
        """
        child = self._children.get((rival, loop))
        if isinstance(child, Child) and child.has_ended:
            child.close()
            child = None
        if child is None:
            try:
                child = Child(rival, loop)
            except NotAvailableError as exc:
                child = exc
            self._children[rival, loop] = child
        if isinstance(child, NotAvailableError):
            raise child
        return child

    def __enter__(self) -> Self:
        """Nothing starts yet."""
        return self

    def __exit__(self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None) -> None:
        """End them all."""
        for child in self._children.values():
            if isinstance(child, Child):
                child.close()


def python_for(rival: str, loop: str) -> Path:
    """The Python that a rival runs on: this one, or that of an environment of its own.

    Raises:
        NotAvailableError: The environment cannot be made.
    """
    pins = _ENVIRONMENTS.get(rival)
    if pins is None:
        return Path(sys.executable)
    alike = {}
    for name in _ALIKE[rival]:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            alike[name] = importlib.metadata.version(name)
    try:
        return python_with({**pins, **alike})
    except NotAvailableError:
        if loop == "uvloop":
            raise
        return python_with(pins)
