"""What would hold the event loop up is done in a helper thread."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable
    from concurrent.futures import Executor

R = TypeVar("R")


def run_in_helper(loop: asyncio.AbstractEventLoop, helpers: Executor, work: Callable[[], R]) -> asyncio.Future[R]:
    """Call ``work`` in a helper thread; here and now where no thread can be started. Once, whatever comes."""
    done: asyncio.Future[R] = loop.create_future()
    todo = [work]
    del work  # so that nothing holds it, nor what it copies, once it has been done

    def settle(settler: Callable[..., None], value: object) -> None:
        if not done.done():
            settler(value)

    def do() -> None:
        try:
            first = todo.pop()
        except IndexError:  # the executor keeps what it could not start a thread for, and may come to it later
            return
        settler: Callable[..., None]
        outcome: object
        try:
            settler, outcome = done.set_result, first()
        except BaseException as exc:  # noqa: BLE001 - it is for whoever waits
            settler, outcome = done.set_exception, exc
        with contextlib.suppress(RuntimeError):  # the loop has closed
            loop.call_soon_threadsafe(settle, settler, outcome)

    try:
        helpers.submit(do)
    except Exception:  # noqa: BLE001 - no thread to be had, or an audit hook
        do()
    return done
