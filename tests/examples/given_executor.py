"""A given executor: two batchers share it, and neither shuts it down."""

from __future__ import annotations

import asyncio
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

from async_batcher import batched


def upper(batch: list[str]) -> list[str]:
    """Convert to upper case."""
    return [text.upper() for text in batch]


def title(batch: list[str]) -> list[str]:
    """Convert to title case."""
    return [text.title() for text in batch]


async def main() -> None:
    """Run two batchers on a pool of two processes."""
    with ProcessPoolExecutor(
        max_workers=2, mp_context=multiprocessing.get_context("spawn")
    ) as pool:
        async with batched(upper, executor=pool) as shout, batched(title, executor=pool) as entitle:
            print(await asyncio.gather(shout("hello"), entitle("hello")))


if __name__ == "__main__":
    asyncio.run(main())
