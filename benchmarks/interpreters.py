"""A fresh interpreter that imports a module: how long it takes, and what comes along."""

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
print(json.dumps([took, importlib.metadata.version("async-batcher") if named else "-", sorted(sys.modules)]))
"""


def measure_import(python: Path | str, module: str) -> tuple[dict[str, float], str, set[str]]:
    """Import it.

    Returns:
        Seconds of the statement and of the whole process; the version of async-batcher, where that was it; all that is loaded.
    """
    began = time.perf_counter()
    finished = subprocess.run(  # noqa: S603 - our own command
        [str(python), "-I", "-c", _IMPORT.format(module=module)], capture_output=True, text=True, timeout=60, check=True
    )
    whole = time.perf_counter() - began
    seconds, version, modules = json.loads(finished.stdout)
    return {"seconds": seconds, "process_seconds": whole}, version, set(modules)
