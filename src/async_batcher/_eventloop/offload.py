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
    todo = [(work, done)]
    del work  # so that it, and what it copies, is freed when it is done

    def run() -> None:
        try:
            first, future = todo.pop()
        except IndexError:  # an executor that could start no thread keeps the call, and may run it
            return
        setter: Callable[..., None]
        value: object
        try:
            setter, value = future.set_result, first()
        except BaseException as exc:  # noqa: BLE001 - the caller gets it
            setter, value = future.set_exception, exc
        with contextlib.suppress(RuntimeError):  # the loop has closed
            loop.call_soon_threadsafe(_resolve, future, setter, value)
        # An exception refers to this frame: without a cycle, what its frames refer to, such as
        # memory and descriptors, is freed with it.
        del first, future, setter, value

    try:
        helpers.submit(run)
    except Exception:  # noqa: BLE001 - no thread is left, or an audit hook raised
        run()
    return done


def _resolve(future: asyncio.Future[R], setter: Callable[..., None], value: object) -> None:
    if not future.done():
        setter(value)
