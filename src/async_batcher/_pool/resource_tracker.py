"""The resource tracker of this program, which its workers share.

It is the process of multiprocessing that unlinks named shared memory and semaphores when the last process that knows it has
ended. A worker that has one of its own unlinks, when the worker ends, what the program still uses
(https://github.com/python/cpython/issues/82300).

Rules:

- It is started where the standard pool starts it: with the first worker of the start methods ``forkserver`` and ``spawn``. It
  costs a program, once, a millisecond in a helper thread and a process with 6 MB of memory of its own.
- A worker whose program had none when the worker was started gets it before the first batch that follows its start.
"""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Any

from async_batcher._pool.interpreter import spawn_python


def ensure_running() -> None:
    """Start it unless it runs; in a helper thread, before the first worker. Workers do without one that cannot be started."""
    if getattr(sys, "frozen", False):  # it may start the program again
        return
    with contextlib.suppress(Exception):
        from multiprocessing import resource_tracker

        # Not by its own `ensure_running`: that process imports from the current folder, and ends with SIGHUP.
        tracker: Any = resource_tracker._resource_tracker  # noqa: SLF001
        with tracker._lock:  # noqa: SLF001
            if tracker._fd is not None:  # noqa: SLF001
                return
            theirs, ours = os.pipe()
            try:
                tracker._pid = spawn_python("multiprocessing.resource_tracker", "main", (theirs,))  # noqa: SLF001
                tracker._fd = ours  # noqa: SLF001
            except BaseException:
                os.close(ours)
                raise
            finally:
                os.close(theirs)


def descriptor() -> int | None:
    """The descriptor by which a process knows it; None while it does not run."""
    module = sys.modules.get("multiprocessing.resource_tracker")
    fd = None if module is None else module._resource_tracker._fd  # noqa: SLF001 - as multiprocessing does for its workers
    if fd is None:
        return None
    try:
        os.fstat(fd)
    except OSError:  # it has been closed
        return None
    return int(fd)
