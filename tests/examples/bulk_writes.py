"""Bulk writes: single inserts from many tasks become one statement, in order of arrival."""

from __future__ import annotations

import asyncio
import sqlite3

from async_batcher import batched


async def main() -> None:
    """Insert a thousand rows, one call for each."""
    database = sqlite3.connect(":memory:")
    database.execute("create table readings (sensor integer, value real)")
    statements = 0

    @batched(max_batch_size=100, max_queue_time=0.01)
    async def insert(batch: list[tuple[int, float]]) -> None:
        nonlocal statements
        statements += 1
        database.executemany("insert into readings values (?, ?)", batch)

    async with insert:
        await asyncio.gather(*(insert((n % 10, n / 7)) for n in range(1000)))

    (rows,) = database.execute("select count(*) from readings").fetchone()
    database.close()
    print(f"{rows} rows in {statements} statements")


if __name__ == "__main__":
    asyncio.run(main())
