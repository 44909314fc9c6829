"""What tells the workers of a pool apart: their numbers, and their titles in ``ps`` and ``top``.

Titles need setproctitle.
"""

from __future__ import annotations

import functools
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

_number: int | None = None


def worker_number() -> int | None:
    """Return the number of the worker process that calls this, below ``max_workers``.

    It is known before the pool's ``initializer`` and before any set-up, which may choose a device
    by it::

        def setup_worker(self):
            self.model = load_model(device=f"cuda:{worker_number() % torch.cuda.device_count()}")

    A new worker gets the lowest number that no other worker of the pool has. So a worker that takes
    the place of a crashed one gets its number. If all numbers are taken, a new worker gets that of
    the worker that it replaces, and both have it until that one has exited. Two workers that take
    batches never have the same number.

    Returns:
        The number, also in other threads of a worker, and in processes that it forks. None in a
        process that is not a worker of a `WorkerPool`: the main process, the workers of a standard
        pool, and while modules of ``preload`` are imported.
    """
    return _number


def set_worker_number(number: int | None) -> None:
    global _number  # noqa: PLW0603 - it belongs to the process
    _number = number


def set_worker_title(function: Any = None) -> None:
    """Name this worker, and the function that it has loaded last.

    Args:
        function: The user's function, or what calls it. None: no function yet.
    """
    from async_batcher._worker.calls import call_function  # not where only the number is needed

    title = f"worker {_number}"
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
