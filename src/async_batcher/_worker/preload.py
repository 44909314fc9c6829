"""Imports the modules of ``preload`` in the fork server, whose workers share them.

Rules:

- Native libraries, such as BLAS, are loaded with one thread.
- A module that leaves a thread running is refused: a forked worker does not have the thread, and
  hangs on a lock that it held.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import threading
import time
from typing import TYPE_CHECKING

from async_batcher._worker.bootstrap import THREAD_VARIABLES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_THREAD_EXIT_TIMEOUT = 1.0  # seconds; a thread that was joined may still be exiting


class Preloader:
    """Imports modules, one after another.

    Args:
        on_import: Called with the name of each module before it is imported.

    Attributes:
        current: The name of the module that is being imported.
    """

    def __init__(self, on_import: Callable[[str], object]) -> None:
        self.current = ""
        self._on_import = on_import
        self._threads = set(threading.enumerate())  # the main one, perhaps a watch on the parent

    def load(self, names: tuple[str, ...]) -> None:
        """Import modules; raise RuntimeError if one leaves a thread running."""
        with _one_thread():
            for self.current in names:
                self._on_import(self.current)
                importlib.import_module(self.current)
                self._check_threads()

    def _check_threads(self) -> None:
        deadline = time.monotonic() + _THREAD_EXIT_TIMEOUT
        # No event announces that a thread of C code has exited.
        while (threads := self._running()) and time.monotonic() < deadline:
            time.sleep(0.01)
        if threads:
            msg = (
                f"importing {self.current!r} left threads running ({', '.join(threads)}), which "
                "forked workers would not have. Start them in setup_worker or in the pool's "
                "initializer, or leave the module out of preload"
            )
            raise RuntimeError(msg)

    def _running(self) -> list[str]:
        """Describe the threads that modules have left running."""
        python = set(threading.enumerate()) - self._threads
        described = sorted(repr(thread.name) for thread in python)
        try:
            count = len(os.listdir("/proc/self/task"))  # noqa: PTH208 - pathlib is not needed here
        except OSError:  # no /proc
            return described
        native = count - len(python) - len(self._threads)
        return [*described, f"{native} of C code"] if native > 0 else described


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Have native libraries use one thread if they are loaded in the block.

    The variables are as before afterwards, for what workers load, unless the block changes them.
    """
    before = {name: os.environ.get(name) for name in THREAD_VARIABLES}
    os.environ.update(dict.fromkeys(before, "1"))
    yield
    for name, value in before.items():
        if os.environ.get(name) == "1":
            del os.environ[name]
            os.environ.update({} if value is None else {name: value})
