"""Streams over files, threads and worker processes."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import random
import signal
import sys
from typing import TYPE_CHECKING, Any

import pytest

from async_batcher import WorkerPool, batched
from async_batcher.exceptions import WorkerDiedError
from async_batcher.failures import isolate
from tests.support import worker_functions as work
from tests.support.batchers import async_echo, echo
from tests.support.polling import wait_until
from tests.support.worker_functions import DEADLINE

if TYPE_CHECKING:
    from pathlib import Path

    from async_batcher import AsyncBatcher


@pytest.mark.parametrize("in_thread", [True, False])
async def test_the_lines_of_a_file(tmp_path: Path, in_thread: bool) -> None:
    """map() reads a file line by line, and does not close it."""
    path = tmp_path / "lines"
    path.write_text("".join(f"{number}\n" for number in range(1000)))
    with path.open() as file:
        async with batched(echo, executor="thread", max_workers=2, max_batch_size=16) as batcher:
            results = batcher.map(file, read_in_thread=in_thread)
            assert await anext(results) == "0\n"
            await results.aclose()
            assert not file.closed
            file.seek(0)
            assert [
                int(line) async for line in batcher.map(file, read_in_thread=in_thread)
            ] == list(range(1000))
        assert not file.closed


async def test_a_stream_that_is_never_iterated() -> None:
    """A stream that is not iterated queues nothing and leaves nothing behind."""
    async with batched(async_echo) as batcher:
        batcher.map([1, 2, 3])
        assert batcher.stats().queued == 0


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no WorkerPool")
@pytest.mark.parametrize("ordered", [True, False])
async def test_a_crashing_item_of_a_stream_fails_alone(ordered: bool) -> None:
    """An item that crashes its worker fails alone, and the stream goes on."""
    items = [item if item % 60 != 35 else f"kill {item}" for item in range(120)]
    options: dict[str, Any] = {
        "executor": "process",
        "max_workers": 2,
        "max_batch_size": 16,
        "on_failure": isolate(),
    }
    async with batched(kill_or_echo, **options) as batcher:
        results: list[Any] = [
            result async for result in batcher.map(items, ordered=ordered, return_exceptions=True)
        ]
    failed = [place for place, result in enumerate(results) if isinstance(result, WorkerDiedError)]
    if ordered:
        assert failed == [place for place, item in enumerate(items) if isinstance(item, str)]
    assert len(failed) == sum(isinstance(item, str) for item in items)
    plain = [result for result in results if not isinstance(result, WorkerDiedError)]
    assert (plain if ordered else sorted(plain)) == [
        item for item in items if isinstance(item, int)
    ]


def has_done(batcher: AsyncBatcher[Any, Any], count: int) -> bool:
    """Whether that many items have their results."""
    return batcher.stats().done >= count


def kill_or_echo(batch: list[Any]) -> list[Any]:
    """Return the items; kill the worker if one of them is a string."""
    if any(isinstance(item, str) for item in batch):
        os.kill(os.getpid(), signal.SIGKILL)
    return batch


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no WorkerPool")
async def test_streams_and_bulk_calls_while_workers_are_killed() -> None:
    """Each item has its own result or WorkerDiedError, and every caller gets an outcome."""
    chance = random.Random(5)  # noqa: S311 - no secret
    async with WorkerPool(2) as pool:

        async def kill() -> None:
            while True:  # at a rate that does not depend on how busy the machine is
                done = batcher.stats().done + chance.randrange(50, 300)
                await wait_until(functools.partial(has_done, batcher, done))
                pids = [
                    worker.pid
                    for worker in pool.workers()
                    if worker.pid and worker.state in ("idle", "busy")
                ]
                if pids:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(chance.choice(pids), signal.SIGKILL)

        async with (
            batched(work.same, executor=pool, max_batch_size=32) as batcher,
            asyncio.timeout(2 * DEADLINE),
        ):
            killer = asyncio.create_task(kill())
            bulk = asyncio.create_task(batcher.process_many(range(5_000), return_exceptions=True))
            stream = [result async for result in batcher.map(range(5_000), return_exceptions=True)]
            results = await bulk
            killer.cancel()
            assert await batcher.process("after") == "after"
    for some in (stream, results):
        assert len(some) == 5_000
        assert all(
            result == item or isinstance(result, WorkerDiedError)
            for item, result in enumerate(some)
        )
        assert sum(isinstance(result, WorkerDiedError) for result in some) < 2_500
