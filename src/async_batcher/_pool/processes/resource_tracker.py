"""This process's resource tracker of multiprocessing, which its workers share.

The tracker is a process that unlinks named shared memory and semaphores when the last process that
knows it has exited. A worker with a tracker of its own would unlink, at its exit, what the parent
still uses (https://github.com/python/cpython/issues/82300).

Rules:

- The tracker starts where the standard pool starts it: with the first worker of the start methods
  ``forkserver`` and ``spawn``. It costs, once, a millisecond in a helper thread and a process with
  6 MB of memory of its own.
- A worker that was started without a tracker gets it before the first batch after the tracker's
  start.
"""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Any

from async_batcher._pool.processes.interpreter import spawn_python


def ensure_running() -> None:
    """Start the tracker unless it runs; called in a helper thread, before the first worker.

    Workers do without a tracker that cannot be started.
    """
    if getattr(sys, "frozen", False):  # it could start the program again
        return
    with contextlib.suppress(Exception):
        from multiprocessing import resource_tracker

        # Not by its own `ensure_running`: that process would import from the current folder, and
        # SIGHUP would end it.
        tracker: Any = resource_tracker._resource_tracker  # noqa: SLF001
        with tracker._lock:  # noqa: SLF001
            if tracker._fd is not None:  # noqa: SLF001
                return
            child_fd, fd = os.pipe()
            try:
                args = ("multiprocessing.resource_tracker", "main", (child_fd,))
                tracker._pid = spawn_python(*args)  # noqa: SLF001
                tracker._fd = fd  # noqa: SLF001
            except BaseException:
                os.close(fd)
                raise
            finally:
                os.close(child_fd)


def descriptor() -> int | None:
    """Return the descriptor by which a process knows the tracker; None while none runs."""
    module = sys.modules.get("multiprocessing.resource_tracker")
    fd = None if module is None else module._resource_tracker._fd  # noqa: SLF001
    if fd is None:
        return None
    try:
        os.fstat(fd)
    except OSError:  # it has been closed
        return None
    return int(fd)
