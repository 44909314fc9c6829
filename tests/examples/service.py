"""A service: many clients call one CPU-bound function, which runs in worker processes."""

from __future__ import annotations

import asyncio
import hashlib
import random

from async_batcher import AsyncBatcher, run
from async_batcher.exceptions import QueueFullException


class Fingerprints(AsyncBatcher[str, str]):
    """Compute fingerprints of short texts."""

    def setup_worker(self) -> None:
        """Prepare a worker, once: the place to load a model."""
        self.salt = hashlib.sha256(b"loaded once in each worker").digest()

    def process_batch(self, batch: list[str]) -> list[str]:
        """Return one fingerprint per text."""
        return [
            hashlib.pbkdf2_hmac("sha256", text.encode(), self.salt, 1000).hex()[:12]
            for text in batch
        ]


async def client(name: int, fingerprints: Fingerprints, results: dict[str, str]) -> None:
    """Request five fingerprints, one after the other; back off when the queue is full."""
    for request in range(5):
        text = f"client {name}, request {request}"
        while text not in results:
            try:
                results[text] = await fingerprints.process(text)
            except QueueFullException:
                await asyncio.sleep(random.uniform(0.01, 0.05))  # noqa: S311 - spreads the retries


async def main() -> None:
    """Run fifty clients."""
    results: dict[str, str] = {}
    fingerprints = Fingerprints(
        executor="process", max_batch_size=16, max_queue_time=0.002, max_queue_size=100
    )
    async with fingerprints, asyncio.TaskGroup() as group:
        for name in range(50):
            group.create_task(client(name, fingerprints, results))
    print(f"{len(results)} fingerprints, the first: {results['client 0, request 0']}")


if __name__ == "__main__":
    run(main())
