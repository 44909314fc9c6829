"""A fresh interpreter that imports a module: how long it takes, and what else it loads."""

from __future__ import annotations

import json
import subprocess
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

_IMPORT = """
import sys, time
began = time.perf_counter()
import {module}
took = time.perf_counter() - began
import importlib.metadata, json
named = "async_batcher" in sys.modules
version = importlib.metadata.version("async-batcher") if named else "-"
print(json.dumps([took, version, sorted(sys.modules)]))
"""


def measure_import(python: Path | str, module: str) -> tuple[dict[str, float], str, set[str]]:
    """Import a module in a new process.

    Returns:
        Seconds of the statement and of the process; the version of async-batcher, or ``"-"`` if
        the module is not of it; the names of all loaded modules.
    """
    began = time.perf_counter()
    command = [str(python), "-I", "-c", _IMPORT.format(module=module)]
    finished = subprocess.run(  # noqa: S603 - our own command
        command, capture_output=True, text=True, timeout=60, check=True
    )
    whole = time.perf_counter() - began
    seconds, version, modules = json.loads(finished.stdout)
    return {"seconds": seconds, "process_seconds": whole}, version, set(modules)
