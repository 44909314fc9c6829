"""A fake batcher whose batches end by themselves, and calls of every kind."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from tests.support.virtual_clock import virtual_loop

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.support.virtual_clock import FakeBatcher


class Autopilot:
    """Finishes each batch some time after it began, and keeps what it began and when."""

    def __init__(self, batcher: FakeBatcher, seconds: float = 0.0) -> None:
        self.starts: list[tuple[float, list[Any]]] = []
        submit = batcher.runner.submit
        loop = virtual_loop()
        start = loop.time()

        def submit_and_end(batch: list[Any], on_done: Any, *args: Any) -> Any:
            self.starts.append((round(loop.time() - start, 6), list(batch)))
            handle = submit(batch, on_done, *args)
            loop.call_later(seconds, self._end, batcher, on_done)
            return handle

        batcher.runner.submit = submit_and_end  # type: ignore[assignment,method-assign]

    def _end(self, batcher: FakeBatcher, on_done: Any) -> None:
        for index, running in enumerate(batcher.runner.running):
            if running[1] is on_done:
                batcher.runner.end(index)

    def check_rate(self, n: float, seconds: float, of: Callable[[list[Any]], float]) -> None:
        """Check that no span of that length has more."""
        for first, _ in self.starts:
            used = sum(of(batch) for at, batch in self.starts if first <= at < first + seconds)
            assert used <= n, (first, used)


async def process_as(kind: str, batcher: FakeBatcher, items: list[Any]) -> list[Any]:
    """Process items by any kind of call, and return the results or exceptions."""
    if kind == "single":
        calls = [batcher.call(item) for item in items]
        return await asyncio.gather(*calls, return_exceptions=True)
    if kind == "submit":
        results: list[Any] = []
        for item in items:
            try:
                results.append(batcher.submit(item))
            except Exception as exc:  # noqa: BLE001 - it is what the caller gets
                failed: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
                failed.set_exception(exc)
                results.append(failed)
        return await asyncio.gather(*results, return_exceptions=True)
    if kind == "bulk":
        return await batcher.process_many(items, return_exceptions=True)
    return [result async for result in batcher.map(items, return_exceptions=True)]
