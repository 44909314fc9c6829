"""What a command says when it fails: one line on standard error, and nothing from the logger."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


class CommandError(Exception):
    """A command cannot do what it was asked to, or has failed.

    The message is one line. A traceback of the user's code may follow it.

    Attributes:
        status: The exit status: 2 for a request that cannot be met, 1 for a failure, 128 and the
            number of the signal after an interruption.
    """

    def __init__(self, message: str, *, status: int = 2) -> None:
        super().__init__(message)
        self.status = status


def message_of(exc: BaseException) -> str:
    """Give the message of an exception in one line."""
    return " ".join(str(exc).split())


def counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


@contextlib.contextmanager
def silenced_logger() -> Iterator[None]:
    """Keep the library from logging failed batches, which the command reports itself."""
    import logging

    logger = logging.getLogger("async_batcher")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before
