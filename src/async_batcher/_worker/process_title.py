"""The titles of processes in ``ps`` and ``top``, where setproctitle is installed."""

from __future__ import annotations

import functools
import sys
from typing import TYPE_CHECKING, Any

from async_batcher._worker.calls import call_function
from async_batcher._worker.number import worker_number

if TYPE_CHECKING:
    from collections.abc import Callable


def set_worker_title(function: Any = None) -> None:
    """Name this worker, and the function that it has loaded last.

    Args:
        function: The user's function, or what calls it. None: no function yet.
    """
    title = f"worker {worker_number()}"
    if function is not None and function is not call_function:  # which calls many
        function = getattr(function, "function", function)
        name = str(getattr(function, "__qualname__", None) or type(function).__qualname__)
        title += f": {name.rpartition('<locals>.')[2]}"
    set_title(title)


def set_title(title: str) -> None:
    setters = _setters()
    if setters is not None:
        set_process_title, set_thread_title = setters
        set_process_title(f"async_batcher {title}")
        # Without a blank: with one, Python takes a process that forks for one with threads.
        set_thread_title("async_batcher")


@functools.cache
def _setters() -> tuple[Callable[[str], None], Callable[[str], None]] | None:
    if sys.platform == "darwin":  # there it calls what may crash a forked process
        return None
    try:
        from setproctitle import setproctitle, setthreadtitle
    except Exception:  # noqa: BLE001 - it is not installed, or does not work here
        return None
    return setproctitle, setthreadtitle
