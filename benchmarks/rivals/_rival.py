"""What a rival offers to the questions that are put to it, and what is done about a wrong answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable


class NotAvailableError(Exception):
    """This rival has no answer to a question."""


@dataclass(frozen=True)
class Front:
    """What a rival offers for one round, opened on the round's loop.

    Attributes:
        process: Awaited by a client for one item.
        submit: Given to gather, one for each item.
        many: Awaited for many items in one call; None: a gather over ``submit`` is all there is.
        stop: Ends it in good order, with all that it or its user made for it.
        discard: Ends it after a round that is not about its end; None: as ``stop`` does.
    """

    process: Callable[[Any], Awaitable[Any]]
    submit: Callable[[Any], Awaitable[Any]]
    stop: Callable[[], Awaitable[None]]
    discard: Callable[[], Awaitable[None]] | None = None
    many: Callable[[list[Any]], Awaitable[list[Any]]] | None = None


@dataclass(frozen=True)
class Pool:
    """Worker processes that a rival offers for one round, opened on the round's loop.

    Attributes:
        call: Awaited for what a function returns in a worker, given its arguments. If it fails and the rival has to be made anew
            by its user, that is done before the error is raised, as a careful user would.
        stop: Ends it in good order.
        workers: How many processes it has.
        pids: Their process ids.
        recover: Awaited when the process of that id has been killed, until there are as many workers as before.
        discard: As of `Front`.
    """

    call: Callable[..., Awaitable[Any]]
    stop: Callable[[], Awaitable[None]]
    workers: int
    pids: Callable[[], list[int]] | None = None
    recover: Callable[[int], Awaitable[None]] | None = None
    discard: Callable[[], Awaitable[None]] | None = None


async def no_stop() -> None:
    """For a rival that has nothing to stop."""


def check(is_right: bool) -> None:  # noqa: FBT001 - reads as a sentence
    """A figure is worth nothing if the answers are wrong.

    Raises:
        ValueError: They are.
    """
    if not is_right:
        msg = "a call got a wrong answer, or a pool has not the workers that it should have"
        raise ValueError(msg)
