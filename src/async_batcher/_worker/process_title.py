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
    setter = _setter()
    if setter is not None:
        setter(f"async_batcher {title}")


@functools.cache
def _setter() -> Callable[[str], None] | None:
    if sys.platform == "darwin":  # there it calls what may crash a forked process
        return None
    try:
        from setproctitle import setproctitle
    except Exception:  # noqa: BLE001 - it is not installed, or does not work here
        return None
    setter: Callable[[str], None] = setproctitle
    return setter
