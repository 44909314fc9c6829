"""The functions that `tune` is measured with, and batchers with any options that clients call.

The functions spend wall time, so that their costs are the same on every machine.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import threading
import time
from itertools import cycle
from typing import TYPE_CHECKING, Any, NamedTuple

from async_batcher import batched
from async_batcher.loops import run

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from async_batcher import AsyncBatcher

FIXED_SECONDS, PER_ITEM_SECONDS = 0.0078, 10e-6  # of a function that is cheap in large batches
ITEM_SECONDS = 0.0005
SLEEP_SECONDS = 0.01
_HASHED = bytes(200_000)  # some 0.2 ms without the GIL


def fixed_cost(batch: list[str]) -> list[str]:
    """Compute for a time of which most does not depend on the batch."""
    _compute(FIXED_SECONDS + PER_ITEM_SECONDS * len(batch))
    return batch


def cost_per_item(batch: list[str]) -> list[str]:
    """Compute for as long for each item."""
    _compute(ITEM_SECONDS * len(batch))
    return batch


def without_gil(batch: list[str]) -> list[str]:
    """Hash for each item, without the GIL."""
    return [hashlib.sha256(_HASHED).hexdigest() for _ in batch]


def sleeping(batch: list[str]) -> list[str]:
    """Wait, as for a server, for each batch."""
    time.sleep(SLEEP_SECONDS)
    return batch


def _compute(seconds: float) -> None:
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        pass


class Options(NamedTuple):
    """The options of a batcher that are compared."""

    executor: str | None
    workers: int
    batch_size: int
    queue_time: float


class ClientsInThread:
    """An event loop in a thread of its own, and on it a batcher for each pool, which stays."""

    def __init__(self, function: Callable[[list[str]], list[str]], loop: Any) -> None:
        self._function = function
        self._batchers: dict[tuple[str | None, int], AsyncBatcher[str, str]] = {}
        self._stack = contextlib.AsyncExitStack()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: run(self._main(), loop=loop))

    def __enter__(self) -> ClientsInThread:
        """Start the event loop."""
        self._thread.start()
        self._ready.wait()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop all batchers, and the event loop."""
        self._loop.call_soon_threadsafe(self._ended.set)
        self._thread.join()

    def seconds_per_item(self, options: Options, clients: int, seconds: float) -> float:
        """Measure the time per item, of all clients together."""
        call: Coroutine[Any, Any, float] = self._measure(options, clients, seconds)
        return asyncio.run_coroutine_threadsafe(call, self._loop).result()

    async def _main(self) -> None:
        self._loop, self._ended = asyncio.get_running_loop(), asyncio.Event()
        self._ready.set()
        async with self._stack:
            await self._ended.wait()

    async def _measure(self, options: Options, clients: int, seconds: float) -> float:
        batcher = await self._batcher(options.executor, options.workers)
        batcher.max_batch_size, batcher.max_queue_time = options.batch_size, options.queue_time
        done, began = 0, time.perf_counter()
        until = began + seconds

        async def client(item: str) -> None:
            nonlocal done
            while time.perf_counter() < until:
                assert await batcher.process(item)
                done += 1

        await asyncio.gather(*map(client, map(str, range(clients))))
        return (time.perf_counter() - began) / done

    async def _batcher(self, executor: str | None, workers: int) -> AsyncBatcher[str, str]:
        key = (executor, workers)
        if key not in self._batchers:
            chosen: Any = {"executor": executor, "max_workers": workers if executor else None}
            batcher = batched(self._function, max_batch_size=1, max_queue_time=0.0, **chosen)
            await self._stack.enter_async_context(batcher)
            source = cycle("abc")
            await asyncio.gather(*(batcher.process(next(source)) for _ in range(4 * workers)))
            self._batchers[key] = batcher
        return self._batchers[key]
