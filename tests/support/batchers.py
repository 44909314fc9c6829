"""Batch functions, batchers and calls that tests of the front end share."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING, Any

import pytest

from async_batcher import AsyncBatcher, batched
from tests.support.worker_functions import DEADLINE

if TYPE_CHECKING:
    import logging
    from collections.abc import Callable, Iterable

# Exceptions with a meaning of their own for the event loop, a coroutine or the process.
CONTROL_FLOW: dict[str, Callable[[], BaseException]] = {
    "builtins.StopIteration": lambda: StopIteration(1),
    "builtins.GeneratorExit": GeneratorExit,
    "asyncio.exceptions.CancelledError": asyncio.CancelledError,
    "builtins.SystemExit": lambda: SystemExit(3),
    "builtins.KeyboardInterrupt": KeyboardInterrupt,
}


def echo(batch: list[Any]) -> list[Any]:
    """Return the items; runs in a thread."""
    return list(batch)


async def async_echo(batch: list[Any]) -> list[Any]:
    """Return the items; runs on the event loop."""
    return list(batch)


def make_batcher(function: Any = echo, **options: Any) -> AsyncBatcher[Any, Any]:
    """Make a batcher of any type, also with options that a type checker rejects."""
    batcher: AsyncBatcher[Any, Any] = batched(function, **options)
    return batcher


def failing_batcher(error: Callable[[], BaseException]) -> AsyncBatcher[Any, Any]:
    """Make a batcher whose every batch raises what ``error`` makes."""

    async def process_batch(batch: list[Any]) -> None:  # noqa: ARG001 - every batch fails
        raise error()

    return batched(process_batch, max_queue_time=0)


async def call_all(batcher: Any, items: Iterable[Any]) -> list[Any]:
    """Process the items at the same time; return results and exceptions."""
    async with asyncio.timeout(DEADLINE):
        return await asyncio.gather(*map(batcher.process, items), return_exceptions=True)


async def process_all(batcher: AsyncBatcher[Any, Any], *items: Any) -> list[Any]:
    """Process the items at the same time; return results and exceptions."""
    return await call_all(batcher, items)


async def stop_by(how: str, target: Any) -> None:
    """Stop a batcher or a pool by "force", by a "timeout", or by a "cancel" of the stop."""
    if how == "force":
        await target.stop(force=True)
    elif how == "timeout":
        with pytest.raises(TimeoutError, match=r"0\.01 seconds"):
            await target.stop(timeout=0.01)
    else:
        stop = asyncio.ensure_future(target.stop())
        await asyncio.sleep(0)
        stop.cancel()
        with pytest.raises(asyncio.CancelledError):
            await stop


def refuse_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the next start of a thread fail."""

    def start(thread: threading.Thread) -> None:
        monkeypatch.undo()
        msg = f"can't start new thread {thread.name}"
        raise RuntimeError(msg)

    monkeypatch.setattr(threading.Thread, "start", start)


def package_logs(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    """Return the records that the package has logged."""
    return [record for record in caplog.records if record.name == "async_batcher"]


class GatedBatcher(AsyncBatcher[Any, Any]):
    """Returns each item once its gate is open."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.gate = asyncio.Event()
        self.batches: list[list[Any]] = []

    async def process_batch(self, batch: list[Any]) -> list[Any]:
        """Wait for the gate, then return the items."""
        self.batches.append(batch)
        await self.gate.wait()
        return list(batch)
