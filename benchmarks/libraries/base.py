"""The contract between adapters and scenarios: what a library offers for one round.

::

    open_batcher(load) -> BatcherAdapter   a library that batches, or calls an executor per item
    open_pool(load)    -> PoolAdapter      a library that runs calls in worker processes
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable


class NotAvailableError(Exception):
    """The library cannot run a scenario; the message says why, in one line."""


@dataclass(frozen=True)
class BatcherAdapter:
    """A batcher that is open for one round, on the round's event loop.

    Attributes:
        process: Awaited by a client for the result of one item.
        submit: Called for each item of an `asyncio.gather`.
        stop: Stops the batcher in good order, with everything made for it.
        discard: Stops it after a round that does not measure the stop. None uses ``stop``.
        many: Awaited for the results of a list of items. None if the library has no such call.
    """

    process: Callable[[Any], Awaitable[Any]]
    submit: Callable[[Any], Awaitable[Any]]
    stop: Callable[[], Awaitable[None]]
    discard: Callable[[], Awaitable[None]] | None = None
    many: Callable[[list[Any]], Awaitable[list[Any]]] | None = None


@dataclass(frozen=True)
class PoolAdapter:
    """A pool of worker processes that is open for one round, on the round's event loop.

    Attributes:
        call: Awaited for what a function returns in a worker. If a crash breaks the pool, the
            adapter makes a new one before it raises, as a careful program would.
        stop: Stops the pool in good order.
        workers: Number of worker processes.
        pids: Returns their process ids. None if a worker cannot be killed.
        recover: Awaited with the id of a killed worker until the pool is complete again.
        discard: Stops it after a round that does not measure the stop. None uses ``stop``.
    """

    call: Callable[..., Awaitable[Any]]
    stop: Callable[[], Awaitable[None]]
    workers: int
    pids: Callable[[], list[int]] | None = None
    recover: Callable[[int], Awaitable[None]] | None = None
    discard: Callable[[], Awaitable[None]] | None = None


async def no_stop() -> None:
    """Do nothing, for a library that has nothing to stop."""


def check(is_right: bool) -> None:  # noqa: FBT001 - reads as a sentence
    """Fail the round if a result is wrong.

    Raises:
        ValueError: A result is wrong, or the pool lacks a worker.
    """
    if not is_right:
        msg = "a call got a wrong result, or the pool lacks a worker"
        raise ValueError(msg)
