"""Refuses workers that a module starts while a worker imports that module.

Each of them would import the module as well, and start more of them.

::

    batch --> unpickle its function, its items --> import of a module -----> WorkerPool: refused
          --> process_batch, setup_worker, initializer --> also imports --> WorkerPool: allowed

Rules:

- The stack shows it, so nothing must be noted for each batch: going outward from where workers are
  started there is an import, and after it the first function of `_worker` is one that unpickles, or
  that imports modules of ``preload``.
- The stack of a worker's main thread counts for its other threads, too: a module may wait for a
  thread that starts workers.
"""

from __future__ import annotations

import sys
import threading
from typing import TYPE_CHECKING

from async_batcher._worker.identity import worker_number

if TYPE_CHECKING:
    from types import FrameType

_PACKAGE = __name__.partition(".")[0]
_WORKER = f"{_PACKAGE}._worker."
_PRELOAD = f"{_WORKER}preload"
_SERIALIZATION = f"{_PACKAGE}._serialization."


def check_not_importing() -> None:
    """Raise RuntimeError if a worker imports the module that starts workers here."""
    modules = _imported_modules(sys._getframe())  # noqa: SLF001 - there is no other way
    main = threading.main_thread().ident
    # Only in a worker of ours: elsewhere this could return frames of other interpreters.
    if not modules and worker_number() is not None and threading.get_ident() != main:
        modules = _imported_modules(sys._current_frames().get(main or 0))  # noqa: SLF001
    if modules:
        via = f" (imported by {modules[-1]!r})" if modules[-1] != modules[0] else ""
        msg = (
            f"module {modules[0]!r}{via} starts workers while it is imported, and a worker imports "
            "it to load a function or an item. Each of these workers would import it as well, and "
            "start more. Move the code that starts them into a function, or under "
            "'if __name__ == \"__main__\":'"
        )
        raise RuntimeError(msg)


def _imported_modules(frame: FrameType | None) -> list[str]:
    """Return the modules that are being imported for a worker, the innermost first."""
    modules: list[str] = []
    is_loading = False
    while frame is not None:
        code, module = frame.f_code, str(frame.f_globals.get("__name__"))
        if code.co_name == "_find_and_load" and code.co_filename.startswith("<frozen importlib"):
            modules.append(frame.f_locals["name"])
        elif modules and module.startswith(f"{_PACKAGE}."):
            if module.startswith(_WORKER):
                return modules if is_loading or module == _PRELOAD else []
            is_loading = module.startswith(_SERIALIZATION)
        frame = frame.f_back
    return []
