"""An executor of one's own: configured as one likes, shared by two batchers, left running by both."""

from __future__ import annotations

import asyncio
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

from async_batcher import batched


def upper(batch: list[str]) -> list[str]:
    """Upper case."""
    return [text.upper() for text in batch]


def title(batch: list[str]) -> list[str]:
    """Title case."""
    return [text.title() for text in batch]


async def main() -> None:
    """Two batchers, one pool of two processes."""
    with ProcessPoolExecutor(max_workers=2, mp_context=multiprocessing.get_context("spawn")) as pool:
        async with batched(upper, executor=pool) as shout, batched(title, executor=pool) as entitle:
            print(await asyncio.gather(shout("hello"), entitle("hello")))


if __name__ == "__main__":
    asyncio.run(main())
