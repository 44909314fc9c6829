"""How much memory this process holds."""

from __future__ import annotations

import ctypes
import gc
import mmap
from pathlib import Path


def trim() -> None:
    """Return freed memory to the system, so that growth of the next round is visible."""
    gc.collect()
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)


def resident() -> int:
    """Return the bytes of resident memory, or 0 where the system does not report them."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE
    except OSError:
        return 0
