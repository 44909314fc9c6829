"""Which event loop a program runs on."""

from __future__ import annotations

import asyncio
import importlib.util
from typing import TYPE_CHECKING, Any, Literal, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

__all__ = ["run"]

R = TypeVar("R")


def run(main: Coroutine[Any, Any, R], *, loop: Literal["auto", "asyncio", "uvloop"] = "auto", debug: bool | None = None) -> R:
    """Run a program on a new event loop, as `asyncio.run` does.

    Args:
        main: The coroutine to run.
        loop: ``"uvloop"``, ``"asyncio"``, or ``"auto"``: uvloop where it is installed.
        debug: As for `asyncio.run`.

    Returns:
        What ``main`` returns.

    Raises:
        ValueError: ``loop`` is none of these.
        ModuleNotFoundError: ``loop="uvloop"`` where it is not installed.
        RuntimeError: An event loop runs already.
    """
    try:
        _check_no_running_loop()
        factory = loop_factory(loop)
    except BaseException:
        main.close()  # or Python warns that it was never awaited
        raise
    with asyncio.Runner(loop_factory=factory, debug=debug) as runner:
        return runner.run(main)


def loop_factory(loop: str) -> Callable[[], asyncio.AbstractEventLoop]:
    """What makes a new event loop of that name; see `run`."""
    if loop not in ("auto", "asyncio", "uvloop"):
        msg = f"loop={loop!r}: must be 'auto', 'asyncio' or 'uvloop'"
        raise ValueError(msg)
    if loop == "asyncio" or (loop == "auto" and importlib.util.find_spec("uvloop") is None):
        return asyncio.new_event_loop
    try:
        import uvloop
    except ModuleNotFoundError as exc:
        msg = "loop='uvloop': uvloop is not installed; pip install 'async-batcher[uvloop]'"
        raise ModuleNotFoundError(msg, name="uvloop") from exc
    return uvloop.new_event_loop


def _check_no_running_loop() -> None:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return
    msg = "async_batcher.run() cannot be called from a running event loop; await the coroutine instead"
    raise RuntimeError(msg)
