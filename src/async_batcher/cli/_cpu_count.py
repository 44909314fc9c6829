"""How many workers a command starts by default."""

from __future__ import annotations


def cpu_count() -> int:
    """Return the library's default number of workers: the CPUs that this process may use."""
    from async_batcher import batched

    return batched(list[object], executor="process").concurrency
