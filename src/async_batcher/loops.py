"""Choose the event loop that a program runs on."""

from __future__ import annotations

import asyncio
import importlib.util
from typing import TYPE_CHECKING, Any, Literal, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

__all__ = ["run"]

R = TypeVar("R")


def run(
    main: Coroutine[Any, Any, R],
    *,
    loop: Literal["auto", "asyncio", "uvloop"] = "auto",
    debug: bool | None = None,
) -> R:
    """Run a coroutine on a new event loop, as `asyncio.run` does.

    Args:
        main: The coroutine to run.
        loop: The event loop: ``"uvloop"``, ``"asyncio"``, or ``"auto"`` for uvloop if it is
            installed.
        debug: Whether the loop runs in debug mode. None: as for `asyncio.run`.

    Returns:
        The result of ``main``.

    Raises:
        ValueError: ``loop`` is not one of these names.
        ModuleNotFoundError: ``loop`` is ``"uvloop"``, which is not installed.
        RuntimeError: An event loop already runs in this thread.
    """
    try:
        _check_no_running_loop()
        factory = loop_factory(loop)
    except BaseException:
        main.close()  # else Python warns that it was never awaited
        raise
    with asyncio.Runner(loop_factory=factory, debug=debug) as runner:
        return runner.run(main)


def loop_factory(loop: str) -> Callable[[], asyncio.AbstractEventLoop]:
    """Return a function that creates an event loop.

    Args:
        loop: The name of the event loop, as for `run`.

    Raises:
        ValueError: ``loop`` is not one of these names.
        ModuleNotFoundError: ``loop`` is ``"uvloop"``, which is not installed.
    """
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
    msg = (
        "async_batcher.run() cannot be called from a running event loop; await the coroutine "
        "instead"
    )
    raise RuntimeError(msg)
