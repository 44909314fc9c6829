"""What the figures were measured on, without the name of a host or user and without a path."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
from pathlib import Path

ROOT = Path(__file__).parents[2]


def describe() -> dict[str, object]:
    """Return the machine block of a results file."""
    return {
        "processor": _processor(),
        "cores": usable_cores(),
        "memory_gib": _memory(),
        "system": platform.system(),
        "release": platform.release(),
        "machine": platform.machine(),
        "python_implementation": platform.python_implementation(),
        "python_version": platform.python_version(),
        "start_method": "forkserver",  # of every library that supports it
        "libraries": _versions(),
    }


def usable_cores() -> int:
    """Return how many cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _versions() -> dict[str, str]:
    """Return the versions of distributions that several libraries use."""
    found = {}
    for name in ("cloudpickle", "numpy", "scikit-learn"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _memory() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, OSError, ValueError):  # not known on every platform
        return None
