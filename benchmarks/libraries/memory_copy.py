"""The lower limit for a trip without shared memory: the payload is copied once each way.

No process takes part. It is a limit, not a library.
"""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any

from benchmarks.libraries.base import NotAvailableError, PoolAdapter, no_stop

if TYPE_CHECKING:
    from collections.abc import Callable


def copied(value: Any) -> Any:
    """Copy bytes or an array; pickle and unpickle any other object."""
    if isinstance(value, bytes):
        return bytes(memoryview(value))  # `bytes(value)` is no copy
    if isinstance(value, list) and value and isinstance(value[0], bytes):
        return [copied(item) for item in value]
    if hasattr(value, "copy") and not isinstance(value, list | dict):
        return value.copy()
    return pickle.loads(pickle.dumps(value, 5))  # noqa: S301 - our own


def open_pool(load: dict[str, Any]) -> PoolAdapter:
    """Run calls in the caller."""
    if load["scenario"] != "round_trip":
        msg = "has no worker"
        raise NotAvailableError(msg)

    async def call(function: Callable[..., Any], *args: Any) -> Any:
        return copied(function(*map(copied, args)))

    return PoolAdapter(call, no_stop, workers=1)


if __name__ == "__main__":
    from benchmarks.libraries.serve import serve

    serve(open_pool)
