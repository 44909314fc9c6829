"""This project with a million items: as a stream, or in one call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from async_batcher import batched

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator


class StreamingBatcher:
    """A batcher that is called with an iterator of items.

    Args:
        load: With ``whole``, all items go into one call.
    """

    def __init__(self, load: dict[str, Any]) -> None:
        async def numbers(batch: list[tuple[int, bytes]]) -> list[int]:
            return [number for number, _ in batch]

        self._batcher = batched(
            numbers, max_batch_size=load["max_batch_size"], max_queue_time=load["max_queue_time"]
        )
        self._whole = load["whole"]
        self.stop = self._batcher.stop
        self.discard = None

    async def __call__(self, items: Iterator[tuple[int, bytes]]) -> AsyncIterator[int]:
        """Yield the results in order."""
        if not self._whole:
            async for result in self._batcher.map(items):
                yield result
            return
        for result in await self._batcher.process_many(items):
            yield result


if __name__ == "__main__":
    from benchmarks.libraries.serve import serve

    serve(StreamingBatcher, "async-batcher")
