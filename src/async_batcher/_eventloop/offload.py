"""Run blocking work of the event loop's side in a helper thread."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable
    from concurrent.futures import Executor

    from async_batcher._eventloop.guarded_loop import GuardedLoop

R = TypeVar("R")


def run_in_helper(loop: GuardedLoop, helpers: Executor, work: Callable[[], R]) -> asyncio.Future[R]:
    """Call ``work`` once: in a helper thread, or here if no thread can be started."""
    done: asyncio.Future[R] = loop.create_future()
    todo = [work]
    del work  # so that it, and what it copies, is freed when it is done

    def resolve(setter: Callable[..., None], value: object) -> None:
        if not done.done():
            setter(value)

    def run() -> None:
        try:
            first = todo.pop()
        except IndexError:  # an executor that could start no thread keeps the call, and may run it
            return
        setter: Callable[..., None]
        value: object
        try:
            setter, value = done.set_result, first()
        except BaseException as exc:  # noqa: BLE001 - the caller gets it
            setter, value = done.set_exception, exc
        with contextlib.suppress(RuntimeError):  # the loop has closed
            loop.call_soon_threadsafe(resolve, setter, value)

    try:
        helpers.submit(run)
    except Exception:  # noqa: BLE001 - no thread is left, or an audit hook raised
        run()
    return done
